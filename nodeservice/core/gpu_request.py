"""Checks what a task asks of GPUs before anybody looks for them. What comes from the wire is hostile."""

from __future__ import annotations

from nodeservice.core.gpus import GpuRequest, GpuShare
from nodeservice.errors import invalid_request
from nodeservice.task_bounds import MOST_GPUS, check_gpu, check_gpu_part, check_gpu_uuids


def check_gpu_request(request: GpuRequest, *, gpu_count: int) -> None:
    """Raise RequestError (INVALID_REQUEST) naming the field, the value and the remedy."""
    if gpu_count > MOST_GPUS:
        raise invalid_request("req_gpu", f"is {gpu_count}", f"ask for at most {MOST_GPUS}")
    check_gpu(model=request.model, min_memory_bytes=request.min_memory_bytes, mig_profile=request.mig_profile)
    capability = request.min_compute_capability
    if capability is not None and not all(0 <= part <= 99 for part in capability):
        shown = ".".join(map(str, capability))
        raise invalid_request("gpu.min_compute_capability", f"is {shown}", "give it as NVIDIA does, such as 9.0")
    if request.share is not None:
        _check_share(request, request.share, gpu_count)
    elif gpu_count == 0 and request != GpuRequest():
        raise invalid_request("req_gpu", "is 0 although GPUs are described", "say how many, or which part of one")
    check_gpu_uuids(request.uuids, count=1 if request.share is not None else gpu_count)


def _check_share(request: GpuRequest, share: GpuShare, gpu_count: int) -> None:
    if gpu_count:
        raise invalid_request(
            "gpu.share", f"is given beside {gpu_count} whole GPUs", "ask for a part of one GPU, or for whole ones"
        )
    if request.mig_profile:
        raise invalid_request(
            "gpu.share", "is given beside a MIG profile", "the profile says the part already; leave one out"
        )
    if share.milli and (share.memory_bytes or share.sm_percent):
        raise invalid_request("gpu.share", "is given beside amounts", "give the fraction, or bytes and percent")
    if share == GpuShare():
        raise invalid_request(
            "gpu.share", "is empty", "give a fraction, or memory_bytes, or both memory_bytes and sm_percent"
        )
    if not 0 <= share.milli < 1000:
        raise invalid_request("req_gpu", f"is {share.milli / 1000:g}", "ask for whole GPUs, or for less than one")
    if not share.milli:
        check_gpu_part(share.memory_bytes, share.sm_percent)
