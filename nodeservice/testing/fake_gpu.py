"""GPUs made up for tests: a GpuProvider whose inventory the test sets, and processes that belong to whom it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from nodeservice.core.model import GIB, AttemptId
from nodeservice.errors import NodeFaultError
from nodeservice.ports import NOBODY, Gpu, GpuInventory, GpuXid


def fake_gpu(number: int = 0, *, utilization_percent: float | None = 0.0) -> Gpu:
    """A GPU whose UUID and PCI address follow from its number."""
    return Gpu(
        uuid=f"GPU-00000000-0000-0000-0000-{number:012d}",
        name="Fake GPU",
        memory_total_bytes=80 * GIB,
        memory_used_bytes=0,
        utilization_percent=utilization_percent,
        pci_address=f"00000000:{number + 1:02x}:00.0",
        compute_capability=(9, 0),
        minor=number,
        recovery_action=0,
    )


class FakeGpuProvider:
    """Answers with `current`, which a test may replace at any time; by default there are no GPUs and no driver."""

    def __init__(self, *gpus: Gpu, error: str | None = None) -> None:
        self.current = GpuInventory(gpus=gpus, driver_version="580.00" if gpus or error else None, error=error)
        self.xids: list[GpuXid] = []
        self.limits: dict[tuple[str, str], int] = {}
        self.keeps_limits = True
        self.closed = False

    def change(self, uuid: str, **facts: object) -> None:
        """Set facts of one GPU."""
        gpus = tuple(replace(gpu, **facts) if gpu.uuid == uuid else gpu for gpu in self.current.gpus)  # type: ignore[arg-type]
        self.current = replace(self.current, gpus=gpus)

    async def inventory(self) -> GpuInventory:
        return self.current

    async def refresh(self) -> GpuInventory:
        return self.current

    def take_xids(self) -> Sequence[GpuXid]:
        taken, self.xids = self.xids, []
        return taken

    async def limit_memory(self, uuid: str, cgroup: str, limit_bytes: int) -> int:
        if not self.keeps_limits:
            raise NodeFaultError("the driver does not limit the GPU memory: NVML error 3", reason="LIMIT_NOT_ENFORCED")
        self.limits[uuid, cgroup] = limit_bytes
        return limit_bytes

    async def close(self) -> None:
        self.closed = True


class FakeOwners:
    """`of` says which attempt a process belongs to; those in `ended` have ended since the look, others are strangers."""

    def __init__(self) -> None:
        self.of: dict[int, AttemptId] = {}
        self.ended: set[int] = set()

    def owners(
        self, pids: Sequence[int], attempts: Mapping[AttemptId, int], *, before_seconds: float
    ) -> Mapping[int, AttemptId]:
        return {pid: self.of.get(pid, NOBODY) for pid in pids if pid not in self.ended}

    def cgroup(self, pid: int) -> str | None:
        return f"/sys/fs/cgroup/fake/{pid}"
