#!/bin/sh
# Makes .venv from the lock file, with the project itself installed in place. Does nothing when nothing changed.
set -eu
cd "$(dirname "$0")/.."
. tools/debian.sh

lock=requirements/dev.txt
stamp=.venv/.made-from

# What the environment was made from. The path counts: scripts inside name it.
wanted=$( (pwd -P && cat "$lock" pyproject.toml tools/setup.sh) | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/nodeservice ] && .venv/bin/python -c '' 2>/dev/null && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
	exit 0
fi

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
can_make_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

python=
# The Debian package runs on the system's own Python, so that is developed, tested and measured on where it will do. It is
# also built with profiles, which one that somebody built by the way is not: a seventh less CPU time for the same work.
system=/usr/bin/python3
if [ -z "${PYTHON:-}" ] && is_new_enough $system && can_make_venv $system; then
	PYTHON=$system
fi
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
	if is_new_enough "$candidate"; then
		python=$candidate
		break
	fi
done
if [ -z "$python" ]; then
	found=$(python3 --version 2>/dev/null || echo "no python3")
	fail "Python 3.11 or newer is needed; found: $found. Install it, or name one: make setup PYTHON=/path/to/python3"
fi
if ! can_make_venv "$python"; then
	# Debian keeps ensurepip in a package of its own; for a python3 that is not Debian's it does not help.
	if is_debian_root; then install_packages python3-venv || true; fi
	can_make_venv "$python" || fail "$python cannot make virtual environments (no module ensurepip). On Debian or Ubuntu: apt-get install python3-venv"
fi

say "Making .venv with $("$python" --version)"
rm -f "$stamp"
if ! .venv/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null || ! is_new_enough .venv/bin/python; then
	"$python" -m venv --clear .venv
fi
# Without build isolation nothing is fetched that the lock file does not name, not even to build a package from source.
# So what builds must be there first. -qq leaves errors.
pip_install() { .venv/bin/python -m pip --disable-pip-version-check --no-input install -qq --no-build-isolation "$@"; }
builder=$(mktemp)
trap 'rm -f "$builder"' EXIT
sed -n '/^setuptools==/,/[^\\]$/p' "$lock" >"$builder"
pip_install --require-hashes -r "$builder"
pip_install --require-hashes --use-pep517 -r "$lock"
pip_install --no-deps --editable .
printf '%s\n' "$wanted" >"$stamp"
