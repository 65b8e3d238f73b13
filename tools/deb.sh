#!/bin/sh
# Builds dist/nodeservice_VERSION_ARCH.deb, and prints its path. Needs Debian or Ubuntu, whose Python it is for, and no root.
# DEB_VERSION in the environment names another version than the program's own.
set -eu
cd "$(dirname "$0")/.."
. tools/debian.sh

python=/usr/bin/python3
home=/usr/lib/nodeservice
for tool in dpkg-deb dpkg readelf gzip "$python"; do
	command -v "$tool" >/dev/null 2>&1 || fail "a Debian package needs $tool. Remedy on Debian or Ubuntu: apt-get install dpkg-dev binutils python3"
done
"$python" -c 'import venv, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
	fail "the package runs on the system's own Python, which must be 3.11 or newer with the module venv; $python is not"

minor=$("$python" -c 'import sys; print(f"3.{sys.version_info[1]}")')
next=$("$python" -c 'import sys; print(f"3.{sys.version_info[1] + 1}")')
# Some packages come as source alone, and are built with what .venv has from the lock file.
[ "$(.venv/bin/python -c 'import sys; print(f"3.{sys.version_info[1]}")')" = "$minor" ] ||
	fail "the package needs a .venv of Python $minor: make setup PYTHON=$python"

SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
umask 022

wheel=$(tools/package.sh)
version=${DEB_VERSION:-$(.venv/bin/python -c 'import nodeservice; print(nodeservice.__version__)')}
arch=$(dpkg --print-architecture)
package=dist/nodeservice_${version}_$arch.deb

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
root=$work/root
mkdir "$root" "$root/DEBIAN"
chmod 755 "$root"

put() { install -D -m "$1" "$2" "$root$3"; }

# The program: exactly what the lock file names, and nothing that is made on the way.
"$python" -m venv --without-pip --symlinks "$root$home"
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input --python "$root$home/bin/python3" install -qq --no-compile "$@"; }
.venv/bin/python -m pip --disable-pip-version-check --no-input wheel -qq --require-hashes --no-deps --no-build-isolation \
	--use-pep517 -w "$work/wheels" -r requirements/runtime.txt
pip --no-deps --no-index "$work"/wheels/*.whl "$wheel"
site=$root$home/lib/python$minor/site-packages
find "$root$home/bin" -mindepth 1 ! -name 'python*' ! -name nodeservice -delete
find "$root$home" -type d -name __pycache__ -prune -exec rm -rf {} +
rm -f "$site"/*.dist-info/direct_url.json "$root$home/lib64" "$root$home/.gitignore"
rmdir "$root$home/include/python$minor" "$root$home/include" 2>/dev/null || true
sed -i "1s|.*|#!$home/bin/python3|" "$root$home/bin/nodeservice"
printf 'home = /usr/bin\ninclude-system-site-packages = false\nversion = %s\n' \
	"$("$python" -c 'import platform; print(platform.python_version())')" >"$root$home/pyvenv.cfg"
! grep -rIl "$work" "$root$home" | grep . || fail "the files above name the folder that they were built in"
# Made now, since nothing may write there later; found valid without a look at the source.
"$python" -m compileall -qq -j 0 --invalidation-mode unchecked-hash -s "$root" -p / "$site" >/dev/null || true
[ -n "$(find "$site/nodeservice" -name 'serving.*.pyc')" ] || fail "the modules could not be compiled"
# What the packages' own libraries need of the system must be what the package depends on.
foreign=$(find "$site" -name '*.so*' -type f -exec readelf -d {} + 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort -u |
	grep -Ev '^(libc|libm|libdl|libpthread|librt|libresolv|libgcc_s|libz|libstdc\+\+|ld-linux[a-z0-9_-]*)\.so' || true)
for library in $foreign; do
	[ -n "$(find "$site" -name "$library")" ] || fail "a package needs $library, which control.in does not depend on"
done
mkdir -p "$root/usr/bin"
ln -s "$home/bin/nodeservice" "$root/usr/bin/nodeservice"

for unit in nodeservice.service nodeservice-master.service nodeservice.slice nodeservice-.slice.d/shutdown.conf nodeserviced.slice; do
	put 644 "packaging/systemd/$unit" "/usr/lib/systemd/system/$unit"
done
put 644 packaging/systemd/nodeservice.sysusers /usr/lib/sysusers.d/nodeservice.conf
put 644 packaging/config/node.toml /etc/nodeservice/node.toml
put 644 packaging/config/master.toml /etc/nodeservice/master.toml
put 600 packaging/config/node.env /etc/nodeservice/node.env
put 600 packaging/config/master.env /etc/nodeservice/master.env

complete() {
	mkdir -p "$(dirname "$root$2")"
	_NODESERVICE_COMPLETE=source_$1 .venv/bin/nodeservice >"$root$2"
	grep -q _NODESERVICE_COMPLETE "$root$2" || fail "no completion for $1"
}
complete bash /usr/share/bash-completion/completions/nodeservice
complete zsh /usr/share/zsh/vendor-completions/_nodeservice
complete fish /usr/share/fish/vendor_completions.d/nodeservice.fish

docs=/usr/share/doc/nodeservice
put 644 packaging/deb/nodeservice.8 /usr/share/man/man8/nodeservice.8
for document in README.md docs/operations.md docs/architecture.md docs/glossary.md; do
	put 644 "$document" "$docs/$(basename "$document")"
done
put 644 CHANGELOG.md "$docs/changelog"
put 644 dist/nodeservice-*.cdx.json "$docs/nodeservice.cdx.json"
gzip -9n "$root/usr/share/man/man8/nodeservice.8" "$root$docs/changelog"
.venv/bin/python tools/copyright.py "$site" >"$root$docs/copyright"

(cd "$root" && find etc -type f | sed 's|^|/|' | sort) >"$root/DEBIAN/conffiles"
(cd "$root" && find usr -type f -exec md5sum {} + | sort -k 2) >"$root/DEBIAN/md5sums"
size=$(du -k -s --apparent-size "$root" | cut -f1)
sed -e "s/@VERSION@/$version/; s/@ARCH@/$arch/; s/@SIZE@/$size/; s/@PYTHON@/$minor/; s/@NEXT_PYTHON@/$next/" \
	packaging/deb/control.in >"$root/DEBIAN/control"
for script in postinst prerm postrm; do install -m 755 "packaging/deb/$script" "$root/DEBIAN/$script"; done
dpkg-deb --root-owner-group -Zxz --build "$root" "$package" >/dev/null
say "Built $package ($(du -h "$package" | cut -f1))"
printf '%s\n' "$package"
