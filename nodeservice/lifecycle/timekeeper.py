"""Ends attempts at their deadlines, whatever phase they are in.

One sleeper per attempt that has a deadline. The time that is left of each deadline is taken when that becomes known, and
counted on a clock that nobody sets, so a jump of the host's clock ends nothing early and lets nothing last longer; after a
restart the host's clock is all there is.

Of a task that is being started the engine may be silent, or the journal may hang, though it runs already. Then the kernel
tells, and its running time counts from when it was seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from nodeservice.core.deadlines import Deadline, deadlines, of_run
from nodeservice.core.model import AttemptId, Phase, TaskRecord
from nodeservice.lifecycle.driver import Driver
from nodeservice.ports import Clock, TaskCgroups

_START_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """An attempt's deadlines, each with when it is on the steady clock, and who sleeps until the first of them."""

    due: Mapping[Deadline, float]
    sleeper: asyncio.Task[None]


class Timekeeper:
    """Listens to the driver from its creation; `open` takes up what the journal held."""

    def __init__(self, driver: Driver, clock: Clock, cgroups: TaskCgroups) -> None:
        self._driver = driver
        self._clock = clock
        self._cgroups = cgroups
        self._held: dict[AttemptId, _Held] = {}
        self._starting: dict[AttemptId, asyncio.Task[None]] = {}
        driver.on_change(self._note)

    def open(self) -> None:
        """Begin. A deadline that passed while nobody looked is kept at once."""
        for record in self._driver.live():
            self._note(record)

    async def close(self) -> None:
        sleepers = [*(held.sleeper for held in self._held.values()), *self._starting.values()]
        for task in sleepers:
            task.cancel()
        await asyncio.gather(*sleepers, return_exceptions=True)

    def _note(self, record: TaskRecord) -> None:
        self._note_start(record)
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

    def _note_start(self, record: TaskRecord) -> None:
        looking = self._starting.pop(record.id, None)
        if looking is not None:
            looking.cancel()
        limit = record.spec.timeout_seconds
        if record.phase is Phase.STARTING and record.stop is None and limit is not None:
            task = asyncio.create_task(self._keep_start(record.id, limit), name=f"start {record.id}")
            self._starting[record.id] = task

    async def _keep_start(self, id_: AttemptId, limit_seconds: float) -> None:
        due: float | None = None
        while due is None or self._clock.elapsed() < due:
            await self._clock.sleep(_START_LOOK_SECONDS)
            if not (await self._cgroups.processes([id_])).get(id_):
                due = None
            elif due is None:
                due = self._clock.elapsed() + limit_seconds
        over = of_run(self._clock.now(), limit_seconds)
        self._driver.end(id_, over.cause, over.message)
