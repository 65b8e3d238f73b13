"""Keeps the journal in memory, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from nodeservice.core.model import AttemptId, TaskRecord


class MemoryJournal:
    """A Journal that ends with its process; its contents survive `close`, so that a test can reopen it."""

    def __init__(self) -> None:
        self._records: dict[AttemptId, TaskRecord] = {}
        self._notes: dict[str, str] = {}

    async def load(self) -> Sequence[TaskRecord]:
        return tuple(self._records.values())

    async def save(self, records: Sequence[TaskRecord]) -> None:
        self._records.update({record.id: record for record in records})

    async def forget(self, ids: Sequence[AttemptId]) -> None:
        for id_ in ids:
            self._records.pop(id_, None)

    async def get_note(self, key: str) -> str | None:
        return self._notes.get(key)

    async def set_note(self, key: str, value: str) -> None:
        self._notes[key] = value

    async def close(self) -> None:
        return None
