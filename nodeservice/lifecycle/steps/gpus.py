"""What the steps do for tasks with GPUs: make ready, hand over, keep to a part, take back."""

from __future__ import annotations

import dataclasses

from nodeservice.core.gpus import ShareMethod
from nodeservice.core.model import MIB, TaskRecord
from nodeservice.errors import NodeFaultError
from nodeservice.lifecycle.context import Context
from nodeservice.ports import ContainerSpec, Enforcement, GpuBound, Mount, labels

_MPS_PIPES = "/tmp/nvidia-mps"  # noqa: S108 the place inside the container where CUDA looks by itself


def with_part(context: Context, record: TaskRecord, spec: ContainerSpec) -> ContainerSpec:
    """The container of a task that shares its GPU through MPS is told where the server is, and what it may take.

    The server keeps each process to what its environment says, and to its own settings where it says nothing
    (docs.nvidia.com/deploy/mps: CUDA_MPS_PINNED_DEVICE_MEM_LIMIT, CUDA_MPS_ACTIVE_THREAD_PERCENTAGE): a task that
    changes its environment is not held by it, so the memory is watched too.
    """
    part, pipes = record.lease.gpu_part, context.settings.gpu_mps_pipe_dir
    if part is None or part.method is not ShareMethod.MPS or pipes is None:
        return spec
    env = [
        ("CUDA_MPS_PIPE_DIRECTORY", _MPS_PIPES),
        ("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", f"0={part.memory_bytes // MIB}M"),
    ]
    if part.sm_percent:
        env.append(("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(part.sm_percent)))
    return dataclasses.replace(
        spec, gpu_env=tuple(env), mounts=(*spec.mounts, Mount(source=pipes, target=_MPS_PIPES, read_only=False))
    )


async def bound(context: Context, record: TaskRecord, pid: int | None) -> GpuBound | None:
    """Keep a running container to its part; None where it has no part, but whole GPUs.

    A limit of the driver that could not be set is told as not in force.
    """
    part = record.lease.gpu_part
    if part is None:
        return None
    match part.method:
        case ShareMethod.MIG:
            # The instance is the limit: what is asked is what it has.
            return GpuBound(
                memory_bytes=part.memory_bytes,
                enforcement=Enforcement.HARD,
                source=f"MIG instance {record.lease.gpu_uuids[0]}",
                sm_percent=part.sm_percent or None,
            )
        case ShareMethod.DRIVER:
            return await _driver_bound(context, record, pid, part.memory_bytes)
        case ShareMethod.MPS:
            # Without the server's directory the container was not told its part of the compute.
            told = context.settings.gpu_mps_pipe_dir is not None
            return GpuBound(
                memory_bytes=part.memory_bytes,
                enforcement=Enforcement.WATCHED,
                source="MPS server and NVML",
                sm_percent=part.sm_percent or None if told else None,
                sm_enforcement=Enforcement.NONE,
                note="the MPS server keeps each process to it that keeps its environment; the memory of all is watched",
            )
        case ShareMethod.WATCHED:
            return GpuBound(
                memory_bytes=part.memory_bytes,
                enforcement=Enforcement.WATCHED,
                source="NVML",
                note="this GPU has no MIG instance for it, its driver limits no cgroups, and no MPS server serves it",
            )


async def follow(context: Context, record: TaskRecord) -> bool:
    """After a start and after a restart of the service alike; False where the container's process is not known yet.

    Without it what is on the GPUs is nobody's: a part would be neither watched nor billed.
    """
    if not record.lease.gpu_uuids:
        return True
    state = await context.runtime.find(record.container_id or labels.container_name(record.id))
    if state is not None and state.pid:
        context.gpus.follow(record.id, state.pid)
        return True
    return state is None or not state.is_running


async def _driver_bound(context: Context, record: TaskRecord, pid: int | None, asked_bytes: int) -> GpuBound:
    if pid is None:  # it has ended already
        return GpuBound(
            memory_bytes=asked_bytes,
            enforcement=Enforcement.WATCHED,
            source="NVML",
            note="it had ended before it was set",
        )
    try:
        held_bytes, cgroup = await context.gpus.limit(record, pid)
    except NodeFaultError as error:
        return GpuBound(memory_bytes=None, enforcement=Enforcement.NONE, source="NVML", note=str(error))
    return GpuBound(memory_bytes=held_bytes, enforcement=Enforcement.HARD, source=f"nvmlDeviceGetMemoryLimits {cgroup}")
