"""Reads a container's log: exact bytes, both streams in the engine's order, one thread per reading."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Iterator

from nodeservice.errors import NodeFaultError, NodeServiceError, TransientError
from nodeservice.runtime.connection import EngineConnection
from nodeservice.runtime.errors import engine_unavailable
from nodeservice.runtime.frames import Reread, read_frames
from nodeservice.runtime.streams import EngineStream, StreamRefusedError

_BUFFER_BYTES = 1024 * 1024


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
    buffer = _HandOver(asyncio.get_running_loop())
    stream = connection.stream()
    reading = _Reading(connection, container_id, follow=follow, mends_lines=mends_lines, stream=stream, buffer=buffer)
    threading.Thread(target=reading.run, name="engine-log", daemon=True).start()
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
        buffer: _HandOver,
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


class _HandOver:
    """Bytes from one thread to the loop: bounded, and with one wake-up however many pieces came."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready = asyncio.Event()
        self._changed = threading.Condition()
        self._pieces: list[bytes] = []
        self._size_bytes = 0
        self._ended = False
        self._closed = False
        self._error: NodeServiceError | None = None

    def put(self, data: bytes) -> bool:
        """In the thread; waits while the reader is behind. False: the reader has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._size_bytes < _BUFFER_BYTES)
            if self._closed:
                return False
            self._pieces.append(data)
            self._size_bytes += len(data)
            if len(self._pieces) == 1:
                self._wake()
            return True

    def end(self, error: NodeServiceError | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._wake()

    async def take(self) -> bytes:
        """All that is there, after waiting for some; empty at the end. Raises what ended it."""
        while True:
            await self._ready.wait()
            with self._changed:
                self._ready.clear()
                data = b"".join(self._pieces)
                self._pieces.clear()
                self._size_bytes = 0
                self._changed.notify()
                if self._ended:
                    self._ready.set()
                if data:
                    return data
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return b""

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed without us
            self._loop.call_soon_threadsafe(self._ready.set)
