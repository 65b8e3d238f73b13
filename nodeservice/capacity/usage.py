"""How busy the host is: CPU since the last sample, memory, disk, GPUs. Cheap enough for every heartbeat."""

from __future__ import annotations

from pathlib import Path

from nodeservice.capacity.disk import read_space
from nodeservice.capacity.memory import read_meminfo
from nodeservice.ports import GpuInventory


class CpuMeter:
    """Percent of all CPUs' time since the last reading, from /proc/stat. The first reading counts from construction."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._stat = root / "proc/stat"
        self._last = self._read()
        self._percent = 0.0

    def percent(self) -> float:
        """The last value again where no clock tick has passed since, or the file cannot be read."""
        busy, total = self._read()
        busy_since, total_since = busy - self._last[0], total - self._last[1]
        if total_since > 0:
            self._last = (busy, total)
            # I/O wait may count backwards (proc_stat(5)), so the share can leave its bounds.
            self._percent = percent(busy_since, total_since)
        return self._percent

    def _read(self) -> tuple[int, int]:
        """Busy and total ticks. Guest time is part of user time already; steal is time that others had, and not free."""
        try:
            with self._stat.open(encoding="ascii") as file:
                ticks = [int(number) for number in file.readline().split()[1:9]]
        except OSError:
            return 0, 0
        idle = sum(ticks[3:5])
        return sum(ticks) - idle, sum(ticks)


def memory_percent(root: Path = Path("/")) -> float:
    memory = read_meminfo(root)
    return percent(memory.total_bytes - memory.available_bytes, memory.total_bytes)


def disk_percent(path: Path) -> float:
    """What is not free for tasks, the file system's own reserve included."""
    total_bytes, free_bytes = read_space(path)
    return percent(total_bytes - free_bytes, total_bytes)


def gpu_percent(inventory: GpuInventory) -> float:
    """The mean over the GPUs that tell; 0 where none does, as with a driver that fails: it showed them before that."""
    gpus = inventory.gpus if inventory.error is None else ()
    known = [gpu.utilization_percent for gpu in gpus if gpu.utilization_percent is not None]
    return percent(sum(known), 100 * len(known))


def percent(part: float, whole: float) -> float:
    return min(100.0, max(0.0, 100.0 * part / whole)) if whole > 0 else 0.0
