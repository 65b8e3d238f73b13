"""Forgets tasks that ended, and nodes last heard of, long ago, where the operator said for how long they are remembered."""

from __future__ import annotations

import structlog

from nodeservice.errors import NodeServiceError
from nodeservice.master.clock import MasterClock
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.store import MasterStore
from nodeservice.master.tasks import TaskBook

log = structlog.get_logger(__name__)

_ROUND_SECONDS = 3600.0
"""The first round too is so long after the start: by then nodes that are well have said again what they hold."""
_PAUSE_SECONDS = 0.2
"""Between two transactions, so that a long backlog holds nobody up."""
_DOUBT_SECONDS = 86400.0
"""For so long a clock that jumped ahead is not believed: what is forgotten does not come back when it is set right."""


class Retention:
    """A task goes with all its attempts, and only where no node may have more to tell of any of them.

    That is a node that lists one (whose results it still keeps, say), and one that is away: it may when it comes back.
    `known_ms` is the newest instant that was written down before the start; by it the clock is judged.
    """

    def __init__(
        self,
        book: TaskBook,
        nodes: NodeRegistry,
        store: MasterStore,
        clock: MasterClock,
        *,
        seconds: float,
        known_ms: int | None = None,
    ) -> None:
        self._book = book
        self._nodes = nodes
        self._store = store
        self._clock = clock
        self._seconds = seconds
        self._known_ms = clock.unix_ms() if known_ms is None else known_ms
        self._known_at = clock.monotonic()
        self._ahead_since: float | None = None

    async def run(self) -> None:
        """Until cancelled. What a database does not take is tried again in the next round."""
        while True:
            await self._clock.sleep(_ROUND_SECONDS)
            try:
                await self.look()
            except NodeServiceError as error:
                log.error("retention.failed", error=str(error))

    async def look(self) -> int:
        """One round; returns how many attempts were removed."""
        before_ms = self._now_ms() - round(self._seconds * 1000)
        count = await self._store.forget_orphans(before_ms)
        after: tuple[int, int] | None = (0, 0)
        while after is not None:
            removed, after = await self._book.forget(before_ms, after, self._nodes.untold(before_ms))
            count += removed
            await self._clock.sleep(_PAUSE_SECONDS)
        if count:
            log.info("tasks.forgotten", count=count, older_than_seconds=self._seconds)
        for worker_id in await self._nodes.forget(before_ms, self._book.assigned()):
            log.info("node.forgotten", worker_id=worker_id, older_than_seconds=self._seconds)
        return count

    def _now_ms(self) -> int:
        """By the clock; where that jumped ahead, as if it had not, until it has been so for a day."""
        now_ms, at = self._clock.unix_ms(), self._clock.monotonic()
        expected_ms = self._known_ms + round((at - self._known_at) * 1000)
        if now_ms - expected_ms > _ROUND_SECONDS * 1000:
            if self._ahead_since is None:
                self._ahead_since = at
                seconds = (now_ms - expected_ms) // 1000
                log.warning("clock.ahead", seconds=seconds, believed_after_seconds=_DOUBT_SECONDS)
            if at - self._ahead_since < _DOUBT_SECONDS:
                return expected_ms
        self._known_ms, self._known_at, self._ahead_since = now_ms, at, None
        return now_ms
