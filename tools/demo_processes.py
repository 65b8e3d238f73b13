"""Starts the parts of the service that a demo shows, each in a process of its own, and ends them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

START_SECONDS = 60.0
ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "REJECTED"})
"""The states of a task, as a master tells them, in which nothing more comes."""
_COMMAND = (sys.executable, "-m", "nodeservice")


@contextlib.contextmanager
def running(
    home: Path, command: str, *options: str, name: str = "", env: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Start a part; gives the port that it says it listens on. Ends it with SIGTERM.

    Its state and its log lie in `home`, under `name`, by default the command.
    """
    name = name or command
    log = home / f"{name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*_COMMAND, command, *options, "--state-dir", str(home / name)],
            stderr=stream, stdout=stream, stdin=subprocess.DEVNULL,
            env=os.environ | {"NODESERVICE_LOG_FORMAT": "json"} | dict(env or {}),
        )  # fmt: skip
    try:
        yield _port_of(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if str(event.get("event", "")).endswith(".ready"):
                    return int(event.get("port") or str(event["address"]).rpartition(":")[2])
        time.sleep(0.05)
    raise SystemExit(f"{log.stem} did not start:\n{log.read_text()}")
