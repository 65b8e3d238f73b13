"""The task's own cgroup, below one that all tasks of the node share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nodeservice.core.model import AttemptId, Resources, TaskSpec, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One value in force, as read back. `value` None: no limit is in force there; `note` says what stopped the reading.

    `limit` is one of cpu_milli, memory_bytes, memory_swap_bytes, pids_limit, cpu_ids, read_bytes_per_second,
    write_bytes_per_second, oom_group, shm_bytes, open_files_limit, core_file_bytes, capabilities, seccomp,
    no_new_privileges, oom_score_adj, disk_bytes, devices, device_rules, gpu_uuids. `value` is a number, or a text such
    as a CPU list. `source` is the file (or the engine's field) that it was read from.
    """

    limit: str
    value: int | str | None
    source: str
    readable: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OomFacts:
    """Kills for lack of memory in an attempt's cgroup. None: cannot be known here."""

    own_limit: bool | None = None
    """At least one because the attempt reached its own limit."""
    outside: bool | None = None
    """At least one although it was within its limit: the host, or all tasks together, had none left."""


class ProcessReader(Protocol):
    """Looks at a running process through /proc. Never raises: what ended meanwhile is told as not readable."""

    def readings(self, pid: int) -> Sequence[Reading]: ...

    def network(self, pid: int) -> tuple[int, int] | None:
        """Bytes received and sent in its network namespace, without the loopback; None where it cannot be read."""
        ...


class TaskCgroups(Protocol):
    """A cgroup of the task's own, made before the container and readable after it."""

    async def share(
        self,
        allocatable: Resources,
        cpu_ids: Sequence[int] = (),
        exclusive_cpu_ids: Mapping[AttemptId, Sequence[int]] | None = None,
    ) -> bool:
        """Hold all tasks of this node together to these amounts (processes too), so that the host keeps its reserve.

        `cpu_ids` are the CPUs for tasks without exclusive ones; empty means all. Call it at the start and whenever one of
        them changes: what runs is moved over, and what is made later begins there. Each of those with exclusive CPUs gets
        its own. False where a part of it can't be done now (more memory is in use, say): that is logged and told by
        `describe`, and the call is to be repeated. Never raises.
        """
        ...

    async def prepare(self, spec: TaskSpec, cpu_ids: Sequence[int] = ()) -> str | None:
        """Make it with the task's limits; the value for the engine's cgroup parent, None where it cannot be used.

        Raises RequestError (LIMIT_NOT_ENFORCED) for a limit that was asked for and that only this cgroup could keep.
        """
        ...

    def rate_devices(self) -> Sequence[Path]:
        """Block devices whose rates have to be set on the container too, since it does not inherit them."""
        ...

    async def readings(self, id_: AttemptId) -> Sequence[Reading]:
        """The limits as the kernel holds them now: of the task's cgroup and of the container's below it.

        Empty where there is no such cgroup, or where nothing ever ran in it: then it limits nobody. Where none could be made
        they are not readable, and their notes say why.
        """
        ...

    async def was_used(self, id_: AttemptId) -> bool:
        """Whether a process ever was in it, by the kernel's counts; false where there is no such cgroup."""
        ...

    async def crowded(self, id_: AttemptId) -> str:
        """One above it that has no room for the processes that a start takes, in words; empty where there is none."""
        ...

    async def look_after(self, id_: AttemptId) -> None:
        """What has to be done while it runs. Call it after the start and now and then.

        Where the kernel ends a task that runs out of memory as a whole, see that it still does (cgroup v2): systemd takes
        that away. What lost only a part meanwhile is ended. On v1 note what was read and written: the kernel forgets that
        with the container.
        """
        ...

    async def usage(self, id_: AttemptId) -> Usage | None:
        """What the kernel counted, once no process is left in it, nor below; None until then.

        Empty where there is no such cgroup.
        """
        ...

    async def at_end(self, id_: AttemptId) -> tuple[OomFacts, Usage | None]:
        """What the kernel says once the container has ended: of kills, and as `usage`."""
        ...

    async def kill(self, id_: AttemptId) -> None:
        """Send SIGKILL to everything in it, also to what left the container's process tree."""
        ...

    async def processes(self, ids: Collection[AttemptId]) -> Mapping[AttemptId, Sequence[int]]:
        """Those in each and below; empty where there is no such cgroup."""
        ...

    async def remove(self, id_: AttemptId) -> None:
        """Remove. One already gone is success."""
        ...

    async def unclaimed(self, claimed: Collection[AttemptId]) -> Sequence[str]:
        """Names of cgroups below this node's that belong to none of these attempts."""
        ...

    async def remove_unclaimed(self, name: str) -> bool:
        """Remove one of these. False, and it is left alone, where a process lives in it. One already gone is success."""
        ...

    def describe(self) -> str | None:
        """Why there are no cgroups of the tasks' own here, in words; None where all is well."""
        ...

    async def close(self) -> None: ...
