"""Lists and removes the images of this host; blocking calls, for use inside `EngineConnection.call`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nodeservice.errors import RequestError
from nodeservice.ports import LocalImage
from nodeservice.runtime.errors import explanation, is_status
from nodeservice.runtime.images import parse_image

if TYPE_CHECKING:
    from docker import APIClient

_NONE = "<none>"
_NEEDED = "in use"
"""Podman answers some refusals with 500 and these words, where Docker answers 409."""


def list_images(client: APIClient) -> list[LocalImage]:
    """The images are asked for first: a container that is made meanwhile is then seen with its image."""
    images = client.images()
    used = {str(entry.get("ImageID") or "") for entry in client.containers(all=True)}
    used |= {str(entry.get("ParentId") or "") for entry in images}
    return [read_image(entry, used=used) for entry in images]


def read_image(entry: dict[str, Any], *, used: set[str]) -> LocalImage:
    """From one entry of the answer to GET /images/json."""
    image_id = _id(str(entry["Id"]))
    return LocalImage(
        image_id=image_id,
        tags=_names(entry.get("RepoTags")),
        digests=_names(entry.get("RepoDigests")),
        size_bytes=int(entry.get("Size") or 0),
        is_used=image_id in {_id(one) for one in used},
    )


def remove_image(client: APIClient, name: str) -> bool:
    from docker.errors import APIError

    try:
        client.remove_image(name)
    except APIError as error:
        if is_status(error, 404):
            return True
        if is_status(error, 409) or (is_status(error, 500) and _NEEDED in explanation(error).lower()):
            return False
        raise
    return True


def _names(entries: Sequence[str] | None) -> tuple[str, ...]:
    """Written out; a name that is none (`<none>:<none>`), or that no task could give, is left as it is."""
    found = []
    for entry in entries or ():
        if _NONE in entry:
            continue
        try:
            found.append(parse_image(entry).full_name)
        except RequestError:
            found.append(entry)
    return tuple(found)


def _id(text: str) -> str:
    """Podman leaves the algorithm out in some answers."""
    return text if ":" in text or not text else f"sha256:{text}"
