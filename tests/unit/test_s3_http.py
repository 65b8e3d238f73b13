"""Requests with a body, as they go out to a store, against a server that is told what to say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import urllib3

from nodeservice.errors import TransientError
from nodeservice.results.access import S3Access
from nodeservice.results.s3_client import BucketClient
from nodeservice.results.s3_http import BlockwisePool, stopped_by
from nodeservice.results.source import PutStopped

OK = b'HTTP/1.1 200 OK\r\nServer: MinIO\r\nETag: "e"\r\nContent-Length: 0\r\n\r\n'
REFUSED = b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n<Err>\r\n0\r\n\r\n"
BLOCK_BYTES = 256 * 1024
Serve = Callable[[socket.socket, int], None]


class Server:
    """Hands each connection and its number to `serve`, in a thread, and closes it after."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/bucket/key"
        self.connection_count = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._one, args=(connection, self.connection_count))
                self._threads.append(thread)
                self.connection_count += 1
                thread.start()

    def _one(self, connection: socket.socket, number: int) -> None:
        with connection, suppress(OSError):
            self._serve(connection, number)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@contextmanager
def serving(serve: Serve, *, read_seconds: float = 10.0) -> Iterator[tuple[Server, BlockwisePool]]:
    server = Server(serve)
    pool = BlockwisePool(timeout=urllib3.Timeout(connect=5.0, read=read_seconds), retries=False)
    try:
        yield server, pool
    finally:
        pool.clear()
        server.close()


def put(server: Server, pool: BlockwisePool, body: bytes) -> urllib3.BaseHTTPResponse:
    return pool.urlopen("PUT", server.url, body=body, headers={"Host": "x", "Content-Length": str(len(body))})


def take_request(connection: socket.socket) -> bytes:
    """The body of one whole request; nothing once the client has gone."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return body


def test_one_connection_serves_one_request_after_the_other() -> None:
    taken: list[bytes] = []

    def serve(connection: socket.socket, _number: int) -> None:
        while body := take_request(connection):
            taken.append(body)
            connection.sendall(OK)

    with serving(serve) as (server, pool):
        bodies = [b"one", b"x" * (2 * BLOCK_BYTES + 5), b"three"]
        answers = [put(server, pool, body) for body in bodies]
        assert [(answer.status, answer.headers["etag"]) for answer in answers] == [(200, '"e"')] * 3
        assert taken == bodies
        assert server.connection_count == 1
        assert pool.is_minio


def test_a_refusal_in_chunks_is_read_whole_and_leaves_the_connection_open() -> None:
    def serve(connection: socket.socket, _number: int) -> None:
        while take_request(connection):
            connection.sendall(REFUSED)

    with serving(serve) as (server, pool):
        for _ in range(2):
            answer = put(server, pool, b"body")
            assert (answer.status, answer.data) == (403, b"<Err>")
        assert server.connection_count == 1
        assert not pool.is_minio


def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again() -> None:
    gone = threading.Event()

    def serve(connection: socket.socket, _number: int) -> None:
        take_request(connection)
        connection.sendall(OK)
        connection.close()
        gone.set()

    with serving(serve) as (server, pool):
        put(server, pool, b"one")
        assert gone.wait(10)
        assert put(server, pool, b"two").status == 200
        assert server.connection_count == 2


@pytest.mark.parametrize("resets", [False, True])
def test_who_refuses_before_all_was_sent_and_hangs_up_is_heard(resets: bool) -> None:
    def serve(connection: socket.socket, _number: int) -> None:
        connection.recv(1000)
        connection.sendall(REFUSED)
        connection.shutdown(socket.SHUT_WR)
        while not resets and connection.recv(65536):  # what is left unread turns the end into a reset
            pass

    with serving(serve) as (server, pool):
        assert put(server, pool, b"x" * 80 * BLOCK_BYTES).status == 403


def test_who_says_yes_before_all_was_sent_is_not_believed() -> None:
    def serve(connection: socket.socket, _number: int) -> None:
        connection.recv(1000)
        connection.sendall(OK)

    with serving(serve) as (server, pool), pytest.raises(urllib3.exceptions.ProtocolError, match="not all of the body"):
        put(server, pool, b"x" * 80 * BLOCK_BYTES)


def test_an_answer_that_came_too_early_is_not_that_to_the_next_request() -> None:
    def serve(connection: socket.socket, number: int) -> None:
        take_request(connection)
        connection.sendall(OK + OK if number == 0 else REFUSED)
        take_request(connection)

    with serving(serve) as (server, pool):
        assert put(server, pool, b"one").status == 200
        assert put(server, pool, b"two").status == 403


def test_what_comes_is_asked_for_as_it_is() -> None:
    heads: list[bytes] = []

    def serve(connection: socket.socket, _number: int) -> None:
        heads.append(connection.recv(65536))
        connection.sendall(OK)

    with serving(serve) as (server, pool):
        put(server, pool, b"body")
    assert b"\r\nAccept-Encoding: identity\r\n" in heads[0]
    assert heads[0].startswith(b"PUT /bucket/key HTTP/1.1\r\nHost: x\r\n")


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<a>"]
)
def test_an_answer_that_breaks_off_is_none(said: bytes) -> None:
    def serve(connection: socket.socket, _number: int) -> None:
        take_request(connection)
        connection.sendall(said)

    with serving(serve) as (server, pool), pytest.raises(urllib3.exceptions.ProtocolError):
        put(server, pool, b"body")


def test_an_answer_that_never_comes_is_waited_for_so_long_and_no_longer() -> None:
    over = threading.Event()

    def serve(connection: socket.socket, _number: int) -> None:
        take_request(connection)
        over.wait(30)

    with serving(serve, read_seconds=0.2) as (server, pool):
        try:
            with pytest.raises(TimeoutError):
                put(server, pool, b"body")
        finally:
            over.set()


def test_what_is_stopped_sends_nothing_more() -> None:
    stop = threading.Event()
    taken: list[int] = []

    def serve(connection: socket.socket, _number: int) -> None:
        taken.append(len(connection.recv(BLOCK_BYTES)))
        stop.set()
        while piece := connection.recv(BLOCK_BYTES):
            taken.append(len(piece))

    with serving(serve) as (server, pool):
        body = b"x" * 400 * BLOCK_BYTES
        with stopped_by(stop), pytest.raises(PutStopped):
            put(server, pool, body)
        with stopped_by(stop), pytest.raises(PutStopped):
            put(server, pool, b"not even the head")
    assert sum(taken) < len(body)


def test_nobody_there_is_an_error_of_the_library() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pool = BlockwisePool(timeout=urllib3.Timeout(connect=5.0, read=5.0), retries=False)
    with pytest.raises(urllib3.exceptions.NewConnectionError):
        pool.urlopen("PUT", f"http://127.0.0.1:{port}/b/k", body=b"x", headers={"Content-Length": "1"})


def test_a_header_that_would_be_two_is_refused() -> None:
    with (
        serving(lambda connection, _number: None) as (server, pool),
        pytest.raises(ValueError, match="cannot be asked"),
    ):
        pool.urlopen("PUT", server.url, body=b"x", headers={"X-Meta": "a\r\nX-Other: b"})


def _hears_out(connection: socket.socket, _number: int) -> None:
    """And says nothing."""
    while connection.recv(4096):
        pass


def _says_no_xml(connection: socket.socket, _number: int) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (None, "connection refused (see whether the server runs there, and whether `minio` names it)"),
        (_hears_out, "no answer in time (see whether the server is up, and what lies on the way to it)"),
        (lambda _connection, _number: None, "the connection broke (see whether the server is up, "),
        (_says_no_xml, "its answer is no XML (see whether what listens there is S3)"),
    ],
)
def test_a_store_that_cannot_be_asked_is_told_in_words_with_the_remedy(serve: Serve | None, words: str) -> None:
    server = Server(serve or _hears_out)
    endpoint = server.url.split("/")[2]
    if serve is None:
        server.close()
    access = S3Access(
        endpoint=endpoint, bucket="bucket", access_key="a", secret_key="s", secure=False, timeout_seconds=0.3
    )
    client = BucketClient(access)
    try:
        with pytest.raises(TransientError) as caught:
            client.check()
    finally:
        client.close()
        server.close()
    assert f"{endpoint}/bucket: cannot list: {words}" in str(caught.value)
