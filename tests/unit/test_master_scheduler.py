"""What the scheduler leaves to others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nodeservice.master.clock import MasterClock
from nodeservice.master.plan import Candidate
from nodeservice.master.rows import TaskRow
from nodeservice.master.scheduler import Scheduler


class Times(MasterClock):
    """The first pause ends whoever waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        raise asyncio.CancelledError


@pytest.mark.parametrize(("took_seconds", "pause_seconds"), [(0.001, 0.02), (3.0, 3.0)])
async def test_others_get_as_much_time_as_a_look_at_the_queue_took_and_no_more_for_a_database_that_is_slow(
    monkeypatch: pytest.MonkeyPatch, took_seconds: float, pause_seconds: float
) -> None:
    clock = Times()
    scheduler = Scheduler(_nothing(), _nothing(), clock)

    async def ask_the_database(_: float) -> None:
        clock.now += 600

    def look(_: float) -> list[Candidate]:
        clock.now += took_seconds
        return []

    monkeypatch.setattr(scheduler, "_give_up_waiting", ask_the_database)
    monkeypatch.setattr(scheduler, "_candidates", look)
    with pytest.raises(asyncio.CancelledError):
        await scheduler.run()
    assert clock.pauses == [pytest.approx(pause_seconds)]


class Nothing:
    """A book without tasks, and nodes that are not there."""

    def open_rows(self) -> list[TaskRow]:
        return []

    def explain(self, notes: object) -> None:
        return None

    def notice_silence(self) -> None:
        return None


def _nothing() -> Any:
    return Nothing()
