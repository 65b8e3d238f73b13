"""Compares what a node says it holds with what the master gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from nodeservice.master.checks import is_id
from nodeservice.master.rows import Key
from nodeservice.master.tasks import TaskBook
from nodeservice.wire import master_worker_pb2 as pb

log = structlog.get_logger(__name__)

MISSES = 3
"""An attempt that so many heartbeats in a row do not list is offered to its node again.

Offering is safe: a node that has it answers the same; one that has ended it is still reporting, or reports again, where our
database was set back; only one that has lost it starts it. So what was cancelled is asked for first.
"""


_ENDED = frozenset({"CLEANING", "RETAINING"})
"""Phases after the report was acknowledged."""


class Reconciler:
    """`recall` is told of attempts that a node shall end, since the master gave them up or never knew that it has them."""

    def __init__(self, book: TaskBook, recall: Callable[[Key, str], None]) -> None:
        self._book = book
        self._recall = recall
        self._misses: dict[str, dict[Key, int]] = {}

    async def compare(self, worker_id: str, running: Iterable[pb.RunningTask]) -> None:
        """Note the phases of what the node lists; count what it should list and doesn't."""
        held = self._book.held_by(worker_id)
        newest = dict(sorted(held))
        phases: dict[Key, str] = {}
        strays: list[tuple[str, int | None, str]] = []
        for task in running:
            if not is_id(task.task_id):
                continue
            # A peer of the old protocol tells no attempt: it is what the peer was given last.
            attempt = task.attempt if task.HasField("attempt") else newest.get(task.task_id)
            phase = (task.phase or task.status or "RUNNING").upper()[:32]
            if attempt is not None and (task.task_id, attempt) in held:
                phases[(task.task_id, attempt)] = phase
            elif phase not in _ENDED:
                strays.append((task.task_id, attempt, phase))
        await self._book.note_phases(worker_id, phases)
        for task_id, attempt, phase in strays:
            unwanted = await self._book.listed(worker_id, task_id, attempt, phase)
            if unwanted is not None:
                self._recall(unwanted.key, worker_id)
        missing = [key for key, row in held.items() if row.accepted and key not in phases]
        misses = self._misses.get(worker_id, {})
        counted = {key: misses.get(key, 0) + 1 for key in missing}
        lost = [key for key, count in counted.items() if count >= MISSES]
        self._misses[worker_id] = {key: count for key, count in counted.items() if count < MISSES}
        if lost:
            log.warning("task.missing_on_node", worker_id=worker_id, task_ids=[task_id for task_id, _ in lost[:20]])
            await self._book.unaccepted(lost)
