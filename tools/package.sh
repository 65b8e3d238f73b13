#!/bin/sh
# Builds the wheel and the list of what it runs with (CycloneDX) into dist/, and prints the wheel's path.
set -eu
cd "$(dirname "$0")/.."
. tools/debian.sh

python=.venv/bin/python
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
umask 022

version=$($python -c 'import nodeservice; print(nodeservice.__version__)')
commit=$($python -c 'from nodeservice.build_info import commit; print(commit())')
wheel=dist/nodeservice-$version-py3-none-any.whl
mkdir -p dist
# A module that was renamed would live on in what setuptools left there.
rm -rf build/lib build/bdist.* nodeservice.egg-info/SOURCES.txt "$wheel"
$python -m pip --disable-pip-version-check --no-input wheel -qq --no-deps --no-build-isolation -w dist .
rm -rf build/lib build/bdist.*
$python tools/sbom.py "$version" "$commit" >"dist/nodeservice-$version.cdx.json"
say "Built $wheel and dist/nodeservice-$version.cdx.json from $commit"
printf '%s\n' "$wheel"
