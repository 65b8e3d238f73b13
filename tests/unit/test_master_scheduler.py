"""What the scheduler leaves to others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nodeservice.master.clock import MasterClock
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
async def test_others_get_as_much_time_as_a_look_at_the_queue_took(
    monkeypatch: pytest.MonkeyPatch, took_seconds: float, pause_seconds: float
) -> None:
    clock, nothing = Times(), _nothing()
    scheduler = Scheduler(nothing, nothing, clock)

    async def look() -> None:
        clock.now += took_seconds

    monkeypatch.setattr(scheduler, "_pass", look)
    with pytest.raises(asyncio.CancelledError):
        await scheduler.run()
    assert clock.pauses == [pytest.approx(pause_seconds)]


def _nothing() -> Any:
    """A book and nodes that are not looked at."""
    return None
