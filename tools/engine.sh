#!/bin/sh
# Finds a container engine that answers and prints its address, all else on stderr. `--start` may install and start one.
# Exit 2: there is none.
set -eu
cd "$(dirname "$0")/.."
. tools/debian.sh

default=unix:///var/run/docker.sock
daemon_log=/var/log/nodeservice-dockerd.log

answers() {
	case $1 in
	unix://*) [ -S "${1#unix://}" ] || return 1 ;;
	esac
	.venv/bin/python -c 'import docker, sys; docker.DockerClient(base_url=sys.argv[1], timeout=10).ping()' "$1" 2>/dev/null
}

find_engine() {
	for address in ${DOCKER_HOST:+"$DOCKER_HOST"} "$default" \
		${XDG_RUNTIME_DIR:+"unix://$XDG_RUNTIME_DIR/docker.sock"} \
		unix:///run/podman/podman.sock ${XDG_RUNTIME_DIR:+"unix://$XDG_RUNTIME_DIR/podman/podman.sock"}; do
		if answers "$address"; then
			printf '%s\n' "$address"
			return 0
		fi
		[ "$address" != "${DOCKER_HOST:-}" ] || say "DOCKER_HOST=$DOCKER_HOST does not answer; trying the usual sockets"
	done
	return 1
}

runs_systemd() { [ -d /run/systemd/system ]; }

start_daemon() {
	say "Starting dockerd as a plain daemon (no systemd here); it keeps running, its log is $daemon_log"
	# A pid file that outlived its process stops dockerd when that pid now belongs to something else.
	old=$(cat /var/run/docker.pid 2>/dev/null || true)
	if [ -n "$old" ] && [ "$(cat "/proc/$old/comm" 2>/dev/null)" != dockerd ]; then rm -f /var/run/docker.pid; fi
	setsid dockerd >>"$daemon_log" 2>&1 </dev/null &
	daemon=$!
	tries=0
	until answers "$default"; do
		tries=$((tries + 1))
		if [ "$tries" -gt 60 ] || ! kill -0 "$daemon" 2>/dev/null; then
			tail -n 15 "$daemon_log" >&2
			fail "dockerd did not come up; the lines above are the end of $daemon_log"
		fi
		sleep 1
	done
}

start_unit() {
	say "Starting docker.service"
	systemctl enable --now docker >&2 || {
		journalctl -u docker -n 15 --no-pager >&2 || true
		fail "docker.service did not start; the lines above are the end of its journal"
	}
	tries=0
	until answers "$default"; do
		tries=$((tries + 1))
		[ "$tries" -le 60 ] || fail "docker.service runs, but $default does not answer"
		sleep 1
	done
}

find_engine && exit 0
[ "${1:-}" = --start ] || fail "no container engine answers (make engine finds or starts one)"

say "No container engine answers on DOCKER_HOST, Docker's socket or Podman's."
if ! is_debian_root; then
	fail "a container engine is needed. Start Docker or Podman's service (podman system service), set DOCKER_HOST, or run this as root on Debian or Ubuntu, where it is installed for you"
fi
if ! command -v dockerd >/dev/null 2>&1; then
	# tini supplies docker-init on Debian; where docker.io needs it, it depends on it.
	install_packages docker.io containerd runc iptables || fail "without docker.io there is no container engine"
fi
if runs_systemd; then start_unit; else start_daemon; fi
find_engine
