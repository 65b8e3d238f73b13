"""Which CPUs there are for tasks, and which of them share a core or a memory node.

Source: /sys/devices/system/cpu (Documentation/ABI/testing/sysfs-devices-system-cpu in the kernel's tree).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from nodeservice.core.cpus import Cpu


def read_cpus(root: Path = Path("/"), *, usable_ids: Collection[int] | None = None) -> tuple[Cpu, ...]:
    """Those that this process may use, in ascending order of their ids. `usable_ids` None asks the kernel."""
    ids = os.sched_getaffinity(0) if usable_ids is None else usable_ids
    return tuple(_cpu(root / f"sys/devices/system/cpu/cpu{id_}", id_) for id_ in sorted(ids))


def _cpu(directory: Path, id_: int) -> Cpu:
    """Where the kernel doesn't tell the topology, each CPU is a core of its own."""
    core = _number(directory / "topology/core_id")
    package = _number(directory / "topology/physical_package_id")
    nodes = [int(entry.name[4:]) for entry in directory.glob("node[0-9]*") if entry.name[4:].isdecimal()]
    if core is None:
        return Cpu(id=id_, core=-1 - id_, numa_node=min(nodes, default=0))
    return Cpu(id=id_, core=(max(0, package or 0) << 16) + core, numa_node=min(nodes, default=0))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
