"""What is said of GPUs on the wire: hostile requests, old masters, and what the node tells of its GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from nodeservice.core.gpu_request import check_gpu_request
from nodeservice.core.gpus import GpuPart, GpuRequest, GpuShare, GpuUnit, GpuUsage, ShareMethod
from nodeservice.core.model import GIB, Lease, Resources
from nodeservice.errors import RequestError
from nodeservice.gpu.health import GpuState
from nodeservice.gpu.units import SharingPolicy, units_of
from nodeservice.ports import Gpu, GpuInventory, MigInstance
from nodeservice.rpc.convert_gpu import gpu_infos, gpu_request, gpu_usage, gpus_allocated
from nodeservice.testing.fake_gpu import fake_gpu
from nodeservice.wire import master_worker_pb2 as pb

ONE = fake_gpu(0)


def task(req_gpu: float = 0.0, gpu: pb.GpuRequest | None = None) -> pb.Task:
    return pb.Task(req_gpu=req_gpu, gpu=gpu)


def take(message: pb.Task) -> None:
    """The translation, and the check behind it."""
    count, request = gpu_request(message)
    check_gpu_request(request, gpu_count=count)


def refused(message: pb.Task) -> RequestError:
    with pytest.raises(RequestError) as caught:
        take(message)
    assert caught.value.reason == "INVALID_REQUEST"
    assert len(str(caught.value)) < 300
    return caught.value


# ---- from the wire ----------------------------------------------------------------------------------------------------


def test_an_old_master_that_knows_only_the_count_gets_any_gpus() -> None:
    assert gpu_request(pb.Task()) == (0, GpuRequest())
    assert gpu_request(task(2.0)) == (2, GpuRequest())
    assert gpu_request(pb.Task.FromString(task(8.0).SerializeToString())) == (8, GpuRequest())


@pytest.mark.parametrize(
    ("value", "milli"), [(0.5, 500), (0.001, 1), (0.999, 999), (0.125, 125), (1 / 3, 333), (0.1, 100)]
)
def test_less_than_one_is_a_part_of_one(value: float, milli: int) -> None:
    assert gpu_request(task(value)) == (0, GpuRequest(share=GpuShare(milli=milli)))


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        float("-inf"),
        -1.0,
        -0.5,
        -1e-300,
        1.5,
        2.0000001,
        1e300,
        1e7,
        0.0001,
        1e-300,
        0.9999,
    ],
)
def test_a_number_of_gpus_that_no_machine_can_give_is_refused(value: float) -> None:
    assert refused(task(value)).field == "req_gpu"


def test_minus_zero_is_zero() -> None:
    assert gpu_request(task(-0.0)) == (0, GpuRequest())


def test_a_request_is_taken_over_field_by_field() -> None:
    uuid = "GPU-01234567-89ab-cdef-0123-456789abcdef"
    asked = pb.GpuRequest(
        model="H200", min_memory_bytes=GIB, min_compute_capability="10.3", mig_profile="1g.18gb", uuids=[uuid]
    )
    assert gpu_request(task(1.0, asked)) == (
        1,
        GpuRequest(
            model="H200",
            min_memory_bytes=GIB,
            min_compute_capability=(10, 3),
            mig_profile="1g.18gb",
            uuids=(uuid,),
        ),
    )


@pytest.mark.parametrize(
    "text", ["9", "9.", ".0", "9.0a", "9,0", "sm_90", "٩.٠", "9.0\n", " 9.0", "-9.0", "999.0", "9.0.0", "x" * 10_000]
)
def test_a_compute_capability_that_is_none_is_refused_and_shown_cut(text: str) -> None:
    assert refused(task(1.0, pb.GpuRequest(min_compute_capability=text))).field == "gpu.min_compute_capability"


def test_a_share_by_amounts_is_taken_and_an_empty_one_is_refused() -> None:
    by_amounts = pb.GpuRequest(share=pb.GpuShare(memory_bytes=GIB, sm_percent=20))
    assert gpu_request(task(0.0, by_amounts)) == (0, GpuRequest(share=GpuShare(memory_bytes=GIB, sm_percent=20)))
    assert refused(task(0.0, pb.GpuRequest(share=pb.GpuShare()))).field == "gpu.share"


@pytest.mark.parametrize(
    ("req_gpu", "share", "field"),
    [
        (0.5, pb.GpuShare(memory_bytes=GIB), "gpu.share"),
        (0.5, pb.GpuShare(), "gpu.share"),
        (1.0, pb.GpuShare(memory_bytes=GIB), "gpu.share"),
        (0.0, pb.GpuShare(memory_bytes=-(2**63)), "gpu.share.memory_bytes"),
        (0.0, pb.GpuShare(memory_bytes=2**63 - 1), "gpu.share.memory_bytes"),
        (0.0, pb.GpuShare(memory_bytes=GIB, sm_percent=-(2**31)), "gpu.share.sm_percent"),
        (0.0, pb.GpuShare(sm_percent=50), "gpu.share.memory_bytes"),
    ],
)
def test_a_share_that_contradicts_itself_or_the_count_is_refused(
    req_gpu: float, share: pb.GpuShare, field: str
) -> None:
    assert refused(task(req_gpu, pb.GpuRequest(share=share))).field == field


def test_a_hundred_thousand_names_are_refused() -> None:
    names = [f"GPU-00000000-0000-0000-0000-{number:012x}" for number in range(100_000)]
    assert refused(task(1.0, pb.GpuRequest(uuids=names))).field == "gpu.uuids"


def test_gpus_that_are_described_and_not_counted_are_refused() -> None:
    assert refused(task(0.0, pb.GpuRequest(model="H200"))).field == "req_gpu"
    assert gpu_request(task(0.0, pb.GpuRequest())) == (0, GpuRequest())


# ---- to the wire ------------------------------------------------------------------------------------------------------


def split(**facts: object) -> Gpu:
    instances = tuple(
        MigInstance(
            uuid=f"MIG-{number}",
            name="Fake GPU MIG 1g.10gb",
            profile="1g.10gb",
            memory_total_bytes=10 * GIB,
            memory_used_bytes=None,
            gpu_instance_id=number,
            compute_instance_id=0,
        )
        for number in (7, 8)
    )
    return replace(fake_gpu(1), mig_enabled=True, mig_instances=instances, **facts)  # type: ignore[arg-type]


def told(
    *gpus: Gpu,
    leases: tuple[Lease, ...] = (),
    states: Mapping[str, tuple[GpuState, str]] | None = None,
    error: str | None = None,
) -> dict[str, pb.GpuInfo]:
    inventory, known = GpuInventory(gpus=gpus, error=error), states or {}
    unwell = {uuid: why for uuid, (_, why) in known.items()}
    units = units_of(inventory, unwell, SharingPolicy())
    infos = gpu_infos(inventory, units, leases, lambda uuid: known.get(uuid, (GpuState.WELL, "")), sharing_allowed=True)
    return {info.uuid: info for info in infos}


def part(uuid: str, memory_bytes: int, method: ShareMethod = ShareMethod.WATCHED) -> Lease:
    return Lease(
        granted=Resources(), gpu_uuids=(uuid,), gpu_part=GpuPart(memory_bytes=memory_bytes, sm_percent=0, method=method)
    )


def test_a_split_gpu_is_told_beside_its_instances_and_is_not_leasable_itself() -> None:
    found = told(ONE, split())
    assert list(found) == [ONE.uuid, fake_gpu(1).uuid, "MIG-7", "MIG-8"]
    assert [(info.leasable, info.counted) for info in found.values()] == [
        (True, True),
        (False, False),
        (True, False),
        (True, False),
    ]
    assert (found["MIG-7"].parent_uuid, found["MIG-7"].mig_profile) == (fake_gpu(1).uuid, "1g.10gb")
    assert list(found[ONE.uuid].share_methods) == ["watched"]


def test_what_is_not_known_is_absent() -> None:
    info = told(ONE)[ONE.uuid]
    assert not any(info.HasField(field) for field in ("numa_node", "power_watts", "temperature_celsius"))
    full = told(replace(ONE, numa_node=0, power_watts=0.0, temperature_celsius=0.0))[ONE.uuid]
    assert all(full.HasField(field) for field in ("numa_node", "power_watts", "temperature_celsius"))
    assert told(replace(ONE, compute_capability=None, pci_address=None))[ONE.uuid].compute_capability == ""


def test_how_much_of_a_gpu_is_held_is_told_in_thousandths() -> None:
    whole = Lease(granted=Resources(gpu_count=1), gpu_uuids=("MIG-7",))
    found = told(ONE, split(), leases=(part(ONE.uuid, 20 * GIB), part(ONE.uuid, 1), whole))
    assert (found[ONE.uuid].held_milli, found["MIG-7"].held_milli, found["MIG-8"].held_milli) == (251, 1000, 0)


def test_a_gpu_s_state_and_its_reason_are_told_of_its_instances_too() -> None:
    found = told(ONE, split(), states={fake_gpu(1).uuid: (GpuState.FAULTY, "XID 79")})
    assert (found[ONE.uuid].state, found[ONE.uuid].state_reason) == ("WELL", "")
    assert {(found[uuid].state, found[uuid].state_reason) for uuid in ("MIG-7", "MIG-8")} == {("FAULTY", "XID 79")}


def test_a_gpu_that_takes_no_tasks_for_its_driver_or_its_modes_is_not_told_to_be_well() -> None:
    broken = told(ONE, split(), error="NVML error 999")
    assert {(broken[uuid].state, broken[uuid].state_reason) for uuid in (ONE.uuid, "MIG-7")} == {
        ("SUSPECT", "NVML error 999")
    }
    assert told(replace(ONE, compute_mode=2))[ONE.uuid].state == "SUSPECT"


def test_what_a_task_holds_is_told_to_old_masters_as_a_number_of_gpus() -> None:
    units = [GpuUnit(uuid="GPU-a", name="H", memory_bytes=80 * GIB)]
    assert gpus_allocated(Lease(granted=Resources(gpu_count=2), gpu_uuids=("GPU-a", "GPU-b")), units) == 2.0
    assert gpus_allocated(part("GPU-a", 40 * GIB), units) == 0.5
    assert gpus_allocated(part("GPU-gone", 40 * GIB), units) == 1.0
    assert gpus_allocated(part("GPU-a", 80 * GIB, ShareMethod.MIG), units) == 1.0
    assert gpus_allocated(Lease(granted=Resources()), units) == 0.0


def test_of_what_was_used_that_which_is_not_known_is_absent_and_zero_is_zero() -> None:
    bare = gpu_usage(GpuUsage(uuid="GPU-a"))
    optional = ("utilization_mean_percent", "utilization_peak_percent", "memory_peak_bytes", "energy_joules")
    assert not any(bare.HasField(field) for field in optional)
    full = gpu_usage(
        GpuUsage(
            uuid="GPU-a",
            utilization_mean_percent=0.0,
            utilization_peak_percent=0.0,
            memory_peak_bytes=0,
            energy_joules=0.0,
            xids=(79, 45),
        )
    )
    assert all(full.HasField(field) for field in optional)
    assert list(full.xids) == [79, 45]
