"""How long something lasts or is waited for, and how old it is, whoever sets the host's clock meanwhile."""

from __future__ import annotations

import random
from datetime import datetime, timedelta

from nodeservice.core.retry import Backoff
from nodeservice.ports import Clock


class Patience:
    """A time limit. What had passed of it since `since`, perhaps before a restart, only the host's clock can tell."""

    def __init__(self, clock: Clock, seconds: float, *, since: datetime | None = None) -> None:
        self._clock = clock
        spent_seconds = 0.0 if since is None else max(0.0, (clock.now() - since).total_seconds())
        self._until = clock.elapsed() + seconds - spent_seconds

    @property
    def left_seconds(self) -> float:
        """Zero or less once it is over."""
        return self._until - self._clock.elapsed()

    @property
    def is_over(self) -> bool:
        return self.left_seconds <= 0


class AgeClock:
    """The present for judging what is old: never further on than has passed since this process began.

    A host's clock that is set a year ahead by mistake makes nothing a year old.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_at = clock.now()
        self._began = clock.elapsed()

    def now(self) -> datetime:
        passed = timedelta(seconds=self._clock.elapsed() - self._began)
        return min(self._clock.now(), self._began_at + passed)


async def back_off(clock: Clock, backoff: Backoff, failures: int) -> None:
    """Before another try, after so many failures."""
    await clock.sleep(backoff.delay(failures, random.random()))  # noqa: S311
