"""Removes what has grown old by the operator's policy, and what a crash left half-made in the stores.

Results of an attempt that is not finished, kept ones that still wait for their store included, are never old.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import structlog

from nodeservice.core.model import AttemptId, Phase
from nodeservice.errors import NodeServiceError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.patience import AgeClock

log = structlog.get_logger(__name__)

_ON_THIS_HOST = "file://"


class Retention:
    def __init__(self, context: Context, driver: Driver) -> None:
        self._context = context
        self._driver = driver
        self._present = AgeClock(context.clock)
        self._tidied: set[AttemptId] = set()

    async def sweep(self) -> None:
        """One round. Raises OSError where a directory can't be read."""
        await self._old_results()
        await self._old_salvage()
        await self._half_made()
        await self._parts_in_the_store()

    async def _old_results(self) -> None:
        """Where another store takes the results, only the pointers that kept results left are old one day."""
        context = self._context
        keep_seconds = context.settings.results_retention_seconds
        if keep_seconds is None:
            return
        before = self._present.now() - timedelta(seconds=keep_seconds)
        only_moved = context.fallback is not None
        for id_ in await asyncio.to_thread(context.folder.stored_before, before, only_moved=only_moved):
            if not self._driver.is_live(id_):
                await self._remove("results", str(id_), partial(context.folder.remove, id_))

    async def _old_salvage(self) -> None:
        keep_seconds = self._context.settings.salvage_retention_seconds
        if keep_seconds is None:
            return
        before = self._present.now() - timedelta(seconds=keep_seconds)
        for path in await asyncio.to_thread(self._context.dirs.salvaged_before, before):
            await self._remove("salvage", path.name, partial(self._context.dirs.remove_salvaged, path))

    async def _half_made(self) -> None:
        """Of attempts that this node knows to be done with storing: another node may be at work in a shared directory."""
        folder = self._context.folder
        for id_, path in await asyncio.to_thread(folder.leftovers):
            record = self._driver.get(id_)
            if record is not None and record.phase is Phase.FINISHED:
                await self._remove("half-made results", path.name, partial(folder.remove_leftover, path))

    async def _parts_in_the_store(self) -> None:
        """Parts of uploads that nobody goes on with: of attempts whose results stayed on this host for good."""
        if self._context.fallback is None or self._context.settings.janitor_dry_run:
            return
        for record in self._driver.finished():
            location = record.result_location or ""
            if record.id in self._tidied or record.collected is None or not location.startswith(_ON_THIS_HOST):
                continue
            try:
                count = await self._context.store.drop_leftovers(record.id, record.collected.paths)
            except NodeServiceError as error:
                log.info("retention.store_away", task_id=record.id.task_id, error=str(error))
                return
            self._tidied.add(record.id)
            if count:
                log.info("retention.uploads_dropped", task_id=record.id.task_id, count=count)
        self._tidied = {id_ for id_ in self._tidied if self._driver.get(id_) is not None}

    async def _remove(self, kind: str, name: str, work: Callable[[], None]) -> None:
        if self._context.settings.janitor_dry_run:
            log.info("retention.would_be_removed", kind=kind, name=name)
            return
        try:
            await asyncio.to_thread(work)
        except OSError as error:
            log.error("retention.not_removed", kind=kind, name=name, error=str(error))
        else:
            log.info("retention.removed", kind=kind, name=name)
