"""The kernel's values for what a task asked, with the kernel's rounding. Pure.

Sources: Documentation/admin-guide/cgroup-v1/memory.rst (whole pages, rounded down), Documentation/scheduler/sched-bwc.rst (a
quota is at least 1 ms), Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

from dataclasses import dataclass

from nodeservice.core.model import Resources

CPU_PERIOD_US = 100_000
"""The period that Docker Engine uses for `--cpus`. A child may not have a larger share than its parent: both agree."""
CPU_QUOTA_MIN_US = 1_000
PIDS_OVERHEAD = 8
"""What the task's cgroup allows above the container's own limit: the runtime's start-up process and the init process come
and go beside the task, and the limit that the task meets must be the one that it was promised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """What is written to the task's own cgroup. None leaves that resource unlimited there."""

    memory_bytes: int | None
    cpu_quota_us: int | None
    cpu_period_us: int = CPU_PERIOD_US
    pids_max: int | None


def plan_cgroup(request: Resources, *, pids_limit: int) -> CgroupLimits:
    return CgroupLimits(
        memory_bytes=request.memory_bytes if request.memory_bytes > 0 else None,
        cpu_quota_us=cpu_quota_us(request.cpu_milli) if request.cpu_milli > 0 else None,
        pids_max=pids_limit + PIDS_OVERHEAD if pids_limit > 0 else None,
    )


def cpu_quota_us(cpu_milli: int, *, period_us: int = CPU_PERIOD_US) -> int:
    return max(CPU_QUOTA_MIN_US, cpu_milli * period_us // 1000)


def cpu_milli_of(quota_us: int, period_us: int) -> int:
    return round(quota_us * 1000 / period_us)


def whole_pages(memory_bytes: int, *, page_bytes: int) -> int:
    return memory_bytes // page_bytes * page_bytes
