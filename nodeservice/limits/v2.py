"""A task's cgroup on the unified hierarchy, with the same kind of file interface as v1.

Source: Documentation/admin-guide/cgroup-v2.rst. A controller works in a cgroup only if every ancestor hands it down in
`cgroup.subtree_control`; the task's cgroup itself holds no process, only the container's cgroup below it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from cgroupspy.interfaces import FlagFile, IntegerFile, ListFile

from nodeservice.core.model import Usage
from nodeservice.limits.files import BandwidthFile, FlatKeyedFile, LimitFile
from nodeservice.limits.hierarchy import Mount, v2_mount
from nodeservice.limits.plan import CgroupLimits, cpu_milli_of
from nodeservice.limits.tree import DirectoryCall, Effective, only_child, prune_parents, remove_tree, tightest

_CONTROLLERS = ("cpu", "memory", "pids")


class UnifiedCgroup:
    """One directory of the unified hierarchy; every attribute is a file in it."""

    memory_max: Any = LimitFile("memory.max")
    memory_swap_max: Any = LimitFile("memory.swap.max")
    memory_peak: Any = IntegerFile("memory.peak", readonly=True)
    memory_events: Any = FlatKeyedFile("memory.events", readonly=True)
    memory_oom_group: Any = FlagFile("memory.oom.group")
    cpu_max: Any = BandwidthFile("cpu.max")
    cpu_stat: Any = FlatKeyedFile("cpu.stat", readonly=True)
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

    def hand_down(self, names: tuple[str, ...]) -> None:
        """Let children use these controllers. Raises OSError (ENODEV) where one is not to be had."""
        missing = set(names) - set(self.controllers)
        if missing:
            raise OSError(errno.ENODEV, f"controllers not available: {', '.join(sorted(missing))}", str(self.directory))
        wanted = [f"+{name}" for name in names if name not in self.handed_down]
        if wanted:
            self.set_property(b"cgroup.subtree_control", " ".join(wanted))


class V2CgroupTree:
    """Implements CgroupTree. `mkdir` and `rmdir` are parameters so that a plain directory can stand in for the kernel."""

    def __init__(
        self, mounts: tuple[Mount, ...], *, mkdir: DirectoryCall = os.mkdir, rmdir: DirectoryCall = os.rmdir
    ) -> None:
        mount = v2_mount(mounts)
        if mount is None or mount.root != "/":
            raise OSError(errno.ENODEV, "no usable unified cgroup hierarchy")
        self._top = Path(mount.point)
        self._mkdir = mkdir
        self._rmdir = rmdir

    def create(self, place: str, limits: CgroupLimits) -> None:
        directory = self._top
        for part in place.split("/"):
            UnifiedCgroup(directory).hand_down(_CONTROLLERS)
            directory = directory / part
            try:
                self._mkdir(directory)
            except FileExistsError:
                continue
        task = UnifiedCgroup(directory)
        if limits.memory_bytes is not None:
            task.memory_max = limits.memory_bytes
            # Without swap accounting there is no such file, and without swap it changes nothing.
            task.set_if_offered("memory_swap_max", 0)
            task.set_if_offered("memory_oom_group", True)
        if limits.cpu_quota_us is not None:
            task.cpu_max = (limits.cpu_quota_us, limits.cpu_period_us)
        if limits.pids_max is not None:
            task.pids_max = limits.pids_max

    def effective(self, place: str) -> Effective | None:
        task = self._top / place
        if not task.is_dir():
            return None
        child = only_child(task)
        held = [_held(UnifiedCgroup(directory)) for directory in (task, child) if directory is not None]
        return Effective(
            cgroup_version=2,
            path=f"/{place}",
            occupied=child is not None or _ran(UnifiedCgroup(task)),
            cpu_milli=tightest(*(h["cpu_milli"] for h in held)),
            memory_bytes=tightest(*(h["memory_bytes"] for h in held)),
            memory_swap_bytes=tightest(*(h["memory_swap_bytes"] for h in held)),
            pids_limit=tightest(*(h["pids_limit"] for h in held)),
        )

    def usage(self, place: str) -> Usage:
        task = UnifiedCgroup(self._top / place)
        if not task.directory.is_dir() or not _ran(task):
            return Usage()
        stat = task.read("cpu_stat") or {}
        events = task.read("memory_events") or {}
        usage_us, throttled_us = stat.get("usage_usec"), stat.get("throttled_usec")
        return Usage(
            memory_peak_bytes=task.read("memory_peak"),
            cpu_seconds=None if usage_us is None else usage_us / 1e6,
            cpu_throttled_seconds=None if throttled_us is None else throttled_us / 1e6,
            pids_peak_count=task.read("pids_peak"),
            oom_kill_count=events.get("oom_kill"),
        )

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


def _held(cgroup: UnifiedCgroup) -> dict[str, int | None]:
    memory = cgroup.read("memory_max")
    swap = cgroup.read("memory_swap_max")
    quota, period = cgroup.read("cpu_max") or (None, 0)
    return {
        "memory_bytes": memory,
        "memory_swap_bytes": None if memory is None or swap is None else memory + swap,
        "cpu_milli": None if quota is None else cpu_milli_of(quota, period),
        "pids_limit": cgroup.read("pids_max"),
    }
