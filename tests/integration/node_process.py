"""A real `nodeservice serve` process that a test can stop, kill and start again on the same state."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_SECONDS = float(os.environ.get("TEST_PATIENCE_SECONDS", "60"))
"""To start and to stop; an emulated machine needs more."""


@dataclass
class NodeProcess:
    """`path` holds state, results and the process's own log. Containers of the node are the test's to remove."""

    path: Path
    worker_id: str
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    insecure: bool = True
    module: str = "nodeservice"
    """What python runs; another one may replace a part of the node first."""
    port: int = 0
    process: asyncio.subprocess.Process | None = None
    starts: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.path / f"serve-{self.starts}.log"

    async def start(self) -> NodeProcess:
        self.path.mkdir(exist_ok=True)
        self.starts += 1
        with self.log.open("wb") as stream:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self.module, "serve", "--worker-id", self.worker_id,
                "--listen", f"127.0.0.1:{self.port}", *(("--insecure",) if self.insecure else ()),
                "--state-dir", str(self.path / "state"), "--results-dir", str(self.path / "results"), *self.options,
                stdout=stream, stderr=stream, stdin=asyncio.subprocess.DEVNULL,
                env=os.environ | {"NODESERVICE_HEARTBEAT_SECONDS": "0.5", "NODESERVICE_LOG_FORMAT": "json"} | self.env,
            )  # fmt: skip
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (ready := [event for event in self.events() if event.get("event") == "node.ready"]):
                if self.process.returncode is not None:
                    raise AssertionError(f"the node ended with {self.process.returncode}:\n{self.log.read_text()}")
                await asyncio.sleep(0.02)
        self.port = int(str(ready[0]["port"]))
        return self

    def events(self) -> Iterator[dict[str, object]]:
        """What it logged since its last start."""
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    async def kill(self) -> None:
        """SIGKILL, as a crash."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        return await self._end(signal.SIGTERM)

    def freeze(self) -> None:
        self._running().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    async def _end(self, number: signal.Signals) -> int:
        process = self._running()
        if process.returncode is None:
            process.send_signal(number)
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await process.wait()

    def _running(self) -> asyncio.subprocess.Process:
        assert self.process is not None, "start it first"
        return self.process
