"""Notices out-of-memory kills in a v1 cgroup through an eventfd on `memory.oom_control`.

On v1 the kernel's own count, `oom_kill`, is not hierarchical, and the container's cgroup is gone once it has ended. The
eventfd of the task's cgroup is signalled also for a kill below it: that cgroup, charged with the bookkeeping of its child,
is the one that reaches the common limit (Documentation/admin-guide/cgroup-v1/memory.rst, "OOM Control"; measured). One
kill was measured to signal between once and 34 times, so the signals say whether, not how often.
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
        self._watches: dict[str, _Watch] = {}

    def watch(self, memory_directory: str, *, from_birth: bool) -> None:
        """Start to watch; one that is watched already goes on. `from_birth`: nothing can have happened in it before."""
        if memory_directory in self._watches:
            return
        descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            with open(f"{memory_directory}/memory.oom_control", "rb") as control:
                command = f"{descriptor} {control.fileno()}"
                Path(memory_directory, "cgroup.event_control").write_text(command)
        except OSError as error:
            os.close(descriptor)
            log.debug("cgroup.oom_not_watched", path=memory_directory, error=str(error))
            return
        self._watches[memory_directory] = _Watch(descriptor, from_birth)

    def kills_at_least(self, memory_directory: str) -> int | None:
        """1 once a kill was seen, else 0; None where none was seen but some may have come before the watch."""
        watch = self._watches.get(memory_directory)
        if watch is None:
            return None
        with suppress(BlockingIOError):
            watch.seen = os.eventfd_read(watch.descriptor) > 0 or watch.seen
        if watch.seen:
            return 1
        return 0 if watch.from_birth else None

    def forget(self, memory_directory: str) -> None:
        watch = self._watches.pop(memory_directory, None)
        if watch is not None:
            os.close(watch.descriptor)

    def close(self) -> None:
        for directory in tuple(self._watches):
            self.forget(directory)


class _Watch:
    __slots__ = ("descriptor", "from_birth", "seen")

    def __init__(self, descriptor: int, from_birth: bool) -> None:
        self.descriptor = descriptor
        self.from_birth = from_birth
        self.seen = False
