"""Reads what a task asks of GPUs, and refuses what no node could take as it is meant."""

from __future__ import annotations

import math

from nodeservice.errors import invalid_request
from nodeservice.master.request import GpuWish
from nodeservice.task_bounds import MOST_GPUS, check_gpu, check_gpu_part, check_gpu_uuids, gpu_capability
from nodeservice.wire import master_worker_pb2 as pb


def wish_of(task: pb.Task) -> GpuWish:
    """Raises RequestError (INVALID_REQUEST) naming the field."""
    asked, share = task.gpu, task.gpu.share
    count, milli = _count(task.req_gpu)
    has_share = asked.HasField("share")
    if has_share and task.req_gpu:
        raise invalid_request("gpu.share", f"is given beside req_gpu {task.req_gpu:g}", "give one of the two")
    if has_share:
        check_gpu_part(share.memory_bytes, share.sm_percent)
    if not (count or milli or has_share) and task.HasField("gpu") and asked.ByteSize():
        raise invalid_request("req_gpu", "is 0 although GPUs are described", "say how many, or which part of one")
    check_gpu(model=asked.model, min_memory_bytes=asked.min_memory_bytes, mig_profile=asked.mig_profile)
    if asked.mig_profile and (has_share or milli):
        raise invalid_request("gpu.mig_profile", "is given beside a part of a GPU", "the profile says the part already")
    check_gpu_uuids(asked.uuids, count=1 if has_share or milli else count)
    return GpuWish(
        count=count,
        model=asked.model,
        min_memory_bytes=asked.min_memory_bytes,
        min_compute_capability=gpu_capability(asked.min_compute_capability or "0.0"),
        mig_profile=asked.mig_profile,
        uuids=frozenset(asked.uuids),
        part_milli=milli,
        part_memory_bytes=share.memory_bytes if has_share else 0,
        part_sm_percent=share.sm_percent if has_share else 0,
    )


def _count(value: float) -> tuple[int, int]:
    """Whole GPUs, or thousandths of one."""
    if math.isfinite(value) and value == int(value) and 0 <= value <= MOST_GPUS:
        return int(value), 0
    milli = round(value * 1000) if math.isfinite(value) and 0 < value < 1 else 0
    if not 1 <= milli <= 999:
        raise invalid_request(
            "req_gpu", f"is {value!r}", f"ask for 0 to {MOST_GPUS} whole GPUs, or for a part of one such as 0.5"
        )
    return 0, milli
