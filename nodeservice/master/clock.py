"""The master's two clocks: one for instants that are shown and stored, one for intervals."""

from __future__ import annotations

import asyncio
import time


class MasterClock:
    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds that never jump; for silences, patience and repeats."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
