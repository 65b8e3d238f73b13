"""Forgets tasks that ended long ago, where the operator said for how long they are remembered."""

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


class Retention:
    """A task goes with all its attempts, and only where no node may have more to tell of any of them.

    That is a node that lists one (whose results it still keeps, say), and one that is away: it may when it comes back.
    """

    def __init__(
        self, book: TaskBook, nodes: NodeRegistry, store: MasterStore, clock: MasterClock, *, seconds: float
    ) -> None:
        self._book = book
        self._nodes = nodes
        self._store = store
        self._clock = clock
        self._seconds = seconds

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
        before_ms = self._clock.unix_ms() - round(self._seconds * 1000)
        count = await self._store.forget_orphans(before_ms)
        after: tuple[int, int] | None = (0, 0)
        while after is not None:
            removed, after = await self._book.forget(before_ms, after, self._nodes.untold(before_ms))
            count += removed
            await self._clock.sleep(_PAUSE_SECONDS)
        if count:
            log.info("tasks.forgotten", count=count, older_than_seconds=self._seconds)
        return count
