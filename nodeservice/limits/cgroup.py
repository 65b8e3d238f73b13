"""The task's own cgroup, whichever version this host has: implements the port TaskCgroups.

The cgroup is made before the container, so the limits hold from the first instruction, and its counts outlive the
container. Above all of them stands one cgroup of the node, with what tasks may have together. Where they can't be used, the
limits sit on the container alone, and that is logged once, with the reason.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from nodeservice.core.model import AttemptId, Resources, TaskSpec, Usage
from nodeservice.errors import RequestError, TransientError
from nodeservice.limits.block_devices import disks_of
from nodeservice.limits.hierarchy import read_mounts
from nodeservice.limits.places import DirectoryPlaces, Places
from nodeservice.limits.plan import CgroupLimits, plan_cgroup, plan_share, plan_top
from nodeservice.limits.tree import CgroupTree, do_all, online_cpus, unread_limits
from nodeservice.limits.v1 import V1CgroupTree
from nodeservice.limits.v2 import V2CgroupTree
from nodeservice.ports import EngineFacts, OomFacts, Reading, TaskCgroups
from nodeservice.threads import Threads

log = structlog.get_logger(__name__)
T = TypeVar("T")

_CREATE_ATTEMPTS = 3
_REMOVE_ATTEMPTS = 20
_REMOVE_PAUSE_SECONDS = 0.05


def task_cgroups(*, node_id: str, facts: EngineFacts | None, directories: Sequence[Path] = ()) -> TaskCgroups:
    """What fits this host and engine. Never raises: where a cgroup of the task's own can't be had, a stand-in says why.

    `directories` are those that tasks write to; block I/O limits are set for the disks behind them.
    """
    if facts is None:
        return _none("the engine does not answer")
    mounts = read_mounts()
    disks = disks_of([*directories, facts.root_dir])
    try:
        if facts.cgroup_driver == "systemd":
            return _with_slices(node_id, facts, disks)
        if facts.cgroup_driver != "cgroupfs":
            return _none(f"the engine uses the cgroup driver {facts.cgroup_driver!r}")
        tree: CgroupTree = (
            V1CgroupTree(mounts, disks=disks) if facts.cgroup_version == 1 else V2CgroupTree(mounts, disks=disks)
        )
    except OSError as error:
        return _none(str(error))
    return KernelTaskCgroups(places=DirectoryPlaces(node_id), tree=tree)


def _with_slices(node_id: str, facts: EngineFacts, disks: tuple[str, ...]) -> TaskCgroups:
    if facts.cgroup_version != 2:
        return _none("the engine uses the cgroup driver 'systemd' on cgroup v1; cgroup v2 is needed for that")
    from nodeservice.limits.slices import SlicePlaces, SliceTree  # only such hosts need a D-Bus library

    return KernelTaskCgroups(places=SlicePlaces(node_id), tree=SliceTree(read_mounts(), disks=disks))


class KernelTaskCgroups:
    """TaskCgroups on a real hierarchy. All file access happens in one thread, in the order of the calls."""

    def __init__(self, *, places: Places, tree: CgroupTree) -> None:
        self._places = places
        self._tree = tree
        self._thread = Threads(1, name="nodeservice-cgroup")
        self._warned: set[str] = set()
        self._fault: str | None = None
        self._share: CgroupLimits | None = None
        self._share_is_set = False
        """What an engine made in the node's place while we were away has no limits."""
        self._shared_cpu_ids: Sequence[int] = ()
        """For tasks without exclusive CPUs; empty means all."""
        self._without: dict[AttemptId, str] = {}  # a cgroup of their own, and why

    async def share(
        self,
        allocatable: Resources,
        cpu_ids: Sequence[int] = (),
        exclusive_cpu_ids: Mapping[AttemptId, Sequence[int]] | None = None,
    ) -> bool:
        place = self._places.of_node()
        self._share = plan_share(allocatable, host_pids=_host_pids())
        self._shared_cpu_ids = cpu_ids
        exclusive = {_name_of(self._places.of_task(id_)): tuple(ids) for id_, ids in (exclusive_cpu_ids or {}).items()}

        def apply() -> None:
            self._share_is_set = self._tree.exists(place)
            if self._share_is_set:  # else it is made with the first task
                names = self._tree.children(place)
                tasks = ((f"{place}/{name}", _online(exclusive.get(name, cpu_ids))) for name in names)
                moves = (partial(self._tree.set_cpus, *task) for task in tasks)
                do_all([partial(self._make_room, place, again=True), *moves])

        try:
            await self._run(apply)
        except OSError as error:
            before, self._fault = self._fault, f"tasks are not held to the node's share: {error}"
            level = log.debug if before == self._fault else log.warning
            level("cgroup.share_not_set", path=place, error=str(error))
            return False
        self._fault = None
        return True

    async def prepare(self, spec: TaskSpec, cpu_ids: Sequence[int] = ()) -> str | None:
        """As the port says. Repeating sets the limits again. None also where the kernel refuses: the reason is logged."""
        place = self._places.of_task(spec.id)
        _refuse_unless(self._tree.throttles(), spec)
        try:
            await self._create(place, plan_cgroup(spec, cpu_ids))
        except OSError as error:
            self._warn_once(error)
            await self._discard(place)
            if cpu_ids or _asked_rate(spec):
                raise RequestError(
                    f"the kernel refused the task's cgroup: {error}",
                    reason="LIMIT_NOT_ENFORCED",
                    field=_asked_rate(spec) or "exclusive_cpus",
                    hint="leave that limit out, or repair the cgroups of this node",
                ) from error
            self._without[spec.id] = str(error)
            return None
        self._without.pop(spec.id, None)
        return self._places.parent_for_engine(spec.id)

    def rate_devices(self) -> Sequence[Path]:
        return self._tree.rate_devices()

    async def readings(self, id_: AttemptId) -> Sequence[Reading]:
        nothing = unread_limits(self._without.get(id_, ""))
        look = self._tree.readings
        return await self._look(id_, lambda place: look(place) if self._tree.was_used(place) else nothing, nothing)

    async def was_used(self, id_: AttemptId) -> bool:
        return await self._look(id_, self._tree.was_used, False)

    async def crowded(self, id_: AttemptId) -> str:
        return await self._look(id_, self._tree.crowded, "")

    async def look_after(self, id_: AttemptId) -> None:
        if self._tree.needs_looks:
            await self._look(id_, self._tree.look_after, None)

    async def usage(self, id_: AttemptId) -> Usage | None:
        return await self._look(id_, self._usage_in, Usage())

    async def at_end(self, id_: AttemptId) -> tuple[OomFacts, Usage | None]:
        def look(place: str) -> tuple[OomFacts, Usage | None]:
            nothing: Usage | None = Usage()
            return self._or_else(place, self._tree.oom, OomFacts()), self._or_else(place, self._usage_in, nothing)

        return await self._run(lambda: look(self._places.of_task(id_)))

    async def kill(self, id_: AttemptId) -> None:
        await self._look(id_, self._tree.kill, None)

    async def processes(self, ids: Collection[AttemptId]) -> Mapping[AttemptId, Sequence[int]]:
        places = {id_: self._places.of_task(id_) for id_ in ids}
        nobody: Sequence[int] = ()
        return await self._run(
            lambda: {id_: self._or_else(place, self._tree.processes, nobody) for id_, place in places.items()}
        )

    async def remove(self, id_: AttemptId) -> None:
        """As the port says. Raises TransientError (CGROUP_BUSY) while something still lives in it after about a second."""
        self._without.pop(id_, None)
        place = self._places.of_task(id_)
        for attempt in range(_REMOVE_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_REMOVE_PAUSE_SECONDS)
            try:
                if await self._run(lambda: self._tree.remove(place)):
                    return
            except OSError as error:
                # Refused for good (read-only, not permitted): waiting would not help, and a cgroup alone holds nothing back.
                log.warning("cgroup.not_removed", path=place, error=str(error))
                return
        raise TransientError(
            f"cgroup /{place} still holds a process",
            reason="CGROUP_BUSY",
            hint="a process of the task has not ended; it is tried again",
        )

    async def unclaimed(self, claimed: Collection[AttemptId]) -> Sequence[str]:
        node = self._places.of_node()
        names = {_name_of(self._places.of_task(id_)) for id_ in claimed}
        try:
            return sorted(await self._run(lambda: self._tree.children(node)) - names)
        except OSError as error:
            log.warning("cgroup.unreadable", path=node, error=str(error))
            return ()

    async def remove_unclaimed(self, name: str) -> bool:
        place = f"{self._places.of_node()}/{name}"

        def remove() -> bool:
            return not self._tree.processes(place) and self._tree.remove(place)

        try:
            return await self._run(remove)
        except OSError as error:
            log.warning("cgroup.not_removed", path=place, error=str(error))
            return False

    def describe(self) -> str | None:
        return self._fault

    async def close(self) -> None:
        await self._run(self._tree.close)
        self._thread.close()

    async def _look(self, id_: AttemptId, call: Callable[[str], T], otherwise: T) -> T:
        return await self._run(lambda: self._or_else(self._places.of_task(id_), call, otherwise))

    def _or_else(self, place: str, call: Callable[[str], T], otherwise: T) -> T:
        try:
            return call(place)
        except OSError as error:
            log.warning("cgroup.unreadable", path=place, error=str(error))
            return otherwise

    def _usage_in(self, place: str) -> Usage | None:
        return None if self._tree.processes(place) else self._tree.usage(place)

    def _make_room(self, place: str, *, again: bool = False) -> None:
        """The cgroup above all tasks; it goes with the last of them."""
        if self._share is not None and (again or not self._share_is_set or not self._tree.exists(place)):
            self._tree.create(place.partition("/")[0], plan_top(os.cpu_count() or 1))
            self._tree.create(place, self._share)
            self._share_is_set = True

    async def _create(self, place: str, limits: CgroupLimits) -> None:
        def make() -> None:
            self._make_room(self._places.of_node())
            self._tree.create(place, limits)
            if self._shared_cpu_ids and not limits.cpu_ids:
                self._tree.set_cpus(place, _online(self._shared_cpu_ids))

        for _ in range(_CREATE_ATTEMPTS - 1):
            # Another node on this host may remove the common parent, empty to its eyes, just as we go through it.
            with suppress(FileNotFoundError):
                return await self._run(make)
        return await self._run(make)

    async def _run(self, call: Callable[[], T]) -> T:
        return await self._thread.run(call)

    async def _discard(self, place: str) -> None:
        try:
            await self._run(lambda: self._tree.remove(place))
        except OSError as error:
            log.debug("cgroup.not_removed", path=place, error=str(error))

    def _warn_once(self, error: OSError) -> None:
        story = f"{error.strerror}"
        level = log.debug if story in self._warned else log.warning
        self._warned.add(story)
        self._fault = f"a task's own cgroup could not be made: {error}"
        level("cgroup.not_prepared", error=str(error), consequence="limits sit on the container alone")


class NoTaskCgroups:
    """TaskCgroups where a cgroup of the task's own can't be had: limits sit on the container alone, usage is not known."""

    def __init__(self, why: str = "cgroups are not used") -> None:
        self._why = why

    async def share(
        self,
        allocatable: Resources,
        cpu_ids: Sequence[int] = (),
        exclusive_cpu_ids: Mapping[AttemptId, Sequence[int]] | None = None,
    ) -> bool:
        """There is nothing that could hold them together, and nothing to try again."""
        return True

    async def prepare(self, spec: TaskSpec, cpu_ids: Sequence[int] = ()) -> str | None:
        _refuse_unless(False, spec)
        return None

    def rate_devices(self) -> Sequence[Path]:
        return ()

    async def readings(self, id_: AttemptId) -> Sequence[Reading]:
        return unread_limits(self._why)

    async def was_used(self, id_: AttemptId) -> bool:
        return False

    async def crowded(self, id_: AttemptId) -> str:
        return ""

    async def look_after(self, id_: AttemptId) -> None:
        """The container's own cgroup is all there is."""

    async def usage(self, id_: AttemptId) -> Usage | None:
        return Usage()

    async def at_end(self, id_: AttemptId) -> tuple[OomFacts, Usage | None]:
        return OomFacts(), Usage()

    async def kill(self, id_: AttemptId) -> None:
        """The engine alone knows what belongs to it."""

    async def processes(self, ids: Collection[AttemptId]) -> Mapping[AttemptId, Sequence[int]]:
        return {}

    async def remove(self, id_: AttemptId) -> None:
        """Nothing was made."""

    async def unclaimed(self, claimed: Collection[AttemptId]) -> Sequence[str]:
        return ()

    async def remove_unclaimed(self, name: str) -> bool:
        return True

    def describe(self) -> str | None:
        return self._why

    async def close(self) -> None:
        """Nothing is held."""


def _none(why: str) -> TaskCgroups:
    log.warning("cgroup.not_used", why=why, consequence="limits sit on the container alone")
    return NoTaskCgroups(why)


def _asked_rate(spec: TaskSpec) -> str:
    """The name of a block I/O limit that was asked for, if any."""
    return next((name for name in ("read_bytes_per_second", "write_bytes_per_second") if getattr(spec, name)), "")


def _refuse_unless(throttles: bool, spec: TaskSpec) -> None:
    field = _asked_rate(spec)
    if field and not throttles:
        raise RequestError(
            f"{field} is {getattr(spec, field)}: this node cannot limit block I/O",
            reason="LIMIT_NOT_ENFORCED",
            field=field,
            hint="leave it out, or use a node with the io (v2) or blkio (v1) controller and a disk of its own",
        )


def _host_pids() -> int | None:
    """The processes that the kernel allows at all (proc(5): kernel/pid_max, kernel/threads-max)."""
    limits = []
    for name in ("pid_max", "threads-max"):
        with suppress(OSError, ValueError):
            limits.append(int(Path("/proc/sys/kernel", name).read_text(encoding="ascii")))
    return min(limits, default=None)


def _online(cpu_ids: Sequence[int]) -> tuple[int, ...]:
    """Those of them that are; all that are where it is none. Raises OSError."""
    online = online_cpus()
    return tuple(cpu for cpu in online if cpu in cpu_ids) or online


def _name_of(place: str) -> str:
    return place.rpartition("/")[2]
