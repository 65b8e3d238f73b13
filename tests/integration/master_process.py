"""A real `nodeservice master` process that a test can end, kill and start again on the same state."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.scripted_node import eventually


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NODESERVICE_")}
    return kept | {"NODESERVICE_LOG_FORMAT": "json"} | extra


class MasterProcess:
    """A real master that a test can end, kill and start again on the same state."""

    def __init__(self, path: Path, *options: str, insecure: bool = True) -> None:
        self.path = path
        self.env: dict[str, str] = {}
        self.options = options
        self.transport = ("--insecure",) if insecure else ()
        self.process: subprocess.Popen[bytes] | None = None
        self.ready: dict[str, Any] = {}
        self.port = 0
        self.starts = 0

    @property
    def log(self) -> Path:
        return self.path / f"master-{self.starts}.log"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> MasterProcess:
        self.starts += 1
        log = self.log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nodeservice", "master", "--listen", f"127.0.0.1:{self.port}",
                 "--state-dir", str(self.path / "state"), *self.transport, *self.options],
                stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment(**self.env),
            )  # fmt: skip

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, log.read_text()
            events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
            self.ready = next((event for event in events if event["event"] == "master.ready"), {})
            return bool(self.ready)

        try:
            await eventually(ready, seconds=60)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.port = int(self.ready["address"].rpartition(":")[2])
        return self

    async def end(self, signum: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(signum)
        return await asyncio.to_thread(self.process.wait, 30)
