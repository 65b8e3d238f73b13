"""One bound on what an attempt writes: implements the port TaskDisk.

Where the file system can keep it (a project quota), the kernel does; elsewhere the directories are measured, often enough
that a crossing is told within two seconds, by one thread that never works more than a part of its time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from nodeservice.core.model import AttemptId
from nodeservice.errors import NodeFaultError
from nodeservice.limits.disk_scan import LEAST_BYTES, Measured, measure
from nodeservice.limits.project_quota import ProjectQuotas, QuotaSupport, quota_support
from nodeservice.ports import DiskBound, DiskUse, Enforcement

log = structlog.get_logger(__name__)
T = TypeVar("T")

_LOOK_SECONDS = 0.5
"""Between two looks at the free space, which cost nothing."""
_WALK_SECONDS = 1.0
"""The longest without a walk: what others delete hides what a task writes."""
_MOST_BUSY = 0.25
"""The part of its time that the thread walks at most. With many files it is late rather than in the way."""


_SLACK_BYTES = 16 * LEAST_BYTES
"""What the few files take that every container and every task has at its birth."""


@dataclass(slots=True)
class _Watched:
    """One attempt. `layer` is what the container writes beside its work directory."""

    limit_bytes: int
    work: Path
    log: Path
    layer: tuple[Path, ...] = ()
    project: int | None = None
    layer_is_hard: bool = False
    used: DiskUse = field(default_factory=lambda: DiskUse(bytes=0, file_count=0, peak_bytes=0))
    walked_at: float = float("-inf")
    next_walk_at: float = float("-inf")
    free_bytes: int = 0

    @property
    def walked(self) -> tuple[Path, ...]:
        return (self.work, self.log, *self.layer)


class BoundedDisk:
    """TaskDisk on the file systems of this host."""

    def __init__(
        self, *, quotas: ProjectQuotas | None, why_watched: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quotas = quotas
        self._why_watched = why_watched
        self._clock = clock
        self._attempts: dict[AttemptId, _Watched] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nodeservice-disk")

    async def prepare(self, id_: AttemptId, limit_bytes: int, *, work: Path, log: Path) -> None:
        """As the port says. Raises NodeFaultError (NODE_FAULT) where the kernel refuses a quota that it offers."""
        known = self._attempts.get(id_)
        if known is not None and known.limit_bytes == limit_bytes:
            return
        watched = _Watched(limit_bytes, work, log)
        if self._quotas is not None:
            quotas = self._quotas
            watched.project = await self._run(lambda: quotas.bind([work], limit_bytes), doing="set the disk quota")
        self._attempts[id_] = watched

    async def add_layer(self, id_: AttemptId, layer: Sequence[Path]) -> None:
        watched = self._attempts.get(id_)
        if watched is None or watched.layer:
            return
        watched.layer = tuple(layer[:1])
        quotas, project = self._quotas, watched.project
        if quotas is not None and project is not None and quotas.holds_layers(layer):
            await self._run(lambda: quotas.join(layer, project), doing="set the disk quota of the container's layer")
            watched.layer_is_hard = True

    def holds_layers(self) -> bool:
        return self._quotas is not None and self._quotas.is_for_layers

    async def bound(self, id_: AttemptId) -> DiskBound | None:
        watched = self._attempts.get(id_)
        if watched is None:
            return None
        held, limit_bytes = False, watched.limit_bytes
        quotas, project = self._quotas, watched.project
        if quotas is not None and project is not None:
            read = await self._run(lambda: quotas.limit_of(project), doing="read the disk quota")
            held, limit_bytes = read is not None, read if read is not None else limit_bytes
        places = [(watched.work, Enforcement.HARD if held else Enforcement.WATCHED)]
        places += [
            (place, Enforcement.HARD if held and watched.layer_is_hard else Enforcement.WATCHED)
            for place in watched.layer
        ]
        whole = all(kept is Enforcement.HARD for _, kept in places)
        return DiskBound(
            limit_bytes=limit_bytes,
            enforcement=Enforcement.HARD if whole else Enforcement.WATCHED,
            places=tuple(places),
            why_watched="" if whole else self._why_watched,
        )

    async def crossed(self, id_: AttemptId) -> DiskUse:
        while True:
            watched = self._attempts.get(id_)
            if watched is not None and not watched.layer_is_hard:
                used = await self._run(partial(self._look, watched), doing="measure what a task wrote")
                if used.bytes > watched.limit_bytes + _SLACK_BYTES:
                    return used
            await asyncio.sleep(_LOOK_SECONDS)

    async def use(self, id_: AttemptId) -> DiskUse | None:
        watched = self._attempts.get(id_)
        if watched is None:
            return None
        return await self._run(lambda: self._count(watched, whole=True), doing="measure what a task wrote")

    async def remove(self, id_: AttemptId) -> None:
        watched = self._attempts.pop(id_, None)
        quotas = self._quotas
        if watched is not None and watched.project is not None and quotas is not None:
            project = watched.project
            await self._run(lambda: quotas.lift(project), doing="lift the disk quota")

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _look(self, watched: _Watched) -> DiskUse:
        """Walk only where that may find something: the disk lost as much as the task has left, or time has passed."""
        now = self._clock()
        if now < watched.next_walk_at:
            return watched.used
        free = _free_bytes(watched.work)
        left = watched.limit_bytes - watched.used.bytes
        if now - watched.walked_at < _WALK_SECONDS and watched.free_bytes - free < left:
            return watched.used
        watched.free_bytes = free
        return self._count(watched)

    def _count(self, watched: _Watched, *, whole: bool = False) -> DiskUse:
        began = self._clock()
        found = self._measured(watched, whole=whole)
        ended = self._clock()
        watched.walked_at, watched.next_walk_at = ended, ended + (ended - began) / _MOST_BUSY
        peak_bytes = max(watched.used.peak_bytes, found.bytes)
        watched.used = DiskUse(bytes=found.bytes, file_count=found.file_count, peak_bytes=peak_bytes)
        return watched.used

    def _measured(self, watched: _Watched, *, whole: bool) -> Measured:
        if self._quotas is not None and watched.project is not None:
            counted = self._quotas.use_of(watched.project)
            if counted is not None:
                places = [watched.log, *(() if watched.layer_is_hard else watched.layer)]
                beside = measure(places, stop_above_bytes=None if whole else watched.limit_bytes)
                return Measured(counted.bytes + beside.bytes, counted.file_count + beside.file_count, beside.is_whole)
        stop_above = None if whole else watched.limit_bytes + _SLACK_BYTES
        return measure(watched.walked, stop_above_bytes=stop_above)

    async def _run(self, call: Callable[[], T], *, doing: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except OSError as error:
            raise NodeFaultError(
                f"this node could not {doing}: {error}",
                reason="NODE_FAULT",
                hint="look at the file system of state_dir",
            ) from error


def open_task_disk(state_dir: Path, engine_root: Path | None, *, engine_passes_ext4: bool = True) -> BoundedDisk:
    """What the file system of the state directory can keep. `engine_passes_ext4`: the engine has CAP_SYS_RESOURCE."""
    support = quota_support(state_dir)
    if support.why_not:
        return BoundedDisk(quotas=None, why_watched=support.why_not)
    quotas = ProjectQuotas(support, engine_root=engine_root, engine_passes_ext4=engine_passes_ext4)
    return BoundedDisk(quotas=quotas, why_watched=_why_layers_are_watched(support, quotas))


def _why_layers_are_watched(support: QuotaSupport, quotas: ProjectQuotas) -> str:
    if quotas.is_for_layers:
        return ""
    return (
        f"the work directory is held by the quota of {support.filesystem} at {support.mount_point}, the container's layer "
        "is not: for that put the engine's root and state_dir on one XFS, mounted with pquota"
    )


def _free_bytes(place: Path) -> int:
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize
