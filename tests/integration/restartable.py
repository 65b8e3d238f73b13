"""A server process that a test can kill, freeze, thaw and start again as it was."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Restartable:
    """`is_ready` tells whether it serves; it may raise OSError until then."""

    argv: Sequence[str | Path]
    log: Path
    is_ready: Callable[[], bool]
    env: Mapping[str, str] | None = None
    start_seconds: float = 60.0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Restartable:
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                [str(word) for word in self.argv], env=self.env, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )
        give_up = time.monotonic() + self.start_seconds
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > give_up:
                raise AssertionError(f"{self.argv[0]} does not serve:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        return self

    def _ready(self) -> bool:
        try:
            return self.is_ready()
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self._send(signal.SIGKILL)
        self._running().wait(30)

    def freeze(self) -> None:
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    def end(self) -> None:
        """SIGTERM, and SIGKILL for one that does not heed it."""
        if self.process is None or self.process.poll() is not None:
            return
        self.thaw()
        self._send(signal.SIGTERM)
        try:
            self._running().wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def _send(self, number: signal.Signals) -> None:
        if self._running().poll() is None:
            self._running().send_signal(number)

    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "start it first"
        return self.process
