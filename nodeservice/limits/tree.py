"""What the v1 and the v2 backend have in common: their interface, and taking a cgroup down."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nodeservice.core.model import Usage
from nodeservice.limits.plan import CgroupLimits

DirectoryCall = Callable[[Path], None]

NO_LIMIT = 1 << 62
"""v1 shows "no limit" as the largest number of whole pages, just below 2**63."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """The limits that the kernel holds; None is no limit. `occupied`: something runs or ran in this cgroup."""

    cgroup_version: int
    path: str
    occupied: bool
    cpu_milli: int | None
    memory_bytes: int | None
    memory_swap_bytes: int | None
    pids_limit: int | None

    def as_dict(self) -> dict[str, object]:
        return {
            "cgroup_version": self.cgroup_version,
            "path": self.path,
            "occupied": self.occupied,
            "cpu_milli": self.cpu_milli,
            "memory_bytes": self.memory_bytes,
            "memory_swap_bytes": self.memory_swap_bytes,
            "pids_limit": self.pids_limit,
        }


class CgroupTree(Protocol):
    """One cgroup version. `place` is relative to the hierarchy's root. Everything blocks and raises OSError."""

    def create(self, place: str, limits: CgroupLimits) -> None:
        """Make it with its limits; one that exists gets the limits again."""
        ...

    def effective(self, place: str) -> Effective | None: ...

    def usage(self, place: str) -> Usage: ...

    def remove(self, place: str) -> bool:
        """Remove it and what the engine left below, and parents that are empty now. False: something still lives in it."""
        ...

    def close(self) -> None: ...


def tightest(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None


def only_child(directory: Path) -> Path | None:
    """The container's cgroup in the task's, while there is exactly one."""
    children = list(children_of(directory))
    return children[0] if len(children) == 1 else None


def children_of(directory: Path) -> Iterator[Path]:
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        yield directory / name


def remove_tree(directory: Path, rmdir: DirectoryCall) -> bool:
    """Remove bottom up. True when it is gone, False when a process or a cgroup in it keeps it (EBUSY)."""
    gone = True
    for child in children_of(directory):
        gone = remove_tree(child, rmdir) and gone
    return _rmdir(directory, rmdir) and gone


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


def _rmdir(directory: Path, rmdir: DirectoryCall) -> bool:
    try:
        rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True
