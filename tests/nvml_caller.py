"""A process of its own that calls NVML through the real binding, beneath which a false driver may lie."""

from __future__ import annotations

import ast
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from nodeservice.testing.false_driver import FalseDriver

_CHILD = r"""
import ctypes, os, sys, threading, time
from pynvml import *
import pynvml

def gpu(uuid): return nvmlDeviceGetHandleByUUID(uuid)

def plain(value):
    if isinstance(value, (ctypes.Structure, ctypes.Union, nvmlFriendlyObject)):
        names = [f[0] for f in value._fields_] if hasattr(value, "_fields_") else vars(value)
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, (ctypes.Array, list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, ctypes._Pointer):
        return ctypes.cast(value, ctypes.c_void_p).value
    if isinstance(value, ctypes._SimpleCData):
        return value.value
    return value

space = dict(globals())
for line in sys.stdin:
    try:
        try:
            answer = ("value", plain(eval(line, space)))
        except SyntaxError:
            exec(line, space)
            answer = ("value", None)
    except pynvml.NVMLError as error:
        answer = ("error", error.value, type(error).__name__)
    except Exception as error:
        answer = ("exception", type(error).__name__, str(error))
    print(ascii(answer), flush=True)
"""


class NvmlCallError(Exception):
    """The call raised an NVMLError of this code and class."""

    def __init__(self, code: int, name: str) -> None:
        super().__init__(f"{name} ({code})")
        self.code = code
        self.name = name


class Caller:
    """`caller("nvmlDeviceGetCount()")` is what that is over there. `gpu(uuid)` there is a handle. Use it with `with`."""

    def __init__(self, driver: FalseDriver | None = None, *, init: bool = True) -> None:
        environment = {**os.environ, **(driver.environment if driver else {})}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.pid = self._process.pid
        if init:
            self("nvmlInit()")

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.stdout.close()

    def __call__(self, expression: str) -> Any:
        self.send(expression)
        return self.answer()

    def send(self, expression: str) -> None:
        """Ask without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(expression.strip().replace("\n", ";") + "\n")
        self._process.stdin.flush()

    def has_answered(self, within_seconds: float) -> bool:
        return bool(select.select([self._process.stdout], [], [], within_seconds)[0])

    def answer(self) -> Any:
        """What was asked for with `send`."""
        if not self.has_answered(60):
            raise AssertionError("no answer for a minute")
        assert self._process.stdout is not None
        kind, *rest = ast.literal_eval(self._process.stdout.readline())
        if kind == "value":
            return rest[0]
        if kind == "error":
            raise NvmlCallError(*rest)
        raise AssertionError(": ".join(rest))

    def code(self, expression: str) -> int:
        """The code of the error that this raises; 0 if none."""
        try:
            self(expression)
        except NvmlCallError as fault:
            return fault.code
        return 0

    def loaded(self) -> Path | None:
        """The libnvidia-ml that it has mapped."""
        maps = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        return next((Path(line.split()[-1]) for line in maps if "libnvidia-ml" in line), None)
