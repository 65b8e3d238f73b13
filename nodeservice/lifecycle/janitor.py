"""Bounds what this node leaves on its host for ever: images, orphans, old results, half-made files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from nodeservice.errors import NodeServiceError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.orphans import Orphans
from nodeservice.lifecycle.retention import Retention

log = structlog.get_logger(__name__)


class Janitor:
    """Looks at the disk for images each `image_look_seconds`, and at all else each `sweep_seconds`, the first time at once.

    What fails is logged and tried in the next round; nobody waits for any of it.
    """

    def __init__(self, context: Context, driver: Driver) -> None:
        self._context = context
        self._driver = driver
        self._orphans = Orphans(context, driver)
        self._retention = Retention(context, driver)

    async def run(self) -> None:
        """Work until cancelled."""
        settings, clock = self._context.settings, self._context.clock
        left_seconds = 0.0
        while True:
            await self._try("images", lambda: self._context.images.make_room(self._driver.live))
            if left_seconds <= 0:
                await self.sweep()
                left_seconds = settings.sweep_seconds
            pause_seconds = min(settings.image_look_seconds, left_seconds)
            await clock.sleep(pause_seconds)
            left_seconds -= pause_seconds

    async def sweep(self) -> None:
        """One round of all but images."""
        await self._try("orphans", self._orphans.sweep)
        await self._try("retention", self._retention.sweep)

    async def _try(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except (NodeServiceError, OSError) as error:
            log.warning("janitor.not_done", what=what, error=str(error))
