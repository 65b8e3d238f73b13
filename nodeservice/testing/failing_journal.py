"""A journal whose writes fail on demand, as those of a full disk do."""

from __future__ import annotations

from collections.abc import Sequence

from nodeservice.core.model import AttemptId, TaskRecord
from nodeservice.errors import TransientError
from nodeservice.ports import Journal


class FailingJournal:
    """Passes all on to `inner`, except that writes raise TransientError (JOURNAL_UNWRITABLE) while told to.

    It starts healthy. A failed write leaves nothing behind. Reads always pass, as those of a read-only disk do.
    """

    def __init__(self, inner: Journal) -> None:
        self._inner = inner
        self._failures_left = 0.0
        self.failed_count = 0

    def fail_next(self, count: int) -> None:
        """Let the next `count` writes fail, then heal."""
        self._failures_left = count

    def fail_always(self) -> None:
        self._failures_left = float("inf")

    def heal(self) -> None:
        self._failures_left = 0

    async def load(self) -> Sequence[TaskRecord]:
        return await self._inner.load()

    async def save(self, records: Sequence[TaskRecord]) -> None:
        self._may_fail()
        await self._inner.save(records)

    async def forget(self, ids: Sequence[AttemptId]) -> None:
        self._may_fail()
        await self._inner.forget(ids)

    async def get_note(self, key: str) -> str | None:
        return await self._inner.get_note(key)

    async def set_note(self, key: str, value: str) -> None:
        self._may_fail()
        await self._inner.set_note(key, value)

    async def close(self) -> None:
        await self._inner.close()

    def _may_fail(self) -> None:
        if self._failures_left > 0:
            self._failures_left -= 1
            self.failed_count += 1
            raise TransientError("journal cannot be used: told to fail", reason="JOURNAL_UNWRITABLE")
