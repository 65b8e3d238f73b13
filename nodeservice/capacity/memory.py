"""How much memory the host has, how much of it tasks may use, and how much is available now.

Sources: /proc/meminfo (what is reserved as huge pages is nobody's to have as ordinary memory), and the memory limits of
every cgroup above the tasks: memory.limit_in_bytes (v1), memory.max and memory.high (v2: above it processes are slowed
until they stand still). v1 tells limits of ancestors that cannot be seen from here in `hierarchical_memory_limit` of
memory.stat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nodeservice.limits.hierarchy import Cgroup, tasks_cgroup


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    total_bytes: int
    limit_bytes: int
    """What of it tasks may use."""
    available_bytes: int


def read_memory(root: Path = Path("/"), *, tasks_place: str | None = None) -> MemoryFacts:
    """For tasks below `tasks_place` (see `tasks_cgroup`).

    Available is what could be had without swapping: the kernel's estimate, and no more than is left below a limit.
    """
    host = read_meminfo(root)
    limit_bytes, available_bytes = host.limit_bytes, host.available_bytes
    for limit, used in _limits(tasks_cgroup("memory", tasks_place, root)):
        limit_bytes = min(limit_bytes, limit)
        available_bytes = min(available_bytes, max(0, limit - used))
    return MemoryFacts(total_bytes=host.total_bytes, limit_bytes=limit_bytes, available_bytes=available_bytes)


def read_meminfo(root: Path = Path("/")) -> MemoryFacts:
    """The whole host, without regard to cgroups. Raises OSError where /proc is missing: then nothing here can be told."""
    fields: dict[str, int] = {}
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdecimal():
            fields[name] = int(number[0]) * 1024
    total = fields["MemTotal"]
    limit = max(0, total - fields.get("Hugetlb", 0))
    return MemoryFacts(total_bytes=total, limit_bytes=limit, available_bytes=fields["MemAvailable"])


def _limits(cgroup: Cgroup | None) -> Iterator[tuple[int, int]]:
    """Each limit with what is used below it, page cache that can be dropped left out."""
    if cgroup is None:
        return
    for directory in cgroup.directories:
        stat = _keyed(directory / "memory.stat")
        if cgroup.version == 1:
            used = (_number(directory / "memory.usage_in_bytes") or 0) - stat.get("total_inactive_file", 0)
            limits = [_number(directory / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        else:
            used = (_number(directory / "memory.current") or 0) - stat.get("inactive_file", 0)
            limits = [_number(directory / "memory.max"), _number(directory / "memory.high")]
        for limit in limits:
            if limit is not None:
                yield limit, max(0, used)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _keyed(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
