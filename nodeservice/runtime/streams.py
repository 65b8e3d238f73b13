"""One HTTP exchange with the engine that streams its answer and can be cut from any thread at any moment.

docker-py's streams cannot be cut before the first byte of the answer, and the engine sends none while a registry is silent.
They also end without an error when the connection breaks, so a log cut in the middle would look complete. Hence this small
reader for the endless calls (pull, events, log, the output of a program run inside); all others go through docker-py.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any, cast
from urllib.parse import urlencode

from nodeservice.http_wire import dechunk, read_head, send_request
from nodeservice.runtime.endpoint import Endpoint

_READ_BYTES = 65536
_MAX_ERROR_BYTES = 65536


class StreamRefusedError(Exception):
    """The engine answered with an HTTP error status instead of a stream."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class EngineStream:
    """Blocking; used by one thread, `abort` by any. May be opened again after `close`, never after `abort`.

    Raises OSError or http.client.HTTPException when the stream breaks.
    """

    def __init__(self, endpoint: Endpoint, *, connect_timeout_seconds: float) -> None:
        self._endpoint = endpoint
        self._connect_timeout_seconds = connect_timeout_seconds
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._reader: io.BufferedReader | None = None
        self._is_chunked = False
        self._length_bytes: int | None = None
        self._aborted = False

    def open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> None:
        """Send the request, its body in JSON; wait without limit for the head of the answer. Raises StreamRefusedError."""
        connection = self._endpoint.connect(timeout_seconds=self._connect_timeout_seconds)
        with self._lock:
            if self._aborted:
                connection.close()
                raise ConnectionAbortedError("the stream was aborted")
            self._socket = connection
        target = f"{path}?{urlencode(query)}" if query else path
        fields = {"Connection": "close", **(headers or {})}
        if body:
            fields["Content-Type"] = "application/json"
        send_request(connection, method, target, fields=fields, body=body)
        reader = cast("io.BufferedReader", connection.makefile("rb", buffering=_READ_BYTES))
        self._reader = reader
        head = read_head(reader)
        self._is_chunked, self._length_bytes = head.is_chunked, head.length_bytes
        if head.status >= 400:
            raise StreamRefusedError(head.status, _message_of(b"".join(self.chunks())[:_MAX_ERROR_BYTES]))

    def chunks(self) -> Iterator[bytes]:
        """Bytes as they come, until the proper end of the answer."""
        pieces = self._pieces()
        if self._is_chunked:
            yield from dechunk(pieces)
            return
        left = self._length_bytes
        for piece in pieces:
            yield piece
            if left is not None:
                left -= len(piece)
                if left <= 0:
                    return
        if left:
            raise http.client.IncompleteRead(b"", left)

    def messages(self) -> Iterator[dict[str, Any]]:
        """JSON objects, one a line; a last line without its end is one too. Anything else is left out."""
        rest = b""
        for data in self.chunks():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield from _objects(line)
        yield from _objects(rest)

    def abort(self) -> None:
        """Make the reading thread fail at once. May be repeated."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the connection; by the reading thread."""
        if self._reader is not None:
            self._reader.close()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _pieces(self) -> Iterator[bytes]:
        assert self._reader is not None, "open the stream first"
        while piece := self._reader.read1(_READ_BYTES):
            yield piece


def _objects(line: bytes) -> Iterator[dict[str, Any]]:
    if not line.strip():
        return
    try:
        value = json.loads(line)
    except ValueError:
        return
    if isinstance(value, dict):
        yield value


def _message_of(body: bytes) -> str:
    for value in _objects(body):
        message = value.get("message") or value.get("cause")
        if message:
            return str(message)
    return body.decode(errors="replace").strip()
