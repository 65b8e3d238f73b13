"""One bound on all that a task may write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from nodeservice.core.model import AttemptId


class Enforcement(StrEnum):
    """How a limit is kept."""

    HARD = "hard"
    """The kernel or the driver refuses."""
    WATCHED = "watched"
    """This service measures, and ends the task soon after it crosses the limit."""
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBound:
    """The bound in force. `places` says for each directory how it is kept; `why_watched` what is missing for a hard one."""

    limit_bytes: int
    enforcement: Enforcement
    places: tuple[tuple[Path, Enforcement], ...]
    why_watched: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """What was written. A file counts with its blocks, at least 4 KiB, so that tiny and empty ones are bounded too."""

    bytes: int
    file_count: int
    peak_bytes: int


class TaskDisk(Protocol):
    """Bounds and measures what each attempt writes: its work directory, its container's layer, its log."""

    async def prepare(self, id_: AttemptId, limit_bytes: int, *, work: Path, log: Path) -> None:
        """Bound the work directory and the log. Called before the container is made, and again after a restart.

        No container may reach the directory above `work`, which is this attempt's alone.
        """
        ...

    def holds_layers(self) -> bool:
        """Whether a container's layer has to be added before its start, since the kernel bounds it."""
        ...

    async def add_layer(self, id_: AttemptId, layer: Sequence[Path], beside: Sequence[Path] = ()) -> None:
        """Bound the container's writable layer too (overlay: upper and work directory), and what it writes to beside it.

        Repeating adds what is new.
        """
        ...

    async def bound(self, id_: AttemptId) -> DiskBound | None:
        """What is in force, read back from the kernel where it keeps it; None for an attempt that was not prepared."""
        ...

    async def crossed(self, id_: AttemptId) -> DiskUse:
        """Return once the attempt has written more than its limit; within two seconds of it. It may be prepared later.

        Where that is hard, only what got past the kernel's bound is told, and later.
        """
        ...

    async def use(self, id_: AttemptId) -> DiskUse | None:
        """What it has left behind, once nothing of it runs, and the most that was seen. None if it was not prepared."""
        ...

    def seen(self, id_: AttemptId) -> DiskUse | None:
        """What was last seen, without a new look: a large tree takes its time. None as with `use`."""
        ...

    async def remove(self, id_: AttemptId, *, work: Path) -> None:
        """Lift the bound, and forget it, also one that an earlier process set. Repeating is harmless.

        Call it while the directories still exist: `work` is the one that was prepared.
        """
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Of one file system, in bytes; `free_bytes` is what unprivileged users can have."""

    used_bytes: int
    free_bytes: int

    @property
    def used_percent(self) -> float:
        """As df(1) counts: of used and free together."""
        return 100 * self.used_bytes / max(1, self.used_bytes + self.free_bytes)


class FreeSpace(Protocol):
    """Room on the file systems that tasks write to."""

    async def of(self, place: Path) -> Room | None:
        """Of the file system that holds this place; None where it cannot be seen."""
        ...

    async def least(self) -> tuple[int, Path] | None:
        """The bytes free to unprivileged users where there are fewest, and where that is; None if nothing can be seen."""
        ...

    async def close(self) -> None: ...
