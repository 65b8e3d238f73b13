"""Reads what a task asks of GPUs, and refuses what no node could take as it is meant."""

from __future__ import annotations

import math
import re

from nodeservice.errors import invalid_request
from nodeservice.master.gpu_fit import capability_of
from nodeservice.master.request import GpuWish
from nodeservice.wire import master_worker_pb2 as pb

# As the node checks them (core.gpu_request): what it refuses for its value alone is refused here.
_UUID = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PROFILE = re.compile(r"([0-9]c\.)?[0-9]g\.[0-9]{1,4}gb([+-][a-z.]{1,12}){0,2}")
_MODEL = re.compile(r"[ -~]{0,96}")
_MOST_GPUS = 1024
_MOST_BYTES = 2**60
_LEAST_PART_BYTES = 1024**2


def wish_of(task: pb.Task) -> GpuWish:
    """Raises RequestError (INVALID_REQUEST) naming the field."""
    asked, share = task.gpu, task.gpu.share
    count, milli = _count(task.req_gpu)
    has_share = asked.HasField("share")
    if has_share and task.req_gpu:
        raise invalid_request("gpu.share", f"is given beside req_gpu {task.req_gpu:g}", "give one of the two")
    if has_share:
        _check_share(share)
    if not (count or milli or has_share) and task.HasField("gpu") and asked.ByteSize():
        raise invalid_request("req_gpu", "is 0 although GPUs are described", "say how many, or which part of one")
    if not _MODEL.fullmatch(asked.model):
        raise invalid_request("gpu.model", f"is {asked.model[:40]!a}", "use a part of the name, such as H200")
    if not 0 <= asked.min_memory_bytes <= _MOST_BYTES:
        raise invalid_request("gpu.min_memory_bytes", f"is {asked.min_memory_bytes}", "give bytes that a GPU can have")
    if asked.mig_profile and not _PROFILE.fullmatch(asked.mig_profile):
        shown = ascii(asked.mig_profile[:40])
        raise invalid_request("gpu.mig_profile", f"is {shown}", "name it as nvidia-smi does, such as 1g.18gb")
    if asked.mig_profile and (has_share or milli):
        raise invalid_request("gpu.mig_profile", "is given beside a part of a GPU", "the profile says the part already")
    return GpuWish(
        count=count,
        model=asked.model,
        min_memory_bytes=asked.min_memory_bytes,
        min_compute_capability=_capability(asked.min_compute_capability),
        mig_profile=asked.mig_profile,
        uuids=_uuids(asked, 1 if has_share or milli else count),
        part_milli=milli,
        part_memory_bytes=share.memory_bytes if has_share else 0,
        part_sm_percent=share.sm_percent if has_share else 0,
    )


def _count(value: float) -> tuple[int, int]:
    """Whole GPUs, or thousandths of one."""
    if math.isfinite(value) and value == int(value) and 0 <= value <= _MOST_GPUS:
        return int(value), 0
    milli = round(value * 1000) if math.isfinite(value) and 0 < value < 1 else 0
    if not 1 <= milli <= 999:
        raise invalid_request(
            "req_gpu", f"is {value!r}", f"ask for 0 to {_MOST_GPUS} whole GPUs, or for a part of one such as 0.5"
        )
    return 0, milli


def _capability(text: str) -> tuple[int, int]:
    found = capability_of(text) if text else (0, 0)
    if found is None:
        shown = ascii(text[:20])
        raise invalid_request("gpu.min_compute_capability", f"is {shown}", "give it as NVIDIA does, such as 9.0")
    return found


def _uuids(asked: pb.GpuRequest, count: int) -> frozenset[str]:
    for uuid in asked.uuids:
        if not _UUID.fullmatch(uuid):
            raise invalid_request(
                "gpu.uuids", f"has {uuid[:60]!a}", "name GPUs and MIG instances as nvidia-smi -L does"
            )
    found = frozenset(asked.uuids)
    if len(found) < len(asked.uuids):
        raise invalid_request("gpu.uuids", "names a GPU twice", "name each once")
    if found and len(found) < count:
        raise invalid_request(
            "gpu.uuids", f"names {len(found)} of the {count} GPUs asked", "name as many, or more to choose from"
        )
    return found


def _check_share(share: pb.GpuShare) -> None:
    if not _LEAST_PART_BYTES <= share.memory_bytes <= _MOST_BYTES:
        raise invalid_request("gpu.share.memory_bytes", f"is {share.memory_bytes}", "ask for at least 1 MiB")
    if not 0 <= share.sm_percent <= 100:
        raise invalid_request("gpu.share.sm_percent", f"is {share.sm_percent}", "use 1 to 100, or leave it out")
