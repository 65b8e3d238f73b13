"""How many CPUs the board has, and how much of them tasks may use.

Sources: /sys/devices/system/cpu, sched_getaffinity(2), and the cgroups above the tasks: cpuset, cfs quota (v1) and cpu.max
(v2) of every one, since the tightest counts.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from nodeservice.limits.asked import ids_of
from nodeservice.limits.hierarchy import TASKS_DIRECTORY, Cgroup, own_cgroup, tasks_cgroup


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFacts:
    model: str
    logical_count: int
    physical_count: int
    usable_milli: int
    usable_ids: frozenset[int]


def read_cpu(
    root: Path = Path("/"), *, tasks_place: str | None = None, affinity: Collection[int] | None = None
) -> CpuFacts:
    """For tasks below `tasks_place` (see `tasks_cgroup`). `affinity` None asks the kernel.

    What cannot be read does not limit.
    Tasks have our affinity, as all processes do where the kernel keeps CPUs out of it, but not what our cpuset makes of it.
    """
    logical_count = _logical_count(root)
    online = _ids(root / "sys/devices/system/cpu/online") or frozenset(range(logical_count))
    own = _cpuset(own_cgroup("cpuset", root)) or online
    kept_out = own - frozenset(os.sched_getaffinity(0) if affinity is None else affinity)
    usable = (online & (_cpuset(_above_tasks(tasks_place, root)) or online)) - kept_out
    return CpuFacts(
        model=_model(root),
        logical_count=logical_count,
        physical_count=_physical_count(root) or logical_count,
        usable_milli=min([len(usable) * 1000, *_quotas_milli(tasks_cgroup("cpu", tasks_place, root))]),
        usable_ids=usable,
    )


def _logical_count(root: Path) -> int:
    return len(_ids(root / "sys/devices/system/cpu/present")) or os.cpu_count() or 1


def _physical_count(root: Path) -> int:
    cores = set()
    for topology in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
        core = _read(topology / "core_id")
        if core:
            cores.add((_read(topology / "physical_package_id"), core))
    return len(cores)


def _model(root: Path) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _above_tasks(tasks_place: str | None, root: Path) -> Cgroup | None:
    """On v1 the kernel takes CPUs that go offline out of each cpuset for good: our own get again what is above them."""
    above = tasks_cgroup("cpuset", tasks_place, root)
    is_refilled = above is not None and above.version == 1 and tasks_place == TASKS_DIRECTORY
    return tasks_cgroup("cpuset", "", root) if is_refilled else above


def _cpuset(cgroup: Cgroup | None) -> frozenset[int]:
    """The CPUs of its cpuset: the kernel keeps it inside those of its ancestors. An empty file inherits."""
    for directory in cgroup.directories if cgroup is not None else ():
        for name in ("cpuset.effective_cpus", "cpuset.cpus.effective"):
            ids = _ids(directory / name)
            if ids:
                return ids
    return frozenset()


def _quotas_milli(cgroup: Cgroup | None) -> Iterator[int]:
    if cgroup is None:
        return
    for directory in cgroup.directories:
        if cgroup.version == 1:
            quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
        else:
            quota, _, period = _read(directory / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) * 1000 // int(period)


def _ids(path: Path) -> frozenset[int]:
    """None of what is no list of CPUs."""
    try:
        return ids_of(_read(path))
    except ValueError:
        return frozenset()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
