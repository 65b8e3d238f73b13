"""The receipt: what was asked beside what kernel and engine hold, and where they differ. Pure.

A value is the tightest of those in force: the kernel's, read back from the cgroup, and the engine's. Equal means equal after
the kernel's own rounding: memory in whole pages, CPU at least 1 ms in 100 ms (so 10 milli).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

from nodeservice.core.model import TaskSpec
from nodeservice.limits.plan import CPU_PERIOD_US, cpu_milli_of, cpu_quota_us, whole_pages

_LIMITS = ("cpu_milli", "memory_bytes", "memory_swap_bytes", "pids_limit")


def receipt(
    spec: TaskSpec,
    *,
    kernel: Mapping[str, object],
    engine: Mapping[str, object],
    page_bytes: int = mmap.PAGESIZE,
) -> dict[str, object]:
    """The JSON-able `limits` of a TaskRecord.

    `kernel` is `TaskCgroups.effective` (ignored when nothing ever ran in that cgroup: then it limits nobody), `engine` is
    `ContainerState.limits`. `memory_swap_bytes` is memory and swap together, equal to the memory since swap is off. In
    `effective` None means: no limit is in force. `read_from` tells for each limit who holds the tightest value.
    """
    asked = {
        "cpu_milli": spec.request.cpu_milli,
        "memory_bytes": spec.request.memory_bytes,
        "memory_swap_bytes": spec.request.memory_bytes,
        "pids_limit": spec.pids_limit,
    }
    in_force = kernel if kernel.get("occupied", True) else {}
    effective: dict[str, int | None] = {}
    read_from: dict[str, str | None] = {}
    mismatches: list[str] = []
    for name in _LIMITS:
        held = {"kernel": _limit(in_force.get(name)), "engine": _limit(engine.get(name))}
        known = {source: value for source, value in held.items() if value is not None}
        # `min` takes the first of equals: the kernel, whose word counts more.
        source = min(known, key=lambda s: known[s]) if known else None
        effective[name] = known[source] if source else None
        read_from[name] = source
        if asked[name] > 0 and not _same(name, asked[name], effective[name], page_bytes):
            shown = "no limit" if effective[name] is None else str(effective[name])
            mismatches.append(f"{name}: asked {asked[name]}, in force {shown}" + (f" ({source})" if source else ""))
    result: dict[str, object] = {
        "asked": asked,
        "effective": effective,
        "read_from": read_from,
        "mismatches": mismatches,
    }
    if in_force:
        result["cgroup"] = {"version": in_force.get("cgroup_version"), "path": in_force.get("path")}
    return result


def _same(name: str, asked: int, effective: int | None, page_bytes: int) -> bool:
    if effective is None:
        return False
    if name in ("memory_bytes", "memory_swap_bytes"):
        return effective in (asked, whole_pages(asked, page_bytes=page_bytes))
    if name == "cpu_milli":
        return effective in (asked, cpu_milli_of(cpu_quota_us(asked), CPU_PERIOD_US))
    return effective == asked


def _limit(value: object) -> int | None:
    """Engines write "no limit" as 0, -1 or nothing."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
