"""Cordon and drain on a node in memory: what is taken, what is ended, what holds across a restart."""

from __future__ import annotations

import asyncio

import pytest

from nodeservice.core.model import AttemptId, Phase, Reason
from nodeservice.errors import CapacityError, TransientError
from nodeservice.lifecycle.node_mode import Mode, ModeKeeper
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from nodeservice.testing.memory_journal import MemoryJournal
from tests.unit.node_harness import LiveNode, World, living, running, spec

T = AttemptId("t")


@pytest.fixture
def world(tmp_path) -> World:  # type: ignore[no-untyped-def]
    return World(path=tmp_path, runtime=FakeRuntime(images={"demo": FakeImage(holds=True)}))


async def keeper_of(node: LiveNode) -> ModeKeeper:
    keeper = ModeKeeper(node.driver, node.world.journal, node.clock)
    await keeper.open()
    return keeper


async def test_a_cordoned_node_refuses_new_tasks_and_goes_on_with_those_it_has(world: World) -> None:
    async with living(world) as node:
        keeper = await keeper_of(node)
        container = await running(node, spec())
        await keeper.set(Mode.CORDONED)
        with pytest.raises(CapacityError) as caught:
            await node.assign(spec("late"))
        assert caught.value.reason == "NODE_DRAINING"
        assert keeper.unfinished_count == 1
        world.runtime.finish(container)
        await node.until_finished(T)
        assert keeper.unfinished_count == 0
        await keeper.set(Mode.ACTIVE)
        await node.assign(spec("late"))


async def test_a_repeated_assignment_is_answered_as_before_although_the_node_is_cordoned(world: World) -> None:
    async with living(world) as node:
        keeper = await keeper_of(node)
        await running(node, spec())
        await keeper.set(Mode.CORDONED)
        assert (await node.assign(spec())).id == T


async def test_the_mode_holds_across_a_restart(world: World) -> None:
    async with living(world) as node:
        await (await keeper_of(node)).set(Mode.DRAINING, deadline_seconds=3600)
    async with living(world) as node:
        keeper = await keeper_of(node)
        assert keeper.current.mode is Mode.DRAINING
        assert keeper.current.ends_at is not None
        with pytest.raises(CapacityError):
            await node.assign(spec())


async def test_what_still_runs_at_the_deadline_of_a_drain_is_ended_as_drained(world: World) -> None:
    async with living(world) as node:
        keeper = await keeper_of(node)
        work = asyncio.create_task(keeper.run())
        try:
            await running(node, spec())
            await keeper.set(Mode.DRAINING)
            await asyncio.sleep(0.05)
            assert node.phase(T) is Phase.RUNNING, "without a deadline it may finish"
            await keeper.set(Mode.DRAINING, deadline_seconds=0.05)
            record = await node.until_finished(T)
        finally:
            work.cancel()
        assert record.verdict is not None
        assert record.verdict.reason is Reason.NODE_DRAINED
        assert len(world.uplink.reports) == 1


async def test_a_mode_that_cannot_be_written_down_is_not_taken(world: World) -> None:
    class Full(MemoryJournal):
        async def set_note(self, key: str, value: str) -> None:
            raise TransientError("disk full", reason="JOURNAL_UNWRITABLE")

    async with living(world) as node:
        keeper = ModeKeeper(node.driver, Full(), node.clock)
        with pytest.raises(TransientError):
            await keeper.set(Mode.CORDONED)
        assert keeper.current.mode is Mode.ACTIVE
        await node.assign(spec())


class GatedJournal(MemoryJournal):
    """Each write of a note waits to be let through, in order; so many of the first fail then."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.gate = asyncio.Semaphore(0)
        self.waiting_count = 0
        self._failures = failures

    async def set_note(self, key: str, value: str) -> None:
        self.waiting_count += 1
        await self.gate.acquire()
        self.waiting_count -= 1
        if self._failures:
            self._failures -= 1
            raise TransientError("disk full", reason="JOURNAL_UNWRITABLE")
        await super().set_note(key, value)


@pytest.mark.parametrize(
    ("failures", "modes", "left"),
    [
        (1, (Mode.CORDONED, Mode.CORDONED), Mode.CORDONED),
        (1, (Mode.CORDONED, Mode.DRAINING), Mode.DRAINING),
        (2, (Mode.CORDONED, Mode.DRAINING), Mode.ACTIVE),
        (0, (Mode.ACTIVE, Mode.CORDONED), Mode.CORDONED),
    ],
)
async def test_modes_that_are_set_at_once_leave_the_one_that_was_written_last(
    world: World, failures: int, modes: tuple[Mode, Mode], left: Mode
) -> None:
    world.journal = journal = GatedJournal(failures)
    async with living(world) as node:
        keeper = await keeper_of(node)
        setting = [asyncio.create_task(keeper.set(mode)) for mode in modes]
        await node.until(lambda: journal.waiting_count > 0)
        journal.gate.release()
        journal.gate.release()
        answers = await asyncio.gather(*setting, return_exceptions=True)
        assert [isinstance(answer, TransientError) for answer in answers] == [failures > 0, failures > 1]
        assert keeper.current.mode is left
        assert node.driver.cordoned is (left is not Mode.ACTIVE)
        assert (await keeper_of(node)).current.mode is left, "as after a restart"


async def test_a_mode_that_cannot_be_read_is_taken_for_the_careful_one(world: World) -> None:
    await world.journal.set_note("node_mode", "{half")
    async with living(world) as node:
        assert (await keeper_of(node)).current.mode is Mode.CORDONED
