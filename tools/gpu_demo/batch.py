"""The tasks of the demo, and how each has to end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from nodeservice.wire import master_worker_pb2 as pb

GIB = 1024**3
MIB = 1024**2
NODES = ("demo-gpu-1", "demo-gpu-2")
SHARING_NODE = NODES[1]
"""The one whose operator gives parts of GPUs that are only watched."""
FAULTY, GREEDY, AGAIN = "falls-off", "greedy", "train-8b"
PART_BYTES = 32 * GIB
GREEDY_BYTES = 24 * GIB
"""What the greedy one takes of its 16 GiB."""


@dataclass(frozen=True, slots=True)
class Expected:
    """`uses_bytes` is what its process takes of each GPU. `reasons` are why its attempts end, one after another."""

    task: pb.Task
    uses_bytes: int = 96 * GIB
    reasons: tuple[str, ...] = ("COMPLETED",)

    @property
    def name(self) -> str:
        return self.task.task_id

    @property
    def asks(self) -> str:
        share = self.task.gpu.share.memory_bytes
        return f"{share // GIB} GiB" if share else f"{self.task.req_gpu:g}"

    @property
    def is_part(self) -> bool:
        return self.task.gpu.HasField("share")


def first_wave() -> list[Expected]:
    """All but the one that waits for the GPU that failed."""
    return [
        _whole("train-8a", 8, 6),
        _whole("tune-4a", 4, 5),
        _whole("tune-4b", 4, 5),
        _whole(FAULTY, 1, "$((NODESERVICE_ATTEMPT == 1 ? 60 : 4))", reasons=("GPU_FAULT", "COMPLETED")),
        _part("part-a", PART_BYTES, 8, uses_bytes=30 * GIB),
        _part(GREEDY, 16 * GIB, 60, uses_bytes=GREEDY_BYTES, reasons=("GPU_MEMORY_LIMIT",)),
        _part("part-b", PART_BYTES, 8, uses_bytes=20 * GIB),
        _whole("eval-2a", 2, 4),
        _whole("eval-2b", 2, 4),
        _whole("eval-2c", 2, 4),
        _whole("infer-1a", 1, 4),
        _whole("infer-1b", 1, 4),
        _whole("infer-1c", 1, 4),
        _whole("infer-1d", 1, 4),
        _whole("no-gpu", 0, 3),
    ]


def after_the_repair(worker_id: str) -> Expected:
    """It needs all eight GPUs of the node on which one failed."""
    return _whole(AGAIN, 8, 4, target=worker_id)


def _whole(name: str, count: int, seconds: float | str, *, target: str = "", **more: Any) -> Expected:
    return Expected(_task(name, seconds, req_gpu=count, target_worker_id=target), **more)


def _part(name: str, memory_bytes: int, seconds: float, **more: Any) -> Expected:
    share = pb.GpuRequest(share=pb.GpuShare(memory_bytes=memory_bytes))
    return Expected(_task(name, seconds, gpu=share), **more)


def _task(name: str, seconds: float | str, **fields: Any) -> pb.Task:
    """It writes down which GPUs it sees, then sleeps for `seconds`, in which the shell may compute."""
    return pb.Task(
        task_id=name, task_name=name, docker_image="nodeservice/demo", user_id="demo",
        command=f"if [ -e /usr/bin/nvidia-smi ]; then nvidia-smi -L; else ls /dev; fi; sleep {seconds}",
        cpu_milli=50, memory_bytes=48 * MIB, disk_bytes=8 * MIB, timeout_seconds=90, grace_seconds=0.5,
        submitted_at=int(time.time()), **fields,
    )  # fmt: skip
