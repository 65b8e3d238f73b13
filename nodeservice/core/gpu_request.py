"""Checks what a task asks of GPUs before anybody looks for them. What comes from the wire is hostile."""

from __future__ import annotations

import re

from nodeservice.core.gpus import GpuRequest, GpuShare
from nodeservice.core.model import MIB
from nodeservice.errors import invalid_request

_UUID = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
"""In lower case, as the driver gives them: one in upper case would be taken for a GPU that is not here."""
_MIG_PROFILE = re.compile(r"([0-9]c\.)?[0-9]g\.[0-9]{1,4}gb([+-][a-z.]{1,12}){0,2}\Z")
"""Such as 1g.18gb, 1c.3g.71gb, 1g.24gb+me.all, 1g.24gb-me (docs.nvidia.com: MIG User Guide, Supported MIG Profiles)."""
_MODEL = re.compile(r"[ -~]{0,96}\Z")
_MOST_BYTES = 2**60
_MOST_GPUS = 1024


def check_gpu_request(request: GpuRequest, *, gpu_count: int) -> None:
    """Raise RequestError (INVALID_REQUEST) naming the field, the value and the remedy."""
    if gpu_count > _MOST_GPUS:
        raise invalid_request("req_gpu", f"is {gpu_count}", f"ask for at most {_MOST_GPUS}")
    if not _MODEL.match(request.model):
        raise invalid_request("gpu.model", f"is {request.model[:40]!r}", "use a part of the product name, such as H200")
    if not 0 <= request.min_memory_bytes <= _MOST_BYTES:
        raise invalid_request(
            "gpu.min_memory_bytes", f"is {request.min_memory_bytes}", "give the bytes that a GPU can have"
        )
    capability = request.min_compute_capability
    if capability is not None and not all(0 <= part <= 99 for part in capability):
        shown = ".".join(map(str, capability))
        raise invalid_request("gpu.min_compute_capability", f"is {shown}", "give it as NVIDIA does, such as 9.0")
    if request.mig_profile and not _MIG_PROFILE.match(request.mig_profile):
        raise invalid_request(
            "gpu.mig_profile", f"is {request.mig_profile[:40]!r}", "name it as nvidia-smi does, such as 1g.18gb"
        )
    if request.share is not None:
        _check_share(request, request.share, gpu_count)
    elif gpu_count == 0 and request != GpuRequest():
        raise invalid_request("req_gpu", "is 0 although GPUs are described", "say how many, or which part of one")
    _check_uuids(request, 1 if request.share is not None else gpu_count)


def _check_uuids(request: GpuRequest, gpu_count: int) -> None:
    if len(request.uuids) > _MOST_GPUS:
        raise invalid_request("gpu.uuids", f"names {len(request.uuids)}", f"name at most {_MOST_GPUS}")
    for uuid in request.uuids:
        if not _UUID.match(uuid):
            raise invalid_request(
                "gpu.uuids", f"has {uuid[:60]!r}", "name GPUs and MIG instances as nvidia-smi -L does"
            )
    if len(set(request.uuids)) < len(request.uuids):
        raise invalid_request("gpu.uuids", "names a GPU twice", "name each once")
    if request.uuids and len(request.uuids) < gpu_count:
        raise invalid_request(
            "gpu.uuids",
            f"names {len(request.uuids)} of the {gpu_count} GPUs asked",
            "name as many, or more to choose from",
        )


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
    if not share.milli and not MIB <= share.memory_bytes <= _MOST_BYTES:
        raise invalid_request("gpu.share.memory_bytes", f"is {share.memory_bytes}", "ask for at least 1 MiB")
    if not 0 <= share.sm_percent <= 100:
        raise invalid_request("gpu.share.sm_percent", f"is {share.sm_percent}", "use 1 to 100, or leave it out")
