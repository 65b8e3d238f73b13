"""Lends an image with a shell for the time of the examination, and what the engine says of itself beside its facts."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nodeservice.core.model import PullPolicy
from nodeservice.doctor.busybox import base_files, find_busybox, image_archive, layer_tar
from nodeservice.doctor.checks.gpu import ASKS_FOR_ALL
from nodeservice.errors import TransientError

if TYPE_CHECKING:
    from docker import APIClient

_REPOSITORY = "nodeservice/doctor"
_PUBLIC_IMAGE = "busybox:stable"
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class LentImage:
    name: str
    pull: PullPolicy
    origin: str


@asynccontextmanager
async def lent_image(engine_url: str, wanted: str | None, *, token: str) -> AsyncIterator[LentImage]:
    """The image asked for, else one built from a static busybox of this host, else a public one.

    An image that was not there before is removed at the end. Raises TransientError where no engine answers.
    """
    client = await asyncio.to_thread(_connect, engine_url)
    try:
        busybox = None if wanted else await asyncio.to_thread(find_busybox)
        if busybox is not None:
            lent = LentImage(
                name=f"{_REPOSITORY}:{token}", pull=PullPolicy.NEVER, origin=f"built from {busybox}, asks for all GPUs"
            )
            await asyncio.to_thread(_build, client, lent.name, busybox)
            is_ours = True
        else:
            lent = LentImage(name=wanted or _PUBLIC_IMAGE, pull=PullPolicy.IF_NOT_PRESENT, origin="as named")
            is_ours = not await asyncio.to_thread(_has, client, lent.name)
        try:
            yield lent
        finally:
            if is_ours:
                await asyncio.to_thread(_remove, client, lent.name)
    finally:
        client.close()


async def engine_says(engine_url: str) -> dict[str, Any]:
    """The engine's answer to /info. Raises TransientError where none answers."""
    return await asyncio.to_thread(_info, engine_url)


def _connect(url: str) -> APIClient:
    from docker import APIClient
    from docker.errors import DockerException

    try:
        return APIClient(url, version="auto", timeout=_TIMEOUT_SECONDS)
    except (DockerException, OSError) as error:
        raise TransientError(
            f"no container engine answers at {url}", reason="ENGINE_UNAVAILABLE", hint="is it running?"
        ) from error


def _build(client: APIClient, name: str, busybox: Any) -> None:
    from docker.errors import DockerException

    try:
        tar = layer_tar([*base_files(busybox)])
        for _ in client.load_image(
            image_archive(name, [tar], labels={}, created_by="nodeservice doctor", env=ASKS_FOR_ALL)
        ):
            pass
    except (DockerException, OSError, subprocess.SubprocessError) as error:
        raise TransientError(
            f"no image could be built from {busybox}: {error}", reason="IMAGE_PULL_FAILED", hint="name one with --image"
        ) from error


def _has(client: APIClient, name: str) -> bool:
    from docker.errors import DockerException

    try:
        client.inspect_image(name)
    except DockerException:
        return False
    return True


def _remove(client: APIClient, name: str) -> None:
    from docker.errors import DockerException

    # One that another container came to use meanwhile stays.
    with suppress(DockerException):
        client.remove_image(name)


def _info(url: str) -> dict[str, Any]:
    client = _connect(url)
    try:
        return dict(client.info())
    finally:
        client.close()
