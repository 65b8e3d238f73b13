"""When a container began and how long it ran, while the host's clock is set."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from nodeservice.lifecycle.stretch import Stretch
from nodeservice.ports import ContainerState
from nodeservice.testing.manual_clock import ManualClock

HOUR = timedelta(hours=1)


class JumpingClock(ManualClock):
    """Somebody sets it; sleeps count on."""

    jump = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.jump


def ended(started_at: datetime, finished_at: datetime) -> ContainerState:
    return ContainerState(
        id="c",
        name="c",
        status="exited",
        pid=None,
        started_at=started_at,
        finished_at=finished_at,
        exit_code=0,
        oom_killed=False,
        error="",
        labels={},
    )


@pytest.mark.parametrize("engine", [-HOUR, timedelta(0), HOUR], ids=["behind", "as ours", "ahead"])
@pytest.mark.parametrize("jump", [-HOUR, timedelta(0), HOUR], ids=["set back", "not set", "set ahead"])
async def test_what_began_in_a_stretch_began_neither_before_nor_after_it(engine: timedelta, jump: timedelta) -> None:
    clock = JumpingClock()
    stretch = Stretch(clock)
    await clock.advance(1.0)
    told = clock.now() + engine
    clock.jump = jump
    await clock.advance(1.0)
    age = clock.now() - stretch.within(told)
    assert timedelta(0) <= age <= timedelta(seconds=2)
    if engine == jump == timedelta(0):
        assert age == timedelta(seconds=1)
    assert stretch.within(None) == clock.now()


@pytest.mark.parametrize("jump", [-HOUR, HOUR], ids=["set back", "set ahead"])
async def test_what_ran_while_the_clock_was_set_ran_as_long_as_it_did(jump: timedelta) -> None:
    clock = JumpingClock()
    began_at = clock.now()
    await clock.advance(1.0)
    stretch = Stretch(clock)
    await clock.advance(59.0)
    assert not stretch.clock_was_set
    clock.jump = jump
    await clock.advance(60.0)
    assert stretch.clock_was_set
    assert stretch.ran(began_at, ended(began_at, max(began_at, clock.now()))) == timedelta(seconds=120)


async def test_what_had_ended_before_it_was_looked_at_ran_for_as_long_as_the_engine_says() -> None:
    clock = ManualClock()
    began_at = clock.now()
    await clock.advance(600.0)
    state = ended(began_at, began_at + timedelta(seconds=20))
    assert Stretch(clock).ran(began_at, state) == timedelta(seconds=20)
