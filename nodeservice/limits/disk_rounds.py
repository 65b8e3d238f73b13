"""Looks, in rounds, for the attempt that wrote more than it may.

One look serves all attempts: with a turn through a thread for each, hundreds of idle tasks would keep a CPU busy. Walks take
turns in one thread. Those that have just begun come first, and most end there; the others, of large trees, take a part of
its time altogether, and hold up no small one.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from nodeservice.core.model import AttemptId
from nodeservice.limits.disk_scan import LEAST_BYTES, Measured, Scan
from nodeservice.ports import DiskUse
from nodeservice.threads import Threads

log = structlog.get_logger(__name__)

Processes = Callable[[Collection[AttemptId]], Awaitable[Mapping[AttemptId, Sequence[int]]]]

MOST_BUSY = 0.25
"""The part of its time that the thread walks through large trees at most: it is late rather than in the way."""
PIECE_SECONDS = 0.02
"""Of walking, before others have their turn."""
_FIRST_SECONDS = 0.005
"""For the first piece of a walk, which is all of it where a task wrote some hundred files."""
_LOOK_SECONDS = 0.5
"""Between two looks at the free space, which cost nothing."""
_WALK_SECONDS = 1.0
"""The longest without a walk: what others delete hides what a task writes."""
_HARD_WALK_SECONDS = 5.0
"""The same where the kernel keeps the bound, so that only a breach of it is looked for."""
_SLACK_BYTES = 16 * LEAST_BYTES
"""What the few files take that every container and every task has at its birth."""
_BREACH = 1.1
"""What the files of an attempt take past its quota before that is called a breach: the log lies beside it."""


@dataclass(slots=True)
class Watched:
    """One attempt. `layer` is what the container writes beside its work directory, volumes and the engine's files too."""

    limit_bytes: int
    work: Path
    log: Path
    layer: tuple[Path, ...] = ()
    joined: tuple[Path, ...] = ()
    project: int | None = None
    used: DiskUse = field(default_factory=lambda: DiskUse(bytes=0, file_count=0, peak_bytes=0))
    walked_at: float = float("-inf")
    next_walk_at: float = float("-inf")
    free_bytes: int = 0

    @property
    def walked(self) -> tuple[Path, ...]:
        return (self.work, self.log, *self.layer)

    @property
    def is_hard(self) -> bool:
        """Whether the kernel bounds all that the container itself can write to."""
        return bool(self.layer and self.joined) and set(self.layer) <= set(self.joined)

    @property
    def most_bytes(self) -> int:
        return int(self.limit_bytes * (_BREACH if self.is_hard else 1)) + _SLACK_BYTES

    @property
    def least_bytes(self) -> int:
        """What a file counts at least. A quota bounds their number by itself, and counts an empty one as nothing."""
        return 1 if self.is_hard else LEAST_BYTES

    def note(self, found: Measured) -> DiskUse:
        peak_bytes = max(self.used.peak_bytes, found.bytes)
        self.used = DiskUse(bytes=found.bytes, file_count=found.file_count, peak_bytes=peak_bytes)
        return self.used

    def note_walk(self, found: Measured, *, at: float, busy_seconds: float, attempt_count: int) -> DiskUse:
        self.walked_at = at
        self.next_walk_at = at + busy_seconds * attempt_count / MOST_BUSY
        return self.note(found)

    def is_due(self, now: float) -> bool:
        """Walk only where that may find something: the disk lost as much as the task has left, or time has passed."""
        if now < self.next_walk_at:
            return False
        since = now - self.walked_at
        if self.is_hard:
            return since >= _HARD_WALK_SECONDS
        try:
            free_bytes = _free_bytes(self.work)
        except OSError:  # its directory is gone, say; there are other places
            return since >= _WALK_SECONDS
        if since < _WALK_SECONDS and self.free_bytes - free_bytes < self.limit_bytes - self.used.bytes:
            return False
        self.free_bytes = free_bytes
        return True


@dataclass(slots=True)
class _Walk:
    id: AttemptId
    watched: Watched
    scan: Scan
    crossing: asyncio.Future[DiskUse]
    found: Measured | None = None
    busy_seconds: float = 0.0


class DiskRounds:
    """Goes round while anybody waits for a crossing. `attempts` and `thread` belong to its owner, `processes` tells whose
    open files count too.
    """

    def __init__(
        self,
        attempts: Mapping[AttemptId, Watched],
        thread: Threads,
        *,
        processes: Processes,
    ) -> None:
        self._attempts = attempts
        self._thread = thread
        self._processes = processes
        self._crossings: dict[AttemptId, asyncio.Future[DiskUse]] = {}
        self._new: deque[_Walk] = deque()
        self._long: deque[_Walk] = deque()
        self._under_way: set[AttemptId] = set()
        self._rounds: asyncio.Task[None] | None = None
        self._walking: asyncio.Task[None] | None = None
        self.measuring_count = 0
        """Walks of others in the same thread, who share the part of its time."""

    def rest_seconds(self, worked_seconds: float) -> float:
        """For how long one who walked so long lets the thread rest."""
        return worked_seconds * ((self.measuring_count + bool(self._long)) / MOST_BUSY - 1)

    async def crossed(self, id_: AttemptId) -> DiskUse:
        crossing: asyncio.Future[DiskUse] = asyncio.get_running_loop().create_future()
        self._crossings[id_] = crossing
        if self._rounds is None or self._rounds.done():
            self._rounds = asyncio.create_task(self._go_round(), name="disk rounds")
        try:
            return await crossing
        finally:
            if self._crossings.get(id_) is crossing:
                del self._crossings[id_]

    async def close(self) -> None:
        running = [task for task in (self._rounds, self._walking) if task is not None]
        for crossing in self._crossings.values():
            crossing.cancel()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for walk in (*self._new, *self._long):
            self._thread.submit(walk.scan.close)

    async def _go_round(self) -> None:
        while self._crossings:
            await asyncio.sleep(_LOOK_SECONDS)  # many tasks have ended by then
            try:
                await self._look()
            except Exception as error:  # a bound is never given up because one look at it failed
                log.exception("disk.round_failed", error=str(error))

    async def _look(self) -> None:
        resting = [id_ for id_ in self._crossings if id_ not in self._under_way and id_ in self._attempts]
        watched = {id_: self._attempts[id_] for id_ in resting}
        due = await self._thread.run(lambda: [id_ for id_ in watched if watched[id_].is_due(time.monotonic())])
        pids = await self._processes(due) if due else {}
        for id_ in due:
            crossing = self._crossings.get(id_)
            if crossing is None or crossing.done():
                continue
            seen = watched[id_]
            scan = Scan(
                seen.walked,
                pids=pids.get(id_, ()),
                stop_above_bytes=seen.most_bytes,
                least_bytes=seen.least_bytes,
            )
            self._under_way.add(id_)
            self._new.append(_Walk(id_, seen, scan, crossing))
        while self._new:
            await self._go_on(self._new, _FIRST_SECONDS)
        if self._long and (self._walking is None or self._walking.done()):
            self._walking = asyncio.create_task(self._walk_long(), name="disk walk")

    async def _walk_long(self) -> None:
        """Until all have ended."""
        while self._long:
            worked_seconds = await self._go_on(self._long, PIECE_SECONDS)
            for walk in tuple(self._long):  # at once: the thread may add one
                if walk.scan.so_far.bytes > walk.watched.used.bytes:
                    walk.watched.note(walk.scan.so_far)
            await asyncio.sleep(self.rest_seconds(worked_seconds))

    async def _go_on(self, walks: deque[_Walk], most_seconds: float) -> float:
        """Walk for a piece of time, none for longer than `most_seconds`; for how long it was."""
        ended, worked_seconds = await self._thread.run(lambda: self._piece(walks, most_seconds))
        for walk in ended:
            self._under_way.discard(walk.id)
            self._note(walk)
        return worked_seconds

    def _note(self, walk: _Walk) -> None:
        if walk.found is None:  # nobody waits any more, or it failed
            return
        used = walk.watched.note_walk(
            walk.found, at=time.monotonic(), busy_seconds=walk.busy_seconds, attempt_count=len(self._attempts)
        )
        if used.bytes > walk.watched.most_bytes and not walk.crossing.done():
            walk.crossing.set_result(used)

    # ---- in the thread ----

    def _piece(self, walks: deque[_Walk], most_seconds: float) -> tuple[list[_Walk], float]:
        """Go on with each in turn, for a piece altogether: those that ended, and how long it took."""
        began = time.monotonic()
        ended = []
        for _ in range(len(walks)):
            at = time.monotonic()
            left_seconds = began + PIECE_SECONDS - at
            if left_seconds <= 0:
                break
            walk = walks.popleft()
            if walk.crossing.done():
                walk.scan.close()
                ended.append(walk)
                continue
            try:
                walk.found = walk.scan.step(min(left_seconds, most_seconds))
            except Exception as error:  # then the next round looks again
                log.exception("disk.walk_failed", path=str(walk.watched.work), error=str(error))
                ended.append(walk)
                continue
            walk.busy_seconds += time.monotonic() - at
            (self._long if walk.found is None else ended).append(walk)
        return ended, time.monotonic() - began


def _free_bytes(place: Path) -> int:
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize
