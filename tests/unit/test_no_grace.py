"""What broke a limit, or fills the host, is killed at once, though it is being ended with a long grace period already."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeservice.core.gpus import GpuRequest, GpuShare
from nodeservice.core.model import GIB, AttemptId, Phase, Reason, StopCause, StopRequest, TaskRecord, Usage
from nodeservice.gpu.units import SharingPolicy
from nodeservice.lifecycle import host_keeper
from nodeservice.limits.cgroup import NoTaskCgroups
from nodeservice.ports import GpuProcess, OomFacts
from nodeservice.testing.fake_gpu import FakeGpuProvider, fake_gpu
from nodeservice.testing.fake_runtime import FakeImage
from tests.unit.node_harness import HeldJournal, LiveNode, World, living, running, spec

T, BIG, SMALL = AttemptId("t"), AttemptId("big"), AttemptId("small")
DAY = 86_400.0
MIB = 1024**2


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.runtime.images["demo"] = FakeImage(holds=True, ignores_term=True)
    return world


def cancel(node: LiveNode, id_: AttemptId = T) -> asyncio.Task[TaskRecord]:
    request = StopRequest(cause=StopCause.CANCELLED, requested_at=node.clock.now())
    return asyncio.create_task(node.driver.request_stop(id_, request))


def calls(node: LiveNode, method: str) -> int:
    return [name for name, _ in node.world.runtime.calls].count(method)


def known(node: LiveNode, id_: AttemptId, check: Callable[[TaskRecord], bool]) -> Callable[[], bool]:
    return lambda: (record := node.driver.get(id_)) is not None and check(record)


def was_cancelled_and_tells(record: TaskRecord, limit: str) -> bool:
    assert record.verdict is not None
    assert record.verdict.reason is Reason.CANCELLED
    return any(limit in remark for remark in record.remarks)


async def test_a_cancelled_task_that_writes_too_much_is_killed_and_the_verdict_stays(world: World) -> None:
    async with living(world) as node:
        await running(node, spec(grace_seconds=DAY))
        await cancel(node)
        await node.until(lambda: calls(node, "stop") == 1)
        world.disk.write(T, 4 * MIB)
        assert was_cancelled_and_tells(await node.until_finished(T), "disk limit")


async def test_a_kill_that_was_decided_on_before_a_restart_is_no_gentle_stop_after_it(world: World) -> None:
    async with living(world) as node:
        await running(node, spec(grace_seconds=DAY))
        await cancel(node)
        world.runtime.unavailable = True
        world.disk.write(T, 4 * MIB)
        await node.until(known(node, T, lambda record: record.escalation is not None))
    world.disk.write(T, 0)
    world.runtime.unavailable = False
    async with living(world) as node:
        assert was_cancelled_and_tells(await node.until_finished(T), "disk limit")


async def test_a_cancelled_task_that_takes_too_much_gpu_memory_is_killed(world: World) -> None:
    gpu = fake_gpu()
    world.gpus, world.gpu_policy = FakeGpuProvider(gpu), SharingPolicy(allowed=True)
    async with living(world) as node:
        await node.until(lambda: node.driver.ledger.free.gpu_count == 1)
        await running(node, spec(gpu=GpuRequest(share=GpuShare(memory_bytes=10 * GIB)), grace_seconds=DAY))
        await cancel(node)
        world.owners.of[7] = T
        world.gpus.change(gpu.uuid, processes=(GpuProcess(pid=7, memory_bytes=60 * GIB),))
        assert was_cancelled_and_tells(await node.until_finished(T), "GPU memory")


async def test_a_limit_ends_at_once_what_was_cancelled_gently_before_the_journal_went_away(world: World) -> None:
    world.journal = journal = HeldJournal()
    async with living(world) as node:
        await running(node, spec("small"))
        (other,) = world.runtime.running
        await running(node, spec(grace_seconds=DAY))
        await cancel(node)
        await node.until(lambda: calls(node, "stop") == 1)
        journal.full = True
        world.runtime.finish(other, 0)
        await node.until(lambda: node.driver.journal_error is not None)
        world.disk.write(T, 4 * MIB)
        await node.until(lambda: not world.runtime.running)
        journal.full = False
        assert was_cancelled_and_tells(await node.until_finished(T), "disk limit")


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_limit_ends_at_once_what_was_cancelled_gently_while_the_journal_was_away(
    world: World, hangs: bool
) -> None:
    world.journal = journal = HeldJournal()
    async with living(world) as node:
        await running(node, spec(grace_seconds=DAY))
        if hangs:
            journal.free.clear()
        else:
            journal.full = True
        asked = cancel(node)
        await node.until(lambda: calls(node, "stop") == 1)
        assert world.runtime.running
        world.disk.write(T, 4 * MIB)
        await node.until(lambda: not world.runtime.running)
        journal.full = False
        journal.free.set()
        await asked
        assert was_cancelled_and_tells(await node.until_finished(T), "disk limit")


# ---- a host that runs out of disk -------------------------------------------------------------------------------------


@pytest.fixture
def host(world: World) -> World:
    world.keep_free_disk_bytes = 1000
    world.free_space.free_bytes = 5000
    return world


async def test_a_task_that_is_ended_gently_does_not_save_the_largest_on_a_full_host(host: World) -> None:
    async with living(host) as node:
        for name, written_bytes in (("small", 10), ("big", 900)):
            await running(node, spec(name, grace_seconds=DAY))
            host.disk.write(AttemptId(name), written_bytes)
        await cancel(node, SMALL)
        host.free_space.free_bytes = 10
        await node.until(known(node, BIG, lambda record: record.stop is not None))
        host.free_space.free_bytes = 5000
        record = await node.until_finished(BIG)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.NODE_DISK_LOW
        assert node.phase(SMALL) is Phase.RUNNING


async def test_the_largest_goes_at_once_on_a_full_host_though_it_is_being_ended_gently(host: World) -> None:
    async with living(host) as node:
        await running(node, spec(grace_seconds=DAY))
        await cancel(node)
        host.disk.write(T, 900)
        host.free_space.free_bytes = 10
        assert was_cancelled_and_tells(await node.until_finished(T), "run out of disk")


async def test_one_goes_after_the_other_though_the_full_host_keeps_the_journal_from_being_written(
    host: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_keeper, "_MAKE_ROOM_SECONDS", 0.05)
    host.journal = journal = HeldJournal()
    async with living(host) as node:
        for name, written_bytes in (("small", 10), ("big", 900)):
            await running(node, spec(name, grace_seconds=DAY))
            host.disk.write(AttemptId(name), written_bytes)
        journal.full = True
        host.free_space.free_bytes = 10
        await node.until(lambda: not host.runtime.running)
        journal.full = False
        for id_ in (SMALL, BIG):
            record = await node.until_finished(id_)
            assert record.verdict is not None
            assert record.verdict.reason is Reason.NODE_DISK_LOW


class CgroupsOfOneThatNeverEmpties(NoTaskCgroups):
    async def usage(self, id_: AttemptId) -> Usage | None:
        return None if id_ == BIG else await super().usage(id_)

    async def at_end(self, id_: AttemptId) -> tuple[OomFacts, Usage | None]:
        kills, _ = await super().at_end(id_)
        return kills, await self.usage(id_)


async def test_one_that_cannot_be_ended_does_not_save_the_next_on_a_full_host(
    host: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_keeper, "_MAKE_ROOM_SECONDS", 0.05)
    host.cgroups = CgroupsOfOneThatNeverEmpties()
    async with living(host) as node:
        for name, written_bytes in (("small", 10), ("big", 900)):
            await running(node, spec(name, grace_seconds=DAY))
            host.disk.write(AttemptId(name), written_bytes)
        host.free_space.free_bytes = 10
        record = await node.until_finished(SMALL)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.NODE_DISK_LOW
        assert node.phase(BIG) is Phase.COLLECTING
