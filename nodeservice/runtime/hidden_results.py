"""Finds what would lie over the results directory in a container that was made and not started."""

from __future__ import annotations

import base64
import json
import posixpath
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nodeservice.errors import RequestError
from nodeservice.ports import ContainerSpec

if TYPE_CHECKING:
    from docker import APIClient


def refuse_hidden(client: APIClient, container_id: str, spec: ContainerSpec, volumes: Sequence[str]) -> None:
    """Raise RequestError (CREATE_FAILED) where a volume of the image would take what is written at one of our mounts.

    Links in the image can bring the two together, and which of them then lies above is chance.
    """
    if not volumes:
        return
    ours = {mount.target: _resolved(client, container_id, mount.target) for mount in spec.mounts}
    for volume in volumes:
        if posixpath.normpath(volume) in ours:
            continue  # our mount is in its place
        at = _resolved(client, container_id, volume)
        for target, place in ours.items():
            if f"{at}/".startswith(f"{place}/") or f"{place}/".startswith(f"{at}/"):
                raise RequestError(
                    f"in image {spec.image!r} its volume {volume} meets {target}, by way of a link: what the task writes "
                    "there might not be stored",
                    reason="CREATE_FAILED",
                    field="image",
                    hint=f"build it without this VOLUME, or without a link at {target}",
                )


def _resolved(client: APIClient, container_id: str, path: str) -> str:
    """Where the image's links lead. The engine resolves the last part of a path, so each has its turn."""
    at = "/"
    for name in path.strip("/").split("/"):
        at = posixpath.join(at, name)
        url = f"{client.base_url}/v{client.api_version}/containers/{container_id}/archive"
        # As a stream, since our own way of asking takes an answer without a body for one that is still to come.
        with client.head(url, params={"path": at}, timeout=client.timeout, stream=True) as answer:
            told = answer.headers.get("X-Docker-Container-Path-Stat")
        if told is not None:
            at = json.loads(base64.b64decode(told)).get("linkTarget") or at
    return posixpath.normpath(at)
