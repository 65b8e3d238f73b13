"""HTTP with an engine, byte by byte."""

from __future__ import annotations

import http.client
import io
import socket
from typing import cast

import pytest

from nodeservice.http_wire import Connection, KeptConnections, read_body, read_head, send_request


def reader(*parts: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(b"".join(parts)))


def test_a_head_and_a_body_of_known_length() -> None:
    answer = reader(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\ncontent-LENGTH:  5 \r\n\r\nhello", b"the next")
    head = read_head(answer)
    assert (head.status, head.reason) == (200, "OK")
    assert head.fields["content-type"] == "text/plain"
    assert head.keeps_open
    assert read_body(answer, head) == b"hello"
    assert answer.read() == b"the next", "nothing is read that is not ours"


def test_a_body_in_chunks_with_extensions_and_a_trailer() -> None:
    answer = reader(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n", b"3;a=b\r\nabc\r\nA\r\n0123456789\r\n",
        b"0\r\nX-Sum: 1\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n",
    )  # fmt: skip
    head = read_head(answer)
    assert head.keeps_open
    assert read_body(answer, head) == b"abc0123456789"
    head = read_head(answer)
    assert head.status == 204
    assert head.keeps_open
    assert read_body(answer, head) == b""


def test_a_body_that_the_end_of_the_connection_ends() -> None:
    answer = reader(b"HTTP/1.0 200\r\n\r\nall of it")
    head = read_head(answer)
    assert head.reason == ""
    assert not head.keeps_open
    assert read_body(answer, head) == b"all of it"


def test_a_connection_that_is_closed_is_not_kept() -> None:
    assert not read_head(reader(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")).keeps_open
    for words in (b"Close", b"close, TE", b"Keep-Alive, close", b"TE\r\nConnection: close"):
        head = read_head(reader(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: " + words + b"\r\n\r\n"))
        assert not head.keeps_open, words


def test_what_comes_before_the_answer_is_passed_over_and_fields_add_up() -> None:
    head = read_head(reader(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nWarning: a\r\nwarning: b\r\n\r\n"))
    assert head.status == 201
    assert head.fields["warning"] == "a, b"


class InPieces(io.RawIOBase):
    def __init__(self, *pieces: bytes) -> None:
        self._pieces = [*pieces]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        piece = self._pieces.pop(0) if self._pieces else b""
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 6\r\n\r\na\r\n\r\nb"],
        [b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 6\r\n\r", b"\na\r\n\r\nb"],
        [b"HTTP/1.1 200 OK\r", b"\nA: ", b"b\r\nContent-Length: 6", b"\r\n\r\na\r\n", b"\r\nb"],
        [b"HTTP/1.1 200 OK\nA: b\nContent-Length: 6\n\na\r\n\r\nb"],
        [b"HTTP/1.1 200 OK\r\nA: b\nContent-Length: 6\r\n\na\r\n\r\nb"],
    ],
)
def test_a_head_ends_at_its_empty_line_however_it_comes(pieces: list[bytes]) -> None:
    answer = cast("io.BufferedReader", io.BufferedReader(InPieces(*pieces)))
    head = read_head(answer)
    assert head.fields == {"a": "b", "content-length": "6"}
    assert read_body(answer, head) == b"a\r\n\r\nb"


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 2\r\nContent-Length: 2",
        b"Content-Length: 2, 2",
        b"Warning: a\r\n  b\r\nContent-Length: 2",
        b"Warning: a\r\n\tContent-Length: 7\r\nContent-Length: 2",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    ],
)
def test_odd_ways_to_say_where_a_body_ends(fields: bytes) -> None:
    body = b"2\r\nhi\r\n0\r\n\r\n" if b"chunked" in fields else b"hi"
    answer = reader(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\n" + body)
    head = read_head(answer)
    assert head.keeps_open
    assert read_body(answer, head) == b"hi"


def test_two_lengths_are_none() -> None:
    head = read_head(reader(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi"))
    assert head.length_bytes is None
    assert not head.keeps_open


def test_more_than_memory_holds_is_not_begun() -> None:
    answer = reader(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999\r\n\r\nhi")
    head = read_head(answer)
    with pytest.raises(http.client.HTTPException, match="99999999999999999"):
        read_body(answer, head)


@pytest.mark.parametrize("surplus", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_connection_with_more_than_its_answer_is_not_used_again(surplus: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    kept = KeptConnections()
    with ours, theirs:
        connection = Connection(ours)
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi" + surplus)
        head = read_head(connection.reader)
        assert read_body(connection.reader, head) == b"hi"
        kept.keep(connection, head)
        assert kept.take() is (None if surplus else connection)
        if not surplus:
            assert ours.gettimeout() == 5
            connection.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", http.client.RemoteDisconnected),
        (b"HTTP/1.1 200 OK\r\n", http.client.RemoteDisconnected),
        (b"HTTP/1.1 200 OK\r\nContent-Len", http.client.RemoteDisconnected),
        (b"\r\n", http.client.BadStatusLine),
        (b"SSH-2.0-OpenSSH\r\n", http.client.BadStatusLine),
        (b"HTTP/1.1 many\r\n\r\n", http.client.BadStatusLine),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, http.client.LineTooLong),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", http.client.HTTPException),
        (b"HTTP/1.1 200 OK\n" + b"X: y\n" * 200 + b"\n", http.client.HTTPException),
    ],
)
def test_what_is_no_answer_is_an_error(answer: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_head(reader(answer))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhel\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    ],
)
def test_a_body_that_breaks_off_is_never_taken_for_whole(answer: bytes) -> None:
    whole = reader(answer)
    with pytest.raises(http.client.HTTPException):
        read_body(whole, read_head(whole))


def test_a_request_as_it_goes_out() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_request(ours, "POST", "/v1/create?name=a", fields={"X-One": "1"}, body=b"{}")
        assert theirs.recv(1000) == (
            b"POST /v1/create?name=a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nX-One: 1\r\n\r\n{}"
        )


@pytest.mark.parametrize(
    ("target", "fields"),
    [("/a\r\nX: y", {}), ("/a b", {}), ("/a", {"X": "1\r\nY: 2"})],
)
def test_what_would_be_two_requests_is_none(target: str, fields: dict[str, str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="cannot be asked"):
        send_request(ours, "GET", target, fields=fields)
