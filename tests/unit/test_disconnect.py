"""Tasks that may not go on for long without the master, on a node in memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from nodeservice.clock import SystemClock
from nodeservice.core.model import AttemptId, Phase, Reason
from nodeservice.lifecycle.disconnect_keeper import DisconnectKeeper
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from nodeservice.testing.memory_journal import MemoryJournal
from tests.unit.node_harness import World, living, spec

pytestmark = pytest.mark.slow

T = AttemptId("t")


@pytest.fixture
def world(tmp_path) -> World:  # type: ignore[no-untyped-def]
    return World(path=tmp_path, runtime=FakeRuntime(images={"demo": FakeImage(holds=True)}))


async def test_a_task_with_a_limit_ends_once_the_master_was_silent_for_longer(world: World) -> None:
    async with living(world) as node:
        await node.assign(spec(disconnect_limit_seconds=0.2))
        await node.assign(spec("patient"))
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.MASTER_LOST
        assert node.phase(AttemptId("patient")) is Phase.RUNNING


async def test_a_journal_that_hangs_at_the_note_gives_it_no_more_time(world: World) -> None:
    class HangsAtNotes(MemoryJournal):
        async def set_note(self, key: str, value: str) -> None:
            await asyncio.Event().wait()

    world.journal = HangsAtNotes()
    async with living(world) as node:
        world.uplink.heard_at = node.clock.now()
        await node.assign(spec(disconnect_limit_seconds=1.5))
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.MASTER_LOST


async def test_a_master_that_is_heard_keeps_it_running(world: World) -> None:
    async with living(world) as node:
        await node.assign(spec(disconnect_limit_seconds=2.0))
        for _ in range(7):
            world.uplink.heard_at = heard_at = node.clock.now()
            await node.clock.sleep(0.5)
        assert node.phase(T) is Phase.RUNNING
        written = await world.journal.get_note("master_heard_at")
        assert written is not None
        assert heard_at - datetime.fromisoformat(written) < timedelta(seconds=5)


class SetClock(SystemClock):
    """A host's clock that somebody sets."""

    ahead = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.ahead


@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)])
async def test_a_clock_that_is_set_makes_the_silence_no_longer_and_no_shorter(world: World, jump: timedelta) -> None:
    async with living(world) as node:
        clock = SetClock()
        keeper = DisconnectKeeper(replace(node.context, clock=clock), node.driver, world.journal)
        await node.assign(spec(disconnect_limit_seconds=3.0))
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        await keeper.look()
        clock.ahead = jump
        await keeper.look()
        await node.driver.settled()
        record = node.driver.get(T)
        assert record is not None
        assert record.stop is None
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.MASTER_LOST


async def test_a_restart_gives_it_no_more_time(world: World) -> None:
    async with living(world) as node:
        await node.assign(spec(disconnect_limit_seconds=1.5))
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        await node.clock.sleep(1.0)
    async with living(world) as node:
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.MASTER_LOST
