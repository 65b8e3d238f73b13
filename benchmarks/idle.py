"""What an idle node costs: memory, CPU, threads and file descriptors, as JSON on stdout.

    .venv/bin/python benchmarks/idle.py [SECONDS]

Starts a node with a heartbeat of 5 s under a reference master of its own, waits 10 s, then measures for SECONDS (60).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

SETTLE_SECONDS = 10.0
COMMAND = (sys.executable, "-m", "nodeservice")


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    print(json.dumps(idle_node(seconds), indent=2))


def idle_node(seconds: float, env: Mapping[str, str] | None = None) -> dict[str, object]:
    """`env` is added to the node's."""
    with tempfile.TemporaryDirectory(prefix="nodeservice-idle-") as home:
        master = start(Path(home), "master", "--listen", "127.0.0.1:0", "--insecure")
        address = ready(Path(home), "master")["address"]
        options = ("--listen", "127.0.0.1:0", "--insecure", "--worker-id", "idle", "--master", str(address))
        node = start(Path(home), "serve", *options, env=env)
        try:
            ready(Path(home), "serve")
            time.sleep(SETTLE_SECONDS)
            return measure(psutil.Process(node.pid), seconds)
        finally:
            for process in (node, master):
                process.terminate()
                process.wait(20)


def start(home: Path, command: str, *options: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    with (home / f"{command}.log").open("wb") as log:
        return subprocess.Popen(
            [*COMMAND, command, *options, "--state-dir", str(home / command)],
            stdout=log, stderr=log, env=os.environ | dict(env or {}),
        )  # fmt: skip


def ready(home: Path, command: str) -> dict[str, object]:
    while True:
        for line in (home / f"{command}.log").read_text().splitlines():
            if ".ready" in line:
                return dict(json.loads(line))
        time.sleep(0.1)


def measure(process: psutil.Process, seconds: float) -> dict[str, object]:
    before, began = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after, took = process.cpu_times(), time.monotonic() - began
    cpu = after.user + after.system - before.user - before.system
    return {
        "machine": {"cpu_count": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        "seconds": round(took, 1),
        "rss_mib": round(process.memory_info().rss / 2**20, 1),
        "cpu_percent_of_a_core": round(100 * cpu / took, 3),
        "thread_count": process.num_threads(),
        "descriptor_count": process.num_fds(),
    }


if __name__ == "__main__":
    main()
