"""What tasks can lease follows from what the driver tells, from what is unwell, and from what the operator says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nodeservice.core.gpus import GpuUnit, ShareMethod
from nodeservice.core.model import GIB
from nodeservice.gpu.units import SharingPolicy, units_of
from nodeservice.ports import Gpu, GpuInventory, MigInstance
from nodeservice.testing.fake_gpu import fake_gpu

NO_SHARING = SharingPolicy()
DEFAULT, PROHIBITED, EXCLUSIVE = 0, 2, 3


def instance(number: int, slices: int = 1, gib: int = 10, *, gpu_instance: int | None = None) -> MigInstance:
    return MigInstance(
        uuid=f"MIG-{number}",
        name=f"Fake GPU MIG {slices}g.{gib}gb",
        profile=f"{slices}g.{gib}gb",
        memory_total_bytes=gib * GIB,
        gpu_instance_id=number if gpu_instance is None else gpu_instance,
        compute_instance_id=number if gpu_instance is not None else 0,
        compute_slice_count=slices,
    )


def split(*instances: MigInstance, **facts: object) -> Gpu:
    return replace(fake_gpu(0), mig_enabled=True, mig_instances=instances, **facts)  # type: ignore[arg-type]


def units(
    *gpus: Gpu, error: str | None = None, unwell: dict[str, str] | None = None, policy: SharingPolicy = NO_SHARING
) -> tuple[GpuUnit, ...]:
    return units_of(GpuInventory(gpus=gpus, error=error), unwell or {}, policy)


def methods(policy: SharingPolicy, **facts: object) -> tuple[ShareMethod, ...]:
    (unit,) = units(replace(fake_gpu(0), **facts), policy=policy)  # type: ignore[arg-type]
    return unit.share_methods


def test_a_gpu_is_leased_whole_with_the_memory_that_tasks_can_allocate() -> None:
    (unit,) = units(replace(fake_gpu(0), memory_reserved_bytes=GIB, numa_node=1, closeness={"GPU-x": 7}))
    assert (unit.memory_bytes, unit.compute_capability, unit.numa_node) == (79 * GIB, (9, 0), 1)
    assert (unit.counts, unit.mig_profile, unit.parent_uuid, unit.unwell) == (True, "", "", "")
    assert unit.closeness == {"GPU-x": 7}


def test_a_gpu_of_which_the_driver_tells_no_memory_has_none_to_give_and_not_less() -> None:
    (unit,) = units(replace(fake_gpu(0), memory_total_bytes=0, memory_reserved_bytes=5, compute_capability=None))
    assert (unit.memory_bytes, unit.compute_capability) == (0, (0, 0))


def test_a_split_gpu_is_its_instances_and_not_itself() -> None:
    found = units(split(instance(7), instance(8, 3, 40)), fake_gpu(1))
    assert [unit.uuid for unit in found] == ["MIG-7", "MIG-8", fake_gpu(1).uuid]
    assert {unit.parent_uuid for unit in found[:2]} == {fake_gpu(0).uuid}
    assert (found[1].mig_profile, found[1].memory_milli, found[1].compute_milli) == ("3g.40gb", 500, 428)
    assert units(split()) == ()


def test_instances_count_only_where_the_operator_says_so() -> None:
    assert not units(split(instance(7)))[0].counts
    assert units(split(instance(7)), policy=SharingPolicy(mig_counts=True))[0].counts


def test_a_gpu_of_four_slices_is_all_of_it_in_four() -> None:
    """An A30 and an RTX PRO 6000 have four, an RTX PRO 5000 two (docs.nvidia.com: MIG User Guide, Supported GPUs)."""
    found = units(split(instance(1, 1, 20), instance(2, 4, 80), mig_slice_count=4))
    assert [unit.compute_milli for unit in found] == [250, 1000]
    assert units(split(instance(1), mig_slice_count=0))[0].compute_milli == 1000


def test_an_instance_of_a_gpu_of_unknown_memory_is_no_known_part_of_it() -> None:
    (unit,) = units(split(instance(7), memory_total_bytes=0))
    assert (unit.memory_bytes, unit.memory_milli) == (10 * GIB, 0)


def test_compute_instances_that_share_one_memory_are_not_given_to_tasks() -> None:
    """They are kept apart by nobody as far as memory goes."""
    found = units(split(instance(1, gpu_instance=5), instance(2, gpu_instance=5), instance(3)))
    assert ["shares its memory" in unit.unwell for unit in found] == [True, True, False]


# ---- unwell -----------------------------------------------------------------------------------------------------------


def test_what_is_unwell_with_a_gpu_is_so_with_all_its_instances() -> None:
    found = units(split(instance(7), instance(8)), fake_gpu(1), unwell={fake_gpu(0).uuid: "XID 48"})
    assert [unit.unwell for unit in found] == ["XID 48", "XID 48", ""]


def test_a_driver_that_fails_makes_all_unwell_whatever_else_they_are() -> None:
    found = units(fake_gpu(0), split(instance(7)), error="NVML error 999", unwell={fake_gpu(0).uuid: "XID 48"})
    assert {unit.unwell for unit in found} == {"NVML error 999"}


def test_a_lost_gpu_is_unwell_before_anybody_has_looked_after_its_health() -> None:
    lost = replace(fake_gpu(0), lost="GPU is lost")
    assert units(lost)[0].unwell == "GPU is lost"
    assert units(lost, unwell={lost.uuid: "XID 79"})[0].unwell == "XID 79"


def test_a_gpu_in_prohibited_mode_takes_no_tasks_and_says_what_to_do() -> None:
    (unit,) = units(replace(fake_gpu(0), compute_mode=PROHIBITED))
    assert "--compute-mode" in unit.unwell
    assert units(replace(fake_gpu(0), compute_mode=EXCLUSIVE))[0].unwell == ""


# ---- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, DEFAULT])
def test_every_gpu_can_be_watched_and_its_driver_is_better_where_it_can_and_tasks_have_cgroups(
    mode: int | None,
) -> None:
    can = SharingPolicy(driver_limits=True)
    assert methods(NO_SHARING, compute_mode=mode) == (ShareMethod.WATCHED,)
    assert methods(can, compute_mode=mode) == (ShareMethod.WATCHED,)
    assert methods(NO_SHARING, compute_mode=mode, memory_limits=True) == (ShareMethod.WATCHED,)
    assert methods(can, compute_mode=mode, memory_limits=True) == (ShareMethod.DRIVER, ShareMethod.WATCHED)


def test_a_gpu_in_exclusive_mode_is_shared_through_mps_or_not_at_all() -> None:
    assert methods(SharingPolicy(driver_limits=True), compute_mode=EXCLUSIVE, memory_limits=True) == ()
    assert methods(SharingPolicy(mps=True), compute_mode=EXCLUSIVE) == (ShareMethod.MPS,)
    assert methods(SharingPolicy(mps=True), compute_mode=DEFAULT) == (ShareMethod.WATCHED,)


def test_an_instance_is_shared_by_nobody() -> None:
    every = SharingPolicy(allowed=True, mps=True, driver_limits=True)
    assert units(split(instance(7), memory_limits=True), policy=every)[0].share_methods == ()
