"""A baseline: an agent of the simple design. It polls every five seconds and runs the engine's command line, one by one."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.rig.bare_engine import CALL_SECONDS, BareEngine, command_line

POLL_SECONDS = 5.0


class SimpleAgent:
    """Each poll: take what has room, look for the image, start it, one after the other; then see which have ended.

    It has no journal, no receipt, no upload and no trace. The image is present, so its pull is a look for it.
    """

    def __init__(self, engine: BareEngine) -> None:
        self._engine = engine

    def seconds_for(self, command: str, cpu_milli: int, *, task_count: int, at_a_time: int) -> float:
        began = time.perf_counter()
        waiting, running = task_count, set[str]()
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.add(self._start(*self._engine.body(command, cpu_milli)))
                waiting -= 1
            time.sleep(POLL_SECONDS)
            running -= self._ended(running)
        return time.perf_counter() - began

    def _start(self, name: str, body: Mapping[str, Any]) -> str:
        if not _docker("image", "inspect", "--format", "{{.Id}}", body["Image"]):
            _docker("pull", body["Image"])
        _docker("run", "--detach", *command_line(name, body))
        return name

    def _ended(self, running: set[str]) -> set[str]:
        of_ours = f"label=nodeservice.node={self._engine.node_id}"
        listed = _docker("ps", "--all", "--filter", of_ours, "--filter", "status=exited", "--format", "{{.Names}}")
        ended = running & set(listed.split())
        for name in ended:
            _docker("logs", name)
            _docker("rm", "--volumes", name)
        return ended


def _docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=True, timeout=CALL_SECONDS)
    return done.stdout
