#!/bin/sh
# Builds the demo images, installing busybox-static first where it is missing and may be installed.
set -eu
cd "$(dirname "$0")/.."
. tools/debian.sh

DOCKER_HOST=$(tools/engine.sh)
export DOCKER_HOST
if is_debian_root; then
	status=0
	.venv/bin/python tools/build_image.py --busybox-can-be-installed || status=$?
	[ "$status" = 3 ] || exit "$status"
	install_packages busybox-static || true # a failure is told; the build then tells what else can be done
fi
exec .venv/bin/python tools/build_image.py
