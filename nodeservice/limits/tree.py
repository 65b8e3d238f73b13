"""What the v1 and the v2 backend have in common: their interface, and taking a cgroup down."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Protocol

from nodeservice.core.model import Usage
from nodeservice.limits.asked import ids_of
from nodeservice.limits.plan import CgroupLimits
from nodeservice.ports import OomFacts, Reading

_MONITORS = ("conmon", "libpod-conmon-")
"""As Podman names them with its cgroup manager cgroupfs, and with systemd."""

DirectoryCall = Callable[[Path | str], None]

_PIDS_OF_A_START = 32
"""Threads that a runtime, and with Podman its monitor, have while they start a container: up to 14 (tried)."""

NO_LIMIT = 1 << 62
"""v1 shows "no limit" as the largest number of whole pages, just below 2**63."""


class CgroupTree(Protocol):
    """One cgroup version. `place` is relative to the hierarchy's root. Everything blocks and raises OSError."""

    needs_looks: ClassVar[bool]
    """Whether `look_after` has work to do."""

    def create(self, place: str, limits: CgroupLimits) -> None:
        """Make it with its limits; one that exists gets the limits again."""
        ...

    def throttles(self) -> bool:
        """Whether block I/O can be limited here."""
        ...

    def rate_devices(self) -> tuple[Path, ...]:
        """Block devices whose rates the container does not inherit."""
        ...

    def set_cpus(self, place: str, cpu_ids: tuple[int, ...]) -> None:
        """Move all in it and below to these CPUs. One that is gone is success."""
        ...

    def exists(self, place: str) -> bool: ...

    def children(self, place: str) -> set[str]:
        """The names of the cgroups right below it."""
        ...

    def was_used(self, place: str) -> bool:
        """Whether anything runs or ever ran in it."""
        ...

    def crowded(self, place: str) -> str:
        """As the port TaskCgroups says."""
        ...

    def look_after(self, place: str) -> None:
        """As the port TaskCgroups says."""
        ...

    def readings(self, place: str) -> list[Reading]:
        """Of the cgroup and of the one below it. Empty where there is none."""
        ...

    def usage(self, place: str) -> Usage: ...

    def oom(self, place: str) -> OomFacts: ...

    def processes(self, place: str) -> list[int]:
        """All in it and below. Empty where there is no such cgroup."""
        ...

    def kill(self, place: str) -> None:
        """SIGKILL to all in it and below."""
        ...

    def remove(self, place: str) -> bool:
        """Remove it and what the engine left below, and parents that are empty now. False: something still lives in it."""
        ...

    def close(self) -> None: ...


def unread_limits(why: str) -> list[Reading]:
    """Of what a task's own cgroup would hold where it has none, and why; empty where that is no matter."""
    names = ("cpu_milli", "memory_bytes", "memory_swap_bytes", "pids_limit") if why else ()
    note = f"the task has no cgroup of its own: {why}"
    return [Reading(limit=name, value=None, source="", readable=False, note=note) for name in names]


def crowded_above(top: Path, place: str) -> str:
    """`top` is that of the controller pids."""
    for directory in (top / above for above in Path(place).parents):
        with suppress(OSError, ValueError):  # the root has no limit, and where there is none the kernel says `max`
            most, present = (
                int((directory / f"pids.{name}").read_text(encoding="ascii")) for name in ("max", "current")
            )
            if most - present < _PIDS_OF_A_START:
                return f"{directory} has {present} of {most} processes"
    return ""


def do_all(calls: Iterable[Callable[[], None]]) -> None:
    """What the kernel refuses keeps nothing else from being done; the first refusal is raised at the end."""
    refused: OSError | None = None
    for call in calls:
        try:
            call()
        except OSError as error:
            refused = refused or error
    if refused is not None:
        raise refused


@contextmanager
def unless_gone() -> Iterator[None]:
    """A container's cgroup may vanish between a look and the next, and between the opening of a file and its use."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


def online_cpus() -> tuple[int, ...]:
    """More can't be written to a cpuset. Raises OSError."""
    return tuple(sorted(ids_of(Path("/sys/devices/system/cpu/online").read_text(encoding="ascii"))))


def only_child(directory: Path | str) -> Path | None:
    """The container's cgroup in the task's, while there is exactly one. That of Podman's monitor lies beside it."""
    children = [child for child in children_of(directory) if not child.name.startswith(_MONITORS)]
    return children[0] if len(children) == 1 else None


def children_of(directory: Path | str) -> Iterator[Path]:
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        yield Path(directory, name)


def processes_in(directory: Path | str) -> list[int]:
    """All in it and below."""
    found: list[int] = []
    with suppress(OSError):
        found += [int(line) for line in Path(directory, "cgroup.procs").read_text(encoding="ascii").split()]
    for child in children_of(directory):
        found += processes_in(child)
    return found


def send_kill(pids: Iterable[int]) -> None:
    for pid in pids:
        if pid > 0:  # 0 stands for a process outside of our pid namespace
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def remove_tree(directory: Path | str, rmdir: DirectoryCall) -> bool:
    """Remove bottom up. True when it is gone, False when a process or a cgroup in it keeps it (EBUSY)."""
    if _rmdir(directory, rmdir):  # the engine has mostly taken away what was below
        return True
    gone = True
    for child in children_of(directory):
        gone = remove_tree(child, rmdir) and gone
    return gone and _rmdir(directory, rmdir)


def prune_parents(top: Path, place: str, rmdir: DirectoryCall) -> None:
    """Remove the parents of `place` below `top` that are empty now; others may use them, so failure is fine."""
    parent = Path(place).parent
    while parent.parts:
        try:
            if not _rmdir(top / parent, rmdir):
                return
        except OSError:
            return
        parent = parent.parent


def _rmdir(directory: Path | str, rmdir: DirectoryCall) -> bool:
    try:
        rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True
