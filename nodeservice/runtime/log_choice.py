"""Chooses how a container's log is read on an engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable

import structlog

from nodeservice.ports import LogMark
from nodeservice.runtime import docker_calls as calls
from nodeservice.runtime.connection import EngineConnection
from nodeservice.runtime.log_file import read_log_file
from nodeservice.runtime.logs import read_log
from nodeservice.runtime.profile import EngineProfile

log = structlog.get_logger(__name__)


async def choose_reading(
    connection: EngineConnection,
    profile: EngineProfile,
    container_id: str,
    *,
    until_end: Callable[[], Awaitable[object]] | None,
    after: str | None,
    on_mark: Callable[[LogMark], None] | None,
) -> AsyncGenerator[bytes, None]:
    """See `ports.ContainerRuntime.read_log`. With `until_end`, which returns at the container's end, follow to then."""
    follow = until_end is not None
    if profile.log_driver != "k8s-file":
        is_local = profile.log_driver == "local"
        return read_log(connection, container_id, follow=follow, is_local=is_local, after=after, on_mark=on_mark)
    path = await connection.call(lambda client: calls.log_path(client, container_id), doing="find a container's log")
    if await asyncio.to_thread(os.access, path.parent, os.R_OK | os.X_OK):
        return read_log_file(path, connection.readers, until_end=until_end, after=after, on_mark=on_mark)
    if until_end is not None:
        # Podman's own follower loses lines (see log_file). Late and whole is better than at once and with holes.
        log.info("container.log_read_at_end", container_id=container_id, why=f"{path.parent} cannot be read")
        await until_end()
    return read_log(connection, container_id, follow=False, is_local=False)
