"""Watches tasks with a part of a GPU that nothing else keeps them to: ends those that overdraw it, or can't be watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from nodeservice.core.gpus import GpuPart, ShareMethod
from nodeservice.core.model import AttemptId, Phase, StopCause, TaskRecord
from nodeservice.gpu.holders import Place, memory_of

_BLIND_SECONDS = 30.0
"""For a driver that is slow, or restarted by its operator."""


class PartWatch:
    """`stop` ends a task."""

    def __init__(self, stop: Callable[[TaskRecord, StopCause, str], None]) -> None:
        self._stop = stop
        self._untold: set[AttemptId] = set()
        """Of whose processes the driver did not tell the memory at the last look."""
        self._blind_since: float | None = None

    def look(self, holders: Iterable[TaskRecord], seen: Mapping[str, Place], owners: Mapping[int, AttemptId]) -> None:
        self._blind_since = None
        untold: set[AttemptId] = set()
        for record, part in _with_parts(holders):
            (uuid,) = record.lease.gpu_uuids
            if uuid not in seen:
                continue
            used = memory_of(seen[uuid], record.id, owners)
            if used is None and part.method is ShareMethod.WATCHED:
                untold.add(record.id)
                if record.id in self._untold:
                    why = f"The driver does not tell what its processes hold of {uuid}: its part of it is not watched."
                    self._stop(record, StopCause.LIMIT_NOT_ENFORCED, why)
            elif used is not None and used > part.memory_bytes:
                why = f"Took {used} bytes of GPU memory; its limit is {part.memory_bytes} bytes ({uuid})."
                self._stop(record, StopCause.GPU_MEMORY_LIMIT, why)
        self._untold = untold

    def see_nothing(self, holders: Iterable[TaskRecord], error: str, *, now_seconds: float) -> None:
        """The driver failed at this look, or hangs. Nobody is kept to a part that is only watched then."""
        if self._blind_since is None:
            self._blind_since = now_seconds
        if now_seconds - self._blind_since < _BLIND_SECONDS:
            return
        for record, part in _with_parts(holders):
            if part.method is ShareMethod.WATCHED:
                (uuid,) = record.lease.gpu_uuids
                why = f"The driver has told nothing for {_BLIND_SECONDS:g} s: its part of {uuid} is not watched ({error})."
                self._stop(record, StopCause.LIMIT_NOT_ENFORCED, why)


def _with_parts(holders: Iterable[TaskRecord]) -> Iterable[tuple[TaskRecord, GpuPart]]:
    """Those that run with a part that is not held by the hardware."""
    for record in holders:
        part = record.lease.gpu_part
        if part is not None and part.method is not ShareMethod.MIG and record.phase is Phase.RUNNING:
            yield record, part
