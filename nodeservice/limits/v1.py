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
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from nodeservice.core.model import Usage
from nodeservice.limits.asked import ids_of, ids_text
from nodeservice.limits.block_devices import device_file
from nodeservice.limits.hierarchy import Mount, v1_mount
from nodeservice.limits.kernel_log import OomLog
from nodeservice.limits.oom import OomWatches
from nodeservice.limits.plan import CPU_PERIOD_US, CgroupLimits, cpu_milli_of, cpu_shares
from nodeservice.limits.tree import (
    NO_LIMIT,
    children_of,
    crowded_above,
    do_all,
    only_child,
    processes_in,
    prune_parents,
    remove_tree,
    send_kill,
    unless_gone,
)
from nodeservice.limits.v1_nodes import HierarchyNode
from nodeservice.ports import OomFacts, Reading

_CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "pids")
_KILL_ROUNDS = 10
_NEAR = 0.9
_THROTTLES = {"read_bytes_per_second": "read_bps_device", "write_bytes_per_second": "write_bps_device"}


class V1CgroupTree:
    """Implements CgroupTree. Only for use from one thread. Raises OSError (ENODEV) where a needed hierarchy is missing."""

    needs_looks: ClassVar[bool] = True

    def __init__(self, mounts: tuple[Mount, ...], *, disks: tuple[str, ...] = ()) -> None:
        self._bases = {name: _base(mounts, name) for name in _CONTROLLERS}
        with suppress(OSError):
            self._bases["blkio"] = _base(mounts, "blkio")
        self._memory_top = str(self._bases["memory"] / "memory")
        self._disks = disks
        # Everywhere that the engine may make directories: every v1 hierarchy, named ones, and the unified one beside them.
        self._tops = tuple(
            dict.fromkeys(Path(m.point) for m in mounts if m.filesystem in ("cgroup", "cgroup2") and m.root == "/")
        )
        bases = {(self._bases[name] / name).resolve() for name in self._bases}
        self._idle_tops = tuple(top for top in self._tops if top.resolve() not in bases)
        self._nodes: dict[tuple[str, str], HierarchyNode] = {}
        self._moved: dict[str, dict[str, int]] = {}
        """Bytes read and written, by place, as last seen while it ran."""
        self._oom = OomWatches()
        self._log = OomLog()

    def create(self, place: str, limits: CgroupLimits) -> None:
        born = not os.path.isdir(self._memory(place))
        for name in self._bases:
            self._make(name, place)
        for top in self._idle_tops:
            with suppress(OSError):
                (top / place).mkdir(parents=True, exist_ok=True)
        self._oom.watch(self._memory(place), from_birth=born)
        do_all(partial(self._set_limits, name, self._node(name, place), limits) for name in self._bases)

    def rate_devices(self) -> tuple[Path, ...]:
        """Block I/O is limited cgroup by cgroup here, whatever stands above.

        Source: Documentation/admin-guide/cgroup-v1/blkio-controller.rst: throttling is hierarchical with sane_behavior only.
        """
        return tuple(path for disk in self._disks if (path := device_file(disk)) is not None)

    def set_cpus(self, place: str, cpu_ids: tuple[int, ...]) -> None:
        wanted = frozenset(cpu_ids)
        held: dict[str, frozenset[int]] = {}
        for part in self._all_in("cpuset", place):
            with unless_gone():
                held[part] = ids_of(self._node("cpuset", part).controller.get_property(b"cpuset.cpus"))
        # A child may hold no CPU that its parent lacks: all grow from the top, and then shrink from the bottom.
        grown = [(part, ids | wanted) for part, ids in held.items() if not wanted <= ids]
        shrunk = [(part, wanted) for part, ids in reversed(held.items()) if not ids <= wanted]
        for part, ids in (*grown, *shrunk):
            with unless_gone():
                self._node("cpuset", part).controller.set_property(b"cpuset.cpus", ids_text(ids))

    def exists(self, place: str) -> bool:
        return os.path.isdir(self._memory(place))

    def children(self, place: str) -> set[str]:
        """Of all hierarchies: one that was being removed may be left in some."""
        return {child.name for top in self._tops for child in children_of(top / place)}

    def was_used(self, place: str) -> bool:
        task = self._memory(place)
        if not os.path.isdir(task):
            return False
        return only_child(task) is not None or bool(self._node("memory", place).controller.max_usage_in_bytes)

    def crowded(self, place: str) -> str:
        return crowded_above(self._bases["pids"] / "pids", place)

    def look_after(self, place: str) -> None:
        """Note the bytes moved. Not at the first look, right after the start: nothing would pass for no bytes."""
        if only_child(self._memory(place)) is not None:
            self._moved[place] = self._moved_bytes(place) if place in self._moved else {}

    def readings(self, place: str) -> list[Reading]:
        task = self._memory(place)
        if not os.path.isdir(task):
            return []
        self._oom.watch(task, from_birth=False)
        child = only_child(task)
        found = self._held(place)
        if child is not None:
            found += self._held(f"{place}/{child.name}")
        return found + self._held_throttles(place if child is None else f"{place}/{child.name}")

    def usage(self, place: str) -> Usage:
        if not self.exists(place):
            return Usage()
        memory = self._node("memory", place).controller
        cpu_nanoseconds = _read(self._node("cpuacct", place).controller, "usage")
        throttled = _read(self._node("cpu", place).controller, "stat")
        peak_bytes = _read(memory, "max_usage_in_bytes")
        if not peak_bytes and not cpu_nanoseconds:
            # Nothing ever ran here: zeros would be a statement about a container that sat elsewhere.
            return Usage()
        # What is counted below is not taken over by the parent when it goes (block/blk-cgroup.c).
        is_whole = only_child(self._memory(place)) is not None
        moved = self._moved_bytes(place) if is_whole else self._moved.get(place, {})
        return Usage(
            memory_peak_bytes=peak_bytes,
            cpu_seconds=None if cpu_nanoseconds is None else cpu_nanoseconds / 1e9,
            cpu_throttled_seconds=None if throttled is None else throttled["throttled_time"] / 1e9,
            pids_peak_count=_read(self._node("pids", place).controller, "peak"),
            oom_kill_count=self._oom_kills(place),
            read_bytes=moved.get("Read"),
            written_bytes=moved.get("Write"),
        )

    def oom(self, place: str) -> OomFacts:
        """A limit above signals all cgroups below it, so a signal counts only in one that came near its own."""
        noticed = self._oom.kills_at_least(self._memory(place))
        logged = self._log.kills_below(f"/{place}")
        own = any(_is_below(kill.limit_place, place) for kill in logged)
        if noticed == 1 and not own:
            memory = self._node("memory", place).controller
            peak_bytes, limit_bytes = _read(memory, "max_usage_in_bytes"), _read(memory, "limit_in_bytes")
            own = bool(peak_bytes and limit_bytes) and peak_bytes >= limit_bytes * _NEAR
        return OomFacts(
            own_limit=own or (None if noticed is None else False),
            outside=any(not _is_below(kill.limit_place, place) for kill in logged) or None,
        )

    def processes(self, place: str) -> list[int]:
        # To list them the kernel makes a copy of each list and keeps it for a second; mostly there are none.
        if _read(self._node("pids", place).controller, "current") == 0:
            return []
        return processes_in(self._memory(place))

    def kill(self, place: str) -> None:
        """Again until nobody new shows: one that forks may be ahead of us."""
        for _ in range(_KILL_ROUNDS):
            pids = self.processes(place)
            if not pids:
                return
            send_kill(pids)

    def remove(self, place: str) -> bool:
        self._oom.forget(self._memory(place))
        self._moved.pop(place, None)
        for key in [key for key in self._nodes if key[1] == place or key[1].startswith(f"{place}/")]:
            del self._nodes[key]
        gone = [remove_tree(f"{top}/{place}", os.rmdir) for top in self._tops]
        if next(children_of(os.path.dirname(self._memory(place))), None) is None:  # it was the last there
            for top in self._tops:
                prune_parents(top, place, os.rmdir)
        return all(gone)

    def close(self) -> None:
        self._oom.close()
        self._log.close()

    def _make(self, name: str, place: str) -> None:
        """One hierarchy's directory, and those above it that are missing."""
        above, _, part = place.rpartition("/")
        node, parent = self._node(name, place), self._node(name, above)
        try:
            parent.create_cgroup(part)
        except FileNotFoundError:
            if not above:
                raise
            self._make(name, above)
            parent.create_cgroup(part)
        if name != "cpuset":
            return
        # An empty cpuset takes no process in (Documentation/admin-guide/cgroup-v1/cpusets.rst).
        for file in (b"cpuset.cpus", b"cpuset.mems"):
            if above and not parent.controller.get_property(file):
                self._make(name, above)
            node.controller.set_property(file, parent.controller.get_property(file))

    def _set_limits(self, name: str, node: Any, limits: CgroupLimits) -> None:
        controller = node.controller
        if name == "cpu" and limits.cpu_weight_milli is not None:
            controller.shares = cpu_shares(limits.cpu_weight_milli)
        if name == "memory" and limits.memory_bytes is not None:
            _set_memory(controller, limits.memory_bytes)
        elif name == "cpu" and limits.cpu_quota_us is not None:
            controller.cfs_period_us = CPU_PERIOD_US
            controller.cfs_quota_us = limits.cpu_quota_us
        elif name == "pids" and limits.pids_max is not None:
            controller.max = limits.pids_max
        elif name == "cpuset" and limits.cpu_ids:
            controller.set_property(b"cpuset.cpus", ids_text(frozenset(limits.cpu_ids)))
        elif name == "blkio":
            self._set_throttles(controller, limits)

    def _set_throttles(self, controller: Any, limits: CgroupLimits) -> None:
        for disk in self._disks:
            if limits.read_bytes_per_second is not None:
                controller.read_bps = f"{disk} {limits.read_bytes_per_second}"
            if limits.write_bytes_per_second is not None:
                controller.write_bps = f"{disk} {limits.write_bytes_per_second}"

    def throttles(self) -> bool:
        """Whether block I/O can be limited here: the engine is told of each disk by its file in /dev."""
        if "blkio" not in self._bases or not self._disks or len(self.rate_devices()) < len(self._disks):
            return False
        return (self._bases["blkio"] / "blkio" / "blkio.throttle.read_bps_device").exists()

    def _moved_bytes(self, place: str) -> dict[str, int]:
        """Bytes read and written, over all devices; empty where the kernel does not count them."""
        moved: dict[str, int] = {}
        if "blkio" not in self._bases:
            return moved
        text = _read(self._node("blkio", place).controller, "service_bytes")
        if text is None:
            return moved
        moved = {"Read": 0, "Write": 0}
        for line in str(text).splitlines():
            words = line.split()
            if len(words) == 3 and words[1] in moved:
                moved[words[1]] += int(words[2])
        return moved

    def _oom_kills(self, place: str) -> int | None:
        """At least so many: what was noticed or logged, or the exact count of a container's cgroup while that exists."""
        known = [self._oom.kills_at_least(self._memory(place)), len(self._log.kills_below(f"/{place}")) or None]
        child = only_child(self._memory(place))
        if child is not None:
            state = _read(self._node("memory", f"{place}/{child.name}").controller, "oom_control")
            known.append(state.get("oom_kill") if isinstance(state, dict) else None)
        return max((count for count in known if count is not None), default=None)

    def _held(self, place: str) -> list[Reading]:
        """What one cgroup holds; a container's may vanish while we look, and then holds nothing."""
        found: list[Reading] = []
        with suppress(OSError, ValueError):
            memory, cpu = self._node("memory", place).controller, self._node("cpu", place).controller
            found = [
                _reading("memory_bytes", _finite(memory.limit_in_bytes), memory, "memory.limit_in_bytes"),
                _reading("pids_limit", self._node("pids", place).controller.max, self._node("pids", place).controller,
                         "pids.max"),
            ]  # fmt: skip
            quota, period = cpu.cfs_quota_us, cpu.cfs_period_us
            cpu_milli = None if quota is None or quota < 0 else cpu_milli_of(quota, period)
            found.append(_reading("cpu_milli", cpu_milli, cpu, "cpu.cfs_quota_us"))
            swap = _read(memory, "memsw_limit_in_bytes")
            if swap is not None:
                found.append(_reading("memory_swap_bytes", _finite(swap), memory, "memory.memsw.limit_in_bytes"))
            cpuset = self._node("cpuset", place).controller
            cpus = cpuset.get_property(b"cpuset.cpus")
            found.append(_reading("cpu_ids", cpus or None, cpuset, "cpuset.cpus"))
        return found

    def _held_throttles(self, place: str) -> list[Reading]:
        if "blkio" not in self._bases:
            return []
        found = []
        with suppress(OSError):
            controller = self._node("blkio", place).controller
            for limit, file in _THROTTLES.items():
                lines = controller.get_property(f"blkio.throttle.{file}".encode()).splitlines()
                rates = dict(line.split() for line in lines if len(line.split()) == 2)
                is_whole = rates.keys() >= set(self._disks)
                held = max(map(int, rates.values()), default=None) if is_whole else None
                found.append(_reading(limit, held, controller, f"blkio.throttle.{file}"))
        return found

    def _all_in(self, name: str, place: str) -> Iterator[str]:
        """The place and those below it in one hierarchy, each after the one above it."""
        yield place
        for child in children_of(self._bases[name] / name / place):
            yield from self._all_in(name, f"{place}/{child.name}")

    def _memory(self, place: str) -> str:
        return f"{self._memory_top}/{place}"

    def _node(self, controller: str, place: str = "") -> Any:
        """A node holds a path and nothing of what lies there, so it stays right; to make one costs more than a read."""
        known = self._nodes.get((controller, place))
        if known is not None:
            return known
        above, _, name = place.rpartition("/")
        if name:
            node = HierarchyNode(name, parent=self._node(controller, above))
        else:
            node = HierarchyNode(controller, parent=HierarchyNode(str(self._bases[controller])))
        self._nodes[controller, place] = node
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


def _is_below(path: str, place: str) -> bool:
    return path == f"/{place}" or path.startswith(f"/{place}/")


def _reading(limit: str, value: int | str | None, controller: Any, file: str) -> Reading:
    return Reading(limit=limit, value=value, source=os.path.join(os.fsdecode(controller.node.full_path), file))


def _finite(value: int | None) -> int | None:
    return None if value is None or value >= NO_LIMIT else value
