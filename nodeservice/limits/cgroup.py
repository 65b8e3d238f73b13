"""The task's own cgroup, whichever version this host has: implements the port TaskCgroups.

The cgroup is made before the container, so the limits hold from the first instruction, and its counts outlive the
container. Where it can't be used, the limits sit on the container alone, and that is logged once, with the reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import structlog

from nodeservice.core.model import AttemptId, TaskSpec, Usage
from nodeservice.errors import TransientError
from nodeservice.limits.hierarchy import read_mounts
from nodeservice.limits.plan import CgroupLimits, plan_cgroup
from nodeservice.limits.tree import CgroupTree
from nodeservice.limits.v1 import V1CgroupTree
from nodeservice.limits.v2 import V2CgroupTree
from nodeservice.ports import EngineFacts, TaskCgroups

log = structlog.get_logger(__name__)
T = TypeVar("T")

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,159}\Z")
_CREATE_ATTEMPTS = 3
_REMOVE_ATTEMPTS = 20
_REMOVE_PAUSE_SECONDS = 0.05


def task_cgroups(*, node_id: str, facts: EngineFacts | None) -> TaskCgroups:
    """What fits this host and engine. Never raises: where a cgroup of the task's own can't be had, a stand-in says why."""
    if facts is None:
        return _none("the engine does not answer")
    if facts.cgroup_driver != "cgroupfs":
        return _none(f"the engine uses the cgroup driver {facts.cgroup_driver!r}")
    mounts = read_mounts()
    try:
        tree: CgroupTree = V1CgroupTree(mounts) if facts.cgroup_version == 1 else V2CgroupTree(mounts)
    except OSError as error:
        return _none(str(error))
    return KernelTaskCgroups(node_id=node_id, tree=tree)


def place_of(node_id: str, id_: AttemptId) -> str:
    """Where the attempt's cgroup lies below the root. The suffix keeps a node's id clear of the names of kernel files."""
    return f"nodeservice/{_safe(node_id)}.node/{_safe(str(id_))}"


class KernelTaskCgroups:
    """TaskCgroups on a real hierarchy. All file access happens in one thread, in the order of the calls."""

    def __init__(self, *, node_id: str, tree: CgroupTree) -> None:
        self._node_id = node_id
        self._tree = tree
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nodeservice-cgroup")
        self._warned: set[str] = set()

    async def prepare(self, spec: TaskSpec) -> str | None:
        """As the port says. Repeating sets the limits again. None also where the kernel refuses: the reason is logged."""
        place = place_of(self._node_id, spec.id)
        limits = plan_cgroup(spec.request, pids_limit=spec.pids_limit)
        try:
            await self._create(place, limits)
        except OSError as error:
            self._warn_once(error)
            await self._discard(place)
            return None
        return f"/{place}"

    async def effective(self, id_: AttemptId) -> Mapping[str, object]:
        """The tightest of the task's cgroup and the container's below it, as `limits.receipt` takes it."""
        place = place_of(self._node_id, id_)
        try:
            held = await self._run(lambda: self._tree.effective(place))
        except OSError as error:
            log.warning("cgroup.unreadable", path=place, error=str(error))
            return {}
        return held.as_dict() if held is not None else {}

    async def usage(self, id_: AttemptId) -> Usage:
        place = place_of(self._node_id, id_)
        try:
            return await self._run(lambda: self._tree.usage(place))
        except OSError as error:
            log.warning("cgroup.unreadable", path=place, error=str(error))
            return Usage()

    async def remove(self, id_: AttemptId) -> None:
        """As the port says. Raises TransientError (CGROUP_BUSY) while something still lives in it after about a second."""
        place = place_of(self._node_id, id_)
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

    async def close(self) -> None:
        await self._run(self._tree.close)
        self._thread.shutdown(wait=False)

    async def _create(self, place: str, limits: CgroupLimits) -> None:
        for _ in range(_CREATE_ATTEMPTS - 1):
            # Another node on this host may remove the common parent, empty to its eyes, just as we go through it.
            with suppress(FileNotFoundError):
                return await self._run(lambda: self._tree.create(place, limits))
        return await self._run(lambda: self._tree.create(place, limits))

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _discard(self, place: str) -> None:
        try:
            await self._run(lambda: self._tree.remove(place))
        except OSError as error:
            log.debug("cgroup.not_removed", path=place, error=str(error))

    def _warn_once(self, error: OSError) -> None:
        story = f"{error.strerror}"
        level = log.debug if story in self._warned else log.warning
        self._warned.add(story)
        level("cgroup.not_prepared", error=str(error), consequence="limits sit on the container alone")


class NoTaskCgroups:
    """TaskCgroups where a cgroup of the task's own can't be had: limits sit on the container alone, usage is not known."""

    async def prepare(self, spec: TaskSpec) -> str | None:
        return None

    async def effective(self, id_: AttemptId) -> Mapping[str, object]:
        return {}

    async def usage(self, id_: AttemptId) -> Usage:
        return Usage()

    async def remove(self, id_: AttemptId) -> None:
        """Nothing was made."""

    async def close(self) -> None:
        """Nothing is held."""


def _none(why: str) -> TaskCgroups:
    log.warning("cgroup.not_used", why=why, consequence="limits sit on the container alone")
    return NoTaskCgroups()


def _safe(name: str) -> str:
    """The name itself where it is safe as a directory, else a digest, which no safe name can look like."""
    if _SAFE_NAME.match(name) and ".." not in name:
        return name
    return "+" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:40]
