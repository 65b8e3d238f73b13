"""Tasks with GPUs on a node in memory: faults, memory, what is left behind, a driver that goes away, the bill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodeservice.core.gpus import GpuRequest, GpuShare, ShareMethod
from nodeservice.core.model import GIB, AttemptId, Outcome, Phase, Reason, Resources, TaskRecord, TaskSpec
from nodeservice.core.verdict import is_retryable
from nodeservice.errors import CapacityError
from nodeservice.gpu.health import GpuState
from nodeservice.gpu.units import SharingPolicy
from nodeservice.lifecycle.gpu_keeper import GPU_DRIVER
from nodeservice.ports import Enforcement, GpuInventory, GpuProcess, GpuXid, MigInstance
from nodeservice.rpc.status import warnings_told
from nodeservice.testing.fake_gpu import FakeGpuProvider, fake_gpu
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from tests.unit.node_harness import LiveNode, World, living, spec

A, B = AttemptId("a"), AttemptId("b")
ONE, TWO = fake_gpu(0), fake_gpu(1)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(
        path=tmp_path,
        runtime=FakeRuntime(images={"demo": FakeImage(holds=True), "quick": FakeImage()}),
        gpus=FakeGpuProvider(ONE, TWO),
    )


def gpu_spec(task_id: str, count: int = 1, **changes: object) -> TaskSpec:
    request = Resources(cpu_milli=100, memory_bytes=2**26, disk_bytes=2**20, gpu_count=count)
    return spec(task_id, request=request, **changes)


def part(task_id: str, memory_bytes: int) -> TaskSpec:
    return gpu_spec(task_id, 0, gpu=GpuRequest(share=GpuShare(memory_bytes=memory_bytes)))


async def ready(node: LiveNode) -> None:
    """The node knows its GPUs."""
    await node.until(lambda: node.driver.ledger.free.gpu_count == 2)


async def running(node: LiveNode, task: TaskSpec) -> TaskRecord:
    await node.assign(task)
    await node.until(lambda: node.phase(task.id) is Phase.RUNNING and task.id in node.context.gpus._pids)
    record = node.driver.get(task.id)
    assert record is not None
    return record


def only(uuids: tuple[str, ...]) -> str:
    (uuid,) = uuids
    return uuid


def finish(node: LiveNode, record: TaskRecord, exit_code: int = 0) -> None:
    assert record.container_id is not None
    node.world.runtime.finish(record.container_id, exit_code)


# ---- leases -----------------------------------------------------------------------------------------------------------


async def test_sixteen_tasks_for_one_to_eight_gpus_on_eight_all_run_and_no_gpu_is_held_twice(world: World) -> None:
    world.gpus = FakeGpuProvider(*(fake_gpu(number) for number in range(8)))
    waiting = [gpu_spec(f"t{number}", number % 8 + 1) for number in range(16)]
    seen: set[str] = set()
    async with living(world) as node:
        await node.until(lambda: node.driver.ledger.free.gpu_count == 8)
        live: list[TaskRecord] = []
        while waiting or live:
            for task in list(waiting):
                try:
                    live.append(await running(node, task))
                    waiting.remove(task)
                except CapacityError:
                    continue
            held = [uuid for record in live for uuid in record.lease.gpu_uuids]
            assert len(held) == len(set(held))
            seen |= set(held)
            done = live.pop(0)
            finish(node, done)
            assert len(done.lease.gpu_uuids) == done.spec.request.gpu_count
            await node.until_finished(done.id)
        assert node.driver.ledger.free.gpu_count == 8
        assert len(seen) == 8
    assert len(world.uplink.reports) == 16
    assert {record.verdict.reason for record in world.uplink.reports if record.verdict} == {Reason.COMPLETED}


# ---- faults -----------------------------------------------------------------------------------------------------------


async def test_an_xid_fails_the_task_that_holds_the_gpu_and_no_other_and_the_gpu_comes_back(world: World) -> None:
    async with living(world) as node:
        await ready(node)
        ill, well = await running(node, gpu_spec("a")), await running(node, gpu_spec("b"))
        uuid = only(ill.lease.gpu_uuids)
        world.gpus.xids.append(GpuXid(uuid=uuid, code=79))
        record = await node.until_finished(A)
        assert record.verdict is not None
        assert (record.verdict.outcome, record.verdict.reason) == (Outcome.FAILED, Reason.GPU_FAULT)
        assert is_retryable(record.verdict.reason)
        assert uuid in record.verdict.message
        assert "XID 79" in record.verdict.message
        assert [used.xids for used in record.usage.gpus] == [(79,)]
        assert node.phase(B) is Phase.RUNNING
        # It takes no task until nothing has been wrong for a while; then it does again.
        await node.until(lambda: node.context.gpus.state(uuid)[0] is GpuState.WELL)
        await node.until(lambda: node.driver.ledger.free.gpu_count == 1)
        finish(node, well)
        again = await node.until_finished(B)
        assert again.verdict is not None
        assert again.verdict.reason is Reason.COMPLETED


async def test_a_quarantined_gpu_is_offered_to_nobody_and_the_node_says_that_it_has_less(world: World) -> None:
    changes: list[int] = []
    async with living(world) as node:
        await ready(node)
        node.context.gpus._on_change = lambda: changes.append(node.driver.ledger.allocatable.gpu_count)
        world.gpus.change(ONE.uuid, lost="GPU is lost")
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 1)
        with pytest.raises(CapacityError) as caught:
            await node.assign(gpu_spec("a", 2))
        assert "GPU is lost" in str(caught.value)
        world.gpus.change(ONE.uuid, lost="")
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 2)
    assert changes[-2:] == [1, 2]


async def test_a_task_that_ends_badly_just_before_its_gpu_is_known_to_be_faulty_failed_because_of_it(
    world: World,
) -> None:
    async with living(world) as node:
        await ready(node)
        record = await running(node, gpu_spec("a"))
        finish(node, record, 1)
        world.gpus.xids.append(GpuXid(uuid=only(record.lease.gpu_uuids), code=48))
        ended = await node.until_finished(A)
        assert ended.verdict is not None
        assert (ended.verdict.reason, ended.verdict.exit_code) == (Reason.GPU_FAULT, 1)


async def test_an_xid_of_the_task_s_own_making_is_told_in_the_bill_and_fails_nobody(world: World) -> None:
    async with living(world) as node:
        await ready(node)
        record = await running(node, gpu_spec("a"))
        world.gpus.xids += [GpuXid(uuid=only(record.lease.gpu_uuids), code=31)] * 2
        await node.until(lambda: not world.gpus.xids)
        finish(node, record, 1)
        ended = await node.until_finished(A)
        assert ended.verdict is not None
        assert ended.verdict.reason is Reason.EXIT_NONZERO
        assert ended.usage.gpus[0].xids == (31,)
        assert node.driver.ledger.allocatable.gpu_count == 2


async def test_an_error_of_one_mig_instance_fails_its_task_and_keeps_its_siblings_from_new_ones(world: World) -> None:
    split = replace(
        fake_gpu(0),
        mig_enabled=True,
        mig_instances=tuple(
            MigInstance(
                uuid=f"MIG-{number}",
                name="H MIG 1g.10gb",
                profile="1g.10gb",
                memory_total_bytes=10 * GIB,
                memory_used_bytes=0,
                gpu_instance_id=number,
                compute_instance_id=0,
            )
            for number in (7, 8, 9)
        ),
    )
    world.gpus = FakeGpuProvider(split)
    world.gpu_quarantine_seconds = 3600.0
    of_mig = GpuRequest(mig_profile="1g.10gb")
    async with living(world) as node:
        await node.until(lambda: len(node.driver.ledger.gpus) == 3)
        first, second = await running(node, gpu_spec("a", gpu=of_mig)), await running(node, gpu_spec("b", gpu=of_mig))
        id_ = int(only(first.lease.gpu_uuids).removeprefix("MIG-"))
        world.gpus.xids.append(GpuXid(uuid=split.uuid, code=95, gpu_instance_id=id_))
        record = await node.until_finished(A)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.GPU_FAULT
        with pytest.raises(CapacityError, match="out of service"):
            await node.assign(gpu_spec("c", gpu=of_mig))
        assert node.phase(B) is Phase.RUNNING
        finish(node, second)
        await node.until_finished(B)


async def test_an_xid_that_comes_while_the_driver_does_not_answer_counts_as_ever(world: World) -> None:
    """A GSP that hangs (119) holds up every call, so its event comes just then."""
    world.gpu_quarantine_seconds = 3600.0
    async with living(world) as node:
        await ready(node)
        record = await running(node, gpu_spec("a"))
        uuid = only(record.lease.gpu_uuids)
        world.gpus.current = replace(world.gpus.current, error="NVML has not answered for 5 s")
        world.gpus.xids.append(GpuXid(uuid=uuid, code=119))
        ended = await node.until_finished(A)
        assert ended.verdict is not None
        assert ended.verdict.reason is Reason.GPU_FAULT
        world.gpus.current = replace(world.gpus.current, error=None)
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 1)
        assert "XID 119" in node.context.gpus.state(uuid)[1]


@pytest.mark.parametrize("has_ended", [False, True])
async def test_a_memory_error_while_the_service_is_down_fails_the_task_that_held_the_gpu_then(
    world: World, has_ended: bool
) -> None:
    (world.path / "state").mkdir()
    for gpu in (ONE, TWO):
        world.gpus.change(gpu.uuid, ecc_uncorrected_count=3)
    async with living(world) as node:
        await ready(node)
        ill = await running(node, gpu_spec("a"))
        well = await running(node, gpu_spec("b"))
        written = node.dirs.gpu_resets
        await node.until(lambda: written.exists() and only(ill.lease.gpu_uuids) in written.read_text())
    world.gpus.change(only(ill.lease.gpu_uuids), ecc_uncorrected_count=4)
    if has_ended:
        finish(node, ill, 1)
    async with living(world) as node:
        record = await node.until_finished(A)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.GPU_FAULT
        assert "uncorrected memory errors (1 more)" in record.verdict.message
        assert node.phase(B) is Phase.RUNNING
        finish(node, well)
        assert (await node.until_finished(B)).verdict.reason is Reason.COMPLETED  # type: ignore[union-attr]


async def test_a_gpu_that_went_while_the_service_was_down_fails_the_task_that_holds_it(world: World) -> None:
    async with living(world) as node:
        await ready(node)
        ill = await running(node, gpu_spec("a"))
        well = await running(node, gpu_spec("b"))
    left = tuple(gpu for gpu in (ONE, TWO) if gpu.uuid not in ill.lease.gpu_uuids)
    world.gpus.current = replace(world.gpus.current, gpus=left)
    async with living(world) as node:
        record = await node.until_finished(A)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.GPU_FAULT
        assert f"{only(ill.lease.gpu_uuids)}: the driver does not list it" in record.verdict.message
        assert node.phase(B) is Phase.RUNNING
        finish(node, well)
        await node.until_finished(B)


async def test_a_gpu_that_needs_a_reset_needs_it_after_a_restart_of_the_service_too(world: World) -> None:
    """Of a driver that tells no recovery action; with one, that tells more than the event."""
    (world.path / "state").mkdir()
    for gpu in (ONE, TWO):
        world.gpus.change(gpu.uuid, recovery_action=None, energy_millijoules=9_000)
    async with living(world) as node:
        await ready(node)
        world.gpus.xids.append(GpuXid(uuid=ONE.uuid, code=95))
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 1)
    async with living(world) as node:
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 1)
        assert node.context.gpus.state(ONE.uuid)[0] is GpuState.FAULTY
        assert "XID 95" in node.context.gpus.state(ONE.uuid)[1]
    world.gpus.change(ONE.uuid, energy_millijoules=5)
    async with living(world) as node:
        await ready(node)
    async with living(world) as node:
        await ready(node)
        assert node.context.gpus.state(ONE.uuid)[0] is GpuState.WELL


# ---- the driver -------------------------------------------------------------------------------------------------------


async def test_a_driver_that_goes_away_costs_gpu_tasks_their_place_and_nobody_else_anything(world: World) -> None:
    async with living(world) as node:
        await ready(node)
        record = await running(node, gpu_spec("a"))
        world.gpus.current = replace(world.gpus.current, error="NVML has not answered for 5 s")
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 0)
        assert "not answered" in node.driver.warnings[GPU_DRIVER]
        assert node.driver.all_conditions() == {}
        with pytest.raises(CapacityError, match="not answered"):
            await node.assign(gpu_spec("b"))
        await node.assign(spec("plain", image="quick"))
        await node.until_finished(AttemptId("plain"))
        assert node.phase(A) is Phase.RUNNING, "what runs may well be well"
        world.gpus.current = replace(world.gpus.current, error=None)
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 2)
        assert GPU_DRIVER not in node.driver.warnings
        finish(node, record)
        await node.until_finished(A)


async def test_a_driver_that_was_updated_gives_no_gpu_to_new_tasks_and_those_that_run_are_watched_on(
    world: World,
) -> None:
    world.gpu_policy = SharingPolicy(allowed=True)
    async with living(world) as node:
        await ready(node)
        record = await running(node, part("a", 10 * GIB))
        world.gpus.current = replace(world.gpus.current, outdated="the driver was updated")
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 0)
        assert node.driver.warnings[GPU_DRIVER] == "the driver was updated"
        with pytest.raises(CapacityError, match="was updated"):
            await node.assign(gpu_spec("b"))
        assert "was updated" in node.context.gpus._not_ready(record)
        uses(world, only(record.lease.gpu_uuids), (1, 11 * GIB, A))
        ended = await node.until_finished(A)
        assert ended.verdict is not None
        assert ended.verdict.reason is Reason.GPU_MEMORY_LIMIT


async def test_a_gpu_that_cannot_be_opened_is_told_as_a_warning(world: World) -> None:
    world.gpus.current = replace(world.gpus.current, unreachable=("GPU 2: a GPU has fallen off the bus",))
    async with living(world) as node:
        await node.until(lambda: "fallen off" in node.driver.warnings.get(GPU_DRIVER, ""))
        assert node.driver.ledger.allocatable.gpu_count == 2


def test_the_first_registration_tells_of_such_a_gpu_though_nobody_has_looked_yet(world: World) -> None:
    driver = LiveNode(world).driver
    dead = GpuInventory(error="it hangs", unreachable=("GPU 2: a GPU has fallen off the bus",))
    assert warnings_told(driver, dead) == [f"{GPU_DRIVER}: it hangs; GPU 2: a GPU has fallen off the bus"]
    assert warnings_told(driver, GpuInventory()) == []


# ---- memory -----------------------------------------------------------------------------------------------------------


def uses(world: World, uuid: str, *processes: tuple[int, int, AttemptId | None]) -> None:
    """Processes (pid, bytes, whose) on a GPU."""
    for pid, _, owner in processes:
        if owner is not None:
            world.owners.of[pid] = owner
    world.gpus.change(
        uuid,
        processes=tuple(GpuProcess(pid=pid, memory_bytes=count) for pid, count, _ in processes),
        memory_used_bytes=sum(count for _, count, _ in processes),
    )


async def test_a_task_that_takes_more_memory_than_its_part_is_ended_and_its_neighbour_is_not(world: World) -> None:
    world.gpu_policy = SharingPolicy(allowed=True)
    async with living(world) as node:
        await ready(node)
        greedy, modest = await running(node, part("a", 10 * GIB)), await running(node, part("b", 10 * GIB))
        uuid = only(greedy.lease.gpu_uuids)
        assert modest.lease.gpu_uuids == greedy.lease.gpu_uuids, "a GPU that is shared already comes first"
        assert node.driver.ledger.free.gpu_count == 1
        uses(world, uuid, (1, 6 * GIB, A), (2, 5 * GIB, A), (3, 10 * GIB, B))
        record = await node.until_finished(A)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.GPU_MEMORY_LIMIT
        assert str(11 * GIB) in record.verdict.message
        assert not is_retryable(record.verdict.reason)
        assert only(tuple(used.memory_peak_bytes for used in record.usage.gpus)) == 11 * GIB  # type: ignore[arg-type]
        assert node.phase(B) is Phase.RUNNING
        assert record.limits["asked"]["gpu_memory_bytes"] == 10 * GIB  # type: ignore[index]
        assert record.limits["enforcement"]["gpu_memory_bytes"] == "watched"  # type: ignore[index]
        uses(world, uuid)
        finish(node, modest)
        await node.until_finished(B)


async def test_a_part_that_cannot_be_watched_is_no_part_that_is_kept(world: World) -> None:
    """In confidential computing the driver does not tell the memory of a process."""
    world.gpu_policy = SharingPolicy(allowed=True)
    async with living(world) as node:
        await ready(node)
        record = await running(node, part("a", 10 * GIB))
        world.owners.of[1] = A
        world.gpus.change(only(record.lease.gpu_uuids), processes=(GpuProcess(pid=1, memory_bytes=None),))
        ended = await node.until_finished(A)
        assert ended.verdict is not None
        assert ended.verdict.reason is Reason.LIMIT_NOT_ENFORCED
        assert "does not tell what its processes hold" in ended.verdict.message


async def test_a_part_that_is_watched_ends_when_the_driver_hangs_for_long_and_a_whole_gpu_does_not(
    world: World,
) -> None:
    world.gpu_policy = SharingPolicy(allowed=True)
    async with living(world) as node:
        await ready(node)
        await running(node, part("a", 10 * GIB))
        whole = await running(node, gpu_spec("b"))
        now, looks = [0.0], [0]
        see_nothing = node.context.gpus._parts.see_nothing

        def counted(*args: Any, **named: Any) -> None:
            looks[0] += 1
            see_nothing(*args, **named)

        node.context.gpus._parts.see_nothing = counted  # type: ignore[method-assign]
        node.context.gpus._monotonic = lambda: now[0]
        world.gpus.current = replace(world.gpus.current, error="NVML has not answered")
        await node.until(lambda: looks[0] > 1)
        now[0] = 29.0
        before = looks[0]
        await node.until(lambda: looks[0] > before + 1)
        assert node.phase(A) is Phase.RUNNING
        now[0] = 30.0
        ended = await node.until_finished(A)
        assert ended.verdict is not None
        assert ended.verdict.reason is Reason.LIMIT_NOT_ENFORCED
        assert "NVML has not answered" in ended.verdict.message
        assert node.phase(B) is Phase.RUNNING
        finish(node, whole)
        await node.until_finished(B)


async def test_parts_that_only_are_watched_are_given_to_nobody_unless_the_operator_says_so(world: World) -> None:
    async with living(world) as node:
        await ready(node)
        with pytest.raises(CapacityError, match="gpu_sharing"):
            await node.assign(part("a", GIB))


async def test_a_limit_of_the_driver_is_set_read_back_and_told_as_hard(world: World) -> None:
    world.gpus.change(ONE.uuid, memory_limits=True)
    world.gpu_policy = SharingPolicy(driver_limits=True)
    async with living(world) as node:
        await ready(node)
        record = await running(node, part("a", 3 * GIB))
        assert record.lease.gpu_part is not None
        assert record.lease.gpu_part.method is ShareMethod.DRIVER
        ((uuid, cgroup), limit) = only(tuple(world.gpus.limits.items()))  # type: ignore[arg-type,misc]
        assert (uuid, limit) == (ONE.uuid, 3 * GIB)  # type: ignore[has-type]
        assert cgroup.startswith("/sys/fs/cgroup/")  # type: ignore[has-type]
        assert record.limits["effective"]["gpu_memory_bytes"] == 3 * GIB  # type: ignore[index]
        assert record.limits["enforcement"]["gpu_memory_bytes"] == Enforcement.HARD.value  # type: ignore[index]
        finish(node, record)
        await node.until_finished(A)


async def test_a_limit_that_the_driver_does_not_take_ends_the_task(world: World) -> None:
    world.gpus.change(ONE.uuid, memory_limits=True)
    world.gpus.keeps_limits = False
    world.gpu_policy = SharingPolicy(driver_limits=True)
    async with living(world) as node:
        await ready(node)
        await node.assign(part("a", 3 * GIB))
        record = await node.until_finished(A)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.LIMIT_NOT_ENFORCED
        assert "gpu_memory_bytes" in record.verdict.message


# ---- before and after a lease -----------------------------------------------------------------------------------------


async def test_a_gpu_that_somebody_else_uses_is_given_to_nobody_until_he_is_gone(world: World) -> None:
    async with living(world) as node:
        await ready(node)
        uses(world, ONE.uuid, (999, 5 * GIB, None))
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 1)
        with pytest.raises(CapacityError, match="process 999"):
            await node.assign(gpu_spec("a", 2))
        uses(world, ONE.uuid)
        await ready(node)


async def test_memory_that_nobody_holds_keeps_a_gpu_from_the_next_task(world: World) -> None:
    async with living(world) as node:
        await ready(node)
        world.gpus.change(TWO.uuid, memory_used_bytes=4 * GIB)
        await node.until(lambda: "no task holds it" in node.context.gpus.state(TWO.uuid)[1])
        world.gpus.change(TWO.uuid, memory_used_bytes=100 * 2**20)
        await ready(node)


async def test_memory_that_somebody_takes_bit_by_bit_is_told_to_the_master_once(world: World) -> None:
    async with living(world) as node:
        await ready(node)
        world.gpus.change(TWO.uuid, memory_used_bytes=4 * GIB)
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 1)
        changes: list[None] = []
        node.context.gpus._on_change = lambda: changes.append(None)
        for count in range(5, 10):
            world.gpus.change(TWO.uuid, memory_used_bytes=count * GIB)
            await node.context.gpus.look()
        assert changes == []


async def test_a_gpu_that_is_taken_between_the_grant_and_the_start_fails_the_task_before_it_runs(world: World) -> None:
    async with living(world) as node:
        await ready(node)
        world.gpus.change(ONE.uuid, memory_used_bytes=9 * GIB)
        world.gpus.change(TWO.uuid, memory_used_bytes=9 * GIB)
        await node.assign(gpu_spec("a"))
        record = await node.until_finished(A)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.GPU_FAULT
        assert "could not be made ready" in record.verdict.message
        assert len(world.runtime.specs) == 0, "no container was made"


async def test_a_lease_goes_back_once_the_memory_is_back(world: World) -> None:
    world.gpu_ready_seconds = 30.0
    async with living(world) as node:
        await ready(node)
        record = await running(node, gpu_spec("a"))
        uuid = only(record.lease.gpu_uuids)
        uses(world, uuid, (7, 40 * GIB, A))
        finish(node, record)
        await node.until(lambda: node.phase(A) is Phase.COLLECTING)
        for _ in range(20):
            await node.context.clock.sleep(0.01)
        assert node.driver.ledger.free.gpu_count == 1
        uses(world, uuid)
        await node.until_finished(A)
        assert node.driver.ledger.free.gpu_count == 2


async def test_memory_that_never_comes_back_keeps_the_gpu_out_of_service_and_not_the_task_from_its_end(
    world: World,
) -> None:
    async with living(world) as node:
        await ready(node)
        record = await running(node, gpu_spec("a"))
        uuid = only(record.lease.gpu_uuids)
        uses(world, uuid, (7, 40 * GIB, A))
        finish(node, record)
        ended = await node.until_finished(A)
        assert ended.verdict is not None
        assert ended.verdict.reason is Reason.COMPLETED
        await node.until(lambda: node.driver.ledger.allocatable.gpu_count == 1)


# ---- the bill ---------------------------------------------------------------------------------------------------------


async def test_the_bill_tells_load_memory_energy_and_what_held_the_clocks_back(world: World) -> None:
    world.gpus.change(ONE.uuid, energy_millijoules=5_000)
    world.gpus.change(TWO.uuid, energy_millijoules=5_000)
    async with living(world) as node:
        await ready(node)
        record = await running(node, gpu_spec("a"))
        uuid = only(record.lease.gpu_uuids)
        uses(world, uuid, (7, 40 * GIB, A))
        world.gpus.change(uuid, utilization_percent=80.0, energy_millijoules=9_000, throttle_reasons=0x04)
        await node.until(lambda: node.context.gpus.usage(A)[0].utilization_peak_percent == 80.0)
        await node.until(lambda: (node.context.gpus.usage(A)[0].throttled_seconds or 0) > 0.01)
        uses(world, uuid)
        finish(node, record)
        (used,) = (await node.until_finished(A)).usage.gpus
        assert (used.uuid, used.name, used.memory_peak_bytes, used.energy_joules) == (uuid, "Fake GPU", 40 * GIB, 4.0)
        assert used.utilization_mean_percent is not None
        assert 0 < used.utilization_mean_percent <= 80.0
        assert used.seconds > 0


async def test_the_bill_goes_on_after_a_restart(world: World) -> None:
    world.gpus.change(ONE.uuid, energy_millijoules=1_000)
    world.gpus.change(TWO.uuid, energy_millijoules=1_000)
    async with living(world) as node:
        await ready(node)
        record = await running(node, gpu_spec("a"))
        uuid = only(record.lease.gpu_uuids)
        uses(world, uuid, (7, 40 * GIB, A))
        path = node.dirs.gpu_bill(A)
        await node.until(lambda: path.exists() and json.loads(path.read_text())[uuid]["memory_peak_bytes"] == 40 * GIB)
    uses(world, uuid, (7, 1 * GIB, A))
    world.gpus.change(uuid, energy_millijoules=3_500)
    async with living(world) as node:
        await node.until(lambda: node.phase(A) is Phase.RUNNING)
        assert node.driver.get(A).lease.gpu_uuids == (uuid,)  # type: ignore[union-attr]
        uses(world, uuid)
        finish(node, record)
        (used,) = (await node.until_finished(A)).usage.gpus
        assert (used.memory_peak_bytes, used.energy_joules) == (40 * GIB, 2.5)


async def test_the_bill_of_a_task_that_ends_while_nothing_is_known_of_the_gpus_is_that_of_before_the_restart(
    world: World,
) -> None:
    async with living(world) as node:
        await ready(node)
        record = await running(node, gpu_spec("a"))
        uuid = only(record.lease.gpu_uuids)
        uses(world, uuid, (7, 40 * GIB, A))
        world.gpus.xids.append(GpuXid(uuid=uuid, code=31))
        await node.until(lambda: [used.xids for used in node.context.gpus.usage(A)] == [(31,)])
        await node.until(lambda: node.context.gpus.usage(A)[0].memory_peak_bytes == 40 * GIB)
    world.gpus.current = GpuInventory(error="NVML has not answered for 5 s")
    async with living(world) as node:
        finish(node, record)
        (used,) = (await node.until_finished(A)).usage.gpus
    assert (used.uuid, used.memory_peak_bytes, used.xids) == (uuid, 40 * GIB, (31,))
