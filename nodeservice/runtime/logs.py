"""Reads a container's log: exact bytes, both streams in the engine's order, one thread per reading."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

from nodeservice.errors import NodeFaultError, NodeServiceError, TransientError
from nodeservice.ports import LogMark
from nodeservice.runtime import docker_calls as calls
from nodeservice.runtime.connection import EngineConnection
from nodeservice.runtime.errors import engine_unavailable
from nodeservice.runtime.frames import Reread, read_frames, read_records
from nodeservice.runtime.hand_over import HandOver
from nodeservice.runtime.log_track import LogTrack
from nodeservice.runtime.streams import EngineStream, StreamRefusedError

_AT_ONCE_BYTES = 256 * 1024


async def read_log(
    connection: EngineConnection,
    container_id: str,
    *,
    follow: bool,
    is_local: bool,
    after: str | None = None,
    on_mark: Callable[[LogMark], None] | None = None,
) -> AsyncGenerator[bytes, None]:
    """See `ports.ContainerRuntime.read_log`. Raises NodeFaultError (CONTAINER_LOST) if there is no such container.

    Reads ahead by 1 MiB at most; what piles up meanwhile is yielded in one piece. Docker can end a followed log without its
    last records: at the end of what is written, its follower waits for either more bytes or the end of the writer, and may
    take the latter though the former are there as well. One that is behind when the log's file is full stays at its end. So
    a followed log is read once more at its end (milliseconds for small logs), and what was missed is added. `is_local`: the
    log is of the driver `local`, whose records tell by their times where they belong (see `log_track`); only then there
    are marks.
    """
    # What is not followed is read at once: to begin with its first line would only cost another turn.
    buffer = HandOver(asyncio.get_running_loop(), least_bytes=1 if follow else _AT_ONCE_BYTES)
    stream = connection.stream()
    reading = _Reading(connection, container_id, stream=stream, buffer=buffer)
    connection.readers.submit(
        lambda: reading.run_local(after, follow=follow) if is_local else reading.run(follow=follow)
    )
    try:
        while data := await buffer.take():
            if isinstance(data, bytes):
                yield data
            elif on_mark is not None:
                on_mark(data)
    finally:
        buffer.close()
        stream.abort()  # the thread, wherever it blocks, ends by itself now


class _Reading:
    """What the thread does."""

    def __init__(
        self, connection: EngineConnection, container_id: str, *, stream: EngineStream, buffer: HandOver
    ) -> None:
        self._connection = connection
        self._container_id = container_id
        self._stream = stream
        self._buffer = buffer

    def run(self, *, follow: bool) -> None:
        reread = Reread()
        with self._ended_in_the_end():
            if not follow:
                self._hand_over(read_frames(self._chunks(follow=False, stamped=False)))
            elif self._hand_over(reread.noted(read_frames(self._chunks(follow=True, stamped=False)))):
                self._hand_over(reread.missed(read_frames(self._chunks(follow=False, stamped=False))))

    def run_local(self, after: str | None, *, follow: bool) -> None:
        track = LogTrack(after)
        with self._ended_in_the_end():
            for follows in (True, False) if follow else (False,):
                records = read_records(self._chunks(follow=follows, stamped=True))
                if not self._hand_over(track.read(records, follows=follows)):
                    return
            if track.is_in_doubt:
                bound_bytes = calls.log_bound(b"".join(self._answer("json")))
                if bound_bytes is None or track.may_lack(bound_bytes):
                    self._buffer.put(track.mark(may_lack=True))

    @contextlib.contextmanager
    def _ended_in_the_end(self) -> Iterator[None]:
        try:
            yield
            self._buffer.end(None)
        except Exception as error:
            self._buffer.end(_translated(self._container_id, error))

    def _chunks(self, *, follow: bool, stamped: bool) -> Iterator[bytes]:
        query = {"stdout": "1", "stderr": "1", "tail": "all", "follow": "01"[follow], "timestamps": "01"[stamped]}
        return self._answer("logs", query)

    def _answer(self, question: str, query: dict[str, str] | None = None) -> Iterator[bytes]:
        try:
            path = self._connection.api_path(f"/containers/{self._container_id}/{question}")
            self._stream.open("GET", path, query=query)
            yield from self._stream.chunks()
        finally:
            with contextlib.suppress(OSError):
                self._stream.close()

    def _hand_over(self, pieces: Iterable[bytes | LogMark]) -> bool:
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
