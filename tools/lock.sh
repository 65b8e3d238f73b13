#!/bin/sh
# Writes the lock files from pyproject.toml: every version and every hash, no address of a package index.
set -eu
cd "$(dirname "$0")/.."

uv=${UV:-uv}
if ! command -v "$uv" >/dev/null 2>&1; then
	folder=$(mktemp -d)
	trap 'rm -rf "$folder"' EXIT
	echo "uv is not on PATH; using one from a temporary environment" >&2
	.venv/bin/python -m venv "$folder"
	"$folder/bin/pip" install --quiet --disable-pip-version-check uv
	uv=$folder/bin/uv
fi

compile() {
	"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --extra master --extra postgresql "$@"
}

compile pyproject.toml --output-file requirements/runtime.txt
# The tests run with exactly what a node runs with. setuptools installs the project without build isolation.
compile pyproject.toml --group dev --constraint requirements/runtime.txt --output-file requirements/dev.txt
