"""What the examination reads of the host itself: the share of all tasks, swap, and who is still alive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nodeservice.core.model import Resources
from nodeservice.doctor.finding import Finding, State
from nodeservice.limits.hierarchy import read_mounts, v1_mount, v2_mount
from nodeservice.limits.plan import cpu_milli_of

_REMEDY = "let this service make cgroups: run it as root, with the cgroup file systems mounted read-write"
_TASK_ID_VARIABLE = b"NODESERVICE_TASK_ID="


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What all tasks of a node may take together, as the kernel holds it. None is no limit."""

    path: str = ""
    cpu_milli: int | None = None
    memory_bytes: int | None = None
    pids: int | None = None


def read_share(task_path: str, *, version: int, root: Path = Path("/")) -> Share:
    """The tightest limits of the cgroups above a task's."""
    share = Share()
    for place in PurePosixPath(task_path).parents:
        if str(place) == "/":
            break
        files = _v1(place, root) if version == 1 else _v2(place, root)
        found = Share(path=str(place), **files)
        share = Share(
            path=share.path or (found.path if any(value is not None for value in files.values()) else ""),
            cpu_milli=_tighter(share.cpu_milli, found.cpu_milli),
            memory_bytes=_tighter(share.memory_bytes, found.memory_bytes),
            pids=_tighter(share.pids, found.pids),
        )
    return share


def judge_share(share: Share | None, allocatable: Resources, why: str | None) -> Finding:
    """The reserve is kept where all tasks together are held to the allocatable amounts."""
    limit = "reserve of the host"
    if share is None:
        return Finding(
            limit=limit, state=State.MISSING, evidence=why or "no task had a cgroup of its own", remedy=_REMEDY
        )
    held = (
        f"all tasks together: {_text(share.cpu_milli)} of {allocatable.cpu_milli} thousandths of a core,"
        f" {_text(share.memory_bytes)} of {allocatable.memory_bytes} bytes of memory, {_text(share.pids)} processes"
    )
    kept = (
        share.cpu_milli is not None
        and share.cpu_milli <= allocatable.cpu_milli + 1
        and share.memory_bytes is not None
        and share.memory_bytes <= allocatable.memory_bytes
        and share.pids is not None
    )
    state = State.HARD if kept else State.MISSING
    evidence = f"{held} ({share.path or 'no cgroup above the tasks holds anything'})"
    return Finding(limit=limit, state=state, evidence=evidence, remedy="" if kept else _REMEDY)


def has_swap(root: Path = Path("/")) -> bool:
    """True also where that can't be told."""
    try:
        return len((root / "proc/swaps").read_text(encoding="ascii").splitlines()) > 1
    except OSError:
        return True


def processes_of(task_id: str, root: Path = Path("/")) -> Iterator[int]:
    """Processes that carry the task's id in their environment, wherever they sit. Others' may be unreadable."""
    mark = _TASK_ID_VARIABLE + task_id.encode()
    for entry in (root / "proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def _v1(place: PurePosixPath, root: Path) -> dict[str, int | None]:
    mounts = read_mounts(root)

    def read(controller: str, name: str) -> int | None:
        mount = v1_mount(mounts, controller)
        return None if mount is None else _number(root / mount.point.lstrip("/") / str(place).lstrip("/") / name)

    quota, period = read("cpu", "cpu.cfs_quota_us"), read("cpu", "cpu.cfs_period_us")
    memory = read("memory", "memory.limit_in_bytes")
    return {
        "cpu_milli": cpu_milli_of(quota, period) if quota and period and quota > 0 else None,
        "memory_bytes": memory if memory is not None and memory < 2**62 else None,
        "pids": read("pids", "pids.max"),
    }


def _v2(place: PurePosixPath, root: Path) -> dict[str, int | None]:
    mount = v2_mount(read_mounts(root))
    if mount is None:
        return {}
    directory = root / mount.point.lstrip("/") / str(place).lstrip("/")
    cpu = _words(directory / "cpu.max")
    limited = len(cpu) == 2 and cpu[0].isdecimal()
    return {
        "cpu_milli": cpu_milli_of(int(cpu[0]), int(cpu[1])) if limited else None,
        "memory_bytes": _number(directory / "memory.max"),
        "pids": _number(directory / "pids.max"),
    }


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].lstrip("-").isdecimal() else None


def _tighter(one: int | None, other: int | None) -> int | None:
    return min((value for value in (one, other) if value is not None), default=None)


def _text(value: int | None) -> str:
    return "no limit" if value is None else str(value)
