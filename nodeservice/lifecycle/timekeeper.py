"""Ends attempts at their deadlines, whatever phase they are in.

One sleeper per attempt that has a deadline. The time that is left of each deadline is taken when that becomes known, and
counted on a clock that nobody sets, so a jump of the host's clock ends nothing early and lets nothing last longer; after a
restart the host's clock is all there is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from nodeservice.core.deadlines import Deadline, deadlines
from nodeservice.core.model import AttemptId, TaskRecord
from nodeservice.lifecycle.driver import Driver
from nodeservice.ports import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """An attempt's deadlines, each with when it is on the steady clock, and who sleeps until the first of them."""

    due: Mapping[Deadline, float]
    sleeper: asyncio.Task[None]


class Timekeeper:
    """Listens to the driver from its creation; `open` takes up what the journal held."""

    def __init__(self, driver: Driver, clock: Clock) -> None:
        self._driver = driver
        self._clock = clock
        self._held: dict[AttemptId, _Held] = {}
        self._open = False
        driver.on_change(self._note)

    def open(self) -> None:
        """Begin. A deadline that passed while nobody looked is kept at once."""
        self._open = True
        for record in self._driver.live():
            self._note(record)

    async def close(self) -> None:
        self._open = False
        sleepers = [held.sleeper for held in self._held.values()]
        for task in sleepers:
            task.cancel()
        await asyncio.gather(*sleepers, return_exceptions=True)

    def _note(self, record: TaskRecord) -> None:
        if not self._open:
            return
        found = deadlines(record)
        held = self._held.get(record.id)
        if held is not None:
            if held.due.keys() == set(found):
                return
            held.sleeper.cancel()
            del self._held[record.id]
        if found:
            now, elapsed = self._clock.now(), self._clock.elapsed()
            due = {deadline: elapsed + (deadline.at - now).total_seconds() for deadline in found}
            if held is not None:
                due |= {deadline: at for deadline, at in held.due.items() if deadline in due}
            task = asyncio.create_task(self._keep(record.id, due), name=f"deadline {record.id}")
            self._held[record.id] = _Held(due=due, sleeper=task)

    async def _keep(self, id_: AttemptId, due: Mapping[Deadline, float]) -> None:
        first = min(due, key=lambda deadline: due[deadline])
        await self._clock.sleep(due[first] - self._clock.elapsed())
        self._driver.end(id_, first.cause, first.message)
