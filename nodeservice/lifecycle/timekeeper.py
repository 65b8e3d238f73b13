"""Ends attempts at their deadlines, whatever phase they are in.

One sleeper per attempt that has a deadline. It sleeps for the time that is left when the deadline becomes known, on a clock
that nobody sets, so a jump of the host's clock ends nothing early; after a restart the host's clock is all there is.
"""

from __future__ import annotations

import asyncio

from nodeservice.core import events as ev
from nodeservice.core.deadlines import Deadline, next_deadline
from nodeservice.core.model import AttemptId, StopRequest, TaskRecord
from nodeservice.lifecycle.driver import Driver
from nodeservice.ports import Clock


class Timekeeper:
    """Listens to the driver from its creation; `open` takes up what the journal held."""

    def __init__(self, driver: Driver, clock: Clock) -> None:
        self._driver = driver
        self._clock = clock
        self._sleepers: dict[AttemptId, tuple[Deadline, asyncio.Task[None]]] = {}
        self._open = False
        driver.on_change(self._note)

    def open(self) -> None:
        """Begin. A deadline that passed while nobody looked is kept at once."""
        self._open = True
        for record in self._driver.live():
            self._note(record)

    async def close(self) -> None:
        self._open = False
        sleepers = [task for _, task in self._sleepers.values()]
        for task in sleepers:
            task.cancel()
        await asyncio.gather(*sleepers, return_exceptions=True)

    def _note(self, record: TaskRecord) -> None:
        if not self._open:
            return
        deadline = next_deadline(record)
        held = self._sleepers.get(record.id)
        if held is not None:
            if held[0] == deadline:
                return
            held[1].cancel()
            del self._sleepers[record.id]
        if deadline is not None:
            task = asyncio.create_task(self._keep(record.id, deadline), name=f"deadline {record.id}")
            self._sleepers[record.id] = (deadline, task)

    async def _keep(self, id_: AttemptId, deadline: Deadline) -> None:
        await self._clock.sleep((deadline.at - self._clock.now()).total_seconds())
        now = self._clock.now()
        stop = StopRequest(cause=deadline.cause, requested_at=now, message=deadline.message)
        self._driver.post(id_, ev.StopRequested(at=now, stop=stop))
