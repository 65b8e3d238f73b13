"""What the start of a task reads back, and what it makes of another's GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nodeservice.core import events as ev
from nodeservice.core.model import AttemptId, Lease, Phase, Resources, TaskRecord, TaskSpec, TraceIds
from nodeservice.lifecycle.steps import create, run
from nodeservice.limits.cgroup import NoTaskCgroups
from nodeservice.limits.device_nodes import GpuNodes
from nodeservice.ports import Reading
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from tests.unit.node_harness import LiveNode, World

GPUS = (GpuNodes(uuid="GPU-a", node=(195, 0)), GpuNodes(uuid="GPU-b", node=(195, 1)))


class Shows:
    """A container whose /dev has these nodes."""

    def __init__(self, devices: str) -> None:
        self._devices = devices

    def readings(self, pid: int) -> Sequence[Reading]:
        return [Reading(limit="devices", value=self._devices, source=f"/proc/{pid}/root/dev")]

    def network(self, pid: int) -> tuple[int, int] | None:
        return None


def record(*gpu_uuids: str) -> TaskRecord:
    request = Resources(memory_bytes=8192, gpu_count=len(gpu_uuids))
    return TaskRecord(
        spec=TaskSpec(id=AttemptId("t"), image="demo", request=request, pids_limit=8, fingerprint="f"),
        lease=Lease(granted=request, gpu_uuids=gpu_uuids),
        trace=TraceIds(trace_id="a" * 32, span_id="b" * 16),
        accepted_at=datetime(2026, 1, 1, tzinfo=UTC),
        phase=Phase.STARTING,
        timings=(),
    )


@pytest.mark.parametrize(
    ("devices", "not_enforced"),
    [
        ("null nvidia0=195:0 nvidiactl=195:255", ()),
        ("null nvidia0=195:0 nvidia1=195:1", ("devices: sees nvidia1 (195:1) of GPU-b, which it was not granted",)),
        ("null nvidiactl=195:255", ("devices: does not see GPU-a, which it was granted",)),
    ],
)
async def test_another_gpu_than_the_leases_is_a_limit_that_is_not_enforced(
    tmp_path: Path, devices: str, not_enforced: tuple[str, ...]
) -> None:
    world = World(tmp_path, runtime=FakeRuntime(images={"demo": FakeImage(holds=True)}))
    context = replace(LiveNode(world).context, processes=Shows(devices), gpu_nodes=lambda: GPUS)
    container_id = await world.runtime.create(create.container_spec(context, record("GPU-a"), None))
    started = await run.start(context, replace(record("GPU-a"), container_id=container_id))
    assert isinstance(started, ev.ContainerStarted)
    assert tuple(sentence.partition(" (/proc")[0] for sentence in started.not_enforced) == not_enforced
    unread = started.limits["unread"]
    assert isinstance(unread, dict)
    assert "the task had ended" not in unread["gpu_uuids"], "the driver is asked; that nobody answers is no mismatch"


class Holds(NoTaskCgroups):
    """A task's cgroup whose memory limit the kernel holds otherwise than was asked."""

    async def readings(self, id_: AttemptId) -> Sequence[Reading]:
        return [Reading(limit="memory_bytes", value=4096, source="/sys/fs/cgroup/memory.max")]


async def test_the_limits_of_a_task_are_those_that_the_kernel_holds_whatever_the_engine_says(tmp_path: Path) -> None:
    world = World(tmp_path, runtime=FakeRuntime(images={"demo": FakeImage(holds=True)}), cgroups=Holds())
    context = LiveNode(world).context
    container_id = await world.runtime.create(create.container_spec(context, record(), None))
    started = await run.start(context, replace(record(), container_id=container_id))
    assert isinstance(started, ev.ContainerStarted)
    assert started.not_enforced == ("memory_bytes: asked 8192, in force 4096 (/sys/fs/cgroup/memory.max)",)
