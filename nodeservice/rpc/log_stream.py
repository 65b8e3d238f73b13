"""Streams an attempt's log as the wire wants it: one chunk is one line, first what is stored, then what comes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from nodeservice.core.model import AttemptId
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.logs import LogBook
from nodeservice.rpc.convert import log_status
from nodeservice.wire import master_worker_pb2 as pb

_BLOCK_BYTES = 256 * 1024
_MAX_LINE_BYTES = 1024 * 1024
"""Longer lines are sent in pieces of this size: a gRPC message ends at 4 MiB, and a replaced byte takes three."""


async def stream_log(
    driver: Driver, logs: LogBook, id_: AttemptId, path: Path, *, follow: bool
) -> AsyncIterator[pb.LogChunk]:
    """Yield lines; the last chunk has `is_complete` once the attempt has ended and its results are settled.

    Without `follow` the stream of a task that still runs ends after what is stored, with no such chunk. `timestamp` is
    when the bytes were last written to the stored log, which for a followed line is when it came.
    """
    reader = _LineReader(path)
    try:
        while True:
            signal = logs.changed(id_)
            record = driver.get(id_)
            status = log_status(record) if record is not None else "failed"
            more = True
            while more:
                lines, more = reader.read()
                for line in lines:
                    yield _chunk(id_, line, reader.written_at)
            if status is not None or not follow:
                rest = reader.rest()
                if rest:
                    yield _chunk(id_, rest, reader.written_at)
                if status is not None:
                    yield pb.LogChunk(
                        task_id=id_.task_id, timestamp=_iso(datetime.now(UTC)), is_complete=True, status=status
                    )
                return
            await signal.wait()
    finally:
        reader.close()


def _chunk(id_: AttemptId, line: bytes, written_at: str) -> pb.LogChunk:
    return pb.LogChunk(task_id=id_.task_id, content=line.decode("utf-8", errors="replace"), timestamp=written_at)


def _iso(instant: datetime) -> str:
    return instant.isoformat(timespec="milliseconds")


class _LineReader:
    """Reads a growing file block by block and gives whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO | None = None
        self._partial = b""
        self.written_at = _iso(datetime.now(UTC))

    def read(self) -> tuple[Iterator[bytes], bool]:
        """The lines of the next block, and whether there may be more."""
        if self._stream is None:
            try:
                self._stream = self._path.open("rb")
            except FileNotFoundError:
                return iter(()), False
        block = self._stream.read(_BLOCK_BYTES)
        if not block:
            return iter(()), False
        self.written_at = _iso(datetime.fromtimestamp(os.fstat(self._stream.fileno()).st_mtime, UTC))
        *lines, self._partial = (self._partial + block).split(b"\n")
        if len(self._partial) >= _MAX_LINE_BYTES:
            lines.append(self._partial)
            self._partial = b""
        return (piece for line in lines for piece in _pieces(line)), True

    def rest(self) -> bytes:
        """What stands after the last newline."""
        rest, self._partial = self._partial, b""
        return rest

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _pieces(line: bytes) -> Iterator[bytes]:
    if len(line) <= _MAX_LINE_BYTES:
        yield line
        return
    for begin in range(0, len(line), _MAX_LINE_BYTES):
        yield line[begin : begin + _MAX_LINE_BYTES]
