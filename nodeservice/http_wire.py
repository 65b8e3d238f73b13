"""As much of HTTP/1.1 as a short call needs: a request, the head of its answer, its body (RFC 9112), kept connections.

For an engine on this host and for uploads. `http.client` reads a head with the parser for e-mail and opens the socket anew
as a file for each answer, which is most of what a short call costs.
"""

from __future__ import annotations

import http
import http.client
import io
import select
import socket
import ssl
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, cast

_MAX_LINE_BYTES = 65536
_MAX_LINES = 100
"""Of a head."""
_READ_BYTES = 65536
_MAX_WHOLE_BYTES = 1024**3
_BODILESS = frozenset({204, 304})


class Head(NamedTuple):
    """Of an answer. The names of `fields` are in small letters; of one that comes twice both values stand, with a comma."""

    status: int
    reason: str
    fields: Mapping[str, str]
    is_chunked: bool
    length_bytes: int | None
    """None where only the end of the connection, or the last chunk, ends the body."""

    @property
    def keeps_open(self) -> bool:
        """Whether the connection serves another request after this body."""
        ends_by_itself = self.is_chunked or self.length_bytes is not None
        return ends_by_itself and "close" not in _words(self.fields, "connection")


class Connection:
    """To one server, for one request after the other, with what was read ahead of its answers."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.reader = cast("io.BufferedReader", connected.makefile("rb", buffering=_READ_BYTES))

    def is_open(self) -> bool:
        """A server has nothing to say on an idle connection but that it is over.

        More than the last answer may have come with it. It is of no request of ours, and must not be taken for the next.
        """
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return not poll.poll(0) and not self._has_read_ahead()

    def _has_read_ahead(self) -> bool:
        limit_seconds = self.socket.gettimeout()
        self.socket.settimeout(0)
        try:
            return bool(self.reader.peek(1))
        except ssl.SSLWantReadError:
            return False
        except OSError:
            return True  # it broke off just now
        finally:
            self.socket.settimeout(limit_seconds)

    def close(self) -> None:
        self.reader.close()
        self.socket.close()


class KeptConnections:
    """Those to one server that are idle, for any thread; the one that was used last goes first."""

    def __init__(self) -> None:
        self._idle: deque[Connection] = deque()

    def take(self) -> Connection | None:
        """One that is still open, if there is any."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took the last
                break
            if connection.is_open():
                return connection
            connection.close()
        return None

    def keep(self, connection: Connection, after: Head) -> None:
        """For others, if this answer, read to its end, leaves it open; else it is closed."""
        if after.keeps_open:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


def send_request(
    connection: socket.socket, method: str, target: str, *, fields: Mapping[str, str] | None = None, body: bytes = b""
) -> None:
    """To the engine. Raises OSError, and ValueError for what would not be one request."""
    all_fields = {"Host": "localhost", "Content-Length": str(len(body)), **(fields or {})}
    connection.sendall(request_head(method, target, all_fields) + body)


def request_head(method: str, target: str, fields: Mapping[str, str]) -> bytes:
    """Raises ValueError for what would not be one request."""
    lines = [f"{method} {target} HTTP/1.1", *[f"{name}: {value}" for name, value in fields.items()], "", ""]
    text = "\r\n".join(lines)
    if not text.count("\r") == text.count("\n") == len(lines) - 1 or " " in target:
        raise ValueError(f"cannot be asked: {method} {target!r}")
    return text.encode("latin-1")


def read_head(reader: io.BufferedReader) -> Head:
    """Blocks until it is there. Raises OSError, or http.client.HTTPException for one that is none."""
    while True:
        lines = _lines(reader)
        first = next(lines, "")
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
            raise http.client.BadStatusLine(repr(first[:80]))
        fields = _fields(lines)
        if words[0] == "HTTP/1.0":
            fields.setdefault("connection", "close")
        status = int(words[1])
        if status >= 200 or status == http.HTTPStatus.SWITCHING_PROTOCOLS:
            is_chunked = _words(fields, "transfer-encoding")[-1] == "chunked"
            length_bytes = 0 if status in _BODILESS else None if is_chunked else _length_bytes(fields)
            return Head(status, words[2] if len(words) > 2 else "", fields, is_chunked, length_bytes)


def read_body(reader: io.BufferedReader, head: Head) -> bytes:
    """All of it. Raises OSError, or http.client.HTTPException (IncompleteRead) for one that breaks off."""
    if head.is_chunked:
        return _read_chunks(reader)
    if head.length_bytes is None:
        return reader.read()
    return _read(reader, head.length_bytes)


def dechunk(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The payload of a chunked body (RFC 9112, 7.1), joined per piece. Raises IncompleteRead when its end is missing.

    The engine sends a chunk for every line of a log: `read_body`, which reads chunk by chunk, would need several times as
    long. In return this one may leave the end of the body unread, so that the connection serves no other answer.
    """
    data, position, left, is_first = b"", 0, 0, True
    for piece in pieces:
        data, position = data[position:] + piece, 0
        payload: list[bytes] = []
        while True:
            if left:
                part = data[position : position + left]
                if not part:
                    break
                payload.append(part)
                position += len(part)
                left -= len(part)
                continue
            start = position if is_first else position + 2  # the line end after the chunk before
            end = data.find(b"\r\n", start)
            if end < 0:
                break
            try:
                left = int(data[start:end].partition(b";")[0], 16)
            except ValueError as error:
                raise http.client.HTTPException("the answer is garbled") from error
            position, is_first = end + 2, False
            if left == 0:
                if payload:
                    yield b"".join(payload)
                return
        if payload:
            yield b"".join(payload)
    raise http.client.IncompleteRead(b"")


def _line(reader: io.BufferedReader) -> bytes:
    line = reader.readline(_MAX_LINE_BYTES + 1)
    if len(line) > _MAX_LINE_BYTES:
        raise http.client.LineTooLong("head of the answer")
    if not line.endswith(b"\n"):
        raise http.client.RemoteDisconnected("the server closed the connection")
    return line.rstrip(b"\r\n")


def _lines(reader: io.BufferedReader) -> Iterator[str]:
    """Those of a head. As a rule it has come as a whole, and is taken at once."""
    come = reader.peek()
    end = come.find(b"\r\n\r\n")
    if end >= 0 and come.count(b"\n", 0, end) == come.count(b"\r\n", 0, end):
        reader.read(end + 4)
        return iter(come[:end].decode("latin-1").split("\r\n"))
    return _lines_one_by_one(reader)


def _lines_one_by_one(reader: io.BufferedReader) -> Iterator[str]:
    for _ in range(_MAX_LINES):
        if not (line := _line(reader)):
            return
        yield line.decode("latin-1")
    raise http.client.HTTPException(f"a head of more than {_MAX_LINES} lines")


def _fields(lines: Iterable[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        if line[:1] in " \t" and fields:  # of old, a field could go on in the next line
            fields[name] += f" {line.strip()}"
            continue
        name, _, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def _words(fields: Mapping[str, str], name: str) -> list[str]:
    """Of a list; one that is empty where there is no such field."""
    text = fields.get(name)
    return [word.strip() for word in text.lower().split(",")] if text else [""]


def _length_bytes(fields: Mapping[str, str]) -> int | None:
    length, *others = set(_words(fields, "content-length"))
    return int(length) if length.isdecimal() and not others else None


def _read_chunks(reader: io.BufferedReader) -> bytes:
    found: list[bytes] = []
    while True:
        try:
            size = int(_line(reader).partition(b";")[0], 16)
        except ValueError as error:
            raise http.client.IncompleteRead(b"".join(found)) from error
        if size < 0:
            raise http.client.HTTPException(f"a chunk of the answer has {size} bytes")
        if size == 0:
            deque(_lines_one_by_one(reader), maxlen=0)  # the fields that may follow the last chunk
            return b"".join(found)
        found.append(_read(reader, size))
        _line(reader)


def _read(reader: io.BufferedReader, size: int) -> bytes:
    if size > _MAX_WHOLE_BYTES:
        raise http.client.HTTPException(f"an answer of {size} bytes is not read whole")
    data = reader.read(size)
    if len(data) < size:
        raise http.client.IncompleteRead(data, size - len(data))
    return data
