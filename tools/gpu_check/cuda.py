"""Starts the CUDA program on one device, and tells it what to do."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check.record import CannotRunError

_PROGRAM = Path(__file__).with_name("cuda_program.py")
_ANSWER_SECONDS = 180
"""Importing PyTorch from a cold disk, and opening a GPU without persistence, take long."""


class CudaProgram:
    """A process of its own. CannotRunError where there is no CUDA. Use it with `with`: it is killed at the end."""

    def __init__(self, device: str, which: str = "auto", *, enter: Callable[[], None] | None = None) -> None:
        """`enter` runs in the process before the program does, to put it into a cgroup."""
        self._process = subprocess.Popen(
            [sys.executable, _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
            preexec_fn=enter,  # noqa: PLW1509 no other thread runs in this program then
        )
        self.pid = self._process.pid
        self.library = ""
        try:
            self.library = self.order("open", which)["with"]
        except (RuntimeError, OSError) as error:
            self.kill()
            raise CannotRunError(f"no CUDA on {device[:12]}: {error}") from error

    def __enter__(self) -> CudaProgram:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def order(self, *order: Any) -> dict[str, Any]:
        """RuntimeError with what CUDA says."""
        self.begin(*order)
        return self.end()

    def begin(self, *order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """The answer to what was begun."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _ANSWER_SECONDS)[0]:
            raise RuntimeError(f"no answer within {_ANSWER_SECONDS} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the program has ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def is_working(self) -> bool:
        """Whether what was begun has not been answered."""
        return not select.select([self._process.stdout], [], [], 0)[0]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
