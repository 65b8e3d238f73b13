"""The clock of the host, and the one that tests turn by hand."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from nodeservice import clock as clock_module
from nodeservice.clock import SystemClock
from nodeservice.testing.manual_clock import ManualClock


async def test_the_host_s_clock_is_aware_utc_and_takes_any_length() -> None:
    clock = SystemClock()
    assert clock.now().tzinfo is UTC
    before = clock.now()
    await clock.sleep(-1)
    await clock.sleep(0)
    await clock.sleep(0.01)
    assert clock.now() > before


async def test_a_sleep_is_over_when_its_host_was_suspended_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_module, "_LONGEST_SLEEP_SECONDS", 0.001)
    clock, before = SystemClock(), SystemClock().elapsed()
    sleeper = asyncio.create_task(clock.sleep(3600.0))
    await asyncio.sleep(0.01)
    assert not sleeper.done()
    monkeypatch.setattr(SystemClock, "elapsed", lambda _self: before + 3601.0)
    await sleeper


async def test_a_manual_clock_wakes_sleepers_at_their_instants_and_not_before() -> None:
    clock = ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
    start, woken = clock.now(), list[tuple[str, timedelta]]()

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.now() - start))

    tasks = [asyncio.create_task(sleeper(name, seconds)) for name, seconds in (("b", 2), ("a", 1), ("c", 10))]
    await clock.advance(0.5)
    assert woken == []
    assert clock.sleeper_count == 3
    await clock.advance(4.5)
    assert woken == [("a", timedelta(seconds=1)), ("b", timedelta(seconds=2))]
    assert clock.now() == start + timedelta(seconds=5)
    await clock.advance(5)
    await asyncio.gather(*tasks)
    assert woken[2] == ("c", timedelta(seconds=10))


async def test_one_advance_carries_a_loop_through_all_its_rounds() -> None:
    clock, rounds = ManualClock(), list[datetime]()

    async def beat() -> None:
        while True:
            await clock.sleep(5)
            rounds.append(clock.now())

    task = asyncio.create_task(beat())
    await clock.advance(60)
    task.cancel()
    assert len(rounds) == 12


async def test_a_sleeper_that_was_cancelled_is_forgotten() -> None:
    clock = ManualClock()
    task = asyncio.create_task(clock.sleep(5))
    await clock.settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert clock.sleeper_count == 0
    await clock.advance(10)
