#!/bin/sh
# Prints a folder with usr/sbin/dockerd and usr/bin/containerd of a newer Debian release, for the tests that need an engine
# with CDI. Nothing is installed: two packages are fetched with this host's apt, unpacked into the cache, and kept.
# Exit 2: not to be had here, and the last line says why.
set -eu
cd "$(dirname "$0")/.."
. tools/debian.sh

suite=${1:-trixie}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/nodeservice/docker
folder=$cache/$suite

if [ ! -d "$folder" ]; then
	[ -r /etc/debian_version ] && command -v apt-get >/dev/null 2>&1 || fail "a newer Docker is fetched with Debian's apt only"
	mkdir -p "$cache"
	exec 9>"$cache/lock"
	flock 9
fi
if [ ! -d "$folder" ]; then
	work=$folder.partial
	rm -rf "$work"
	mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/root"
	trap 'rm -rf "$work"' EXIT
	trap 'exit 130' INT TERM
	# shellcheck disable=SC2016 # apt's own variables
	mirror=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null | sed -n 's/^Debian //p' | head -n 1)
	[ -n "$mirror" ] || fail "this host's apt knows no Debian mirror"
	printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$mirror" "$suite" >"$work/sources.list"
	cat >"$work/apt.conf" <<-END
		Dir::Etc::sourcelist "$work/sources.list";
		Dir::Etc::sourceparts "-";
		Dir::State::lists "$work/lists";
		Dir::Cache "$work";
		Dir::Cache::archives "archives";
		APT::Sandbox::User "root";
		Acquire::Languages "none";
	END
	{
		APT_CONFIG=$work/apt.conf apt-get update -qq &&
			(cd "$work/archives" && APT_CONFIG=$work/apt.conf apt-get download -qq "docker.io/$suite" "containerd/$suite")
	} >"$work/log" 2>&1 </dev/null || {
		tail -n 5 "$work/log" >&2
		fail "the packages docker.io and containerd of Debian $suite could not be fetched"
	}
	for package in "$work"/archives/*.deb; do
		dpkg-deb --fsys-tarfile "$package" |
			tar -x -C "$work/root" --wildcards './usr/sbin/dockerd' './usr/bin/containerd*' 2>/dev/null || true
	done
	"$work/root/usr/sbin/dockerd" --version >/dev/null 2>"$work/log" || {
		tail -n 2 "$work/log" >&2
		fail "dockerd of Debian $suite does not run on this host"
	}
	mv "$work/root" "$folder"
fi
printf '%s\n' "$folder"
