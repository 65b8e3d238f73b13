"""Translates what is said of GPUs between the wire and the core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from nodeservice.core.gpus import GpuRequest, GpuShare, GpuUnit, GpuUsage, ShareMethod
from nodeservice.core.model import Lease
from nodeservice.errors import invalid_request
from nodeservice.gpu.health import GpuState
from nodeservice.gpu.throttle import throttle_names
from nodeservice.ports import Gpu, GpuInventory, MigInstance
from nodeservice.task_bounds import gpu_capability
from nodeservice.wire import master_worker_pb2 as pb

_MOST_GPUS = 1_000_000
State = Callable[[str], tuple[GpuState, str]]
_OPTIONAL = (
    "memory_used_bytes",
    "utilization_percent",
    "numa_node",
    "power_watts",
    "power_limit_watts",
    "temperature_celsius",
    "ecc_enabled",
    "ecc_uncorrected_count",
)


# ---- from the wire ----------------------------------------------------------------------------------------------------


def gpu_request(task: pb.Task) -> tuple[int, GpuRequest]:
    """The number of whole GPUs, and what they have to be. Raises RequestError; `core.gpu_request` checks the rest."""
    asked = task.gpu
    count, milli = _count(task.req_gpu)
    share: GpuShare | None = None
    if milli:
        share = GpuShare(milli=milli)
    if asked.HasField("share"):
        if milli:
            raise invalid_request("gpu.share", f"is given beside req_gpu {task.req_gpu:g}", "give one of the two")
        share = GpuShare(memory_bytes=asked.share.memory_bytes, sm_percent=asked.share.sm_percent)
    return count, GpuRequest(
        model=asked.model,
        min_memory_bytes=asked.min_memory_bytes,
        min_compute_capability=gpu_capability(capability) if (capability := asked.min_compute_capability) else None,
        mig_profile=asked.mig_profile,
        uuids=tuple(asked.uuids),
        share=share,
    )


def _count(value: float) -> tuple[int, int]:
    """Whole GPUs, or thousandths of one."""
    if not math.isfinite(value) or value < 0 or value > _MOST_GPUS:
        raise invalid_request("req_gpu", f"is {value!r}", "ask for a number of GPUs that a machine can have")
    if value == int(value):
        return int(value), 0
    milli = round(value * 1000)
    if value > 1 or not 1 <= milli <= 999:
        raise invalid_request("req_gpu", f"is {value!r}", "ask for whole GPUs, or for a part of one such as 0.5")
    return 0, milli


# ---- to the wire ------------------------------------------------------------------------------------------------------


def gpu_infos(
    inventory: GpuInventory, units: Iterable[GpuUnit], leases: Iterable[Lease], state: State, *, sharing_allowed: bool
) -> list[pb.GpuInfo]:
    """GPUs, each with its MIG instances behind it. `sharing_allowed`: the operator takes parts that are only watched."""
    leasable = {unit.uuid: unit for unit in units}
    held = _held_milli(leasable, leases)
    infos: list[pb.GpuInfo] = []
    for gpu in inventory.gpus:
        info = _info(gpu, leasable.get(gpu.uuid), held, state)
        instances = [
            _instance(gpu, instance, leasable.get(instance.uuid), held, state) for instance in gpu.mig_instances
        ]
        if not sharing_allowed and ShareMethod.WATCHED in info.share_methods:
            info.share_methods.remove(ShareMethod.WATCHED)
        infos += [info, *instances]
    return infos


def _info(gpu: Gpu, unit: GpuUnit | None, held: Mapping[str, int], state: State) -> pb.GpuInfo:
    how, why = _state_of(gpu, unit, state)
    info = pb.GpuInfo(
        uuid=gpu.uuid,
        name=gpu.name,
        memory_total_bytes=gpu.memory_total_bytes,
        memory_reserved_bytes=gpu.memory_reserved_bytes,
        compute_capability=_capability_text(gpu),
        pci_address=gpu.pci_address or "",
        leasable=unit is not None,
        counted=unit is not None and unit.counts,
        state=how.value,
        state_reason=why,
        held_milli=held.get(gpu.uuid, 0),
        throttle_reasons=throttle_names(gpu.throttle_reasons),
        share_methods=[method.value for method in unit.share_methods] if unit is not None else [],
        nvlink_count=gpu.nvlink_count,
    )
    for field in _OPTIONAL:
        value = getattr(gpu, field)
        if value is not None:
            setattr(info, field, value)
    return info


def _instance(
    gpu: Gpu, instance: MigInstance, unit: GpuUnit | None, held: Mapping[str, int], state: State
) -> pb.GpuInfo:
    how, why = _state_of(gpu, unit, state)
    return pb.GpuInfo(
        uuid=instance.uuid,
        name=instance.name,
        memory_total_bytes=instance.memory_total_bytes,
        memory_used_bytes=instance.memory_used_bytes,
        compute_capability=_capability_text(gpu),
        pci_address=gpu.pci_address or "",
        mig_profile=instance.profile,
        parent_uuid=gpu.uuid,
        leasable=unit is not None,
        counted=unit is not None and unit.counts,
        state=how.value,
        state_reason=why,
        held_milli=held.get(instance.uuid, 0),
        share_methods=[ShareMethod.MIG.value],
    )


def _state_of(gpu: Gpu, unit: GpuUnit | None, state: State) -> tuple[GpuState, str]:
    """A GPU that is well takes no tasks all the same where its driver or its modes forbid it."""
    how, why = state(gpu.uuid)
    if how is GpuState.WELL and unit is not None and unit.unwell:
        return GpuState.SUSPECT, unit.unwell
    return how, why


def _held_milli(units: Mapping[str, GpuUnit], leases: Iterable[Lease]) -> dict[str, int]:
    held: dict[str, int] = {}
    for lease in leases:
        for uuid in lease.gpu_uuids:
            held[uuid] = min(1000, held.get(uuid, 0) + _milli(units.get(uuid), lease))
    return held


def _milli(unit: GpuUnit | None, lease: Lease) -> int:
    part = lease.gpu_part
    if part is None or unit is None or unit.mig_profile:
        return 1000
    return -(-part.memory_bytes * 1000 // max(1, unit.memory_bytes))


def gpus_allocated(lease: Lease, units: Iterable[GpuUnit]) -> float:
    """As the old field counts them: a part of a GPU by its share of the memory."""
    if lease.gpu_part is None:
        return float(len(lease.gpu_uuids))
    by_uuid = {unit.uuid: unit for unit in units}
    return sum(_milli(by_uuid.get(uuid), lease) for uuid in lease.gpu_uuids) / 1000


def gpu_part(lease: Lease) -> pb.GpuPart | None:
    part = lease.gpu_part
    if part is None:
        return None
    return pb.GpuPart(memory_bytes=part.memory_bytes, sm_percent=part.sm_percent, method=part.method.value)


def gpu_usage(used: GpuUsage) -> pb.GpuUsage:
    message = pb.GpuUsage(uuid=used.uuid, name=used.name, seconds=used.seconds, xids=used.xids)
    for field in (
        "utilization_mean_percent",
        "utilization_peak_percent",
        "memory_peak_bytes",
        "energy_joules",
        "throttled_seconds",
    ):
        value = getattr(used, field)
        if value is not None:
            setattr(message, field, value)
    return message


def _capability_text(gpu: Gpu) -> str:
    return "{}.{}".format(*gpu.compute_capability) if gpu.compute_capability is not None else ""
