"""A clock that a test turns by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from datetime import UTC, datetime, timedelta


class ManualClock:
    """A Clock that stands still until `advance`. Sleepers wake in the order of their instants.

    `advance` gives what it woke, and what that woke in turn, the chance to run and to sleep again, so that one call can
    carry a loop through many rounds. Work that waits for real I/O is not waited for.
    """

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = self._start = start
        self._order = itertools.count()
        self._sleepers: list[tuple[datetime, int, asyncio.Future[None]]] = []

    def now(self) -> datetime:
        return self._now

    def elapsed(self) -> float:
        return (self._now - self._start).total_seconds()

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        waker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + timedelta(seconds=seconds), next(self._order), waker))
        await waker

    @property
    def sleeper_count(self) -> int:
        """How many sleep now; a test waits for this before it advances."""
        return sum(not waker.done() for _, _, waker in self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Move time on, stopping at each instant for which somebody sleeps."""
        target = self._now + timedelta(seconds=seconds)
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= target:
            instant, _, waker = heapq.heappop(self._sleepers)
            if waker.done():
                continue
            self._now = max(self._now, instant)
            waker.set_result(None)
            await self.settle()
        self._now = target

    async def settle(self) -> None:
        """Let tasks that are ready run, and what they make ready in turn."""
        for _ in range(20):
            await asyncio.sleep(0)
