"""One bound on what an attempt writes: implements the port TaskDisk.

Where the file system can keep it (a project quota), the kernel does. Everywhere the places are also measured, by one thread
that works in short pieces, in turn for all attempts, and never more than a part of its time. Without a quota that is how a
crossing is told, within two seconds of it; with one it shows what got past the quota: whoever owns a file may take it out of
its project (ioctl_xfs_fsgetxattr(2)), and no engine's filter of system calls stops that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from nodeservice.core.model import AttemptId
from nodeservice.errors import NodeFaultError
from nodeservice.limits.disk_rounds import PIECE_SECONDS, DiskRounds, Processes, Watched
from nodeservice.limits.disk_scan import Measured, Scan, measure
from nodeservice.limits.project_quota import ProjectQuotas, QuotaSupport, quota_support
from nodeservice.ports import DiskBound, DiskUse, Enforcement
from nodeservice.threads import Threads

log = structlog.get_logger(__name__)
T = TypeVar("T")


async def _no_processes(_ids: Collection[AttemptId]) -> Mapping[AttemptId, Sequence[int]]:
    return {}


class BoundedDisk:
    """TaskDisk on the file systems of this host. `processes` names those of an attempt, for the files that they hold."""

    def __init__(
        self,
        *,
        quotas: ProjectQuotas | None,
        why_watched: str = "",
        processes: Processes = _no_processes,
    ) -> None:
        self._quotas = quotas
        self._why_watched = why_watched
        self._attempts: dict[AttemptId, Watched] = {}
        self._thread = Threads(1, name="nodeservice-disk")
        self._rounds = DiskRounds(self._attempts, self._thread, processes=processes)

    async def prepare(self, id_: AttemptId, limit_bytes: int, *, work: Path, log: Path) -> None:
        """As the port says. Raises NodeFaultError (NODE_FAULT) where the kernel refuses a quota that it offers.

        What it refuses is watched nevertheless, until a repetition succeeds.
        """
        watched = self._attempts.get(id_)
        if watched is None or watched.limit_bytes != limit_bytes:
            watched = self._attempts[id_] = Watched(limit_bytes, work, log)
        quotas = self._quotas
        if quotas is None or watched.project is not None:
            return

        def bind() -> None:
            watched.project = quotas.bind(work, limit_bytes)

        await self._run(bind, doing="set the disk quota")

    async def add_layer(self, id_: AttemptId, layer: Sequence[Path], beside: Sequence[Path] = ()) -> None:
        watched = self._attempts.get(id_)
        if watched is None:
            return
        watched.layer = tuple(dict.fromkeys((*watched.layer, *layer[:1], *beside)))
        quotas, project = self._quotas, watched.project
        if quotas is None or project is None:
            return

        def join() -> list[Path]:
            # The engine makes its files in the container, or makes them anew, when it starts it.
            new = [place for place in (*layer, *beside) if place not in watched.joined or place.is_file()]
            return quotas.join([place for place in new if quotas.holds_layers([place])], project)

        found = await self._run(join, doing="set the disk quota of the container's layer")
        watched.joined = tuple(dict.fromkeys((*watched.joined, *found)))

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
            (place, Enforcement.HARD if held and place in watched.joined else Enforcement.WATCHED)
            for place in watched.layer
            if project is not None or place.is_dir()  # the engine's few files would only make the receipt long
        ]
        whole = watched.is_hard and all(kept is Enforcement.HARD for _, kept in places)
        return DiskBound(
            limit_bytes=limit_bytes,
            enforcement=Enforcement.HARD if whole else Enforcement.WATCHED,
            places=tuple(places),
            why_watched="" if whole else self._why_watched,
        )

    async def crossed(self, id_: AttemptId) -> DiskUse:
        return await self._rounds.crossed(id_)

    async def use(self, id_: AttemptId) -> DiskUse | None:
        watched = self._attempts.get(id_)
        if watched is None:
            return None
        if watched.is_hard:
            counted = await self._run(lambda: self._count(watched), doing="read what a task wrote")
            if counted is not None:
                return watched.note(counted)
        return await self._measure(watched)

    def seen(self, id_: AttemptId) -> DiskUse | None:
        watched = self._attempts.get(id_)
        return None if watched is None else watched.used

    async def remove(self, id_: AttemptId, *, work: Path) -> None:
        if self._quotas is not None:
            await self._run(partial(self._lift, self._quotas, id_, work), doing="lift the disk quota")
        self._attempts.pop(id_, None)

    async def close(self) -> None:
        await self._rounds.close()
        self._thread.close()

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _lift(self, quotas: ProjectQuotas, id_: AttemptId, work: Path) -> None:
        """A restart forgot the number: the directory above bears it still."""
        watched = self._attempts.get(id_)
        project = watched.project if watched is not None else None
        if project is None:
            project = quotas.project_of(work)
        if project is not None:
            quotas.lift(project)

    def _count(self, watched: Watched) -> Measured | None:
        """What the kernel counted, and the log beside it."""
        if self._quotas is None or watched.project is None:
            return None
        counted = self._quotas.use_of(watched.project)
        if counted is None:
            return None
        beside = measure([watched.log])
        return Measured(counted.bytes + beside.bytes, counted.file_count + beside.file_count)

    # ---- piece by piece ---------------------------------------------------------------------------------------------

    async def _measure(self, watched: Watched) -> DiskUse:
        """Others have their turn between the pieces, and all long walks together their part of the time."""
        scan = Scan(watched.walked, least_bytes=watched.least_bytes)
        walk = partial(self._timed, scan)
        busy_seconds, found = 0.0, None
        self._rounds.measuring_count += 1
        try:
            while True:
                found, seconds = await self._run(walk, doing="measure what a task wrote")
                busy_seconds += seconds
                if found is not None:
                    break
                if scan.so_far.bytes > watched.used.bytes:
                    watched.note(scan.so_far)
                await asyncio.sleep(self._rounds.rest_seconds(seconds))
        finally:
            self._rounds.measuring_count -= 1
            if found is None:
                with suppress(RuntimeError):  # the thread has ended
                    self._thread.submit(scan.close)
        return watched.note_walk(
            found, at=time.monotonic(), busy_seconds=busy_seconds, attempt_count=len(self._attempts)
        )

    def _timed(self, scan: Scan) -> tuple[Measured | None, float]:
        began = time.monotonic()
        found = scan.step(PIECE_SECONDS)
        return found, time.monotonic() - began

    async def _run(self, call: Callable[[], T], *, doing: str) -> T:
        try:
            return await self._thread.run(call)
        except OSError as error:
            raise NodeFaultError(
                f"this node could not {doing}: {error}",
                reason="NODE_FAULT",
                hint="look at the file system of state_dir",
            ) from error


def open_task_disk(
    state_dir: Path,
    engine_root: Path | None,
    *,
    engine_passes_ext4: bool = True,
    processes: Processes = _no_processes,
) -> BoundedDisk:
    """What the file system of the state directory can keep. `engine_passes_ext4`: the engine has CAP_SYS_RESOURCE."""
    support = quota_support(state_dir)
    if support.why_not:
        return BoundedDisk(quotas=None, why_watched=support.why_not, processes=processes)
    quotas = ProjectQuotas(support, engine_root=engine_root, engine_passes_ext4=engine_passes_ext4)
    return BoundedDisk(quotas=quotas, why_watched=_why_layers_are_watched(support, quotas), processes=processes)


def _why_layers_are_watched(support: QuotaSupport, quotas: ProjectQuotas) -> str:
    if quotas.is_for_layers:
        return ""
    return (
        f"the work directory is held by the quota of {support.filesystem} at {support.mount_point}, the container's layer "
        "is not: for that put the engine's root and state_dir on one XFS, mounted with pquota"
    )
