"""Whether this node takes work: cordoned (it takes nothing), draining (it also ends what is left at a deadline), active.

The mode is written down before it is answered, so it holds across restarts: a node that is being upgraded comes back in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

import structlog

from nodeservice.core.model import Phase, StopCause
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.patience import Patience
from nodeservice.ports import Clock, Journal

log = structlog.get_logger(__name__)

_NOTE = "node_mode"


class Mode(StrEnum):
    ACTIVE = "ACTIVE"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMode:
    """`ends_at`: when a draining node ends what still runs; None lets it finish."""

    mode: Mode = Mode.ACTIVE
    ends_at: datetime | None = None


class ModeKeeper:
    """Sets the driver's `cordoned`. Open it before work is taken."""

    def __init__(self, driver: Driver, journal: Journal, clock: Clock) -> None:
        self._driver = driver
        self._journal = journal
        self._clock = clock
        self._changed = asyncio.Event()
        self._setting = asyncio.Lock()
        """One at a time: what a mode that cannot be written is taken back to must be one that is."""
        self._patience: Patience | None = None
        self.current = self._written = NodeMode()

    async def open(self) -> None:
        """Take up the mode of before the restart. One that cannot be read is the careful one."""
        text = await self._journal.get_note(_NOTE)
        if text is not None:
            try:
                told = json.loads(text)
                ends_at = datetime.fromisoformat(told["ends_at"]) if told["ends_at"] else None
                self.current = NodeMode(mode=Mode(told["mode"]), ends_at=ends_at)
            except (ValueError, KeyError, TypeError):
                log.error("node.mode_unreadable", note=text[:200])
                self.current = NodeMode(mode=Mode.CORDONED)
        self._written = self.current
        self._apply()

    async def set(self, mode: Mode, *, deadline_seconds: float | None = None) -> NodeMode:
        """Durable when it returns. Raises TransientError (JOURNAL_UNWRITABLE), and then nothing has changed."""
        ends_at = None
        if mode is Mode.DRAINING and deadline_seconds is not None:
            ends_at = self._clock.now() + timedelta(seconds=deadline_seconds)
        wanted = NodeMode(mode=mode, ends_at=ends_at)
        if mode is not Mode.ACTIVE:
            self._take(wanted)  # no task is from here on, also not while it is being written
        try:
            async with self._setting:
                await self._write(wanted)
                self._written = wanted
                if self.current != wanted:
                    self._take(wanted)
        except BaseException:
            if self.current == wanted:
                self._take(self._written)
            raise
        log.info("node.mode", mode=mode.value, ends_at=ends_at.isoformat() if ends_at else None)
        return wanted

    @property
    def unfinished_count(self) -> int:
        """Attempts that are not reported yet."""
        return sum(1 for record in self._driver.live() if record.phase <= Phase.REPORTING)

    async def run(self) -> None:
        """End what is left at the deadline of a drain; work until cancelled."""
        while True:
            self._changed.clear()
            left_seconds = self._left_seconds()
            if left_seconds is not None and left_seconds <= 0:
                self._end_all()
                left_seconds = 1.0  # one that was just being made is ended at the next look
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_seconds):
                    await self._changed.wait()

    def _left_seconds(self) -> float | None:
        return None if self._patience is None else self._patience.left_seconds

    def _end_all(self) -> None:
        for record in self._driver.live():
            if record.phase <= Phase.RUNNING and record.stop is None:
                self._driver.end(record.id, StopCause.NODE_DRAINED)

    def _take(self, mode: NodeMode) -> None:
        self.current = mode
        self._apply()
        self._changed.set()

    def _apply(self) -> None:
        ends_at = self.current.ends_at
        self._patience = None
        if ends_at is not None:
            self._patience = Patience(self._clock, (ends_at - self._clock.now()).total_seconds())
        self._driver.cordoned = self.current.mode is not Mode.ACTIVE

    async def _write(self, mode: NodeMode) -> None:
        ends_at = mode.ends_at.isoformat() if mode.ends_at else None
        await self._journal.set_note(_NOTE, json.dumps({"mode": mode.mode.value, "ends_at": ends_at}))
