"""How a task is kept to its part of a GPU, and what the receipt tells of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nodeservice.core.gpus import GpuPart, ShareMethod
from nodeservice.core.model import GIB, MIB, AttemptId, Lease, Phase, Resources, TaskRecord, TaskSpec, TraceIds
from nodeservice.errors import NodeFaultError
from nodeservice.lifecycle.context import Settings
from nodeservice.lifecycle.steps.gpus import bound, with_part
from nodeservice.limits.receipt import Receipt, receipt
from nodeservice.ports import ContainerSpec, Enforcement, GpuBound, Mount

HARD, WATCHED, NONE = Enforcement.HARD, Enforcement.WATCHED, Enforcement.NONE
PIPES = Path("/run/mps")


class FalseKeeper:
    """Holds a cgroup to what it `held`, whatever was asked; None refuses."""

    def __init__(self, held: int | None) -> None:
        self.held = held

    async def limit(self, record: TaskRecord, pid: int) -> tuple[int, str]:
        if self.held is None:
            raise NodeFaultError("the driver does not limit the GPU memory: NVML error 3", reason="LIMIT_NOT_ENFORCED")
        return self.held, f"/sys/fs/cgroup/{pid}"


def context(*, pipes: Path | None = PIPES, held: int | None = None) -> Any:
    settings = Settings(worker_id="w", log_max_bytes=1, gpu_mps_pipe_dir=pipes)
    return SimpleNamespace(settings=settings, gpus=FalseKeeper(held))


def record(method: ShareMethod | None, *, memory_bytes: int = 10 * GIB, sm_percent: int = 0) -> TaskRecord:
    part = None if method is None else GpuPart(memory_bytes=memory_bytes, sm_percent=sm_percent, method=method)
    return TaskRecord(
        spec=TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=1, fingerprint="f"),
        lease=Lease(granted=Resources(), gpu_uuids=("GPU-a",), gpu_part=part),
        trace=TraceIds(trace_id="0" * 32, span_id="0" * 16),
        accepted_at=datetime(2026, 1, 1, tzinfo=UTC),
        phase=Phase.STARTING,
        timings=(),
    )


def container() -> ContainerSpec:
    return ContainerSpec(
        name="t",
        image="i",
        argv=(),
        shell=None,
        env=(),
        labels={},
        gpu_uuids=("GPU-a",),
        log_max_bytes=1,
        grace_seconds=1.0,
        cpu_milli=100,
        memory_bytes=64 * MIB,
        pids_limit=10,
        mounts=(Mount(source=Path("/s"), target="/results", read_only=False),),
    )


async def written(task: TaskRecord, of: Any, pid: int | None = 7) -> tuple[GpuBound, Receipt]:
    how = await bound(of, task, pid)
    assert how is not None
    return how, receipt(task.spec, task.lease, readings=[], disk=None, engine={}, gpu_part=how)


# ---- what the container is told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, ShareMethod.MIG, ShareMethod.DRIVER, ShareMethod.WATCHED])
def test_only_who_shares_through_mps_is_told_of_its_server(method: ShareMethod | None) -> None:
    assert with_part(context(), record(method), container()) == container()


def test_a_container_of_mps_is_told_its_limits_and_reaches_the_server() -> None:
    spec = with_part(context(), record(ShareMethod.MPS, memory_bytes=3 * GIB + 1, sm_percent=20), container())
    assert dict(spec.gpu_env) == {
        "CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=3072M",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "20",
    }
    assert [(mount.source, mount.target) for mount in spec.mounts] == [
        (Path("/s"), "/results"),
        (PIPES, "/tmp/nvidia-mps"),
    ]
    assert container().mounts == spec.mounts[:1]


def test_without_a_share_of_the_compute_none_is_told() -> None:
    spec = with_part(context(), record(ShareMethod.MPS), container())
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in dict(spec.gpu_env)


# ---- what is in force -------------------------------------------------------------------------------------------------


async def test_whole_gpus_are_bound_by_nothing() -> None:
    assert await bound(context(), record(None), 7) is None


async def test_an_instance_holds_memory_and_compute() -> None:
    how, told = await written(record(ShareMethod.MIG, memory_bytes=20 * GIB, sm_percent=28), context())
    assert (how.memory_bytes, how.enforcement, how.sm_percent, how.sm_enforcement) == (20 * GIB, HARD, 28, HARD)
    assert (told.asked["gpu_sm_percent"], told.effective["gpu_sm_percent"]) == (28, 28)
    assert told.enforcement["gpu_sm_percent"] is HARD
    assert not [words for words in told.mismatches if "gpu" in words]


async def test_a_limit_of_the_driver_is_what_the_driver_says_that_it_is() -> None:
    how, told = await written(record(ShareMethod.DRIVER), context(held=10 * GIB))
    assert (how.memory_bytes, how.enforcement, how.sm_percent) == (10 * GIB, HARD, None)
    assert "/sys/fs/cgroup/7" in told.read_from["gpu_memory_bytes"]
    assert (told.effective["gpu_sm_percent"], told.enforcement["gpu_sm_percent"]) == (None, NONE)
    assert "gpu_sm_percent" not in told.asked


@pytest.mark.parametrize(("held", "words"), [(None, "no limit"), (12 * GIB, str(12 * GIB)), (1, "in force 1")])
async def test_a_limit_of_the_driver_that_is_another_than_asked_is_not_enforced(held: int | None, words: str) -> None:
    _, told = await written(record(ShareMethod.DRIVER), context(held=held))
    (mismatch,) = [sentence for sentence in told.mismatches if sentence.startswith("gpu_memory_bytes")]
    assert words in mismatch


async def test_a_container_that_ended_before_its_limit_was_set_was_only_watched() -> None:
    how, told = await written(record(ShareMethod.DRIVER), context(), pid=None)
    assert (how.enforcement, told.unread["gpu_memory_bytes"]) == (WATCHED, "it had ended before it was set")


async def test_what_is_only_watched_is_told_so_with_the_reason() -> None:
    _, told = await written(record(ShareMethod.WATCHED, sm_percent=50), context())
    assert told.enforcement["gpu_memory_bytes"] is WATCHED
    assert "no MIG instance" in told.unread["gpu_memory_bytes"]
    assert told.enforcement["gpu_sm_percent"] is NONE
    assert not [words for words in told.mismatches if "gpu_memory" in words]


async def test_a_share_of_the_compute_by_mps_holds_only_processes_that_keep_their_environment_and_is_not_told_as_hard() -> (
    None
):
    how, told = await written(record(ShareMethod.MPS, sm_percent=20), context())
    assert (how.enforcement, how.sm_percent, how.sm_enforcement) == (WATCHED, 20, NONE)
    assert (told.effective["gpu_sm_percent"], told.enforcement["gpu_sm_percent"]) == (20, NONE)
    assert "environment" in told.unread["gpu_memory_bytes"]


async def test_without_the_server_s_directory_a_share_of_the_compute_is_not_in_force() -> None:
    """It was configured when the lease was granted, and is no more."""
    _, told = await written(record(ShareMethod.MPS, sm_percent=20), context(pipes=None))
    assert [words for words in told.mismatches if words.startswith("gpu_sm_percent")]


def test_a_part_that_nobody_looked_at_is_told_as_unread_and_not_passed_over() -> None:
    task = record(ShareMethod.MIG, sm_percent=28)
    told = receipt(task.spec, task.lease, readings=[], disk=None, engine={})
    assert set(told.unread) >= {"gpu_memory_bytes", "gpu_sm_percent"}
    assert "gpu_memory_bytes" not in told.effective
