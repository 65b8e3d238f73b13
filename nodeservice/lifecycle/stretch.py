"""When a container began and how long it ran, whoever sets the host's clock meanwhile, by which the engine counts."""

from __future__ import annotations

from datetime import datetime, timedelta

from nodeservice.ports import Clock, ContainerState

_SET = timedelta(seconds=1)
"""A clock that is only adjusted runs away from the steady one by less: that is adjusted with it."""


class Stretch:
    """The time from its making on, by both clocks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_at, self._began = clock.now(), clock.elapsed()

    @property
    def clock_was_set(self) -> bool:
        return abs(self._clock.now() - self._began_at - self._passed) > _SET

    def within(self, at: datetime | None) -> datetime:
        """When it happened, of which the engine tells this; now, where that is not in this stretch by our clock.

        Ours may have been set since. What is taken for later than it was ends nothing early.
        """
        now = self._clock.now()
        return at if at is not None and now - self._passed <= at <= now else now

    def ran(self, started_at: datetime | None, ended: ContainerState) -> timedelta | None:
        """By the engine; where the clock was set in this stretch, from the start to now."""
        if self.clock_was_set and started_at is not None:
            return max(timedelta(0), self._began_at - started_at) + self._passed
        return ended.finished_at - ended.started_at if ended.finished_at and ended.started_at else None

    @property
    def _passed(self) -> timedelta:
        return timedelta(seconds=self._clock.elapsed() - self._began)
