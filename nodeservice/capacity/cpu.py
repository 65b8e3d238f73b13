"""How many CPUs the board has, and how much of them processes here may use.

Sources: /sys/devices/system/cpu, sched_getaffinity(2), and the cgroups that this process sits in: cpuset, cfs quota (v1) and
cpu.max (v2) of every ancestor, since the tightest one counts.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nodeservice.limits.hierarchy import OwnCgroup, own_cgroup


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFacts:
    model: str
    logical_count: int
    physical_count: int
    usable_milli: int


def read_cpu(root: Path = Path("/"), *, affinity_count: int | None = None) -> CpuFacts:
    """`affinity_count` None asks the kernel. What cannot be read does not limit."""
    logical_count = _logical_count(root)
    if affinity_count is None:
        affinity_count = len(os.sched_getaffinity(0))
    limits = [logical_count * 1000, affinity_count * 1000]
    limits += [count * 1000 for count in _cpuset_counts(own_cgroup("cpuset", root))]
    limits += list(_quotas_milli(own_cgroup("cpu", root)))
    return CpuFacts(
        model=_model(root),
        logical_count=logical_count,
        physical_count=_physical_count(root) or logical_count,
        usable_milli=min(limits),
    )


def count_of_list(text: str) -> int:
    """The length of a kernel CPU list such as `0-3,8`."""
    count = 0
    for part in text.strip().split(","):
        first, dash, last = part.strip().partition("-")
        if first.isdecimal() and (not dash or last.isdecimal()):
            count += int(last) - int(first) + 1 if dash else 1
    return count


def _logical_count(root: Path) -> int:
    present = _read(root / "sys/devices/system/cpu/present")
    return count_of_list(present) or os.cpu_count() or 1


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
        if key.strip() in ("model name", "Model", "cpu model") and value.strip():
            return value.strip()
    return platform.machine()


def _cpuset_counts(own: OwnCgroup | None) -> Iterator[int]:
    """The CPUs of our own cpuset: the kernel keeps it inside those of its ancestors. An empty file inherits."""
    if own is None:
        return
    names = ("cpuset.effective_cpus", "cpuset.cpus") if own.version == 1 else ("cpuset.cpus.effective", "cpuset.cpus")
    for directory in own.directories:
        for name in names:
            count = count_of_list(_read(directory / name))
            if count:
                yield count
                return


def _quotas_milli(own: OwnCgroup | None) -> Iterator[int]:
    for directory in own.directories if own is not None else ():
        if own is not None and own.version == 1:
            quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
        else:
            quota, _, period = _read(directory / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            yield max(1, int(quota) * 1000 // int(period))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
