"""Asks the result store whether it takes results, before a task has run for nothing."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from nodeservice.errors import NodeServiceError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver

log = structlog.get_logger(__name__)

STORE_CREDENTIALS = "STORE_CREDENTIALS"
"""A condition: the store refuses whoever we say we are. That is certain, holds for each task, and passes only when somebody
changes the credentials, the clock or the store. All else that is wrong with it may pass, or concern this question alone, and
results are kept here meanwhile: a warning, by the error's reason."""


class StoreKeeper:
    """Asks at the start, each `check_store_seconds`, and at once when results were not taken.

    What is wrong stands among the driver's conditions and warnings for as long as the store says so.
    """

    def __init__(self, context: Context, driver: Driver) -> None:
        self._context = context
        self._driver = driver
        self._looked = asyncio.Event()
        self._told: str | None = None

    async def has_looked(self) -> None:
        """Return once the store was asked, or after `first_check_seconds` if it doesn't answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._context.settings.first_check_seconds):
                await self._looked.wait()

    async def run(self) -> None:
        """Work until cancelled."""
        settings, doubt = self._context.settings, self._context.store_in_doubt
        while True:
            doubt.clear()
            await self._look()
            self._looked.set()
            if self._told is not None:
                await self._context.clock.sleep(settings.store_trouble_seconds)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.check_store_seconds):
                    await doubt.wait()

    async def _look(self) -> None:
        try:
            await self._context.store.check()
        except NodeServiceError as error:
            self._tell(error.reason, str(error))
        except Exception as error:  # a question must not end the node
            log.exception("store.not_asked")
            self._tell("STORE_REFUSED", f"the store could not be asked: {error}")
        else:
            if self._told is not None:
                log.info("store.takes_results_again")
            self._clear()

    def _tell(self, name: str, words: str) -> None:
        if name != self._told:
            self._clear()
            log.warning("store.takes_no_results", reason=name, error=words)
        self._told = name
        where = self._driver.conditions if name == STORE_CREDENTIALS else self._driver.warnings
        where[name] = words

    def _clear(self) -> None:
        if self._told is not None:
            self._driver.conditions.pop(self._told, None)
            self._driver.warnings.pop(self._told, None)
        self._told = None
