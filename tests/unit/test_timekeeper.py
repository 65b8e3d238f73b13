"""Deadlines are kept in every phase, once, and by nobody's clock but the host's steady one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

import pytest

from nodeservice.core import events as ev
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId, Phase, Resources, StopCause, TaskSpec, TraceIds
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.timekeeper import Timekeeper
from nodeservice.limits.cgroup import NoTaskCgroups
from nodeservice.ports import TaskCgroups
from nodeservice.telemetry.tracing import NoTraceSink
from nodeservice.testing.manual_clock import ManualClock
from nodeservice.testing.memory_journal import MemoryJournal
from tests.unit.node_harness import spec

T = AttemptId("t")
TRACE = TraceIds(trace_id="1" * 32, span_id="2" * 16)
NODE = Resources(cpu_milli=4000, memory_bytes=2**32, disk_bytes=2**40)


class Room:
    """A driver that decides and journals while nobody acts."""

    def __init__(
        self, clock: ManualClock, journal: MemoryJournal | None = None, cgroups: TaskCgroups | None = None
    ) -> None:
        self.clock = clock
        self.journal = journal or MemoryJournal()
        self.driver = Driver(journal=self.journal, ledger=Ledger(NODE), clock=clock, traces=NoTraceSink())
        self.keeper = Timekeeper(self.driver, clock, cgroups or NoTaskCgroups())

    async def assign(self, task: TaskSpec) -> None:
        await self.driver.assign(task, trace=TRACE, received_at=self.clock.now())

    @property
    def cause(self) -> StopCause | None:
        record = self.driver.get(T)
        return record.stop.cause if record and record.stop else None


@contextlib.asynccontextmanager
async def opened(room: Room) -> AsyncIterator[Room]:
    await room.driver.open()
    running = asyncio.create_task(room.driver.run())
    room.keeper.open()
    try:
        yield room
    finally:
        await room.keeper.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(
    ("limits", "cause"),
    [
        ({"pull_timeout_seconds": 5.0, "total_timeout_seconds": 9.0}, StopCause.PULL_TIMEOUT),
        ({"wait_timeout_seconds": 5.0, "pull_timeout_seconds": 9.0}, StopCause.WAIT_TIMEOUT),
        ({"total_timeout_seconds": 5.0}, StopCause.DEADLINE),
    ],
)
async def test_a_deadline_is_kept_when_it_comes_and_not_before(limits: dict[str, object], cause: StopCause) -> None:
    async with opened(Room(ManualClock())) as room:
        await room.assign(spec(**limits))
        await room.clock.advance(4.9)
        assert room.cause is None
        await room.clock.advance(0.2)
        assert room.cause is cause
        record = room.driver.get(T)
        assert record is not None
        assert record.phase is Phase.COLLECTING


async def test_a_deadline_that_passed_while_nobody_looked_is_kept_at_once() -> None:
    clock, journal = ManualClock(), MemoryJournal()
    async with opened(Room(clock, journal)) as room:
        await room.assign(spec(total_timeout_seconds=5.0))
    await clock.advance(60.0)
    async with opened(Room(clock, journal)) as room:
        await clock.settle()
        assert room.cause is StopCause.DEADLINE


async def test_a_task_that_ended_leaves_no_sleeper() -> None:
    async with opened(Room(ManualClock())) as room:
        await room.assign(spec(total_timeout_seconds=5.0))
        assert room.clock.sleeper_count == 1
        record = room.driver.get(T)
        assert record is not None
        room.keeper._note(replace(record, phase=Phase.COLLECTING))
        await room.clock.settle()
        assert (room.clock.sleeper_count, room.keeper._held) == (0, {})


class Processes(NoTaskCgroups):
    """As the kernel lists them."""

    alive = False

    async def processes(self, ids: Collection[AttemptId]) -> Mapping[AttemptId, Sequence[int]]:
        return {id_: [4711] if self.alive else [] for id_ in ids}


async def starting(room: Room, clock: ManualClock) -> None:
    """Bring a task with a time limit of 60 s so far that its start has no answer."""
    await room.assign(spec(timeout_seconds=60.0))
    at = clock.now()
    room.driver.post(T, ev.ImagePulled(at=at, digest="d"))
    room.driver.post(T, ev.ContainerCreated(at=at, container_id="c"))


async def test_what_is_seen_to_run_while_its_start_is_not_answered_has_its_time_and_no_more() -> None:
    clock, cgroups = ManualClock(), Processes()
    async with opened(Room(clock, cgroups=cgroups)) as room:
        await starting(room, clock)
        await clock.advance(300.0)
        for alive in (True, False, True):  # the first start came to nothing
            cgroups.alive = alive
            await clock.advance(59.0)
            assert room.cause is None
        await clock.advance(3.0)
        assert room.cause is StopCause.DEADLINE
        assert clock.sleeper_count == 0


async def test_nobody_sleeps_once_it_is_closed() -> None:
    clock = ManualClock()
    async with opened(Room(clock)) as room:
        await starting(room, clock)
        await room.assign(spec("other", timeout_seconds=60.0, total_timeout_seconds=5.0))
        await clock.settle()
        assert clock.sleeper_count == 2
    assert clock.sleeper_count == 0


async def test_from_the_answer_to_its_start_its_time_counts_from_there() -> None:
    clock, cgroups = ManualClock(), Processes()
    cgroups.alive = True
    async with opened(Room(clock, cgroups=cgroups)) as room:
        await starting(room, clock)
        await clock.advance(30.0)
        room.driver.post(T, ev.ContainerStarted(at=clock.now(), started_at=clock.now()))
        await clock.advance(59.0)
        assert (room.cause, room.keeper._starting) == (None, {})
        await clock.advance(2.0)
        assert room.cause is StopCause.DEADLINE


class JumpingClock(ManualClock):
    """Somebody sets the host's clock; sleeps count on."""

    jump = timedelta(0)

    def now(self):  # type: ignore[no-untyped-def]
        return super().now() + self.jump


async def test_a_clock_that_is_set_ends_nothing_early() -> None:
    clock = JumpingClock()
    async with opened(Room(clock)) as room:
        await room.assign(spec(total_timeout_seconds=60.0))
        clock.jump = timedelta(hours=5)
        await room.clock.advance(59.0)
        assert room.cause is None
        await room.clock.advance(2.0)
        assert room.cause is StopCause.DEADLINE


@pytest.mark.parametrize("hours", [3, -3])
async def test_a_deadline_that_is_not_the_first_is_not_moved_by_a_clock_that_is_set_before_its_turn(hours: int) -> None:
    clock = JumpingClock()
    async with opened(Room(clock)) as room:
        await room.assign(spec(wait_timeout_seconds=600.0, total_timeout_seconds=7200.0))
        await clock.advance(60.0)
        clock.jump = timedelta(hours=hours)
        await clock.advance(60.0)
        record = room.driver.get(T)
        assert record is not None
        room.keeper._note(replace(record, phase=Phase.RUNNING))
        await clock.advance(7075.0)
        assert room.cause is None
        await clock.advance(10.0)
        assert room.cause is StopCause.DEADLINE
