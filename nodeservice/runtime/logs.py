"""Reads a container's log: exact bytes, both streams in the engine's order, one thread per reading."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator

from nodeservice.errors import NodeFaultError, NodeServiceError, TransientError
from nodeservice.runtime.connection import EngineConnection
from nodeservice.runtime.errors import engine_unavailable
from nodeservice.runtime.frames import LogPosition, read_frames
from nodeservice.runtime.streams import EngineStream, StreamRefusedError

_BUFFER_BYTES = 1024 * 1024


async def read_log(
    connection: EngineConnection, container_id: str, *, follow: bool, mends_end: bool
) -> AsyncGenerator[bytes, None]:
    """See `ports.ContainerRuntime.read_log`. Raises NodeFaultError (CONTAINER_LOST) if there is no such container.

    Reads ahead by 1 MiB at most; what piles up meanwhile is yielded in one piece. Docker up to 20.10 and later can end a
    followed log without its last records: the follower waits for either more bytes or the end of the writer, and takes the
    latter though the former is there as well. With `mends_end`, what is missing is fetched by its time afterwards.
    """
    buffer = _HandOver(asyncio.get_running_loop())
    stream = connection.stream()
    threading.Thread(
        target=_pump,
        args=(connection, container_id, follow, mends_end, stream, buffer),
        name="engine-log",
        daemon=True,
    ).start()
    try:
        while data := await buffer.take():
            yield data
    finally:
        buffer.close()
        stream.abort()  # the thread, wherever it blocks, ends by itself now


def _pump(
    connection: EngineConnection, container_id: str, follow: bool, mends: bool, stream: EngineStream, buffer: _HandOver
) -> None:
    position = LogPosition() if mends else None
    query = {"stdout": "1", "stderr": "1", "tail": "all", "timestamps": "1" if mends else "0"}
    try:
        path = connection.api_path(f"/containers/{container_id}/logs")
        stream.open("GET", path, query={**query, "follow": "1" if follow else "0"})
        for data in read_frames(stream.chunks(), position=position):
            if not buffer.put(data):
                return
        if follow and position is not None:
            since, skip_count = position.resume()
            stream.close()
            stream.open("GET", path, query={**query, "follow": "0", "since": since})
            for data in read_frames(stream.chunks(), position=position, skip_count=skip_count):
                if not buffer.put(data):
                    return
        buffer.end(None)
    except Exception as error:
        buffer.end(_translated(container_id, error))
    finally:
        with contextlib.suppress(OSError):
            stream.close()


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
