# Sourced by the other scripts: installs missing Debian packages, and says so first.
# shellcheck shell=sh

say() { printf '%s\n' "$*" >&2; }

fail() {
	say "error: $*"
	exit 2
}

is_debian_root() {
	[ "$(id -u)" = 0 ] && [ -r /etc/debian_version ] && command -v apt-get >/dev/null 2>&1
}

# Names, of the packages given, those that are not installed.
missing_packages() {
	for package in "$@"; do
		dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || printf '%s ' "$package"
	done
}

# Installs without starting services: who needs one starts it knowingly. policy-rc.d is Debian's own way to say that
# (see invoke-rc.d(8)); one that is there already is left as it is.
install_packages() {
	say "Installing Debian packages: $*"
	log=$(mktemp)
	policy=/usr/sbin/policy-rc.d
	if [ -e "$policy" ]; then policy=; else
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
		trap 'rm -f "$policy"' EXIT
		trap 'exit 130' INT TERM
	fi
	status=0
	{
		DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 update -qq ||
			echo "apt-get update failed; going on with the package lists that are here"
		DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$@"
	} >"$log" 2>&1 </dev/null || status=$?
	[ -z "$policy" ] || rm -f "$policy"
	trap - EXIT INT TERM
	if [ "$status" != 0 ]; then
		tail -n 20 "$log" >&2
		say "apt-get could not install: $*"
	fi
	rm -f "$log"
	return "$status"
}
