"""Keeps for the host what is the host's: all tasks together within their share, and some free disk."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

import structlog

from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId, Phase, Resources, StopCause, TaskRecord
from nodeservice.core.verdict import has_no_grace
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.patience import Patience

log = structlog.get_logger(__name__)

DISK_LOW = "DISK_LOW"
Share = tuple[Resources, tuple[int, ...], Mapping[AttemptId, tuple[int, ...]]]
"""What all tasks may have together, the CPUs of those without exclusive ones, and whose CPUs are exclusive."""
_MAKE_ROOM_SECONDS = 60.0
"""For one that was killed to give back its disk, before the next one goes."""


class HostKeeper:
    """Looks at the ledger after each change of a record, and at everything each `keep_host_seconds`.

    With less than `keep_free_disk_bytes` free the node takes no new work (condition DISK_LOW); below half of that it ends
    the running task that has written most, one after the other.
    """

    def __init__(self, context: Context, driver: Driver) -> None:
        self._context = context
        self._driver = driver
        self._share_changed = asyncio.Event()
        self._asked: Share | None = None
        self._holds = False
        """Whether what was asked for was done; else it is asked for again at the next look."""
        self._ending: dict[AttemptId, Patience] = {}
        driver.on_change(self._note)

    def _note(self, _record: TaskRecord) -> None:
        if _share(self._driver.ledger) != self._asked:
            self._share_changed.set()

    async def apply_share(self) -> None:
        """Hold all tasks to what the ledger says. Nothing happens while that is what it was, and holds."""
        wanted = _share(self._driver.ledger)
        if wanted != self._asked or not self._holds:
            self._asked, self._holds = wanted, False
            self._holds = await self._context.cgroups.share(*wanted)

    async def run(self) -> None:
        """Work until cancelled.

        A look at a disk that hangs keeps no share from being set: it is set before a task comes whose CPUs are exclusive.
        """
        async with asyncio.TaskGroup() as both:
            both.create_task(self._keep_share())
            both.create_task(self._keep_disk())

    async def _keep_share(self) -> None:
        while True:
            self._share_changed.clear()
            await self.apply_share()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._context.settings.keep_host_seconds):
                    await self._share_changed.wait()

    async def _keep_disk(self) -> None:
        while True:
            await self.look_at_disk()
            await self._context.clock.sleep(self._context.settings.keep_host_seconds)

    async def look_at_disk(self) -> None:
        least = await self._context.free_space.least()
        keep_bytes = self._context.settings.keep_free_disk_bytes
        conditions = self._driver.conditions
        if least is None or least[0] >= keep_bytes:
            if conditions.pop(DISK_LOW, None) is not None:
                log.info("disk.enough_again", keep_bytes=keep_bytes)
            return
        free_bytes, place = least
        words = f"{free_bytes} bytes are free at {place}, {keep_bytes} are to stay free (keep_free_disk_bytes)"
        if DISK_LOW not in conditions:
            log.warning("disk.low", free_bytes=free_bytes, place=str(place), keep_bytes=keep_bytes)
        conditions[DISK_LOW] = words
        if free_bytes < keep_bytes // 2:
            self._end_the_largest(place, words)

    def _end_the_largest(self, place: Path, words: str) -> None:
        if self._is_making_room():
            return
        largest: tuple[int, TaskRecord] | None = None
        for record in self._driver.live():
            is_going = has_no_grace(record) or record.id in self._ending
            may_go = record.phase is Phase.RUNNING and not is_going
            use = self._context.disk.seen(record.id) if may_go else None
            if use is not None and (largest is None or use.bytes > largest[0]):
                largest = (use.bytes, record)
        if largest is None:
            return
        wrote_bytes, record = largest
        message = (
            f"The host was about to run out of disk: {words}. This task had written {wrote_bytes} bytes, the most."
        )
        log.warning("disk.task_ended", task_id=record.id.task_id, attempt=record.id.attempt, place=str(place))
        # Its record may not tell for long: a disk that is full may keep the journal from being written.
        self._ending[record.id] = Patience(self._context.clock, _MAKE_ROOM_SECONDS)
        self._driver.end(record.id, StopCause.NODE_DISK_LOW, message)

    def _is_making_room(self) -> bool:
        """Whether one is on its way out, and not for long: neither a grace nor one that hangs keeps the disk filling."""
        killed = [
            record.id
            for record in self._driver.live()
            if (has_no_grace(record) or record.id in self._ending) and record.phase < Phase.UPLOADING
        ]
        clock = self._context.clock
        self._ending = {id_: self._ending.get(id_) or Patience(clock, _MAKE_ROOM_SECONDS) for id_ in killed}
        return not all(patience.is_over for patience in self._ending.values())


def _share(ledger: Ledger) -> Share:
    return ledger.share, ledger.shared_cpu_ids, ledger.exclusive_cpu_ids
