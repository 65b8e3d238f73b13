"""The kernel's values for what a task asked, and for what all tasks together may take, with the kernel's rounding. Pure.

Sources: Documentation/admin-guide/cgroup-v1/memory.rst (whole pages, rounded down), Documentation/scheduler/sched-bwc.rst (a
quota is at least 1 ms), Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nodeservice.core.model import Resources, TaskSpec

CPU_PERIOD_US = 100_000
"""The period that Docker Engine uses for `--cpus`."""
CPU_PERIODS_BELOW = 10
"""So many of them are that of a container below a cgroup of the task's own: the longest that the kernel takes.

A child may not have a larger share than its parent, so both agree. Over the same time either may run out first, and each
counts only what it held back itself; what the container's counted goes with it. So the task's own is to run out first.
"""
CPU_QUOTA_MIN_US = 1_000
PIDS_OVERHEAD = 8
"""What the task's cgroup allows above the container's own limit: the runtime's start-up process and the init process come
and go beside the task, and the limit that the task meets must be the one that it was promised."""
HOST_PIDS_SHARE = 0.1
"""Of the processes that this host can have at all, what no task may take."""

HOST_WORK_WEIGHT = 4
"""How much more a CPU of the tasks weighs than one busy thread of the host.

What the host needs is reserved by the quota on each node. Beyond that its work gives way to what was promised, also work
that a task makes for it: one that floods its log keeps several threads of the engine busy.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """What is written to a cgroup. None and empty leave that resource unlimited there."""

    memory_bytes: int | None
    cpu_quota_us: int | None
    pids_max: int | None
    cpu_ids: tuple[int, ...] = ()
    read_bytes_per_second: int | None = None
    write_bytes_per_second: int | None = None
    oom_group: bool = False
    """Whether the kernel ends everything in it when it runs out of memory (v2 only)."""
    cpu_weight_milli: int | None = None
    """Its part, in proportion to others beside it, where all together want more CPU than there is."""


def plan_cgroup(spec: TaskSpec, cpu_ids: Sequence[int] = ()) -> CgroupLimits:
    request = spec.request
    return CgroupLimits(
        memory_bytes=request.memory_bytes if request.memory_bytes > 0 else None,
        cpu_quota_us=cpu_quota_us(request.cpu_milli) if request.cpu_milli > 0 else None,
        pids_max=spec.pids_limit + PIDS_OVERHEAD if spec.pids_limit > 0 else None,
        cpu_ids=tuple(cpu_ids),
        read_bytes_per_second=spec.read_bytes_per_second,
        write_bytes_per_second=spec.write_bytes_per_second,
        oom_group=True,
        cpu_weight_milli=request.cpu_milli if request.cpu_milli > 0 else None,
    )


def plan_share(allocatable: Resources, *, host_pids: int | None) -> CgroupLimits:
    """For the cgroup above all tasks of a node. `host_pids` is what the host can have at all, None where not known."""
    return CgroupLimits(
        memory_bytes=allocatable.memory_bytes if allocatable.memory_bytes > 0 else None,
        cpu_quota_us=cpu_quota_us(allocatable.cpu_milli) if allocatable.cpu_milli > 0 else None,
        pids_max=int(host_pids * (1 - HOST_PIDS_SHARE)) if host_pids else None,
        cpu_weight_milli=allocatable.cpu_milli if allocatable.cpu_milli > 0 else None,
    )


def plan_top(cpu_count: int) -> CgroupLimits:
    """For the cgroup above all nodes of this host: no limit, but a weight beside the host's own work."""
    return CgroupLimits(
        memory_bytes=None, cpu_quota_us=None, pids_max=None, cpu_weight_milli=cpu_count * 1000 * HOST_WORK_WEIGHT
    )


def cpu_shares(cpu_milli: int) -> int:
    """For `cpu.shares` of v1, where a core is 1,024 and anything new has as much."""
    return min(262_144, max(2, cpu_milli * 1024 // 1000))


def cpu_weight(cpu_milli: int) -> int:
    """For `cpu.weight` of v2, where a core is 100 and anything new has as much."""
    return min(10_000, max(1, cpu_milli // 10))


def cpu_quota_us(cpu_milli: int) -> int:
    """In a period of `CPU_PERIOD_US`."""
    return max(CPU_QUOTA_MIN_US, cpu_milli * CPU_PERIOD_US // 1000)


def cpu_milli_of(quota_us: int, period_us: int) -> int:
    return round(quota_us * 1000 / period_us)


def whole_pages(memory_bytes: int, *, page_bytes: int) -> int:
    return memory_bytes // page_bytes * page_bytes
