"""Keeps images from filling the engine's disk: of those that this node pulled itself, the least recently used go first.

An image that somebody else made, pulled or gave a name of its own is left alone, and so is one that any container or any
task still needs. What this node pulled, and when it was last used, is a note in the journal. A node killed in the moment
between the end of a pull and that note takes the image for somebody else's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from nodeservice.core.model import AttemptId, Phase, TaskRecord
from nodeservice.errors import TransientError
from nodeservice.ports import Clock, ContainerRuntime, FreeSpace, Journal, LocalImage, PulledImage

log = structlog.get_logger(__name__)

_NOTE = "images"
_WRITE_EVERY = timedelta(minutes=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """An image that this node pulled, by the names under which it did."""

    names: frozenset[str]
    used_at: datetime
    written_at: datetime


class ImageKeeper:
    """`engine_root` names the file system that counts; percents are of what tasks could use of it.

    `on_removed` gets the size of each image that went, layers that it shared included.
    """

    def __init__(
        self,
        *,
        runtime: ContainerRuntime,
        journal: Journal,
        clock: Clock,
        free_space: FreeSpace,
        engine_root: Path,
        high_percent: float,
        low_percent: float,
        dry_run: bool = False,
        on_removed: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        self._runtime = runtime
        self._journal = journal
        self._clock = clock
        self._free_space = free_space
        self._engine_root = engine_root
        self._high_percent = high_percent
        self._low_percent = low_percent
        self._dry_run = dry_run
        self._on_removed = on_removed
        self._known: dict[str, _Known] = {}
        self._claims: dict[AttemptId, str] = {}
        self._is_high = False

    async def open(self) -> None:
        """Take up what was noted before the restart. A note that cannot be read is as none: nothing is removed then."""
        text = await self._journal.get_note(_NOTE)
        if text is None:
            return
        try:
            for image_id, told in json.loads(text).items():
                used_at = datetime.fromisoformat(told["used_at"])
                self._known[image_id] = _Known(names=frozenset(told["names"]), used_at=used_at, written_at=used_at)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._known = {}
            log.error("images.note_unreadable", error=repr(error))

    async def used(self, id_: AttemptId, image: PulledImage) -> None:
        """An attempt is about to use an image, which its pull found or brought."""
        self._claims[id_] = image.image_id
        known, now = self._known.get(image.image_id), self._clock.now()
        if image.is_new:
            names = (known.names if known is not None else frozenset()) | {image.name}
            self._known[image.image_id] = _Known(names=names, used_at=now, written_at=now)
        elif known is not None:
            self._known[image.image_id] = replace(known, used_at=now)
            if now - known.written_at < _WRITE_EVERY:
                return
        else:
            return  # somebody else's
        await self._write()

    def forget(self, id_: AttemptId) -> None:
        """The attempt needs its image no more. Repeating is harmless."""
        self._claims.pop(id_, None)

    async def make_room(self, live: Callable[[], Iterable[TaskRecord]]) -> None:
        """Remove images while the disk is used above the high mark, down to the low one. `live`: all unfinished attempts.

        Raises as the runtime does where images can't be listed.
        """
        if not await self._is_above(self._high_percent):
            self._is_high = False
            return
        listed = {image.image_id: image for image in await self._runtime.list_images()}
        for image_id in self._known.keys() - listed.keys():
            del self._known[image_id]
        removed_count = 0
        for image_id in sorted(self._known, key=lambda image_id: self._known[image_id].used_at):
            known, image = self._known[image_id], listed[image_id]
            if image.is_used or self._is_claimed(image, live()):
                self._known[image_id] = replace(known, used_at=self._clock.now())
            elif _is_ours(image, known) and await self._remove(image):
                removed_count += 1
                if not await self._is_above(self._low_percent):
                    break
        if removed_count:
            await self._write()
        elif not self._is_high:
            log.warning("images.disk_high", place=str(self._engine_root), percent=self._high_percent)
        self._is_high = True

    async def _remove(self, image: LocalImage) -> bool:
        story = {"image": image.tags or image.digests, "id": image.image_id, "size_bytes": image.size_bytes}
        if self._dry_run:
            log.info("image.would_be_removed", **story)
            return False
        for name in (*image.tags, *image.digests) or (image.image_id,):
            if not await self._runtime.remove_image(name):
                log.info("image.removal_refused", **story)
                return False
        del self._known[image.image_id]
        log.info("image.removed", **story)
        self._on_removed(image.size_bytes)
        return True

    async def _is_above(self, percent: float) -> bool:
        room = await self._free_space.of(self._engine_root)
        return room is not None and room.used_percent > percent

    def _is_claimed(self, image: LocalImage, live: Iterable[TaskRecord]) -> bool:
        """Whether a container is yet to be made from it."""
        waiting = [record for record in live if record.phase <= Phase.STARTING]
        self._claims = {record.id: self._claims[record.id] for record in waiting if record.id in self._claims}
        content = {image.image_id, *(digest.rpartition("@")[2] for digest in image.digests)}
        return image.image_id in self._claims.values() or any(
            record.image_digest is not None and record.image_digest.rpartition("@")[2] in content for record in waiting
        )

    async def _write(self) -> None:
        note = {
            image_id: {"names": sorted(known.names), "used_at": known.used_at.isoformat()}
            for image_id, known in self._known.items()
        }
        try:
            await self._journal.set_note(_NOTE, json.dumps(note))
        except TransientError as error:
            log.debug("images.not_noted", error=str(error))
            return
        now = self._clock.now()
        self._known = {image_id: replace(known, written_at=now) for image_id, known in self._known.items()}


def _is_ours(image: LocalImage, known: _Known) -> bool:
    """Whether it has no name but those by which it was pulled here, and the digests that came with them."""
    repositories = {_repository(name) for name in known.names}
    return set(image.tags) <= known.names and {_repository(digest) for digest in image.digests} <= repositories


def _repository(name: str) -> str:
    head = name.partition("@")[0]
    repository, colon, tag = head.rpartition(":")
    return repository if colon and "/" not in tag else head
