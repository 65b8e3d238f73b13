"""A store of the master in memory, with the same promises, that can be slow or fail."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nodeservice.errors import TransientError
from nodeservice.master.rows import OrphanRow, TaskRow, Wanted


class MemoryMasterStore:
    """What `TaskBook` asks of a store. `gate` unset: writes wait for it, and then happen, whoever gave up waiting."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], TaskRow] = {}
        self.orphans: dict[tuple[str, int, str], OrphanRow] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails = False
        self.forgets_to_answer = False
        """A write is done, and the call fails all the same."""

    async def save_tasks(self, rows: Sequence[TaskRow]) -> None:
        await self.gate.wait()
        self._check()
        self.rows |= {row.key: row for row in rows}
        if self.forgets_to_answer:
            raise TransientError("the master's database does not answer: gone", reason="STORE_UNAVAILABLE")

    async def save_orphan(self, row: OrphanRow) -> None:
        self._check()
        self.orphans[(row.task_id, row.attempt, row.worker_id)] = row

    async def open_tasks(self) -> list[TaskRow]:
        return sorted((row for row in self.rows.values() if not row.state.is_final), key=lambda row: row.sequence)

    async def newest_tasks(self, limit: int, wanted: Wanted) -> list[TaskRow]:
        assert wanted == Wanted(), "all tasks alone"
        newest = {row.task_id: row for row in sorted(self.rows.values(), key=lambda row: row.sequence)}
        return sorted(newest.values(), key=lambda row: -row.sequence)[:limit]

    async def find_task(self, task_id: str, attempt: int | None = None) -> TaskRow | None:
        found = [row for row in self.rows.values() if row.task_id == task_id and attempt in (None, row.attempt)]
        return max(found, key=lambda row: row.sequence, default=None)

    async def attempts(self, task_id: str) -> list[TaskRow]:
        return sorted((row for row in self.rows.values() if row.task_id == task_id), key=lambda row: row.attempt)

    async def last_sequence(self) -> int:
        return max((row.sequence for row in self.rows.values()), default=0)

    def _check(self) -> None:
        if self.fails:
            raise TransientError("the master's database does not answer: full", reason="STORE_UNAVAILABLE")
