"""A task's cgroup on cgroup v1: one directory in each hierarchy, through cgroupspy's nodes.

The nodes are built directly (root, controller, parents, task); the library's tree would walk every hierarchy. Hierarchies
that carry a limit or a count must work; in the others the directory is made too, because the engine makes its own below it
and would race with the removal of empty parents.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from cgroupspy.controllers import Controller
from cgroupspy.interfaces import IntegerFile
from cgroupspy.nodes import Node

from nodeservice.core.model import Usage
from nodeservice.limits.files import LimitFile
from nodeservice.limits.hierarchy import Mount, v1_mount
from nodeservice.limits.oom import OomWatches
from nodeservice.limits.plan import CgroupLimits, cpu_milli_of
from nodeservice.limits.tree import NO_LIMIT, Effective, only_child, prune_parents, remove_tree, tightest

_CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "pids")


class PidsController(Controller):  # type: ignore[misc]
    """The controller that the library lacks (Documentation/admin-guide/cgroup-v1/pids.rst)."""

    max = LimitFile("pids.max")
    current = IntegerFile("pids.current", readonly=True)
    peak = IntegerFile("pids.peak", readonly=True)


class HierarchyNode(Node):  # type: ignore[misc]
    """The library's node, which also knows the pids controller and makes children of its own kind."""

    CONTROLLERS: ClassVar[dict[bytes, Any]] = {**Node.CONTROLLERS, b"pids": PidsController}

    def create_cgroup(self, name: str) -> HierarchyNode:
        with suppress(FileExistsError):
            os.mkdir(os.path.join(self.full_path, os.fsencode(name)))
        return HierarchyNode(name, parent=self)


class V1CgroupTree:
    """Implements CgroupTree. Only for use from one thread. Raises OSError (ENODEV) where a needed hierarchy is missing."""

    def __init__(self, mounts: tuple[Mount, ...]) -> None:
        self._bases = {name: _base(mounts, name) for name in _CONTROLLERS}
        # Everywhere that the engine may make directories: every v1 hierarchy, named ones, and the unified one beside them.
        self._tops = tuple(
            dict.fromkeys(Path(m.point) for m in mounts if m.filesystem in ("cgroup", "cgroup2") and m.root == "/")
        )
        self._oom = OomWatches()

    def create(self, place: str, limits: CgroupLimits) -> None:
        born = not self._memory(place).is_dir()
        for name in _CONTROLLERS:
            node = self._node(name)
            for part in place.split("/"):
                parent, node = node, node.create_cgroup(part)
                if name == "cpuset":
                    # An empty cpuset takes no process in (Documentation/admin-guide/cgroup-v1/cpusets.rst).
                    for file in (b"cpuset.cpus", b"cpuset.mems"):
                        node.controller.set_property(file, parent.controller.get_property(file))
            self._set_limits(name, node, limits)
        for top in self._tops:
            with suppress(OSError):
                (top / place).mkdir(parents=True, exist_ok=True)
        self._oom.watch(self._memory(place), from_birth=born)

    def effective(self, place: str) -> Effective | None:
        task = self._memory(place)
        if not task.is_dir():
            return None
        self._oom.watch(task, from_birth=False)
        places = [place]
        child = only_child(task)
        if child is not None:
            places.append(f"{place}/{child.name}")
        held = [self._held(p) for p in places]
        return Effective(
            cgroup_version=1,
            path=f"/{place}",
            occupied=child is not None or bool(self._node("memory", place).controller.max_usage_in_bytes),
            cpu_milli=tightest(*(h.get("cpu_milli") for h in held)),
            memory_bytes=tightest(*(h.get("memory_bytes") for h in held)),
            memory_swap_bytes=tightest(*(h.get("memory_swap_bytes") for h in held)),
            pids_limit=tightest(*(h.get("pids_limit") for h in held)),
        )

    def usage(self, place: str) -> Usage:
        if not self._memory(place).is_dir():
            return Usage()
        memory = self._node("memory", place).controller
        cpu_nanoseconds = _read(self._node("cpuacct", place).controller, "usage")
        throttled = _read(self._node("cpu", place).controller, "stat")
        peak_bytes = _read(memory, "max_usage_in_bytes")
        if not peak_bytes and not cpu_nanoseconds:
            # Nothing ever ran here: zeros would be a statement about a container that sat elsewhere.
            return Usage()
        return Usage(
            memory_peak_bytes=peak_bytes,
            cpu_seconds=None if cpu_nanoseconds is None else cpu_nanoseconds / 1e9,
            cpu_throttled_seconds=None if throttled is None else throttled["throttled_time"] / 1e9,
            pids_peak_count=_read(self._node("pids", place).controller, "peak"),
            oom_kill_count=self._oom_kills(place),
        )

    def remove(self, place: str) -> bool:
        self._oom.forget(self._memory(place))
        gone = True
        for top in self._tops:
            if remove_tree(top / place, os.rmdir):
                prune_parents(top, place, os.rmdir)
            else:
                gone = False
        return gone

    def close(self) -> None:
        self._oom.close()

    def _set_limits(self, name: str, node: Any, limits: CgroupLimits) -> None:
        controller = node.controller
        if name == "memory" and limits.memory_bytes is not None:
            _set_memory(controller, limits.memory_bytes)
        elif name == "cpu" and limits.cpu_quota_us is not None:
            controller.cfs_period_us = limits.cpu_period_us
            controller.cfs_quota_us = limits.cpu_quota_us
        elif name == "pids" and limits.pids_max is not None:
            controller.max = limits.pids_max

    def _oom_kills(self, place: str) -> int | None:
        """At least so many: what was noticed here, or the exact count of a container's cgroup while that exists."""
        known = [self._oom.kills_at_least(self._memory(place))]
        child = only_child(self._memory(place))
        if child is not None:
            state = _read(self._node("memory", f"{place}/{child.name}").controller, "oom_control")
            known.append(state.get("oom_kill") if isinstance(state, dict) else None)
        return max((count for count in known if count is not None), default=None)

    def _held(self, place: str) -> dict[str, int | None]:
        """What one cgroup holds; a container's may vanish while we look, and then holds nothing."""
        held: dict[str, int | None] = {}
        with suppress(OSError, ValueError):
            memory = self._node("memory", place).controller
            held["memory_bytes"] = _finite(memory.limit_in_bytes)
            held["memory_swap_bytes"] = _finite(_read(memory, "memsw_limit_in_bytes"))
            cpu = self._node("cpu", place).controller
            quota, period = cpu.cfs_quota_us, cpu.cfs_period_us
            held["cpu_milli"] = None if quota is None else cpu_milli_of(quota, period)
            held["pids_limit"] = self._node("pids", place).controller.max
        return held

    def _memory(self, place: str) -> Path:
        return self._bases["memory"] / "memory" / place

    def _node(self, controller: str, place: str = "") -> Any:
        node = HierarchyNode(controller, parent=HierarchyNode(str(self._bases[controller])))
        for part in _parts(place):
            node = HierarchyNode(part, parent=node)
        return node


def _base(mounts: tuple[Mount, ...], controller: str) -> Path:
    """The directory in which the controller shows under its own name, be it a link to `cpu,cpuacct`."""
    mount = v1_mount(mounts, controller)
    if mount is None or mount.root != "/" or not (Path(mount.point).parent / controller).is_dir():
        raise OSError(errno.ENODEV, "no usable cgroup v1 hierarchy", controller)
    return Path(mount.point).parent


def _set_memory(controller: Any, memory_bytes: int) -> None:
    """Memory, then memory with swap, which may not be the smaller; when both rise, in the other order."""
    has_swap_account = (Path(os.fsdecode(controller.node.full_path)) / "memory.memsw.limit_in_bytes").exists()
    if has_swap_account and controller.memsw_limit_in_bytes < memory_bytes:
        controller.memsw_limit_in_bytes = memory_bytes
    controller.limit_in_bytes = memory_bytes
    if has_swap_account:
        controller.memsw_limit_in_bytes = memory_bytes


def _read(controller: Any, interface: str) -> Any:
    """A value, or None where this kernel does not have the file or the cgroup has just gone."""
    try:
        return getattr(controller, interface)
    except (OSError, ValueError):
        return None


def _finite(value: int | None) -> int | None:
    return None if value is None or value >= NO_LIMIT else value


def _parts(place: str) -> Iterator[str]:
    return (part for part in place.split("/") if part)
