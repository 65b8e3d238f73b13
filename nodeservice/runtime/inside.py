"""Runs a short program inside a running container, and takes what it writes, within bounds.

Podman keeps a small monitor process of it for five minutes (`exit_command_delay` in containers.conf), in the cgroup of the
container's parent: with a cgroup of the task's own it ends with the task.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.runtime.connection import EngineConnection
from nodeservice.runtime.errors import engine_unavailable, explanation, is_status
from nodeservice.runtime.frames import read_frames
from nodeservice.runtime.streams import EngineStream, StreamRefusedError

if TYPE_CHECKING:
    from docker import APIClient

MAX_OUTPUT_BYTES = 64 * 1024
_LOOK_SECONDS = (0.01, 0.04, 0.15, 0.5)


async def run_inside(
    connection: EngineConnection, container_id: str, argv: Sequence[str], *, timeout_seconds: float
) -> str:
    """See `ports.ContainerRuntime.run_inside`."""
    stream = connection.stream()
    try:
        async with asyncio.timeout(timeout_seconds):
            return await connection.call(
                lambda client: _run(client, connection, stream, container_id, list(argv)), doing=f"run {argv[0]} inside"
            )
    except TimeoutError as error:
        raise TransientError(
            f"{argv[0]} in container {container_id[:12]} had not ended after {timeout_seconds:g} s",
            reason="EXEC_TIMEOUT",
        ) from error
    finally:
        stream.abort()  # the thread, wherever it blocks, ends by itself now


def _run(
    client: APIClient, connection: EngineConnection, stream: EngineStream, container_id: str, argv: list[str]
) -> str:
    from docker.errors import APIError

    try:
        id_ = client.exec_create(container_id, argv, stdout=True, stderr=False)["Id"]
        output = _output(connection, stream, f"/exec/{id_}/start")
        exit_code = _exit_code(client, id_)
    except APIError as error:
        if is_status(error, 404, 409):
            said = f"container {container_id[:12]} does not run: {explanation(error)}"
            raise NodeFaultError(said, reason="CONTAINER_LOST") from error
        raise
    except StreamRefusedError as error:
        raise _failed(argv, error.message) from error
    except (ConnectionRefusedError, FileNotFoundError, PermissionError) as error:
        raise engine_unavailable(error) from error
    except (OSError, http.client.HTTPException) as error:
        raise TransientError(f"the output of {argv[0]} broke off: {error}", reason="EXEC_BROKEN") from error
    if exit_code != 0:
        raise _failed(argv, f"it ended with {exit_code}")
    return output.decode(errors="replace")


def _exit_code(client: APIClient, id_: str) -> int | None:
    """The engine may note it a moment after the output has ended; None where it does not."""
    from docker.errors import NotFound

    for pause_seconds in (*_LOOK_SECONDS, 0.0):
        try:
            found: int | None = client.exec_inspect(id_)["ExitCode"]
        except NotFound as error:
            raise TransientError("the engine did not keep how the program ended", reason="EXEC_BROKEN") from error
        if found is not None:
            return found
        time.sleep(pause_seconds)
    return None


def _output(connection: EngineConnection, stream: EngineStream, path: str) -> bytes:
    output = b""
    try:
        stream.open("POST", connection.api_path(path), body=json.dumps({"Detach": False, "Tty": False}).encode())
        for piece in read_frames(stream.chunks()):
            output += piece
            if len(output) > MAX_OUTPUT_BYTES:
                raise RequestError(f"it wrote more than {MAX_OUTPUT_BYTES} bytes", reason="EXEC_FAILED")
        return output
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def _failed(argv: Sequence[str], why: str) -> RequestError:
    return RequestError(f"{argv[0]} could not be run inside: {why}", reason="EXEC_FAILED")
