"""What a task has written is leased and is missing from the free disk, and counts once, also across a restart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nodeservice.capacity import source
from nodeservice.config import NodeConfig
from nodeservice.core.model import GIB, MIB, AttemptId, Phase, Resources
from nodeservice.daemon.look import look
from nodeservice.daemon.node import Node, build
from nodeservice.errors import TransientError
from nodeservice.lifecycle.allocatable_disk import AllocatableDisk
from nodeservice.ports import DiskFacts, GpuInventory, HostFacts, NodeCapacity, UsageSample
from nodeservice.rpc.status import NodeStatus
from nodeservice.telemetry.tracing import new_trace_ids
from nodeservice.testing.fake_runtime import FakeImage
from nodeservice.testing.manual_clock import ManualClock
from nodeservice.testing.memory_journal import MemoryJournal
from tests.unit.node_harness import NODE, World, living, running, spec

T = AttemptId("t")
RESERVED = 1 * MIB
LEASED = 500 * MIB
WROTE = spec().request.disk_bytes // 2


class Disk:
    free_bytes = 1000 * MIB

    def read(self, path: Path, *, root: Path = Path("/")) -> DiskFacts:
        return DiskFacts(
            path=path, filesystem="tmpfs", device="tmpfs", total_bytes=1000 * MIB, free_bytes=self.free_bytes
        )


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(source, "read_disk", found.read)
    return found


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    return NodeConfig(
        worker_id="n",
        state_dir=tmp_path / "state",
        docker_host=f"unix://{tmp_path}/none.sock",
        reserve_disk_bytes=RESERVED,
        insecure=True,
    )


@contextlib.asynccontextmanager
async def started(config: NodeConfig) -> AsyncIterator[Node]:
    """A node that decides and journals while nobody acts."""
    node = await build(config)
    running = asyncio.create_task(node.driver.run())
    try:
        yield node
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await node.close()


async def assign(node: Node) -> None:
    task = spec(request=Resources(cpu_milli=100, memory_bytes=64 * MIB, disk_bytes=LEASED))
    await node.driver.assign(task, trace=new_trace_ids(None), received_at=node.clock.now())


async def test_a_restart_does_not_count_the_disk_of_running_tasks_twice(disk: Disk, config: NodeConfig) -> None:
    async with started(config) as node:
        assert node.driver.ledger.allocatable.disk_bytes == 999 * MIB
        await assign(node)
    disk.free_bytes -= 400 * MIB
    seen = await look(config)
    assert (seen.capacity.allocatable.disk_bytes, seen.free.disk_bytes) == (999 * MIB, 499 * MIB)
    async with started(config) as node:
        ledger = node.driver.ledger
        assert ledger.allocatable.disk_bytes == 999 * MIB
        shortfall = ledger.shortfall(Resources(disk_bytes=600 * MIB))
        assert shortfall is not None
        assert shortfall.ever
        assert (await node.disk.look()).allocatable.disk_bytes == 999 * MIB


async def test_what_others_wrote_before_a_restart_is_not_offered(disk: Disk, config: NodeConfig) -> None:
    async with started(config) as node:
        await assign(node)
    disk.free_bytes = 300 * MIB
    async with started(config) as node:
        assert node.driver.ledger.allocatable.disk_bytes == 299 * MIB + LEASED


class Capacity:
    """Of a host that changes."""

    def __init__(self, disk_bytes: int, cpu_milli: int = NODE.cpu_milli) -> None:
        self.disk_bytes = disk_bytes
        self.cpu_milli = cpu_milli
        self.count = 0
        self.fails = False

    async def read(self) -> NodeCapacity:
        self.count += 1
        if self.fails:
            raise OSError("no such /proc")
        allocatable = replace(NODE, disk_bytes=self.disk_bytes, cpu_milli=self.cpu_milli)
        disk = Disk().read(Path("/"))
        host = HostFacts(
            hostname="h", kernel="k", cgroup_version=2, cpu_model="c", cpu_logical_count=1, cpu_physical_count=1,
            cpu_usable_milli=1, memory_total_bytes=1, memory_limit_bytes=1, memory_available_bytes=1, disk=disk,
            engine_disk=None, engine=None, engine_error=None, gpus=GpuInventory(),
        )  # fmt: skip
        return NodeCapacity(host=host, capacity=NODE, reserved=NODE.minus(allocatable), allocatable=allocatable)

    async def sample(self) -> UsageSample:
        return UsageSample(cpu_percent=1.0, memory_percent=2.0, disk_percent=3.0, gpu_percent=4.0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.runtime.images["demo"] = FakeImage(holds=True)
    return world


async def test_the_disk_is_looked_at_again_when_the_last_lease_of_a_restart_goes(world: World) -> None:
    async with living(world) as node:
        await running(node, spec())
    async with living(world) as node:
        capacity = Capacity(NODE.disk_bytes - WROTE)
        disk = AllocatableDisk(node.driver, capacity, world.journal)
        wanted = asyncio.Event()
        disk.look_again = wanted.set
        await disk.open()
        await disk.look()
        assert node.driver.ledger.allocatable.disk_bytes == NODE.disk_bytes, "what is leased is not counted twice"
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        world.runtime.finish(world.runtime.running[0])
        async with asyncio.timeout(30):
            await wanted.wait()
        await disk.look()
        assert node.driver.ledger.allocatable.disk_bytes == capacity.disk_bytes
        wanted.clear()
        await node.assign(spec("next"))
        await node.until(lambda: node.phase(AttemptId("next")) is Phase.RUNNING)
        world.runtime.finish(world.runtime.running[0])
        await node.until_finished(AttemptId("next"))
        await asyncio.sleep(0)
        assert not wanted.is_set(), "it was seen while nothing was leased"


async def test_a_lease_that_goes_during_the_look_does_not_make_it_believed(world: World) -> None:
    async with living(world) as node:
        container = await running(node, spec())
        capacity = Capacity(NODE.disk_bytes - WROTE)
        disk = AllocatableDisk(node.driver, capacity, world.journal)
        read = capacity.read

        async def slow() -> NodeCapacity:
            found = await read()
            world.runtime.finish(container)
            await node.until_finished(T)
            await node.until(lambda: not node.driver.ledger.leased.disk_bytes)
            return found

        capacity.read = slow  # type: ignore[method-assign]
        await disk.look()
        assert node.driver.ledger.allocatable.disk_bytes == NODE.disk_bytes


async def test_what_others_write_while_tasks_run_is_not_offered(world: World) -> None:
    async with living(world) as node:
        await running(node, spec())
        capacity, leased = Capacity(NODE.disk_bytes // 2), spec().request.disk_bytes
        disk = AllocatableDisk(node.driver, capacity, world.journal)
        await world.journal.set_note("allocatable_disk_bytes", str(NODE.disk_bytes))
        node.driver.ledger.resize(NODE, ())
        await disk.open()
        await disk.look()
        assert node.driver.ledger.allocatable.disk_bytes == NODE.disk_bytes // 2 + leased
        capacity.disk_bytes = NODE.disk_bytes - WROTE
        await disk.look()
        assert node.driver.ledger.allocatable.disk_bytes == NODE.disk_bytes, "they have taken it away"


async def test_what_changes_while_the_node_runs_is_seen_and_told(world: World) -> None:
    async with living(world) as node:
        capacity = Capacity(NODE.disk_bytes)
        disk = AllocatableDisk(node.driver, capacity, world.journal)
        told: list[Resources] = []
        disk.look_again = lambda: told.append(node.driver.ledger.allocatable)
        await disk.open()
        clock = ManualClock()
        looking = asyncio.create_task(disk.run(clock))

        async def after(**changes: object) -> None:
            for name, value in changes.items():
                setattr(capacity, name, value)
            await clock.settle()
            before = capacity.count
            await clock.advance(60)
            assert capacity.count > before

        await after()
        assert not told
        await after(cpu_milli=1000)
        assert [one.cpu_milli for one in told] == [1000]
        await after(disk_bytes=NODE.disk_bytes - 1)
        assert len(told) == 1
        assert node.driver.ledger.allocatable.disk_bytes == NODE.disk_bytes - 1
        await after(fails=True)
        await after(fails=False, disk_bytes=NODE.disk_bytes // 2)
        assert [one.disk_bytes for one in told[1:]] == [NODE.disk_bytes // 2]
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_a_registration_and_heartbeats_tell_of_host_ledger_and_tasks(world: World) -> None:
    world.uplink.down = True
    async with living(world) as node:
        container = await running(node, spec())
        capacity = Capacity(NODE.disk_bytes // 2, cpu_milli=2500)
        disk = AllocatableDisk(node.driver, capacity, world.journal)
        status = NodeStatus(
            worker_id="w", advertise="", listen="0.0.0.0:7", version="1", capacity=capacity, disk=disk,
            driver=node.driver, gpus=node.context.gpus,
        )  # fmt: skip
        node.driver.warnings["W"] = "odd"
        node.driver.conditions["C"] = "bad"
        info, beat = await status.registration(), await status.heartbeat()
        allocatable = node.driver.ledger.allocatable
        assert (info.total_cpu, info.total_memory, info.total_gpu) == (2.5, NODE.memory_bytes / GIB, 0.0)
        assert info.total_storage == allocatable.disk_bytes / GIB
        assert (info.capacity.cpu_milli, info.allocatable.cpu_milli, info.free.cpu_milli) == (4000, 2500, 1500)
        assert (info.listen_address, [*info.warnings]) == ("0.0.0.0:7", ["W: odd"])
        assert (beat.cpu_usage, beat.memory_usage, beat.storage_usage, beat.gpu_usage) == (1.0, 2.0, 3.0, 4.0)
        assert (beat.allocatable.cpu_milli, beat.free.cpu_milli) == (2500, 1500)
        assert ([*beat.conditions], [*beat.warnings], beat.draining) == (["C: bad"], ["W: odd"], False)
        world.runtime.finish(container)
        await node.until(lambda: node.phase(T) is Phase.REPORTING)
        node.driver.draining = True
        beat = await status.heartbeat()
        assert ([task.task_id for task in beat.running_tasks], beat.draining) == (["t"], True)
        node.driver.draining, node.driver.cordoned = False, True
        assert (await status.heartbeat()).draining


class UnwritableJournal(MemoryJournal):
    async def set_note(self, key: str, value: str) -> None:
        raise TransientError("disk full", reason="JOURNAL_UNWRITABLE")


async def test_a_journal_that_cannot_be_written_keeps_nobody_from_looking(world: World) -> None:
    async with living(world) as node:
        disk = AllocatableDisk(node.driver, Capacity(7), UnwritableJournal())
        await disk.open()
        assert (await disk.look()).allocatable.disk_bytes == 7
