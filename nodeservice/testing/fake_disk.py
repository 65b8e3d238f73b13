"""A TaskDisk that is told what was written, and a FreeSpace that is told what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from nodeservice.core.model import AttemptId
from nodeservice.ports import DiskBound, DiskUse, Enforcement, Room


class FakeTaskDisk:
    """Bounds and counts nothing by itself: `write` says what an attempt has written in all."""

    def __init__(self) -> None:
        self._limits: dict[AttemptId, int] = {}
        self.prepared_places: dict[AttemptId, tuple[Path, Path]] = {}
        """Work directory and log, as they were named; remembered past the end."""
        self._places: dict[AttemptId, tuple[Path, ...]] = {}
        self._used: dict[AttemptId, DiskUse] = {}
        self._changed = asyncio.Event()

    def write(self, id_: AttemptId, total_bytes: int) -> None:
        peak_bytes = max(total_bytes, self._used[id_].peak_bytes if id_ in self._used else 0)
        self._used[id_] = DiskUse(bytes=total_bytes, file_count=1, peak_bytes=peak_bytes)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def prepared(self) -> tuple[AttemptId, ...]:
        return tuple(self._limits)

    async def prepare(self, id_: AttemptId, limit_bytes: int, *, work: Path, log: Path) -> None:
        self._limits[id_] = limit_bytes
        self._places[id_] = self.prepared_places[id_] = (work, log)
        self._tell()

    def holds_layers(self) -> bool:
        return False

    async def add_layer(self, id_: AttemptId, layer: Sequence[Path], beside: Sequence[Path] = ()) -> None:
        self._places[id_] = tuple(dict.fromkeys((*self._places.get(id_, ()), *layer, *beside)))

    async def bound(self, id_: AttemptId) -> DiskBound | None:
        if id_ not in self._limits:
            return None
        places = tuple((place, Enforcement.WATCHED) for place in self._places[id_])
        return DiskBound(limit_bytes=self._limits[id_], enforcement=Enforcement.WATCHED, places=places)

    async def crossed(self, id_: AttemptId) -> DiskUse:
        while True:
            used = self._used.get(id_)
            if used is not None and id_ in self._limits and used.bytes > self._limits[id_]:
                return used
            await self._changed.wait()

    async def use(self, id_: AttemptId) -> DiskUse | None:
        return self.seen(id_)

    def seen(self, id_: AttemptId) -> DiskUse | None:
        if id_ not in self._limits:
            return None
        return self._used.get(id_, DiskUse(bytes=0, file_count=0, peak_bytes=0))

    async def remove(self, id_: AttemptId, *, work: Path) -> None:
        self._limits.pop(id_, None)
        self._places.pop(id_, None)

    async def close(self) -> None:
        """Nothing is held."""


class FakeFreeSpace:
    """A FreeSpace that is told what is free."""

    def __init__(self) -> None:
        self.free_bytes: int | None = None
        self.rooms: dict[Path, Callable[[], Room]] = {}
        """What `of` answers, asked at each call."""

    async def least(self) -> tuple[int, Path] | None:
        return None if self.free_bytes is None else (self.free_bytes, Path("/fake"))

    async def of(self, place: Path) -> Room | None:
        return self.rooms[place]() if place in self.rooms else None

    async def close(self) -> None:
        """Nothing is held."""
