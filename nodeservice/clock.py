"""The time of this host."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime


class SystemClock:
    """A Clock over the host's clock. `sleep` counts on the monotonic clock, so a set clock does not change its length."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def elapsed(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """A length of zero or less yields once and returns."""
        await asyncio.sleep(max(0.0, seconds))
