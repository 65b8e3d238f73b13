"""Ends tasks that may not go on for long without a master that hears of them. Without such a limit, a task runs on.

When the master was last heard is written down while any task has a limit, so a restart of this node gives none of them more.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import Phase, StopCause, StopRequest, TaskRecord
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
        self._written_at: datetime | None = None

    async def run(self) -> None:
        """Work until cancelled."""
        text = await self._journal.get_note(_NOTE)
        if text is not None:
            self._written_at = datetime.fromisoformat(text)
        while True:
            await self.look()
            await self._context.clock.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        limited = [record for record in self._driver.live() if _is_limited(record)]
        if not limited:
            return
        heard_at = self._context.uplink.heard_at
        if heard_at is not None and (self._written_at is None or heard_at - self._written_at >= _WRITE_EVERY):
            await self._write(heard_at)
        now = self._context.clock.now()
        for record in limited:
            # That it was accepted was a sign of life too.
            last = max(filter(None, (heard_at, self._written_at, record.accepted_at)))
            limit = record.spec.disconnect_limit_seconds
            if limit is not None and (now - last).total_seconds() > limit:
                message = (
                    f"The master was not heard for {(now - last).total_seconds():.0f} s; its limit is {limit:g} s."
                )
                stop = StopRequest(cause=StopCause.MASTER_LOST, requested_at=now, message=message)
                self._driver.post(record.id, ev.StopRequested(at=now, stop=stop))

    async def _write(self, heard_at: datetime) -> None:
        try:
            await self._journal.set_note(_NOTE, heard_at.isoformat())
            self._written_at = heard_at
        except TransientError as error:
            log.debug("master.heard_not_written", error=str(error))


def _is_limited(record: TaskRecord) -> bool:
    return record.spec.disconnect_limit_seconds is not None and record.phase <= Phase.RUNNING and record.stop is None
