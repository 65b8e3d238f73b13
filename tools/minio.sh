#!/bin/sh
# Finds or builds a MinIO server for the S3 tests, and prints its path. Never fails: without one those tests are skipped.
set -u

# Servers are released as source; this pins the one that the tests are known to pass with.
module=github.com/minio/minio
version=v0.0.0-20260212201848-7aac2a2c5b7c
folder=${XDG_CACHE_HOME:-$HOME/.cache}/nodeservice/bin
limit_seconds=900

say() { printf '%s\n' "$*" >&2; }
skipped() {
	say "NO MINIO SERVER: $*"
	say "The tests marked 'minio' will be skipped. Remedy: put minio on PATH, or set MINIO_BIN to a server binary."
	exit 0
}

for candidate in "${MINIO_BIN:-}" "$(command -v minio)" "$folder/minio"; do
	if [ -n "$candidate" ] && "$candidate" --version >/dev/null 2>&1; then
		printf '%s\n' "$candidate"
		exit 0
	fi
done
[ -z "${MINIO_BIN:-}" ] || say "MINIO_BIN=$MINIO_BIN is not a server that runs"

command -v go >/dev/null 2>&1 || skipped "none on PATH or in $folder, and no Go to build one with."
say "Building $module@$version into $folder (once, some minutes)"
log=$(mktemp) || skipped "no temporary file could be made."
if ! mkdir -p "$folder" || ! GOBIN=$folder CGO_ENABLED=0 timeout "$limit_seconds" go install "$module@$version" >"$log" 2>&1; then
	tail -n 5 "$log" >&2
	rm -f "$log"
	skipped "go install $module@$version failed or took more than $limit_seconds s."
fi
rm -f "$log"
"$folder/minio" --version >/dev/null 2>&1 || skipped "the server that was built does not run."
printf '%s\n' "$folder/minio"
