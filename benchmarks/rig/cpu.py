"""CPU time that processes used between two looks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

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


def seconds_on_cpu(pid: int) -> float:
    """Of all threads that live now, to the nanosecond, without those that have ended; `cpu_times` counts in ticks of 10 ms.

    Source: Documentation/scheduler/sched-stats.rst.
    """
    found = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            found += int(path.read_text().split()[0])
    if not found:
        raise RuntimeError(f"no CPU time of process {pid} is to be read in /proc/{pid}/task/*/schedstat")
    return found / 1e9


def named(*names: str) -> list[int]:
    """The pids of all processes with one of these names, such as those of an engine that others use too."""
    return [process.pid for process in psutil.process_iter(["name"]) if process.info["name"] in names]
