"""How requests go out to the store: block by block, to be stopped between two of them."""

from __future__ import annotations

import contextlib
import contextvars
import http.client
import socket
import ssl
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, cast

import urllib3

from nodeservice.http_wire import Connection, KeptConnections, read_body, read_head, request_head
from nodeservice.results.source import PutStopped

_BLOCK_BYTES = 256 * 1024

_stop: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("results_s3_stop", default=None)


@contextlib.contextmanager
def stopped_by(stop: threading.Event) -> Iterator[None]:
    """What is sent within stops between two blocks once the event is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


class BlockwisePool(urllib3.PoolManager):
    """Sends bodies block by block, the first together with the head: the store is woken once, not twice.

    A body of type bytes would go out in one `sendall`, whose time limit covers the whole body (socket.sendall since Python
    3.5), so a slow but living link would time out. Here the limit is for each block. What has a body goes out on connections
    that `urllib3` makes and this class keeps; its layers in between, made for redirects, retries and answers without an
    end, are most of what a small object costs.
    """

    is_minio = False
    """Whether the last answer says that it is from one. Other stores would keep an archive as it is."""

    def __init__(self, *, timeout: urllib3.Timeout, **kw: Any) -> None:
        super().__init__(timeout=timeout, **kw)
        self._kept: defaultdict[str, KeptConnections] = defaultdict(KeptConnections)
        """By scheme and host."""
        self._answer_seconds = timeout.read_timeout

    def urlopen(self, method: str, url: str, redirect: bool = True, **kw: Any) -> urllib3.BaseHTTPResponse:  # type: ignore[override]
        body = kw.get("body")
        if isinstance(body, bytes) and body:
            response: urllib3.BaseHTTPResponse = self._send(method, url, kw["headers"], body)
        else:
            response = super().urlopen(method, url, redirect, **kw)
        self.is_minio = response.headers.get("Server") == "MinIO"
        return response

    def clear(self) -> None:
        super().clear()
        for kept in self._kept.values():
            kept.close()

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> urllib3.HTTPResponse:
        """Raises OSError, HTTPError of urllib3's, or PutStopped."""
        scheme, _, place = url.partition("://")
        host, _, target = place.partition("/")
        kept = self._kept[f"{scheme}://{host}"]
        connection = kept.take() or self._connect(url)
        try:
            # What is encoded would have to be decoded; it is no part of the signature.
            request = request_head(method, f"/{target}", dict(headers.items()) | {"Accept-Encoding": "identity"})
            is_sent = _send_blocks(connection, request, body)
            head = read_head(connection.reader)
            content = read_body(connection.reader, head)
            if not is_sent and head.status < HTTPStatus.MULTIPLE_CHOICES:
                raise http.client.HTTPException(f"{head.status}, but not all of the body was taken")
        except BaseException as error:
            connection.close()
            if isinstance(error, http.client.HTTPException):
                raise urllib3.exceptions.ProtocolError(f"no answer: {error}") from error
            raise
        if is_sent:
            kept.keep(connection, head)
        else:
            connection.close()
        return urllib3.HTTPResponse(content, headers=head.fields, status=head.status, reason=head.reason)

    def _connect(self, url: str) -> Connection:
        """As urllib3 does it, certificates and all."""
        made = self.connection_from_url(url)._new_conn()  # noqa: SLF001
        try:
            made.connect()
        except ssl.SSLError as error:
            made.close()
            raise urllib3.exceptions.SSLError(error) from error
        connected = cast("http.client.HTTPConnection", made).sock
        connected.settimeout(self._answer_seconds)
        # Else the kernel takes some megabytes at once, and the limit for the answer counts while a slow link carries them.
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _BLOCK_BYTES)
        return Connection(connected)


def _send_blocks(connection: Connection, head: bytes, body: bytes) -> bool:
    """False: the server takes no more. It may have answered before it hung up."""
    stop, left = _stop.get(), memoryview(body)
    try:
        while head or left:
            if stop is not None and stop.is_set():
                raise PutStopped
            connection.socket.sendall(head + left[:_BLOCK_BYTES] if head else left[:_BLOCK_BYTES])
            head, left = b"", left[_BLOCK_BYTES:]
    except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        return False
    return True
