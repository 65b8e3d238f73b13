"""The receipt: what was asked beside what is in force, how each limit is kept, and what does not hold; pure.

Where several places limit the same thing, the tightest counts. The engine's word counts only where the kernel's can't be
read. Equal means equal after rounding: memory in whole pages, a CPU quota of at least 1 ms in 100 ms, in whole percents
where systemd writes it.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from nodeservice.core.model import Lease, TaskSpec
from nodeservice.limits.asked import Value, asked_limits
from nodeservice.limits.compare import difference, in_force
from nodeservice.limits.device_nodes import GpuNodes
from nodeservice.limits.gpu_check import GPU_LIMITS
from nodeservice.limits.plan import PIDS_OVERHEAD
from nodeservice.ports import DiskBound, Enforcement, GpuBound, Reading

ENGINE = "engine"
_NOT_LOOKED_AT = "the task had ended, or nothing was there to read it from"
_BOUND_ELSEWHERE = frozenset({"disk_bytes", "gpu_memory_bytes", "gpu_sm_percent"})
"""By more than one file of the kernel, so told by whoever bounds them."""
_ONLY_IF_ASKED = frozenset({"read_bytes_per_second", "write_bytes_per_second"})
"""Most tasks have none, of which their receipts need not speak."""
_SWITCHES = frozenset({"oom_group", "seccomp", "no_new_privileges"})
"""0 is off."""
_VERSION_OF_FILE = {"memory.limit_in_bytes": 1, "cpu.cfs_quota_us": 1, "memory.max": 2, "cpu.max": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Each mapping is by name of the limit, as in `ports.Reading`.

    `effective` has what is in force, asked for or not; None means that nothing is. `read_from` is a file, or `engine`.
    `unread` tells why the kernel's word is missing. `mismatches` are sentences, each naming what differs from what was
    asked; with any of them the task didn't get what it was promised.
    """

    asked: Mapping[str, Value]
    effective: Mapping[str, Value | None]
    enforcement: Mapping[str, Enforcement]
    read_from: Mapping[str, str]
    unread: Mapping[str, str]
    mismatches: tuple[str, ...]
    cgroup: Mapping[str, Value] = field(default_factory=dict)
    """`version` and `path` of the task's cgroup; empty where none was read."""
    why_watched: str = ""
    """What is missing for a hard limit on the disk."""

    def as_dict(self) -> dict[str, object]:
        """JSON-able: the `limits` of a TaskRecord."""
        result: dict[str, object] = {
            "asked": dict(self.asked),
            "effective": dict(self.effective),
            "enforcement": {name: kept.value for name, kept in self.enforcement.items()},
            "read_from": dict(self.read_from),
            "unread": dict(self.unread),
            "mismatches": list(self.mismatches),
        }
        if self.why_watched:
            result["why_watched"] = self.why_watched
        if self.cgroup:
            result["cgroup"] = dict(self.cgroup)
        return result


def receipt(
    spec: TaskSpec,
    lease: Lease,
    *,
    readings: Sequence[Reading],
    disk: DiskBound | None,
    engine: Mapping[str, object],
    gpus: Sequence[GpuNodes] = (),
    gpu_part: GpuBound | None = None,
    page_bytes: int = mmap.PAGESIZE,
) -> Receipt:
    """`engine` is `ContainerState.limits`: by name of the limit, None for one that it says is not in force.

    `gpus` are those of this host, the lease's among them; without them, GPUs are told apart by their number alone.
    `gpu_part` is how a task is kept to its part of one; None where it has no part.
    """
    asked = asked_limits(spec, lease)
    effective: dict[str, Value | None] = {}
    enforcement: dict[str, Enforcement] = {}
    read_from: dict[str, str] = {}
    unread: dict[str, str] = {}
    mismatches: list[str] = []
    for name in dict.fromkeys((*asked, *(reading.limit for reading in readings))):
        if name in _BOUND_ELSEWHERE:
            continue
        found = _look(name, asked.get(name), [reading for reading in readings if reading.limit == name], engine)
        if isinstance(found, str):
            unread[name] = found
            continue
        if found.value is None and name in _ONLY_IF_ASKED and name not in asked:
            continue
        effective[name], read_from[name] = found.value, found.source
        is_off = found.value is None or (name in _SWITCHES and found.value == 0)
        enforcement[name] = Enforcement.NONE if is_off else Enforcement.HARD
        if found.note:
            unread[name] = found.note
    if disk is not None:
        effective["disk_bytes"] = None if disk.enforcement is Enforcement.NONE else disk.limit_bytes
        enforcement["disk_bytes"] = disk.enforcement
        read_from["disk_bytes"] = " ".join(str(place) for place, _ in disk.places)
    elif "disk_bytes" in asked:
        unread["disk_bytes"] = _NOT_LOOKED_AT
    if gpu_part is not None:
        effective["gpu_memory_bytes"], effective["gpu_sm_percent"] = gpu_part.memory_bytes, gpu_part.sm_percent
        enforcement["gpu_memory_bytes"] = gpu_part.enforcement
        enforcement["gpu_sm_percent"] = Enforcement.NONE if gpu_part.sm_percent is None else gpu_part.sm_enforcement
        read_from["gpu_memory_bytes"] = read_from["gpu_sm_percent"] = gpu_part.source
        if gpu_part.note:
            unread["gpu_memory_bytes"] = gpu_part.note
    else:
        unread.update((name, _NOT_LOOKED_AT) for name in ("gpu_memory_bytes", "gpu_sm_percent") if name in asked)
    for name, wanted in asked.items():
        if name in effective:
            held = effective[name]
            differs = (
                GPU_LIMITS[name](str(held), gpus, lease.gpu_uuids)
                if name in GPU_LIMITS and held is not None
                else difference(name, wanted, held, page_bytes=page_bytes)
            )
            mismatches += [f"{name}: {differs} ({read_from[name]})"] if differs else []
    return Receipt(
        asked=asked,
        effective=effective,
        enforcement=enforcement,
        read_from=read_from,
        unread=unread,
        mismatches=tuple(mismatches),
        cgroup=_place(readings),
        why_watched=disk.why_watched if disk is not None else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    value: Value | None
    source: str
    note: str = ""


def _look(name: str, asked: Value | None, readings: Sequence[Reading], engine: Mapping[str, object]) -> _Found | str:
    """What is in force, or why that is not known."""
    kernel = [reading for reading in readings if reading.readable]
    why = next((reading.note for reading in readings if not reading.readable and reading.note), _NOT_LOOKED_AT)
    held = in_force(name, kernel) if kernel else None
    if held is not None and _is_of_task_only(name, asked, kernel):
        held = None
    if held is not None:
        return _Found(value=held.value, source=held.source)
    said = engine.get(name)
    if name in engine and (said is None or (isinstance(said, int | str) and not isinstance(said, bool))):
        # Engines write "no limit" as 0, -1 or nothing.
        return _Found(value=None if said in (None, 0, -1, "") else said, source=ENGINE, note=why)
    return why


def _is_of_task_only(name: str, asked: Value | None, kernel: Sequence[Reading]) -> bool:
    """The task's cgroup leaves room for processes of the runtime. The container's own, the promised one, was gone."""
    if name != "pids_limit" or len(kernel) != 1:
        return False
    value = kernel[0].value
    return isinstance(asked, int) and isinstance(value, int) and asked < value <= asked + PIDS_OVERHEAD


def _place(readings: Sequence[Reading]) -> dict[str, Value]:
    """The task's own cgroup is the outer one of those that were read."""
    for reading in sorted(readings, key=lambda reading: len(reading.source)):
        directory, _, file = reading.source.rpartition("/")
        version = _VERSION_OF_FILE.get(file)
        if reading.readable and version is not None:
            parts = PurePosixPath(directory).parts
            top = parts.index("cgroup") + 1 if "cgroup" in parts else 1
            # One directory for each controller, on a hybrid host also for the unified hierarchy.
            top += version == 1 or parts[top : top + 1] == ("unified",)
            return {"version": version, "path": "/" + "/".join(parts[top:])}
    return {}
