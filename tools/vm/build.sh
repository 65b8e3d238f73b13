#!/bin/sh
# Builds the disk of the virtual machine unless the cache has it, and prints the folder it is in: disk.img, vmlinuz, initrd.img,
# id_ed25519, known_hosts. Exit 2: it cannot be built here, and the last line says why. The only argument is the list of its
# packages, a file beside this script.
set -eu
cd "$(dirname "$0")/../.."
. tools/debian.sh

here=tools/vm
list=$here/${1:-packages.txt}
tools="qemu-system-x86 qemu-utils mmdebstrap e2fsprogs openssh-client util-linux"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/nodeservice/vm
key=$(cat "$list" "$here/build.sh" | sha256sum | cut -c1-16)
image=$cache/$key

needs_tools() {
	for tool in qemu-system-x86_64 qemu-img mke2fs ssh ssh-keygen setpriv flock "$@"; do
		command -v "$tool" >/dev/null 2>&1 || return 0
	done
	return 1
}

if needs_tools; then
	is_debian_root || fail "the virtual machine needs QEMU. Remedy, as root: apt-get install --no-install-recommends $tools"
	# shellcheck disable=SC2086 # a list of words
	install_packages $tools || fail "the virtual machine needs QEMU, which could not be installed"
fi

# One builds, the others wait for it.
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
if [ -d "$image" ]; then
	touch "$image"
	printf '%s\n' "$image"
	exit 0
fi

[ "$(uname -m)" = x86_64 ] || fail "the virtual machine is built on x86_64 only"
is_debian_root || fail "the virtual machine's disk is built by root on Debian only; none is cached in $image"
if needs_tools mmdebstrap; then
	# shellcheck disable=SC2086
	install_packages $tools || fail "the virtual machine's disk needs mmdebstrap, which could not be installed"
fi

# What this host's apt itself uses: mirrors, proxies, retries.
. /etc/os-release
# shellcheck disable=SC2016 # apt's own variables
debian_sources() {
	apt-get indextargets --format '$(ORIGIN) deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(REPO_URI) $(RELEASE) $(COMPONENT)' \
		'Created-By: Packages' 'Architecture: amd64' | sed -n 's/^Debian //p' | grep " $VERSION_CODENAME[ -]" | sort -u
}
work=$image.partial
rm -rf "$work"
mkdir "$work"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
debian_sources >"$work/sources.list" || {
	apt-get update -qq >&2 || true
	debian_sources >"$work/sources.list" || fail "this host's apt knows no Debian mirror for $VERSION_CODENAME"
}
apt-config dump | grep -E '^Acquire::(https?|Retries|ForceIPv4)' >"$work/apt.conf" || true

say "Building the virtual machine's disk in $image (about a minute)"
ssh-keygen -q -t ed25519 -N '' -C nodeservice-vm -f "$work/id_ed25519"

# Runs in the new system before the kernel comes: an initial RAM disk with what this machine has and no more.
cat >"$work/essential" <<-'END'
	set -eu
	mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
	printf 'MODULES=list\nCOMPRESS=gzip\n' >"$1/etc/initramfs-tools/conf.d/nodeservice"
	printf '%s\n' virtio_pci virtio_blk ext4 quota_tree quota_v2 >"$1/usr/share/initramfs-tools/modules.d/nodeservice"
END
cat >"$work/customize" <<-'END'
	set -eu
	echo nodeservice-vm >"$1/etc/hostname"
	printf '127.0.0.1 localhost nodeservice-vm\n' >"$1/etc/hosts"
	: >"$1/etc/machine-id"
	mkdir -p "$1/etc/systemd/network" "$1/etc/systemd/journald.conf.d"
	printf '[Match]\nName=en* eth*\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n' \
		>"$1/etc/systemd/network/nodeservice.network"
	printf '[Journal]\nStorage=volatile\n' >"$1/etc/systemd/journald.conf.d/nodeservice.conf"
	printf 'nameserver 10.0.2.3\n' >"$1/etc/resolv.conf"
	systemctl --root "$1" --quiet enable systemd-networkd ssh
	if [ -e "$1/lib/systemd/system/docker.service" ]; then systemctl --root "$1" --quiet enable docker; fi
	# The clock leaps when a saved machine is taken up again; nothing may be waiting for that.
	systemctl --root "$1" --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
		fstrim.timer systemd-tmpfiles-clean.timer systemd-networkd-wait-online.service systemd-timesyncd.service
	install -d -m 700 "$1/root/.ssh"
	install -m 600 "$WORK/id_ed25519.pub" "$1/root/.ssh/authorized_keys"
	sed 's/^/nodeservice-vm /' "$1/etc/ssh/ssh_host_ed25519_key.pub" >"$WORK/known_hosts"
	cp "$1"/boot/vmlinuz-* "$WORK/vmlinuz"
	cp "$1"/boot/initrd.img-* "$WORK/initrd.img"
	rm -f "$1"/boot/initrd.img-* "$1"/var/cache/apt/*.bin "$1"/var/lib/apt/lists/*_*
END
packages=$(grep -v '^#' "$list" | paste -sd,)
if ! WORK=$work mmdebstrap --quiet --variant=minbase --include="$packages" \
	--aptopt="$work/apt.conf" --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' \
	--essential-hook="sh $work/essential \"\$1\"" --customize-hook="sh $work/customize \"\$1\"" \
	"$VERSION_CODENAME" "$work/root" "$work/sources.list" >"$work/log" 2>&1 </dev/null; then
	tail -n 20 "$work/log" >&2
	fail "mmdebstrap could not make the virtual machine's root file system; the lines above say why"
fi
truncate -s 4G "$work/disk.img"
mke2fs -q -t ext4 -O quota,project,^has_journal -E quotatype=usrquota:grpquota:prjquota -d "$work/root" "$work/disk.img" >&2
rm -rf "$work/root" "$work/essential" "$work/customize" "$work/apt.conf" "$work/sources.list" "$work/log"
mv "$work" "$image"

# What no checkout has used for a month.
find "$cache" -mindepth 1 -maxdepth 1 -type d -mtime +30 -exec rm -rf {} +
printf '%s\n' "$image"
