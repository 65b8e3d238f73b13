"""CPU time that processes used between two looks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import psutil


@dataclass
class CpuMeter:
    """Of these processes together, without their children; `lap` gives the seconds since the last one."""

    pids: Iterable[int]
    _processes: list[psutil.Process] = field(init=False)
    _before: float = field(init=False)

    def __post_init__(self) -> None:
        self._processes = [psutil.Process(pid) for pid in self.pids]
        self._before = self._used()

    def lap(self) -> float:
        now = self._used()
        spent, self._before = now - self._before, now
        return spent

    def _used(self) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._processes))


def named(*names: str) -> list[int]:
    """The pids of all processes with one of these names, such as those of an engine that others use too."""
    return [process.pid for process in psutil.process_iter(["name"]) if process.info["name"] in names]
