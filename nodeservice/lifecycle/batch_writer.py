"""Journals what the driver's rounds decided, and keeps at it while the journal cannot be written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId, TaskRecord
from nodeservice.core.retry import Backoff
from nodeservice.errors import CapacityError, TransientError
from nodeservice.lifecycle.inbox import Batch, fail
from nodeservice.lifecycle.patience import back_off
from nodeservice.ports import Clock, Journal

log = structlog.get_logger(__name__)

_BACKOFF = Backoff(first_seconds=0.2, max_seconds=15.0)
_DEFERRED_SECONDS = 0.2


class BatchWriter:
    """One batch at a time. `ask_for_write` is called when something has waited for another write for long enough."""

    def __init__(self, journal: Journal, ledger: Ledger, clock: Clock, *, ask_for_write: Callable[[], None]) -> None:
        self._journal = journal
        self._ledger = ledger
        self._clock = clock
        self._ask_for_write = ask_for_write
        self._deferred: dict[AttemptId, TaskRecord] = {}
        self._write_deferred: asyncio.TimerHandle | None = None
        self._refused: set[AttemptId] = set()
        """Told to run elsewhere, and perhaps in the journal: a write that failed at its sync may be there all the same."""
        self._under_way: Batch | None = None
        self.trouble: str | None = None
        """Why what has happened cannot be journalled now, so that nothing behind it is decided."""

    def pending(self, id_: AttemptId) -> TaskRecord | None:
        """The record as it will be once it is written."""
        return None if self._under_way is None else self._under_way.changed.get(id_)

    def forget(self, id_: AttemptId) -> None:
        self._deferred.pop(id_, None)

    def defer(self, batch: Batch) -> None:
        """Leave the batch to the next write, or to one of its own when none comes soon."""
        self._deferred |= batch.changed
        if self._deferred and self._write_deferred is None:
            self._write_deferred = asyncio.get_running_loop().call_later(_DEFERRED_SECONDS, self._ask_for_write)

    async def write(self, batch: Batch) -> None:
        """Journal the batch. New work is refused while the journal cannot be written; what happened is kept until it can."""
        self._under_way = batch
        failures = 0
        while self._deferred or batch.changed or self._refused:
            try:
                await self._try(batch)
            except TransientError as error:
                if self.trouble is None:
                    log.error("journal.unwritable", error=str(error))
                self.trouble = str(error)
                self._refuse_admitted(batch)
                failures += 1
                await back_off(self._clock, _BACKOFF, failures)
            else:
                break
        if not self._deferred and self._write_deferred is not None:  # written, or forgotten before
            self._write_deferred.cancel()
            self._write_deferred = None
        if self.trouble is not None:
            log.info("journal.writable_again")
        self.trouble = self._under_way = None

    async def _try(self, batch: Batch) -> None:
        if self._refused:
            await self._journal.forget(list(self._refused))
            self._refused.clear()
        if unwritten := self._deferred | batch.changed:
            await self._journal.save(list(unwritten.values()))
        self._deferred.clear()

    def _refuse_admitted(self, batch: Batch) -> None:
        for id_ in batch.admitted:
            batch.changed.pop(id_, None)
            self._ledger.release_compute(id_)
            self._ledger.release_disk(id_)
        refusal = self.refusal()
        for answer, id_ in batch.answers:
            if id_ in batch.admitted:
                fail(answer, refusal)
        batch.answers = [(answer, id_) for answer, id_ in batch.answers if id_ not in batch.admitted]
        batch.effects = [(id_, effect) for id_, effect in batch.effects if id_ not in batch.admitted]
        self._refused |= batch.admitted
        batch.admitted.clear()

    def refusal(self) -> CapacityError:
        """For who wants something accepted now."""
        return CapacityError(
            f"this node cannot write its journal: {self.trouble}",
            reason="JOURNAL_UNWRITABLE",
            hint="assign it elsewhere",
        )
