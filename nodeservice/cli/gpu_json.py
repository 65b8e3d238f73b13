"""GPUs as plain objects, the same in every command's `--json`: asked, held, used, and what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nodeservice.core.gpus import GpuRequest
from nodeservice.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nodeservice.core.model import TaskRecord
    from nodeservice.wire import master_worker_pb2 as pb

Document = dict[str, object]

_USED = (
    "seconds",
    "utilization_mean_percent",
    "utilization_peak_percent",
    "memory_peak_bytes",
    "energy_joules",
    "throttled_seconds",
)
_OPTIONAL_FACTS = (
    "memory_used_bytes",
    "utilization_percent",
    "numa_node",
    "nvlink_count",
    "ecc_enabled",
    "ecc_uncorrected_count",
    "power_watts",
    "power_limit_watts",
    "temperature_celsius",
)


def asked_document(request: GpuRequest) -> Document | None:
    """What is asked beside a number; null where any GPU will do. Of a part, either `milli` or the amounts are set."""
    if request == GpuRequest():
        return None
    capability, share = request.min_compute_capability, request.share
    return {
        "model": request.model or None,
        "min_memory_bytes": request.min_memory_bytes or None,
        "min_compute_capability": None if capability is None else "{}.{}".format(*capability),
        "mig_profile": request.mig_profile or None,
        "uuids": list(request.uuids),
        "share": None
        if share is None
        else {
            "milli": share.milli or None,
            "memory_bytes": share.memory_bytes or None,
            "sm_percent": share.sm_percent or None,
        },
    }


def asked_of_task(task: pb.Task) -> tuple[int, Document | None]:
    """Number of whole GPUs, and the rest. A master can send anything; what can't be read is shown as a number alone."""
    from nodeservice.rpc.convert_gpu import gpu_request

    try:
        count, request = gpu_request(task)
    except RequestError:
        return 0, None
    return count, asked_document(request)


def part_document(part: pb.GpuPart) -> Document:
    """`method` is who keeps the task to its part: mig, driver, mps, watched."""
    return {"memory_bytes": part.memory_bytes, "sm_percent": part.sm_percent or None, "method": part.method}


def held_by_record(record: TaskRecord) -> Document | None:
    """Its part of a GPU; null where it held whole ones, or none."""
    from nodeservice.rpc.convert_gpu import gpu_part

    part = gpu_part(record.lease)
    return None if part is None else part_document(part)


def bill_document(used: Iterable[pb.GpuUsage]) -> list[Document]:
    """One entry for each GPU; null for what is not known."""
    return [
        {
            "uuid": gpu.uuid,
            "name": gpu.name,
            **{name: getattr(gpu, name) if name == "seconds" or gpu.HasField(name) else None for name in _USED},
            "xids": list(gpu.xids),
        }
        for gpu in used
    ]


def bill_of_record(record: TaskRecord) -> list[Document]:
    from nodeservice.rpc.convert_gpu import gpu_usage

    return bill_document(gpu_usage(used) for used in record.usage.gpus)


def gpus_document(infos: Iterable[pb.GpuInfo]) -> list[Document]:
    """The GPUs of a node, each with its MIG instances in it."""
    found: dict[str, Any] = {}
    alone: list[Document] = []
    for info in infos:
        parent = found.get(info.parent_uuid) if info.parent_uuid else None
        if parent is not None:
            parent["mig_instances"].append(_instance(info))
            continue
        document = _gpu(info)
        alone.append(document)
        found[info.uuid] = document
    return alone


def _gpu(info: pb.GpuInfo) -> Document:
    return {
        "uuid": info.uuid,
        "name": info.name,
        "state": info.state or None,
        "state_reason": info.state_reason or None,
        "leasable": info.leasable,
        "counted": info.counted,
        "held_milli": info.held_milli,
        "share_methods": list(info.share_methods),
        "memory_total_bytes": info.memory_total_bytes,
        "memory_reserved_bytes": info.memory_reserved_bytes,
        "compute_capability": info.compute_capability or None,
        "pci_address": info.pci_address or None,
        **{name: getattr(info, name) if info.HasField(name) else None for name in _OPTIONAL_FACTS},
        "throttle_reasons": list(info.throttle_reasons),
        "mig_profile": info.mig_profile or None,
        "mig_instances": [],
    }


def _instance(info: pb.GpuInfo) -> Document:
    return {
        "uuid": info.uuid,
        "name": info.name,
        "mig_profile": info.mig_profile,
        "state": info.state or None,
        "state_reason": info.state_reason or None,
        "leasable": info.leasable,
        "counted": info.counted,
        "held_milli": info.held_milli,
        "memory_total_bytes": info.memory_total_bytes,
        "memory_used_bytes": info.memory_used_bytes if info.HasField("memory_used_bytes") else None,
    }
