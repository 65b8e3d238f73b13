"""The time of this host."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

_LONGEST_SLEEP_SECONDS = 30.0
"""The event loop's own clock stands still while the host is suspended: what was over then is found out so much later."""


class SystemClock:
    """A Clock over the host's clock. `sleep` counts as `elapsed` does, so a set clock does not change its length."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def elapsed(self) -> float:
        """Goes on while the host is suspended, as its tasks' deadlines do (CLOCK_BOOTTIME, clock_gettime(2))."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        """A length of zero or less yields once and returns."""
        until = self.elapsed() + seconds
        left = seconds
        while True:
            await asyncio.sleep(max(0.0, min(left, _LONGEST_SLEEP_SECONDS)))
            left = until - self.elapsed()
            if left <= 0:
                return
