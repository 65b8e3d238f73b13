"""Durable memory, the way to the master, and where spans go."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from nodeservice.core.model import AttemptId, PhaseTiming, TaskRecord


class Journal(Protocol):
    """Durable memory of attempts. What `save` returned from survives a power cut."""

    async def load(self) -> Sequence[TaskRecord]:
        """All records, unfinished and finished ones that are still remembered, oldest first."""
        ...

    async def save(self, records: Sequence[TaskRecord]) -> None:
        """Write all or nothing, synced. The last write per attempt wins. Raises TransientError (JOURNAL_UNWRITABLE)."""
        ...

    async def forget(self, ids: Sequence[AttemptId]) -> None: ...

    async def get_note(self, key: str) -> str | None:
        """A small fact kept beside the records, such as the master's address."""
        ...

    async def set_note(self, key: str, value: str) -> None: ...

    async def close(self) -> None: ...


class Uplink(Protocol):
    """The way to the master."""

    @property
    def heard_at(self) -> datetime | None:
        """When the master last answered anything; None where it has not since this process began."""
        ...

    async def settled(self) -> None:
        """Return once no report is under way that the master may have taken though it has not answered yet."""
        ...

    async def report(self, record: TaskRecord) -> None:
        """Deliver the outcome; returning means acknowledged. Raises TransientError otherwise, also when refused."""
        ...


class TraceSink(Protocol):
    """Takes finished spans. Never blocks, never raises."""

    def phase_ended(self, record: TaskRecord, timing: PhaseTiming) -> None: ...

    def task_ended(self, record: TaskRecord) -> None: ...

    async def close(self) -> None:
        """Send what is left, within a bound of seconds."""
        ...
