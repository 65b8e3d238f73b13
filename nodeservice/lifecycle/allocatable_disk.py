"""What tasks may have, as the host changes.

What they wrote is missing from the free disk and is leased: it must not count twice. So more of it is believed only as it
was seen while nothing was leased. That is written down for a start with leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import structlog

from nodeservice.core.ledger import Ledger
from nodeservice.core.model import TaskRecord
from nodeservice.errors import NodeServiceError
from nodeservice.lifecycle.driver import Driver
from nodeservice.ports import CapacitySource, Clock, Journal, NodeCapacity

log = structlog.get_logger(__name__)

_NOTE = "allocatable_disk_bytes"
_WRITE_SECONDS = 2.0
_LEAST_PAUSE_SECONDS = 60.0
"""Between two looks on a node that is hardly ever without leases: a new task may come in the middle of each."""
_LOOK_SECONDS = 30.0
_MUCH = 10
"""A tenth of the disk more or less is told to masters that know registrations alone; heartbeats tell others every byte."""


class AllocatableDisk:
    """Sizes the driver's ledger.

    `look_again` is called when what there is has changed, or the last lease goes that kept `look` from seeing the disk.
    """

    def __init__(self, driver: Driver, capacity: CapacitySource, journal: Journal) -> None:
        self._driver = driver
        self._capacity = capacity
        self._journal = journal
        self._seen_unleased = False
        self._believed_bytes = driver.ledger.allocatable.disk_bytes
        self._asked_at = -_LEAST_PAUSE_SECONDS
        self._asking: asyncio.TimerHandle | None = None
        self.look_again: Callable[[], None] = lambda: None
        driver.on_change(self._note_change)

    async def open(self) -> None:
        """Call it once a ledger that was sized by a look at the host has its leases. Raises as the journal does."""
        ledger = self._driver.ledger
        if ledger.leased.disk_bytes:
            await believe_note(ledger, self._journal)
        else:
            self._seen_unleased = True
            await self._write(ledger.allocatable.disk_bytes)
        self._believed_bytes = ledger.allocatable.disk_bytes

    async def run(self, clock: Clock) -> None:
        """Look now and then until cancelled: CPUs, memory and limits come and go, and others write to the disk."""
        ledger = self._driver.ledger
        told = ledger.allocatable
        while True:
            await clock.sleep(_LOOK_SECONDS)
            try:
                await self.look()
            except OSError as error:
                log.warning("capacity.look_failed", error=str(error))
                continue
            now = ledger.allocatable
            has_changed = (now.cpu_milli, now.memory_bytes) != (told.cpu_milli, told.memory_bytes)
            if has_changed or abs(now.disk_bytes - told.disk_bytes) * _MUCH > told.disk_bytes:
                told = now
                log.info(
                    "capacity.changed",
                    cpu_milli=now.cpu_milli,
                    memory_bytes=now.memory_bytes,
                    disk_bytes=now.disk_bytes,
                )
                self.look_again()

    async def look(self) -> NodeCapacity:
        """A fresh look at the host; the ledger has what it says."""
        ledger = self._driver.ledger
        leased_bytes = ledger.leased.disk_bytes
        node = await self._capacity.read()
        leased_bytes = max(leased_bytes, ledger.leased.disk_bytes)
        is_believed = not leased_bytes
        if not is_believed:
            # Others may have written more than tasks can have.
            node = with_disk(node, min(self._believed_bytes, node.allocatable.disk_bytes + leased_bytes))
        ledger.resize(node.allocatable, node.gpu_units, node.cpus)
        if is_believed:
            self._seen_unleased = True
            self._believed_bytes = node.allocatable.disk_bytes
            await self._write(node.allocatable.disk_bytes)
        return node

    def _note_change(self, _record: TaskRecord) -> None:
        if not self._seen_unleased and self._asking is None:
            # The driver gives leases back after it has told of what changed.
            loop = asyncio.get_running_loop()
            pause_seconds = max(0.0, self._asked_at + _LEAST_PAUSE_SECONDS - loop.time())
            self._asking = loop.call_later(pause_seconds, self._look_again)

    def _look_again(self) -> None:
        self._asking = None
        if not self._seen_unleased and not self._driver.ledger.leased.disk_bytes:
            self._asked_at = asyncio.get_running_loop().time()
            self.look_again()

    async def _write(self, disk_bytes: int) -> None:
        try:
            async with asyncio.timeout(_WRITE_SECONDS):  # a journal that hangs must not hold up the node's registration
                await self._journal.set_note(_NOTE, str(disk_bytes))
        except (NodeServiceError, TimeoutError) as error:  # then the next start with leases knows less
            log.warning("allocatable_disk.not_noted", error=repr(error))


async def believe_note(ledger: Ledger, journal: Journal) -> None:
    """Size a ledger with leases, made from what is free now, by what was noted before them.

    No more than could be free if its tasks had filled all they lease: others may have written meanwhile.
    """
    noted = await journal.get_note(_NOTE)
    seen, leased = ledger.allocatable, ledger.leased.disk_bytes
    if noted is not None and noted.isdecimal() and leased:
        most_bytes = seen.disk_bytes + leased
        ledger.resize(replace(seen, disk_bytes=min(int(noted), most_bytes)), ledger.gpus)


def with_disk(node: NodeCapacity, disk_bytes: int) -> NodeCapacity:
    """The same node with that much allocatable disk."""
    allocatable = replace(node.allocatable, disk_bytes=disk_bytes)
    return replace(node, allocatable=allocatable, reserved=node.capacity.minus(allocatable))
