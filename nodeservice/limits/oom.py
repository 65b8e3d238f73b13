"""Counts out-of-memory events of a v1 cgroup through an eventfd on `memory.oom_control`.

On v1 the count `oom_kill` is not hierarchical, and the container's own cgroup is gone once it has ended. The kernel signals
the eventfd of the task's cgroup also for a kill below it, because that cgroup, charged with the bookkeeping of its child,
is the one that reaches the common limit (Documentation/admin-guide/cgroup-v1/memory.rst, "OOM Control"; measured).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)


class OomWatches:
    """One eventfd per watched cgroup. Only for use from one thread."""

    def __init__(self) -> None:
        self._watches: dict[Path, _Watch] = {}

    def watch(self, memory_directory: Path, *, from_birth: bool) -> None:
        """Start to count; one that is watched already goes on. `from_birth`: nothing can have happened in it before."""
        if memory_directory in self._watches:
            return
        descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            with (memory_directory / "memory.oom_control").open("rb") as control:
                command = f"{descriptor} {control.fileno()}"
                (memory_directory / "cgroup.event_control").write_text(command)
        except OSError as error:
            os.close(descriptor)
            log.debug("cgroup.oom_not_watched", path=str(memory_directory), error=str(error))
            return
        self._watches[memory_directory] = _Watch(descriptor, from_birth)

    def count(self, memory_directory: Path) -> int | None:
        """Events so far, at least one for every burst of kills; None where none was seen but some may have been missed."""
        watch = self._watches.get(memory_directory)
        if watch is None:
            return None
        with suppress(BlockingIOError):
            watch.count += os.eventfd_read(watch.descriptor)
        return watch.count if watch.count or watch.from_birth else None

    def forget(self, memory_directory: Path) -> None:
        watch = self._watches.pop(memory_directory, None)
        if watch is not None:
            os.close(watch.descriptor)

    def close(self) -> None:
        for directory in tuple(self._watches):
            self.forget(directory)


class _Watch:
    __slots__ = ("count", "descriptor", "from_birth")

    def __init__(self, descriptor: int, from_birth: bool) -> None:
        self.descriptor = descriptor
        self.from_birth = from_birth
        self.count = 0
