#!/bin/sh
# Installs what only the tests need: a registry, a database server, Podman, certificates, a compiler. Never fails: says what is missing.
set -u
cd "$(dirname "$0")/.." || exit 1
. tools/debian.sh

# An engine with CDI, beside the host's own.
tools/newer_docker.sh >/dev/null || say "The tests that need a Docker with CDI will be skipped."

packages="docker-registry podman catatonit postgresql openssl gcc libc6-dev e2fsprogs faketime"

if [ ! -r /etc/debian_version ]; then
	for tool in docker-registry podman openssl gcc; do
		command -v "$tool" >/dev/null 2>&1 || say "MISSING: $tool. The tests that need it will be skipped."
	done
	exit 0
fi
# shellcheck disable=SC2086 # a list of words
missing=$(missing_packages $packages)
[ -n "$missing" ] || exit 0
if is_debian_root; then
	# shellcheck disable=SC2086
	install_packages $missing && exit 0
fi
say "MISSING: Debian packages $missing"
say "The tests that need them will be skipped. Remedy, as root: apt-get install --no-install-recommends $missing"
exit 0
