"""GPUs made up for tests: a GpuProvider whose inventory the test sets."""

from __future__ import annotations

from nodeservice.core.model import GIB
from nodeservice.ports import Gpu, GpuInventory


def fake_gpu(number: int = 0, *, memory_total_bytes: int = 80 * GIB, utilization_percent: float | None = 0.0) -> Gpu:
    """A GPU whose UUID and PCI address follow from its number."""
    return Gpu(
        uuid=f"GPU-00000000-0000-0000-0000-{number:012d}",
        name="Fake GPU",
        memory_total_bytes=memory_total_bytes,
        memory_used_bytes=0,
        utilization_percent=utilization_percent,
        pci_address=f"00000000:{number + 1:02x}:00.0",
    )


class FakeGpuProvider:
    """Answers with `current`, which a test may replace at any time; by default there are no GPUs and no driver."""

    def __init__(self, *gpus: Gpu, error: str | None = None) -> None:
        self.current = GpuInventory(gpus=gpus, driver_version="580.00" if gpus or error else None, error=error)
        self.closed = False

    async def inventory(self) -> GpuInventory:
        return self.current

    async def close(self) -> None:
        self.closed = True
