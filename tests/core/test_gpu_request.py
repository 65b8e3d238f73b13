"""What a task asks of GPUs is checked before anybody looks for them."""

from __future__ import annotations

import pytest

from nodeservice.core.gpu_request import check_gpu_request
from nodeservice.core.gpus import GpuRequest, GpuShare
from nodeservice.core.model import MIB
from nodeservice.errors import RequestError

UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"


def of_part(**share: int) -> GpuRequest:
    return GpuRequest(share=GpuShare(**share))


def many(count: int) -> tuple[str, ...]:
    return tuple(f"GPU-00000000-0000-0000-0000-{number:012x}" for number in range(count))


@pytest.mark.parametrize(
    ("count", "request_"),
    [
        (0, GpuRequest()),
        (1024, GpuRequest()),
        (1, GpuRequest(model="NVIDIA H200 NVL")),
        (1, GpuRequest(min_memory_bytes=2**60, min_compute_capability=(9, 0))),
        (2, GpuRequest(uuids=(UUID, UUID.replace("GPU", "MIG")))),
        (1, GpuRequest(uuids=many(1024))),
        (0, of_part(milli=1)),
        (0, of_part(milli=999)),
        (0, of_part(memory_bytes=MIB)),
        (0, of_part(memory_bytes=MIB, sm_percent=100)),
        (0, GpuRequest(share=GpuShare(milli=500), uuids=(UUID,), model="H200")),
    ],
)
def test_what_can_be_meant_is_taken(count: int, request_: GpuRequest) -> None:
    check_gpu_request(request_, gpu_count=count)


@pytest.mark.parametrize(
    "profile",
    ["1g.5gb", "1g.18gb", "7g.141gb", "1g.10gb+me", "1c.3g.71gb", "1g.24gb+me.all", "1g.24gb-me", "4g.96gb+gfx"],
)
def test_mig_profiles_are_named_as_nvidia_names_them(profile: str) -> None:
    check_gpu_request(GpuRequest(mig_profile=profile), gpu_count=1)


@pytest.mark.parametrize(
    ("count", "request_", "field", "words"),
    [
        (1025, GpuRequest(), "req_gpu", "1025"),
        (1, GpuRequest(model="H\n200"), "gpu.model", "H\\n200"),
        (1, GpuRequest(model="é"), "gpu.model", "product name"),
        (1, GpuRequest(model="x" * 97), "gpu.model", "x" * 40),
        (1, GpuRequest(min_memory_bytes=-1), "gpu.min_memory_bytes", "-1"),
        (1, GpuRequest(min_memory_bytes=2**60 + 1), "gpu.min_memory_bytes", str(2**60 + 1)),
        (1, GpuRequest(min_compute_capability=(100, 0)), "gpu.min_compute_capability", "100.0"),
        (1, GpuRequest(min_compute_capability=(-1, 0)), "gpu.min_compute_capability", "-1.0"),
        (1, GpuRequest(mig_profile="1g.18GB"), "gpu.mig_profile", "1g.18GB"),
        (1, GpuRequest(mig_profile="1g.18gb\n"), "gpu.mig_profile", "\\n"),
        (1, GpuRequest(mig_profile="all"), "gpu.mig_profile", "all"),
        (1, GpuRequest(uuids=("0",)), "gpu.uuids", "'0'"),
        (1, GpuRequest(uuids=("all",)), "gpu.uuids", "'all'"),
        (1, GpuRequest(uuids=(UUID + "\n",)), "gpu.uuids", "nvidia-smi"),
        (1, GpuRequest(uuids=(UUID.upper(),)), "gpu.uuids", "nvidia-smi"),
        (1, GpuRequest(uuids=(f"{UUID},{UUID}",)), "gpu.uuids", "nvidia-smi"),
        (2, GpuRequest(uuids=(UUID, UUID)), "gpu.uuids", "twice"),
        (2, GpuRequest(uuids=(UUID,)), "gpu.uuids", "1 of the 2"),
        (1, GpuRequest(uuids=many(1025)), "gpu.uuids", "1025"),
        (0, GpuRequest(model="H200"), "req_gpu", "is 0"),
        (0, GpuRequest(uuids=(UUID,)), "req_gpu", "is 0"),
        (1, of_part(milli=500), "gpu.share", "beside 1 whole"),
        (0, GpuRequest(share=GpuShare(milli=500), mig_profile="1g.18gb"), "gpu.share", "MIG profile"),
        (0, of_part(milli=500, memory_bytes=MIB), "gpu.share", "beside amounts"),
        (0, of_part(milli=500, sm_percent=1), "gpu.share", "beside amounts"),
        (0, of_part(), "gpu.share", "empty"),
        (0, of_part(milli=1000), "req_gpu", "is 1"),
        (0, of_part(milli=-1), "req_gpu", "-0.001"),
        (0, of_part(memory_bytes=MIB - 1), "gpu.share.memory_bytes", str(MIB - 1)),
        (0, of_part(memory_bytes=-MIB), "gpu.share.memory_bytes", str(-MIB)),
        (0, of_part(memory_bytes=2**61), "gpu.share.memory_bytes", str(2**61)),
        (0, of_part(sm_percent=50), "gpu.share.memory_bytes", "is 0"),
        (0, of_part(memory_bytes=MIB, sm_percent=101), "gpu.share.sm_percent", "101"),
        (0, of_part(memory_bytes=MIB, sm_percent=-1), "gpu.share.sm_percent", "-1"),
        (0, GpuRequest(share=GpuShare(milli=500), uuids=(UUID, UUID)), "gpu.uuids", "twice"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_the_name_of_its_field(
    count: int, request_: GpuRequest, field: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        check_gpu_request(request_, gpu_count=count)
    assert (caught.value.reason, caught.value.field) == ("INVALID_REQUEST", field)
    assert words in f"{caught.value} {caught.value.hint}"
    assert len(str(caught.value)) < 300
