"""A task's cgroup on the unified hierarchy, with the same kind of file interface as v1.

Source: Documentation/admin-guide/cgroup-v2.rst. A controller works in a cgroup only if every ancestor hands it down in
`cgroup.subtree_control`; the task's cgroup itself holds no process, only the container's cgroup below it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, ClassVar

from cgroupspy.interfaces import BaseFileInterface, FlagFile, IntegerFile, ListFile

from nodeservice.core.model import Usage
from nodeservice.limits.asked import ids_of, ids_text
from nodeservice.limits.files import BandwidthFile, FlatKeyedFile, LimitFile
from nodeservice.limits.hierarchy import Mount, v2_mount
from nodeservice.limits.plan import CPU_PERIOD_US, CgroupLimits, cpu_milli_of, cpu_weight
from nodeservice.limits.tree import (
    DirectoryCall,
    children_of,
    crowded_above,
    online_cpus,
    only_child,
    processes_in,
    prune_parents,
    remove_tree,
    send_kill,
    unless_gone,
)
from nodeservice.ports import OomFacts, Reading

_NEEDED = ("cpu", "memory", "pids")
_WELCOME = ("cpuset", "io")


class UnifiedCgroup:
    """One directory of the unified hierarchy; every attribute is a file in it."""

    memory_max: Any = LimitFile("memory.max")
    memory_swap_max: Any = LimitFile("memory.swap.max")
    memory_peak: Any = IntegerFile("memory.peak", readonly=True)
    memory_events: Any = FlatKeyedFile("memory.events", readonly=True)
    memory_oom_group: Any = FlagFile("memory.oom.group")
    cpu_max: Any = BandwidthFile("cpu.max")
    cpu_weight: Any = IntegerFile("cpu.weight")
    cpu_stat: Any = FlatKeyedFile("cpu.stat", readonly=True)
    cpuset_cpus: Any = BaseFileInterface("cpuset.cpus")
    cpuset_cpus_effective: Any = BaseFileInterface("cpuset.cpus.effective", readonly=True)
    io_max: Any = BaseFileInterface("io.max")
    io_stat: Any = BaseFileInterface("io.stat", readonly=True)
    pids_max: Any = LimitFile("pids.max")
    pids_peak: Any = IntegerFile("pids.peak", readonly=True)
    controllers: Any = ListFile("cgroup.controllers")
    handed_down: Any = ListFile("cgroup.subtree_control")

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get_property(self, filename: bytes) -> str:
        return (self.directory / os.fsdecode(filename)).read_text(encoding="ascii").strip()

    def set_property(self, filename: bytes, value: object) -> None:
        # Opened without O_CREAT: a file that the kernel does not offer must fail, not appear.
        descriptor = os.open(self.directory / os.fsdecode(filename), os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(descriptor, str(value).encode("ascii"))
        finally:
            os.close(descriptor)

    def read(self, interface: str) -> Any:
        """A value, or None where this kernel does not have the file or the cgroup has just gone."""
        try:
            return getattr(self, interface)
        except (OSError, ValueError):
            return None

    def set_if_offered(self, interface: str, value: object) -> None:
        try:
            setattr(self, interface, value)
        except FileNotFoundError:
            return

    def hand_down(self) -> None:
        """Let children use the controllers. Raises OSError (ENODEV) where one that is needed is not to be had."""
        offered = set(self.controllers)
        missing = set(_NEEDED) - offered
        if missing:
            raise OSError(errno.ENODEV, f"controllers not available: {', '.join(sorted(missing))}", str(self.directory))
        already = set(self.handed_down)
        wanted = [f"+{name}" for name in (*_NEEDED, *_WELCOME) if name in offered and name not in already]
        if wanted:
            self.set_property(b"cgroup.subtree_control", " ".join(wanted))

    def set_limits(self, limits: CgroupLimits, disks: tuple[str, ...]) -> None:
        if limits.memory_bytes is not None:
            self.memory_max = limits.memory_bytes
            # Without swap accounting there is no such file, and without swap it changes nothing.
            self.set_if_offered("memory_swap_max", 0)
        if limits.oom_group:
            self.set_if_offered("memory_oom_group", True)
        if limits.cpu_quota_us is not None:
            self.cpu_max = (limits.cpu_quota_us, CPU_PERIOD_US)
        if limits.cpu_weight_milli is not None:
            self.set_if_offered("cpu_weight", cpu_weight(limits.cpu_weight_milli))
        if limits.pids_max is not None:
            self.pids_max = limits.pids_max
        if limits.cpu_ids:
            self.cpuset_cpus = ids_text(frozenset(limits.cpu_ids))
        rates = {"rbps": limits.read_bytes_per_second, "wbps": limits.write_bytes_per_second}
        asked = " ".join(f"{key}={rate}" for key, rate in rates.items() if rate is not None)
        for disk in disks if asked else ():
            self.io_max = f"{disk} {asked}"


class V2CgroupTree:
    """Implements CgroupTree. `mkdir` and `rmdir` are parameters so that a plain directory can stand in for the kernel."""

    needs_looks: ClassVar[bool] = False

    def __init__(
        self,
        mounts: tuple[Mount, ...],
        *,
        disks: tuple[str, ...] = (),
        mkdir: DirectoryCall = os.mkdir,
        rmdir: DirectoryCall = os.rmdir,
    ) -> None:
        mount = v2_mount(mounts)
        if mount is None or mount.root != "/":
            raise OSError(errno.ENODEV, "no usable unified cgroup hierarchy")
        self._top = Path(mount.point)
        self._disks = disks
        self._mkdir = mkdir
        self._rmdir = rmdir

    def create(self, place: str, limits: CgroupLimits) -> None:
        directory = self._top
        for part in place.split("/"):
            UnifiedCgroup(directory).hand_down()
            directory = directory / part
            try:
                self._mkdir(directory)
            except FileExistsError:
                continue
        UnifiedCgroup(directory).set_limits(limits, self._disks)

    def rate_devices(self) -> tuple[Path, ...]:
        """What stands above holds below here."""
        return ()

    def set_cpus(self, place: str, cpu_ids: tuple[int, ...]) -> None:
        """What lies below has those that it was given, or else all, of these."""
        task = UnifiedCgroup(self._top / place)
        held = task.read("cpuset_cpus") or task.read("cpuset_cpus_effective")
        if ids_of(held or ids_text(frozenset(online_cpus()))) != frozenset(cpu_ids):
            self._write_cpus(place, cpu_ids)

    def _write_cpus(self, place: str, cpu_ids: tuple[int, ...]) -> None:
        # Where there are no cpusets no task gets exclusive CPUs.
        with unless_gone():
            UnifiedCgroup(self._top / place).set_if_offered("cpuset_cpus", ids_text(frozenset(cpu_ids)))

    def throttles(self) -> bool:
        """Whether block I/O can be limited here."""
        return bool(self._disks) and "io" in UnifiedCgroup(self._top).controllers

    def exists(self, place: str) -> bool:
        return (self._top / place).is_dir()

    def children(self, place: str) -> set[str]:
        return {child.name for child in children_of(self._top / place)}

    def was_used(self, place: str) -> bool:
        task = self._top / place
        return only_child(task) is not None or _ran(UnifiedCgroup(task))

    def crowded(self, place: str) -> str:
        return crowded_above(self._top, place)

    def look_after(self, place: str) -> None:
        """Nobody takes the flag away that was set when it was made."""

    def readings(self, place: str) -> list[Reading]:
        task = self._top / place
        if not task.is_dir():
            return []
        child = only_child(task)
        # The task's own cgroup runs out first, so that only its word counts on what ends then.
        below = [reading for reading in _held(child) if reading.limit != "oom_group"] if child is not None else []
        return [*_held(task), *below]

    def usage(self, place: str) -> Usage:
        task = UnifiedCgroup(self._top / place)
        if not task.directory.is_dir() or not _ran(task):
            return Usage()
        stat = task.read("cpu_stat") or {}
        events = task.read("memory_events") or {}
        usage_us, throttled_us = stat.get("usage_usec"), stat.get("throttled_usec")
        moved = _moved_bytes(task.read("io_stat"))
        return Usage(
            memory_peak_bytes=task.read("memory_peak"),
            cpu_seconds=None if usage_us is None else usage_us / 1e6,
            cpu_throttled_seconds=None if throttled_us is None else throttled_us / 1e6,
            pids_peak_count=task.read("pids_peak"),
            oom_kill_count=events.get("oom_kill"),
            read_bytes=moved.get("rbytes"),
            written_bytes=moved.get("wbytes"),
        )

    def oom(self, place: str) -> OomFacts:
        """`oom` counts limits reached in it and below; `oom_kill` kills for any limit, be it above it or the host's."""
        events = UnifiedCgroup(self._top / place).read("memory_events")
        if events is None:
            return OomFacts()
        killed, reached = events.get("oom_kill", 0) > 0, events.get("oom", 0) > 0
        return OomFacts(own_limit=killed and reached, outside=killed and not reached)

    def processes(self, place: str) -> list[int]:
        return processes_in(self._top / place)

    def kill(self, place: str) -> None:
        directory = self._top / place
        try:
            UnifiedCgroup(directory).set_property(b"cgroup.kill", 1)
        except FileNotFoundError:  # before Linux 5.14
            send_kill(self.processes(place))

    def remove(self, place: str) -> bool:
        if not remove_tree(self._top / place, self._rmdir):
            return False
        prune_parents(self._top, place, self._rmdir)
        return True

    def close(self) -> None:
        """Nothing is held."""


def _ran(task: UnifiedCgroup) -> bool:
    """Whether anything ever ran here: then it used CPU time."""
    return bool((task.read("cpu_stat") or {}).get("usage_usec"))


def _moved_bytes(text: str | None) -> dict[str, int]:
    """Sums over the devices of `io.stat`; empty where it is not to be had."""
    if text is None:
        return {}
    moved = {"rbytes": 0, "wbytes": 0}
    for word in text.split():
        key, mark, value = word.partition("=")
        if mark and key in moved:
            moved[key] += int(value)
    return moved


def _held(directory: Path) -> list[Reading]:
    cgroup = UnifiedCgroup(directory)
    memory, swap = cgroup.read("memory_max"), cgroup.read("memory_swap_max")
    quota, period = cgroup.read("cpu_max") or (None, 0)
    group = cgroup.read("memory_oom_group")
    rows: list[tuple[str, int | str | None, str]] = [
        ("memory_bytes", memory, "memory.max"),
        ("cpu_milli", None if quota is None else cpu_milli_of(quota, period), "cpu.max"),
        ("pids_limit", cgroup.read("pids_max"), "pids.max"),
    ]
    if swap is not None or (directory / "memory.swap.max").exists():
        rows.append(("memory_swap_bytes", None if memory is None or swap is None else memory + swap, "memory.swap.max"))
    if group is not None:
        rows.append(("oom_group", int(group), "memory.oom.group"))
    cpus = cgroup.read("cpuset_cpus_effective") or cgroup.read("cpuset_cpus")
    if cpus:  # what was written stays, whatever a cgroup above it keeps out, or goes offline
        rows.append(("cpu_ids", cpus, "cpuset.cpus.effective"))
    if (of_disks := cgroup.read("io_max")) is not None:
        rates = [dict(word.split("=") for word in line.split()[1:]) for line in of_disks.splitlines()]
        for limit, key in (("read_bytes_per_second", "rbps"), ("write_bytes_per_second", "wbps")):
            held = [int(rate[key]) for rate in rates if rate.get(key, "max") != "max"]
            rows.append((limit, min(held, default=None), "io.max"))
    if not directory.is_dir():  # it has gone meanwhile: what it lacks are files, not limits
        return []
    return [Reading(limit=limit, value=value, source=str(directory / file)) for limit, value, file in rows]
