"""Which CPUs there are for tasks, and which of them share a core or a memory node.

Source: /sys/devices/system/cpu (Documentation/ABI/testing/sysfs-devices-system-cpu in the kernel's tree).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nodeservice.core.cpus import Cpu


def read_cpus(root: Path, ids: Iterable[int]) -> tuple[Cpu, ...]:
    """Those with these ids, in ascending order."""
    return tuple(_cpu(root / f"sys/devices/system/cpu/cpu{id_}", id_) for id_ in sorted(ids))


def _cpu(directory: Path, id_: int) -> Cpu:
    """Where the kernel doesn't tell the topology, each CPU is a core of its own."""
    numa_node = min((int(entry.name[4:]) for entry in directory.glob("node[0-9]*")), default=0)
    core = _number(directory / "topology/core_id")
    if core is None:
        return Cpu(id=id_, core=-1 - id_, numa_node=numa_node)
    package = _number(directory / "topology/physical_package_id") or 0  # -1 where it is not known
    return Cpu(id=id_, core=(max(0, package) << 16) + core, numa_node=numa_node)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
