"""Workers of one host never give out the same GPU: the locks alone, and two nodes in memory on the same GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nodeservice.core import events as ev
from nodeservice.core.gpus import GpuRequest, GpuShare
from nodeservice.core.model import GIB, AttemptId, Phase, Reason, Resources, StopCause, TaskRecord, TaskSpec
from nodeservice.errors import CapacityError
from nodeservice.gpu.locks import GpuLocks
from nodeservice.gpu.units import SharingPolicy
from nodeservice.lifecycle.gpu_keeper import GPU_LOCKS
from nodeservice.lifecycle.steps import run
from nodeservice.ports import GpuProcess, MigInstance
from nodeservice.testing.fake_gpu import FakeGpuProvider, fake_gpu
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from tests.unit.node_harness import LiveNode, World, living, spec

A, B, C = AttemptId("a"), AttemptId("b"), AttemptId("c")
ONE, TWO = fake_gpu(0), fake_gpu(1)
SPLIT = replace(
    fake_gpu(2),
    mig_enabled=True,
    mig_slice_count=7,
    mig_instances=tuple(
        MigInstance(
            uuid=f"MIG-{number}", name="Fake GPU MIG 3g.40gb", profile="3g.40gb", memory_total_bytes=40 * GIB,
            gpu_instance_id=number, compute_instance_id=0, compute_slice_count=3,
        )
        for number in (1, 2)
    ),
)  # fmt: skip
OURS = f"in use by worker node (pid {os.getpid()}) on this host"
HOLDS_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from nodeservice.core.model import AttemptId
from nodeservice.gpu.locks import GpuLocks
locks = GpuLocks(Path(sys.argv[1]), worker_id="other")
locks.take(AttemptId("x"), ["GPU-1", "GPU-2"])
print("held", flush=True)
time.sleep(600)
"""


def locks(directory: Path, worker_id: str = "other") -> GpuLocks:
    return GpuLocks(directory, worker_id=worker_id)


# ---- the locks alone ----------------------------------------------------------------------------------------------------


def test_a_gpu_is_one_workers_until_the_last_of_its_attempts_gives_it_back(tmp_path: Path) -> None:
    mine, others = locks(tmp_path / "run" / "gpus", "node"), locks(tmp_path / "run" / "gpus")
    assert others.in_use("GPU-1") == "", "where nobody ever locked anything nothing is in use"
    assert mine.take(A, ["GPU-1"]) == mine.take(B, ["GPU-1"]) == mine.take(B, ["GPU-1"]) == ""
    assert others.take(C, ["GPU-1"]) == others.in_use("GPU-1") == OURS
    assert mine.in_use("GPU-1") == ""
    mine.release(A)
    assert others.take(C, ["GPU-1"]) == OURS
    mine.release(B)
    assert others.in_use("GPU-1") == others.take(C, ["GPU-1"]) == ""
    assert "worker other" in mine.take(A, ["GPU-1"])
    assert mine.trouble == others.trouble == ""


def test_a_worker_is_told_apart_from_others_by_its_name(tmp_path: Path) -> None:
    mine, looks = locks(tmp_path, "node"), locks(tmp_path, "node")
    mine.take(A, ["GPU-1"])
    assert looks.in_use("GPU-1", apart_from="node") == ""
    assert looks.in_use("GPU-1", apart_from="nod") == OURS
    (tmp_path / "GPU-1.lock").write_bytes(b"")  # it was just taken
    assert looks.in_use("GPU-1") == looks.in_use("GPU-1", apart_from="node") == "in use by another process on this host"


def test_a_process_that_dies_frees_what_it_held(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS_UNTIL_KILLED, str(tmp_path)]
    mine = locks(tmp_path, "node")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            assert mine.take(A, ["GPU-2"]) == f"in use by worker other (pid {process.pid}) on this host"
        finally:
            process.kill()
    assert mine.take(A, ["GPU-1", "GPU-2"]) == mine.in_use("GPU-2") == ""


def test_where_there_can_be_no_lock_there_is_none_and_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mine = locks(tmp_path / "file" / "gpus")
    assert mine.take(A, ["GPU-1"]) == mine.in_use("GPU-1") == ""
    assert str(tmp_path / "file" / "gpus") in mine.trouble
    (tmp_path / "file").unlink()
    assert mine.take(A, ["GPU-1"]) == mine.trouble == ""


# ---- two nodes on one host ----------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "one", FakeRuntime(images={"demo": FakeImage(holds=True)}), gpus=FakeGpuProvider(ONE, TWO))


def beside(world: World) -> World:
    """Of another node on the same host."""
    runtime = FakeRuntime(images={"demo": FakeImage(holds=True)})
    return World(
        world.path.parent / "other", runtime, gpus=world.gpus, gpu_policy=world.gpu_policy,
        gpu_lock_dir=world.path / "locks",
    )  # fmt: skip


@pytest.fixture
async def other(world: World) -> AsyncIterator[LiveNode]:
    async with living(beside(world)) as node:
        yield node


def gpu_spec(task_id: str, count: int = 1, **changes: object) -> TaskSpec:
    request = Resources(cpu_milli=100, memory_bytes=2**26, disk_bytes=2**20, gpu_count=count)
    return spec(task_id, request=request, **changes)


def part(task_id: str, memory_bytes: int) -> TaskSpec:
    return gpu_spec(task_id, 0, gpu=GpuRequest(share=GpuShare(memory_bytes=memory_bytes)))


async def running(node: LiveNode, task: TaskSpec) -> TaskRecord:
    await node.until(lambda: node.driver.ledger.gpus != ())
    await node.assign(task)
    await node.until(lambda: node.phase(task.id) is Phase.RUNNING)
    record = node.driver.get(task.id)
    assert record is not None
    return record


async def end(node: LiveNode, record: TaskRecord) -> None:
    assert record.container_id is not None
    node.world.runtime.finish(record.container_id)
    await node.until_finished(record.id)


def blind(node: LiveNode) -> None:
    """It grants what it does not see that somebody else holds, as in the moment between the grant and the start."""
    node.context.gpus._locks.in_use = lambda _uuid, **_: ""  # type: ignore[method-assign]


async def test_what_one_node_holds_the_other_neither_offers_nor_gives_until_it_is_back(
    world: World, other: LiveNode
) -> None:
    async with living(world) as node:
        record = await running(node, gpu_spec("a"))
        (uuid,) = record.lease.gpu_uuids
        await other.until(lambda: other.driver.ledger.allocatable.gpu_count == 1)
        assert other.context.gpus.state(uuid)[1] == OURS
        with pytest.raises(CapacityError, match="in use by worker node"):
            await other.assign(gpu_spec("b", 2))
        mine = await running(other, gpu_spec("c"))
        assert {uuid, *mine.lease.gpu_uuids} == {ONE.uuid, TWO.uuid}
        await end(node, record)
        await other.until(lambda: other.driver.ledger.free.gpu_count == 1)
        assert await running(other, gpu_spec("b"))


async def test_a_gpu_is_the_nodes_from_its_grant_on_also_while_the_image_is_pulled(
    world: World, other: LiveNode
) -> None:
    world.runtime = FakeRuntime(images={"demo": FakeImage(is_local=False, pull_holds=True)})
    async with living(world) as node:
        await node.until(lambda: node.driver.ledger.free.gpu_count == 2)
        record = await node.assign(gpu_spec("a"))
        assert node.phase(A) is Phase.PULLING
        assert [locks(world.path / "locks").in_use(uuid) for uuid in record.lease.gpu_uuids] == [OURS]
        node.driver.end(A, StopCause.CANCELLED)
        await node.until_finished(A)
        assert [locks(world.path / "locks").in_use(uuid) for uuid in record.lease.gpu_uuids] == [""]


async def test_of_two_nodes_that_granted_the_same_gpus_one_runs_and_the_other_says_who_has_them(
    world: World, other: LiveNode
) -> None:
    async with living(world) as node:
        await running(node, gpu_spec("a", 2))
        blind(other)
        await other.until(lambda: other.driver.ledger.free.gpu_count == 2)
        await other.assign(gpu_spec("b"))
        failed = await other.until_finished(B)
        assert failed.verdict is not None
        assert failed.verdict.reason is Reason.GPU_FAULT
        assert OURS in failed.verdict.message
        assert other.world.runtime.specs == []


async def test_who_waits_for_a_gpu_gets_it_once_it_is_back_and_keeps_no_other_meanwhile(world: World) -> None:
    second = beside(world)
    second.gpu_ready_seconds = 60.0
    async with living(world) as node, living(second) as other:
        one = await running(node, gpu_spec("a", gpu=GpuRequest(uuids=(TWO.uuid,))))
        blind(other)
        await other.until(lambda: other.driver.ledger.free.gpu_count == 2)
        await other.assign(gpu_spec("b", 2))
        await other.until(lambda: other.phase(B) is Phase.CREATING)
        # The one that is free goes to the node that can begin with it.
        two = await running(node, gpu_spec("c"))
        await end(node, one)
        await end(node, two)
        await other.until(lambda: other.phase(B) is Phase.RUNNING)


async def test_parts_of_a_gpu_are_shared_within_a_node_and_with_no_other(world: World) -> None:
    world.gpus, world.gpu_policy = FakeGpuProvider(ONE), SharingPolicy(allowed=True)
    async with living(world) as node, living(beside(world)) as other:
        first, second = await running(node, part("a", GIB)), await running(node, part("b", GIB))
        await other.until(lambda: other.driver.ledger.allocatable.gpu_count == 0 and other.driver.ledger.gpus != ())
        for task in (part("c", GIB), gpu_spec("c")):
            with pytest.raises(CapacityError, match="in use by worker node"):
                await other.assign(task)
        await end(node, first)
        await other.context.gpus.look()
        assert other.driver.ledger.allocatable.gpu_count == 0
        await end(node, second)
        await other.until(lambda: other.driver.ledger.allocatable.gpu_count == 1)
        assert await running(other, part("c", GIB))


async def test_a_gpu_that_is_split_is_one_nodes_with_all_its_instances(world: World) -> None:
    world.gpus = FakeGpuProvider(SPLIT)
    mig = GpuRequest(mig_profile="3g.40gb")
    async with living(world) as node, living(beside(world)) as other:
        await running(node, gpu_spec("a", gpu=mig))
        await running(node, gpu_spec("b", gpu=mig))
        await other.until(lambda: {unit.unwell for unit in other.driver.ledger.gpus} == {OURS})
        with pytest.raises(CapacityError, match="in use by worker node"):
            await other.assign(gpu_spec("c", gpu=mig))


async def test_after_a_restart_a_node_has_the_gpus_of_its_running_tasks_again(world: World, other: LiveNode) -> None:
    async with living(world) as node:
        record = await running(node, gpu_spec("a"))
    (uuid,) = record.lease.gpu_uuids
    await other.until(lambda: other.driver.ledger.free.gpu_count == 2)
    async with living(world) as node:
        await other.until(lambda: other.driver.ledger.free.gpu_count == 1)
        assert other.context.gpus.state(uuid)[1] == OURS
        assert GPU_LOCKS not in node.driver.warnings
        await end(node, record)
        await other.until(lambda: other.driver.ledger.free.gpu_count == 2)


async def test_a_task_whose_gpu_somebody_took_while_the_node_was_away_runs_on_and_that_is_told(world: World) -> None:
    async with living(world) as node:
        record = await running(node, gpu_spec("a"))
    (uuid,) = record.lease.gpu_uuids
    others = locks(world.path / "locks")
    assert others.take(B, [uuid]) == ""
    async with living(world) as node:
        await node.until(lambda: GPU_LOCKS in node.driver.warnings)
        assert node.driver.warnings[GPU_LOCKS] == f"{A}: {OURS.replace('worker node', 'worker other')}"
        assert node.phase(A) is Phase.RUNNING
        others.close()
        await node.until(lambda: GPU_LOCKS not in node.driver.warnings)
        assert others.in_use(uuid) == OURS


async def test_a_container_made_before_a_restart_is_not_started_on_a_gpu_that_somebody_took_meanwhile(
    world: World, other: LiveNode
) -> None:
    async with living(world) as node:
        record = await running(node, gpu_spec("a"))
    made = await world.runtime.create(replace(world.runtime.specs[0], name="made", labels={}))
    world.runtime._untouched.clear()
    await other.until(lambda: other.driver.ledger.free.gpu_count == 2)
    await running(other, gpu_spec("b", 2))
    event = await run.start(LiveNode(world).context, replace(record, phase=Phase.STARTING, container_id=made))
    assert isinstance(event, ev.StepFailed)
    assert event.reason is Reason.GPU_FAULT
    assert OURS in event.message


async def test_a_container_that_was_started_just_before_a_restart_is_not_refused_for_what_it_uses_itself(
    world: World,
) -> None:
    world.gpus = FakeGpuProvider(ONE)
    async with living(world) as node:
        record = await running(node, gpu_spec("a"))
    world.gpus.change(ONE.uuid, processes=(GpuProcess(pid=7, memory_bytes=GIB),))
    world.owners.of[7] = A
    event = await run.start(LiveNode(world).context, replace(record, phase=Phase.STARTING))
    assert isinstance(event, ev.ContainerStarted)


async def test_a_node_that_can_lock_nothing_works_and_says_so(world: World) -> None:
    world.path.mkdir()
    (world.path / "file").touch()
    world.gpu_lock_dir = world.path / "file" / "gpus"
    async with living(world) as node:
        record = await running(node, gpu_spec("a"))
        await node.until(lambda: GPU_LOCKS in node.driver.warnings)
        assert str(world.gpu_lock_dir) in node.driver.warnings[GPU_LOCKS]
        await end(node, record)
