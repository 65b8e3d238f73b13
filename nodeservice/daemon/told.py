"""What a running daemon says of itself to `inspect` on its host, over a socket in its state directory, and so as it is now.

A file would go on saying what was so, and could not be written on the full disk that it has to tell of.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from nodeservice import __version__
from nodeservice.daemon.node import Node
from nodeservice.daemon.standing import standing
from nodeservice.errors import TransientError
from nodeservice.rpc.status import conditions_told, warnings_told

log = structlog.get_logger(__name__)

SOCKET_NAME = "node.sock"
_ANSWER_SECONDS = 10.0
_MOST_BYTES = 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """`conditions` and `warnings` as a master hears them; `status` is a line for a person."""

    pid: int
    version: str
    mode: str
    status: str
    conditions: list[str]
    warnings: list[str]


def told(node: Node) -> Told:
    return Told(
        pid=os.getpid(),
        version=__version__,
        mode=node.mode.current.mode.value,
        status=standing(node),
        conditions=conditions_told(node.driver),
        warnings=warnings_told(node.driver, node.keeper.inventory),
    )


@contextlib.asynccontextmanager
async def telling(state_dir: Path, tell: Callable[[], Told]) -> AsyncIterator[None]:
    """While the block lasts, whoever may read the journal is answered. Nothing else depends on it: a failure is logged."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            writer.write(json.dumps(asdict(tell())).encode())
            await writer.drain()

    with _short(state_dir) as path:
        server = None
        try:
            server = await asyncio.start_unix_server(answer, path)
            os.chmod(path, 0o600)
        except OSError as error:
            log.warning("inspect.not_answered", error=str(error))
        try:
            yield
        finally:
            if server is not None:
                server.close()
                with contextlib.suppress(OSError):
                    os.unlink(path)


async def ask(state_dir: Path) -> Told | None:
    """None where no daemon listens. Raises TransientError for one that listens and does not answer."""
    try:
        with _short(state_dir) as path:
            async with asyncio.timeout(_ANSWER_SECONDS):
                reader, writer = await asyncio.open_unix_connection(path)
                with contextlib.closing(writer):
                    said: dict[str, Any] = json.loads(await reader.read(_MOST_BYTES))
        return Told(**said)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        raise TransientError(
            f"the daemon on {state_dir} does not tell how it is: {why}",
            reason="DAEMON_SILENT",
            hint="ask as its user, or read its log",
        ) from error


@contextlib.contextmanager
def _short(state_dir: Path) -> Iterator[str]:
    """The socket's path, whatever the directory's: the kernel takes no more than 107 bytes (unix(7))."""
    directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{SOCKET_NAME}"
    finally:
        os.close(directory)
