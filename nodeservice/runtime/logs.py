"""Reads a container's log: exact bytes, both streams in the engine's order, one thread per reading."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

from nodeservice.errors import NodeFaultError, NodeServiceError, TransientError
from nodeservice.runtime.connection import EngineConnection
from nodeservice.runtime.errors import engine_unavailable
from nodeservice.runtime.frames import Reread, read_frames
from nodeservice.runtime.hand_over import HandOver
from nodeservice.runtime.streams import EngineStream, StreamRefusedError

_AT_ONCE_BYTES = 256 * 1024


async def read_log(
    connection: EngineConnection, container_id: str, *, follow: bool, mends_lines: bool
) -> AsyncGenerator[bytes, None]:
    """See `ports.ContainerRuntime.read_log`. Raises NodeFaultError (CONTAINER_LOST) if there is no such container.

    Reads ahead by 1 MiB at most; what piles up meanwhile is yielded in one piece. Docker can end a followed log without its
    last records: at the end of what is written, its follower waits for either more bytes or the end of the writer, and may
    take the latter though the former are there as well. So a followed log is read once more at its end (milliseconds for
    small logs), and what was missed is added; only for a log that outgrew its bound in the engine that is not possible.
    For `mends_lines` see `frames.read_frames`.
    """
    # What is not followed is read at once: to begin with its first line would only cost another turn.
    buffer = HandOver(asyncio.get_running_loop(), least_bytes=1 if follow else _AT_ONCE_BYTES)
    stream = connection.stream()
    reading = _Reading(connection, container_id, follow=follow, mends_lines=mends_lines, stream=stream, buffer=buffer)
    connection.readers.submit(reading.run)
    try:
        while data := await buffer.take():
            yield data
    finally:
        buffer.close()
        stream.abort()  # the thread, wherever it blocks, ends by itself now


class _Reading:
    """What the thread does."""

    def __init__(
        self,
        connection: EngineConnection,
        container_id: str,
        *,
        follow: bool,
        mends_lines: bool,
        stream: EngineStream,
        buffer: HandOver,
    ) -> None:
        self._connection = connection
        self._container_id = container_id
        self._follow = follow
        self._mends_lines = mends_lines
        self._stream = stream
        self._buffer = buffer

    def run(self) -> None:
        try:
            if self._follow:
                reread = Reread()
                if self._hand_over(reread.noted(self._read(follow=True))):
                    self._hand_over(reread.missed(self._read(follow=False)))
            else:
                self._hand_over(self._read(follow=False))
            self._buffer.end(None)
        except Exception as error:
            self._buffer.end(_translated(self._container_id, error))

    def _read(self, *, follow: bool) -> Iterator[bytes]:
        query = {
            "stdout": "1",
            "stderr": "1",
            "tail": "all",
            "follow": "01"[follow],
            "timestamps": "01"[self._mends_lines],
        }
        try:
            path = self._connection.api_path(f"/containers/{self._container_id}/logs")
            self._stream.open("GET", path, query=query)
            yield from read_frames(self._stream.chunks(), mends_lines=self._mends_lines)
        finally:
            with contextlib.suppress(OSError):
                self._stream.close()

    def _hand_over(self, pieces: Iterator[bytes]) -> bool:
        """False: the reader has gone."""
        return all(self._buffer.put(piece) for piece in pieces)


def _translated(container_id: str, error: Exception) -> NodeServiceError:
    if isinstance(error, NodeServiceError):
        return error
    translated: NodeServiceError
    if isinstance(error, StreamRefusedError) and error.status in {404, 409}:
        translated = NodeFaultError(f"container {container_id} has no log: {error.message}", reason="CONTAINER_LOST")
    elif isinstance(error, ConnectionRefusedError | FileNotFoundError | PermissionError):
        translated = engine_unavailable(error)
    else:
        translated = TransientError(f"the log of {container_id} broke off: {error}", reason="LOG_STREAM_BROKEN")
    translated.__cause__ = error
    return translated
