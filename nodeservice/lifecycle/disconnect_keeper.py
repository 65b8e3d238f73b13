"""Ends tasks that may not go on for long without a master that hears of them. Without such a limit, a task runs on.

When the master was last heard is written down while any task has a limit, so a restart of this node gives none of them more.
Within the process silence is measured on a clock that nobody sets.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import structlog

from nodeservice.core.model import AttemptId, Phase, StopCause, TaskRecord
from nodeservice.errors import TransientError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.ports import Journal

log = structlog.get_logger(__name__)

_NOTE = "master_heard_at"
_LOOK_SECONDS = 1.0
_WRITE_EVERY = timedelta(seconds=5)


class DisconnectKeeper:
    def __init__(self, context: Context, driver: Driver, journal: Journal) -> None:
        self._context = context
        self._driver = driver
        self._journal = journal
        self._heard_at: datetime | None = None
        self._written_at: datetime | None = None
        self._signs: dict[AttemptId, float] = {}
        """When each limited attempt was accepted, which was a sign of life too; on the clock that nobody sets."""
        self._heard: float | None = None

    async def run(self) -> None:
        """Work until cancelled."""
        text = await self._journal.get_note(_NOTE)
        if text is not None:
            self._written_at = datetime.fromisoformat(text)
            self._heard = self._moment(self._written_at)
        while True:
            await self.look()
            await self._context.clock.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        limited = [record for record in self._driver.live() if _is_limited(record)]
        self._signs = {
            record.id: self._signs[record.id] if record.id in self._signs else self._moment(record.accepted_at)
            for record in limited
        }
        heard_at = self._context.uplink.heard_at
        if heard_at is not None and heard_at != self._heard_at:
            self._heard_at, self._heard = heard_at, self._context.clock.elapsed()
        if not limited:
            return
        for record in limited:
            self._keep(record)
        if heard_at is not None and (self._written_at is None or abs(heard_at - self._written_at) >= _WRITE_EVERY):
            await self._write(heard_at)

    def _keep(self, record: TaskRecord) -> None:
        sign = self._signs[record.id]
        silent_seconds = self._context.clock.elapsed() - (sign if self._heard is None else max(sign, self._heard))
        limit = record.spec.disconnect_limit_seconds
        if limit is not None and silent_seconds > limit:
            message = f"The master was not heard for {silent_seconds:.0f} s; its limit is {limit:g} s."
            self._driver.end(record.id, StopCause.MASTER_LOST, message)

    def _moment(self, instant: datetime) -> float:
        """An instant of the host's clock, which may lie before a restart, on the clock that nobody sets."""
        clock = self._context.clock
        return clock.elapsed() - max(0.0, (clock.now() - instant).total_seconds())

    async def _write(self, heard_at: datetime) -> None:
        try:
            async with asyncio.timeout(_LOOK_SECONDS):  # a journal that hangs must not hold up the looks
                await self._journal.set_note(_NOTE, heard_at.isoformat())
            self._written_at = heard_at
        except (TransientError, TimeoutError) as error:
            log.debug("master.heard_not_written", error=repr(error))


def _is_limited(record: TaskRecord) -> bool:
    return record.spec.disconnect_limit_seconds is not None and record.phase <= Phase.RUNNING and record.stop is None
