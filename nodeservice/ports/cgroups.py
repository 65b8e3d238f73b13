"""The task's own cgroup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from nodeservice.core.model import AttemptId, TaskSpec, Usage


class TaskCgroups(Protocol):
    """A cgroup of the task's own, made before the container and readable after it."""

    async def prepare(self, spec: TaskSpec) -> str | None:
        """Make it with the task's limits; the value for the engine's cgroup parent, None where it cannot be used."""
        ...

    async def effective(self, id_: AttemptId) -> Mapping[str, object]:
        """The limits as the kernel holds them now, read back; empty where there is no such cgroup."""
        ...

    async def usage(self, id_: AttemptId) -> Usage: ...

    async def remove(self, id_: AttemptId) -> None:
        """Remove. One already gone is success."""
        ...

    async def close(self) -> None: ...
