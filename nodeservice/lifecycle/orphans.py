"""Finds what carries this node's mark and no attempt claims, and removes it when it was found so twice, some time apart.

A list can be stale: what was made, or ended, while it was taken looks like nobody's. So nothing goes at first sight.
Containers, cgroups, work directories and logs; never anything that does not bear our name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from nodeservice.core.model import AttemptId
from nodeservice.errors import NodeServiceError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.recovery import identity
from nodeservice.ports import ContainerState

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Orphan:
    kind: str
    name: str
    remove: Callable[[], Awaitable[bool]]
    """False where it could not be removed."""


class Orphans:
    def __init__(self, context: Context, driver: Driver) -> None:
        self._context = context
        self._driver = driver
        self._first_seen: dict[tuple[str, str], float] = {}

    async def sweep(self) -> None:
        """One round. Raises as the runtime does where containers can't be listed."""
        containers = await self._context.runtime.list_owned(self._context.settings.worker_id)
        files = await self._files({identity(container) for container in containers})
        found = [*self._containers(containers), *await self._cgroups(), *files]
        now = self._context.clock.elapsed()
        seen = {(orphan.kind, orphan.name): orphan for orphan in found}
        before = self._first_seen
        self._first_seen = {key: before.get(key, now) for key in seen}
        for key, orphan in seen.items():
            age_seconds = now - self._first_seen[key]
            if key in before and age_seconds >= self._context.settings.orphan_grace_seconds:
                await self._remove(orphan, age_seconds)

    async def _remove(self, orphan: _Orphan, age_seconds: float) -> None:
        story = {"kind": orphan.kind, "name": orphan.name, "seen_for_seconds": round(age_seconds)}
        if self._context.settings.janitor_dry_run:
            log.info("orphan.would_be_removed", **story)
            return
        try:
            removed = await orphan.remove()
        except (NodeServiceError, OSError) as error:
            log.error("orphan.not_removed", **story, error=str(error))
            return
        if removed:
            log.warning("orphan.removed", **story)
        else:
            log.error("orphan.not_removed", **story, error="something still lives in it")

    def _containers(self, listed: Sequence[ContainerState]) -> list[_Orphan]:
        context = self._context

        async def remove(container_id: str) -> bool:
            await context.runtime.remove(container_id)
            return True

        return [
            _Orphan(
                kind="container", name=f"{container.name} {container.id[:12]}", remove=partial(remove, container.id)
            )
            for container in listed
            if (id_ := identity(container)) is not None and not self._driver.is_live(id_)
        ]

    async def _cgroups(self) -> list[_Orphan]:
        cgroups = self._context.cgroups
        return [
            _Orphan(kind="cgroup", name=name, remove=partial(cgroups.remove_unclaimed, name))
            for name in await cgroups.unclaimed([record.id for record in self._driver.live()])
        ]

    async def _files(self, written_to: set[AttemptId | None]) -> list[_Orphan]:
        """`written_to`: whose containers are there and may write into their directories."""
        dirs = self._context.dirs

        async def remove(work: Callable[[AttemptId], None], id_: AttemptId) -> bool:
            await asyncio.to_thread(work, id_)
            return True

        async def remove_directory(id_: AttemptId) -> bool:
            await self._context.disk.remove(id_, work=dirs.results(id_))
            return await remove(dirs.remove, id_)

        directories = await asyncio.to_thread(dirs.all)
        logs = await asyncio.to_thread(dirs.logs)
        found = [
            _Orphan(kind="directory", name=str(id_), remove=partial(remove_directory, id_))
            for id_ in directories
            if id_ not in written_to and not self._driver.is_live(id_)
        ]
        # The log of a finished attempt can be read for as long as the attempt is remembered.
        found += [
            _Orphan(kind="log", name=str(id_), remove=partial(remove, dirs.remove_log, id_))
            for id_ in logs
            if self._driver.get(id_) is None
        ]
        return found
