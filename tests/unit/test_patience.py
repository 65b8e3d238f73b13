"""Time limits and ages under a clock that somebody sets."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from nodeservice.core.model import AttemptId, Outcome, Phase
from nodeservice.core.retry import Backoff, is_worth_telling
from nodeservice.errors import TransientError
from nodeservice.lifecycle.patience import AgeClock, Patience
from nodeservice.testing.manual_clock import ManualClock
from tests.unit.node_harness import World, living, spec

HOUR = timedelta(hours=1)


class SetClock(ManualClock):
    ahead = timedelta(0)

    def now(self):  # type: ignore[no-untyped-def]
        return super().now() + self.ahead


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
async def test_a_limit_is_as_long_as_it_was_given_however_the_clock_is_set(jump: timedelta) -> None:
    clock = SetClock()
    patience = Patience(clock, 60)
    clock.ahead = jump
    await clock.advance(59)
    assert not patience.is_over
    await clock.advance(1)
    assert patience.is_over


async def test_what_had_passed_before_a_restart_counts() -> None:
    clock = SetClock()
    assert Patience(clock, 60, since=clock.now() - timedelta(seconds=50)).left_seconds == 10
    assert Patience(clock, 60, since=clock.now() - HOUR).is_over
    assert Patience(clock, 60, since=clock.now() + HOUR).left_seconds == 60, "the clock was set back meanwhile"


async def test_a_clock_set_ahead_makes_nothing_older_and_one_set_back_makes_it_younger() -> None:
    clock = SetClock()
    ages = AgeClock(clock)
    began_at = clock.now()
    clock.ahead = 365 * 24 * HOUR
    await clock.advance(5)
    assert ages.now() == began_at + timedelta(seconds=5)
    clock.ahead = -HOUR
    assert ages.now() == began_at + timedelta(seconds=5) - HOUR


def test_pauses_double_up_to_the_longest_and_ever_fewer_failures_are_told() -> None:
    backoff = Backoff(first_seconds=0.5, max_seconds=30.0)
    assert [backoff.delay(failures, 0.0) for failures in (1, 2, 6, 7, 10_000)] == [0.25, 0.5, 8.0, 15.0, 15.0]
    assert backoff.delay(1, 0.5) == 0.375
    assert [failures for failures in range(1, 301) if is_worth_telling(failures)] == [1, 10, 100, 200, 300]


async def test_results_are_not_given_up_early_because_the_clock_was_set(tmp_path: Path) -> None:
    world = World(tmp_path, give_up_seconds=600)
    world.store.fail_next(5, TransientError("away", reason="STORE_UNREACHABLE"))
    world.store.block()
    async with living(world) as node:
        slow = Backoff(first_seconds=0.05, max_seconds=0.05)
        object.__setattr__(node.context.settings, "store_backoff", slow)
        clock = node.clock
        real_now = clock.now
        await node.assign(spec())
        await node.until(lambda: node.phase(AttemptId("t")) is Phase.UPLOADING)
        object.__setattr__(clock, "now", lambda: real_now() + HOUR)
        world.store.unblock()
        record = await node.until_finished(AttemptId("t"))
    assert record.verdict is not None
    assert record.verdict.outcome is Outcome.SUCCEEDED
