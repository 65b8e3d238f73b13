"""A TCP proxy on loopback that can be slow, failing, breaking, corrupting, silent or down."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_BLOCK = 64 * 1024
_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")
_SLOW_DOWN = (503, "SlowDown")


class FaultProxy:
    """Passes connections on to `host:port` until told otherwise. Faults apply to what comes from the client.

    `requests` lists the HTTP requests that were passed on, as (method, path with query), in the order seen;
    `bytes_sent` counts what went to the server.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._port = 0
        self.requests: list[tuple[str, str]] = []
        self.bytes_sent = 0
        self.rejected_count = 0
        self.reset_count = 0
        self.corrupted_count = 0
        self.heal()
        self.up()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._port}"

    def heal(self) -> None:
        """No faults from now on."""
        self._bytes_per_second = 0.0
        self._reject_left = 0
        self._rejection = _SLOW_DOWN
        self._rejects_puts = False
        self._reset_at = 0
        self._reset_left = 0
        self._corrupt_at = 0
        self._corrupt_left = 0
        self._silent = False
        self._is_renamed = False

    def rename(self) -> None:
        """Answers do not say any more that they are from MinIO."""
        self._is_renamed = True

    def be_slow(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second

    def reject_first(self, count: int) -> None:
        """Answer the next `count` requests with 503 SlowDown; each ends its connection."""
        self._reject_left = count

    def reject_puts(self, rejection: tuple[int, str]) -> None:
        """Answer each PUT that begins a connection with this status and code of S3's, and end it."""
        self._rejects_puts, self._rejection = True, rejection

    def reset_at(self, byte_count: int, *, times: int = 1) -> None:
        """Reset the next `times` connections that carry more than `byte_count` bytes, at that byte."""
        self._reset_at, self._reset_left = byte_count, times

    def corrupt_at(self, byte_count: int) -> None:
        """Flip one bit of the next connection that carries more than `byte_count` bytes, at that byte."""
        self._corrupt_at, self._corrupt_left = byte_count, 1

    def be_silent(self) -> None:
        """Swallow everything, answer nothing."""
        self._silent = True

    def down(self) -> None:
        """Refuse connections and break those that are open."""
        if self._listener is not None:
            # shutdown wakes the thread that waits in accept; close alone does not.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            open_sockets = list(self._sockets)
        for one in open_sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def up(self) -> None:
        """Listen (again), always on the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Small buffers, inherited by connections: what the client has sent is what the proxy has seen, almost.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BLOCK)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(64)
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._spawn(self._accept, listener)

    def close(self) -> None:
        self.down()
        for thread in self._threads:
            thread.join(10)

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="fault-proxy", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with self._tracked(client):
            if (self._rejects_puts and client.recv(3, socket.MSG_PEEK) == b"PUT") or self._take("_reject_left"):
                self._reject(client)
                return
            if self._silent:
                with contextlib.suppress(OSError):
                    while client.recv(_BLOCK):
                        pass
                return
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                return
            server.settimeout(None)
            with self._tracked(server):
                back = threading.Thread(target=self._copy_back, args=(server, client), name="fault-proxy", daemon=True)
                back.start()
                self._copy_forth(client, server)
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
                back.join(10)

    def _copy_forth(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while block := client.recv(_BLOCK):
                if match := _REQUEST.match(block):
                    self.requests.append((match[1].decode(), match[2].decode()))
                end = passed + len(block)
                if passed <= self._corrupt_at < end and self._corrupt_at and self._take("_corrupt_left"):
                    flipped = bytearray(block)
                    flipped[self._corrupt_at - passed] ^= 1
                    block = bytes(flipped)
                    self.corrupted_count += 1
                if self._reset_at and end > self._reset_at and self._take("_reset_left"):
                    server.sendall(block[: max(0, self._reset_at - passed)])
                    self.reset_count += 1
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                if self._bytes_per_second:
                    time.sleep(len(block) / self._bytes_per_second)
                server.sendall(block)
                passed = end
                self.bytes_sent += len(block)

    def _copy_back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := server.recv(_BLOCK):
                if self._is_renamed:
                    block = block.replace(b"Server: MinIO", b"Server: Other")
                client.sendall(block)
            client.shutdown(socket.SHUT_WR)

    def _reject(self, client: socket.socket) -> None:
        """Read the whole request first: closing with bytes unread would reset the connection instead of answering."""
        self.rejected_count += 1
        head, _, body = self._read_head(client)
        match = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        left = (int(match[1]) if match else 0) - len(body)
        with contextlib.suppress(OSError):
            while left > 0 and (block := client.recv(min(left, _BLOCK))):
                left -= len(block)
            status, code = self._rejection
            answer = b"" if head.startswith(b"HEAD") else f"<Error><Code>{code}</Code></Error>".encode()
            client.sendall(
                b"HTTP/1.1 %d No\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (status, len(answer), answer)
            )

    @staticmethod
    def _read_head(client: socket.socket) -> tuple[bytes, bytes, bytes]:
        data = b""
        while b"\r\n\r\n" not in data and (block := client.recv(_BLOCK)):
            data += block
        return data.partition(b"\r\n\r\n")

    def _take(self, counter: str) -> bool:
        with self._lock:
            left = int(getattr(self, counter))
            if left > 0:
                setattr(self, counter, left - 1)
            return left > 0

    @contextmanager
    def _tracked(self, one: socket.socket) -> Iterator[None]:
        with self._lock:
            self._sockets.add(one)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(one)
            one.close()
