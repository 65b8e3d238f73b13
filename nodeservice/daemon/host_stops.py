"""Shutdowns of the host, noted by the worker that stops with it, and falls of the host, of which there is no such note.

The engine goes after the worker and ends what runs. Nobody sees that, and a task that obeys leaves the code of a success. So
what ran then is noted before, and told from what ended by itself. A host that loses its power also loses what was written
within the last half minute or so, though not what the engine noted of an exit: results that nobody had read are in doubt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from nodeservice.core.model import AttemptId, Phase, TaskRecord
from nodeservice.errors import NodeServiceError
from nodeservice.ports import Journal

log = structlog.get_logger(__name__)

_NOTE = "host_stops"
_FALLS_NOTE = "host_falls"
_KEPT_COUNT = 8
"""Shutdowns in a row in which the worker never came to look at what the first of them had ended."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class HostStops:
    def __init__(self, journal: Journal, *, boot_id: str | None = None) -> None:
        self._journal = journal
        self._boot_id = _BOOT_ID.read_text(encoding="ascii").strip() if boot_id is None else boot_id

    async def ended(self) -> Mapping[str, datetime]:
        """Ids of containers that ran when the host was shut down, each with the instant from which on it did not by itself.

        A shutdown in this very boot was called off, and ended nothing.
        """
        found: dict[str, datetime] = {}
        for stop in await self._noted():
            if stop["boot_id"] != self._boot_id:
                at = datetime.fromisoformat(stop["at"])
                found |= {container_id: at for container_id in stop["containers"] if container_id not in found}
        return found

    async def in_doubt(self, live: Iterable[TaskRecord]) -> frozenset[AttemptId]:
        """Unfinished attempts that had been started when the host fell, and whose results nobody had read whole by then.

        Call it at each start. They are remembered for as long as they are unfinished. A worker that was not there when the
        host was shut down can't tell that from a fall.
        """
        before: dict[str, Any] = json.loads(await self._journal.get_note(_FALLS_NOTE) or "{}")
        last_boot, named = before.get("boot_id", self._boot_id), before.get("in_doubt", [])
        fell = last_boot != self._boot_id and all(stop["boot_id"] != last_boot for stop in await self._noted())
        found = {
            record.id
            for record in live
            if (fell and Phase.RUNNING <= record.phase <= Phase.COLLECTING) or str(record.id) in named
        }
        now = {"boot_id": self._boot_id, "in_doubt": sorted(map(str, found))}
        if now != before:
            try:
                await self._journal.set_note(_FALLS_NOTE, json.dumps(now))
            except NodeServiceError as error:  # the next start sees the same
                log.error("host_fall.not_noted", error=str(error))
        return frozenset(found)

    async def note(self, at: datetime, container_ids: Iterable[str]) -> None:
        """Durable when it returns, unless the journal can't be read or written, which is logged."""
        stop = {"boot_id": self._boot_id, "at": at.isoformat(), "containers": sorted(container_ids)}
        try:
            await self._journal.set_note(_NOTE, json.dumps([*await self._noted(), stop][-_KEPT_COUNT:]))
        except NodeServiceError as error:
            log.error("host_stop.not_noted", error=str(error))
        else:
            log.info("host.stopping", containers=len(stop["containers"]))

    async def _noted(self) -> list[dict[str, Any]]:
        """Oldest first."""
        found: list[dict[str, Any]] = json.loads(await self._journal.get_note(_NOTE) or "[]")
        return found
