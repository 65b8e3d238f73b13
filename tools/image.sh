#!/bin/sh
# Builds the demo images, installing busybox-static first where it is missing and may be installed.
set -eu
cd "$(dirname "$0")/.."
. tools/debian.sh

DOCKER_HOST=$(tools/engine.sh)
export DOCKER_HOST
status=0
.venv/bin/python tools/build_image.py || status=$?
if [ "$status" = 3 ] && is_debian_root && install_packages busybox-static; then
	status=0
	.venv/bin/python tools/build_image.py || status=$?
fi
exit "$status"
