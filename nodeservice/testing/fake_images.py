"""The images of the fake runtime: what each does when it runs, which are present, and their pulls."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nodeservice.core.model import PullPolicy
from nodeservice.errors import RequestError
from nodeservice.ports import LocalImage, PulledImage, PullProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeImage:
    """What an image does when it runs: writes `output`, then ends with `exit_code`, or waits for `finish` if it `holds`.

    `is_local` false means that it must be pulled first; `pull_holds` makes the pull wait for `release_pulls`.
    `ignores_term` runs on after SIGTERM. `has_command` false makes the start fail as for a command that is not there.
    """

    exit_code: int = 0
    output: bytes = b""
    holds: bool = False
    ignores_term: bool = False
    has_command: bool = True
    inside: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """What a program that is run inside writes; those that are not named are not there."""
    is_local: bool = True
    pull_holds: bool = False
    size_bytes: int = 2_000_000
    volumes: tuple[str, ...] = ()
    other_tags: tuple[str, ...] = ()
    """Names that somebody else gave it."""


class FakeImageShelf:
    """`images` is read at each call, so a test may change it. `present` are the names of those on this host."""

    def __init__(self, images: Mapping[str, FakeImage]) -> None:
        self._images = images
        self._pulls: dict[str, tuple[asyncio.Task[PulledImage], list[PullProgress | None]]] = {}
        self.present = {name for name, image in images.items() if image.is_local}
        self.pull_counts: dict[str, int] = defaultdict(int)
        self.needed: set[str] = set()
        self.gate = asyncio.Event()

    def name_of(self, text: str) -> str | None:
        """Its plain name, given that, a digest or an id."""
        for name in self._images:
            if text in {name, full_name(name), _digest(name), _image_id(name)}:
                return name
        return None

    async def pull(self, image: str, policy: PullPolicy, on_progress: PullProgress | None) -> PulledImage:
        name = self.name_of(image)
        if policy is not PullPolicy.ALWAYS and name in self.present:
            return self._pulled(name)
        if policy is PullPolicy.NEVER or name is None:
            raise RequestError(f"image {image[:80]!r} was not found", reason="IMAGE_NOT_FOUND", field="image")
        if name not in self._pulls:
            listeners: list[PullProgress | None] = []
            self._pulls[name] = (asyncio.create_task(self._transfer(name, listeners)), listeners)
        task, listeners = self._pulls[name]
        listeners.append(on_progress)
        try:
            return await asyncio.shield(task)
        finally:
            listeners.remove(on_progress)
            if not listeners and not task.done():
                self._pulls.pop(name, None)
                task.cancel()

    def listed(self, used: Collection[str]) -> Sequence[LocalImage]:
        """`used` are the images of containers, as these were asked for."""
        used_names = {self.name_of(text) for text in used}
        return [
            LocalImage(
                image_id=_image_id(name),
                tags=(full_name(name), *image.other_tags),
                digests=(_digest(name),),
                size_bytes=image.size_bytes,
                is_used=name in used_names,
            )
            for name, image in self._images.items()
            if name in self.present
        ]

    def remove(self, name: str, used: Collection[str]) -> bool:
        plain = self.name_of(name)
        if name in self.needed or plain in {self.name_of(text) for text in used}:
            return False
        if plain is not None:
            self.present.discard(plain)
        return True

    async def close(self) -> None:
        for task, _ in list(self._pulls.values()):
            task.cancel()
            await asyncio.wait({task})

    def _pulled(self, name: str) -> PulledImage:
        image = self._images[name]
        return PulledImage(
            digest=_digest(name),
            image_id=_image_id(name),
            size_bytes=image.size_bytes,
            name=full_name(name),
            volumes=image.volumes,
        )

    async def _transfer(self, name: str, listeners: list[PullProgress | None]) -> PulledImage:
        try:
            size = self._images[name].size_bytes
            self.pull_counts[name] += 1
            for listener in filter(None, listeners):
                listener(0, size)
            if self._images[name].pull_holds:
                await self.gate.wait()
            else:
                await asyncio.sleep(0)
            for listener in filter(None, listeners):
                listener(size, size)
            is_new = name not in self.present
            self.present.add(name)
            return replace(self._pulled(name), is_new=is_new)
        finally:
            if name in self._pulls and self._pulls[name][1] is listeners:
                del self._pulls[name]


def full_name(name: str) -> str:
    return f"fake.invalid/{name}:latest"


def _digest(name: str) -> str:
    return f"fake.invalid/{name}@{_image_id(name)}"


def _image_id(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
