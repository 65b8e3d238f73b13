"""Who holds what beside what the driver sees: memory by attempt, strangers, what is left behind, a sample for the bill."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nodeservice.core.gpus import GpuPart, ShareMethod
from nodeservice.core.model import GIB, MIB, AttemptId, Lease, Resources
from nodeservice.gpu.bill import GpuSample
from nodeservice.gpu.holders import Place, left_behind_bytes, memory_of, places, sample, strangers
from nodeservice.ports import NOBODY, GpuInventory, GpuProcess, MigInstance
from nodeservice.testing.fake_gpu import fake_gpu

A, B = AttemptId("a"), AttemptId("b")
WHOLE = Lease(granted=Resources(gpu_count=1), gpu_uuids=("GPU-x",))


def process(pid: int, gib: int | None, instance: int | None = None) -> GpuProcess:
    return GpuProcess(pid=pid, memory_bytes=None if gib is None else gib * GIB, gpu_instance_id=instance)


def on(*processes: GpuProcess, **facts: object) -> Place:
    return Place(replace(fake_gpu(0), processes=processes, **facts))  # type: ignore[arg-type]


def instance(number: int, used_bytes: int | None = 0) -> MigInstance:
    return MigInstance(
        uuid=f"MIG-{number}",
        name="H100 MIG 1g.10gb",
        profile="1g.10gb",
        memory_total_bytes=10 * GIB,
        memory_used_bytes=used_bytes,
        gpu_instance_id=number,
        compute_instance_id=0,
    )


def split(*processes: GpuProcess, used_bytes: int | None = 0) -> dict[str, Place]:
    gpu = replace(
        fake_gpu(0),
        mig_enabled=True,
        mig_instances=(instance(7, used_bytes), instance(8, used_bytes)),
        processes=processes,
        energy_millijoules=5,
        utilization_percent=None,
    )
    return places(GpuInventory(gpus=(gpu, fake_gpu(1))))


def part_of(method: ShareMethod) -> Lease:
    return replace(WHOLE, gpu_part=GpuPart(memory_bytes=GIB, sm_percent=0, method=method))


def test_gpus_and_instances_are_found_by_their_uuid() -> None:
    found = split()
    assert set(found) == {fake_gpu(0).uuid, fake_gpu(1).uuid, "MIG-7", "MIG-8"}
    assert found["MIG-7"].gpu.uuid == fake_gpu(0).uuid


# ---- memory -----------------------------------------------------------------------------------------------------------


def test_the_memory_of_an_attempt_is_that_of_all_its_processes_there() -> None:
    place = on(process(1, 5), process(2, 6), process(3, 7))
    assert memory_of(place, A, {1: A, 2: A, 3: B}) == 11 * GIB
    assert memory_of(place, AttemptId("c"), {1: A, 2: A, 3: B}) == 0


def test_memory_that_the_driver_does_not_tell_of_one_process_is_not_known_for_that_attempt_alone() -> None:
    place = on(process(1, 5), process(2, None), process(3, 7))
    owners = {1: A, 2: A, 3: B}
    assert memory_of(place, A, owners) is None
    assert memory_of(place, B, owners) == 7 * GIB


def test_a_task_with_several_gpus_is_billed_each_gpu_s_own_memory() -> None:
    one, two = on(process(1, 5)), on(process(1, 9))
    assert [memory_of(place, A, {1: A}) for place in (one, two)] == [5 * GIB, 9 * GIB]


def test_an_instance_has_the_processes_of_its_own_id() -> None:
    found = split(process(1, 5, 7), process(2, 6, 8))
    assert memory_of(found["MIG-7"], A, {1: A, 2: A}) == 5 * GIB
    assert [seen.pid for seen in found["MIG-8"].processes] == [2]


@pytest.mark.parametrize(
    ("used", "left"),
    [(None, 0), (0, 0), (256 * MIB, 0), (80 * GIB // 100, 0), (80 * GIB // 100 + 1, 80 * GIB // 100 + 1)],
)
def test_a_little_memory_in_use_is_the_driver_s_own(used: int | None, left: int) -> None:
    assert left_behind_bytes(on(memory_used_bytes=used), {}) == left


def test_what_is_left_behind_on_an_instance_is_its_own() -> None:
    assert left_behind_bytes(split(used_bytes=GIB)["MIG-7"], {}) == GIB
    assert left_behind_bytes(split(used_bytes=200 * MIB)["MIG-7"], {}) == 0


def test_what_a_server_for_all_or_a_process_that_ended_holds_is_not_left_behind() -> None:
    processes = (GpuProcess(pid=1, memory_bytes=GIB), GpuProcess(pid=2, memory_bytes=2 * GIB))
    place = on(*processes, memory_used_bytes=3 * GIB)
    assert left_behind_bytes(place, {2: AttemptId("t")}) == 2 * GIB
    assert left_behind_bytes(place, {}) == 0


# ---- strangers --------------------------------------------------------------------------------------------------------


def test_a_process_of_nobody_or_of_another_attempt_is_a_stranger() -> None:
    place = on(process(3, 1), process(2, 1), process(1, 1))
    assert strangers(place, [A], {1: A, 2: NOBODY, 3: B}) == [2, 3]
    assert strangers(place, [A, B], {1: A, 2: B, 3: B}) == []
    assert strangers(place, [], {1: NOBODY, 2: NOBODY, 3: NOBODY}) == [1, 2, 3]


def test_a_process_that_has_ended_since_the_look_is_no_stranger() -> None:
    """A task that runs one short program after the other would seem to share its GPU all the time."""
    assert strangers(on(process(1, 1), process(2, 1)), [A], {1: A}) == []


def test_the_process_of_a_sibling_instance_is_no_stranger() -> None:
    found = split(process(1, 1, 7), process(2, 1, 8))
    owners = {1: A, 2: B}
    assert strangers(found["MIG-7"], [A], owners) == strangers(found["MIG-8"], [B], owners) == []
    assert strangers(found["MIG-8"], [A], owners) == [2]


# ---- the sample -------------------------------------------------------------------------------------------------------


def test_who_holds_a_gpu_whole_is_billed_what_it_did() -> None:
    place = on(
        process(1, 5), memory_used_bytes=9 * GIB, utilization_percent=70.0, energy_millijoules=3, throttle_reasons=4
    )
    assert sample(place, A, WHOLE, {1: A}) == GpuSample(
        uuid=place.uuid,
        name="Fake GPU",
        utilization_percent=70.0,
        memory_bytes=9 * GIB,
        energy_millijoules=3,
        throttle_reasons=4,
    )


def test_memory_of_which_nothing_is_known_is_not_nothing() -> None:
    place = on(process(1, None), memory_used_bytes=None)
    assert sample(place, A, WHOLE, {1: A}).memory_bytes is None
    assert sample(on(process(1, 5), memory_used_bytes=None), A, WHOLE, {1: A}).memory_bytes == 5 * GIB
    assert sample(on(process(1, None), memory_used_bytes=6), A, WHOLE, {1: A}).memory_bytes == 6


@pytest.mark.parametrize("method", [ShareMethod.WATCHED, ShareMethod.DRIVER, ShareMethod.MPS])
def test_who_shares_a_gpu_is_billed_the_memory_of_its_own_processes_alone(method: ShareMethod) -> None:
    place = on(process(1, 5), process(2, 6), memory_used_bytes=12 * GIB, utilization_percent=70.0, energy_millijoules=3)
    seen = sample(place, A, part_of(method), {1: A, 2: B})
    assert (seen.memory_bytes, seen.utilization_percent, seen.energy_millijoules) == (5 * GIB, None, None)


def test_of_an_instance_its_memory_is_known_and_neither_load_nor_energy() -> None:
    found = split(process(1, 5, 7), used_bytes=6 * GIB)
    for lease in (WHOLE, part_of(ShareMethod.MIG)):
        seen = sample(found["MIG-7"], A, lease, {1: A})
        assert (seen.name, seen.memory_bytes) == ("H100 MIG 1g.10gb", 6 * GIB)
        assert (seen.utilization_percent, seen.energy_millijoules) == (None, None)


def test_nothing_is_billed_of_a_gpu_that_is_lost() -> None:
    """What is known of it is of before."""
    place = on(process(1, 5), lost="GPU is lost", utilization_percent=99.0, energy_millijoules=9, throttle_reasons=0x40)
    assert sample(place, A, WHOLE, {1: A}) == GpuSample(uuid=place.uuid, name="Fake GPU")
