"""Makes of what the driver tells what tasks can lease: whole GPUs that are not split, and MIG instances. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nodeservice.core.gpus import GpuUnit, ShareMethod
from nodeservice.ports import Gpu, GpuInventory, MigInstance

_EXCLUSIVE_PROCESS = 3
"""The compute mode in which MPS is no process's own choice."""
_PROHIBITED = 2
_SHARES_MEMORY = "it shares its memory with other compute instances; make one compute instance in each GPU instance"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingPolicy:
    """What the operator says about parts of GPUs."""

    allowed: bool = False
    """Parts of which only the memory is watched or held are given too."""
    mig_counts: bool = False
    """A task that asks for a number of GPUs may get MIG instances."""
    mps: bool = False
    """An MPS server runs for those GPUs that are in exclusive process mode."""
    driver_limits: bool = False
    """Tasks have cgroups of their own on cgroup v2, which the driver can limit."""


def units_of(inventory: GpuInventory, unwell: Mapping[str, str], policy: SharingPolicy) -> tuple[GpuUnit, ...]:
    """`unwell` says by UUID of a GPU why it takes no new tasks; its MIG instances don't either then."""
    units: list[GpuUnit] = []
    for gpu in inventory.gpus:
        why = unwell.get(gpu.uuid, "") or inventory.outdated
        if inventory.error is not None:
            why = inventory.error
        elif gpu.lost:
            why = why or gpu.lost
        elif gpu.compute_mode == _PROHIBITED:
            why = why or "its compute mode is 'prohibited'; set it with nvidia-smi --compute-mode"
        if gpu.mig_enabled:
            units += [_instance(gpu, instance, why, policy) for instance in gpu.mig_instances]
        else:
            units.append(_whole(gpu, why, policy))
    return tuple(units)


def _whole(gpu: Gpu, why: str, policy: SharingPolicy) -> GpuUnit:
    return GpuUnit(
        uuid=gpu.uuid,
        name=gpu.name,
        memory_bytes=max(0, gpu.memory_total_bytes - gpu.memory_reserved_bytes),
        compute_capability=gpu.compute_capability or (0, 0),
        numa_node=gpu.numa_node,
        closeness=gpu.closeness,
        unwell=why,
        share_methods=tuple(_methods(gpu, policy)),
    )


def _methods(gpu: Gpu, policy: SharingPolicy) -> Sequence[ShareMethod]:
    """Best first. In exclusive process mode a second process that is no client of MPS gets nothing at all."""
    if gpu.compute_mode == _EXCLUSIVE_PROCESS:
        return [ShareMethod.MPS] if policy.mps else []
    by_driver = [ShareMethod.DRIVER] if gpu.memory_limits and policy.driver_limits else []
    return [*by_driver, ShareMethod.WATCHED]


def _instance(gpu: Gpu, instance: MigInstance, why: str, policy: SharingPolicy) -> GpuUnit:
    """Where the memory of the whole GPU is not known, so isn't its part of it: 0."""
    if sum(1 for other in gpu.mig_instances if other.gpu_instance_id == instance.gpu_instance_id) > 1:
        why = why or _SHARES_MEMORY
    memory_milli = instance.memory_total_bytes * 1000 // gpu.memory_total_bytes if gpu.memory_total_bytes else 0
    return GpuUnit(
        uuid=instance.uuid,
        name=instance.name,
        memory_bytes=instance.memory_total_bytes,
        compute_capability=gpu.compute_capability or (0, 0),
        mig_profile=instance.profile,
        parent_uuid=gpu.uuid,
        memory_milli=min(1000, memory_milli),
        compute_milli=min(1000, instance.compute_slice_count * 1000 // max(1, gpu.mig_slice_count)),
        counts=policy.mig_counts,
        numa_node=gpu.numa_node,
        unwell=why,
    )
