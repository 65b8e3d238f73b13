"""How requests go out to the store: block by block, to be stopped between two of them."""

from __future__ import annotations

import contextlib
import contextvars
import io
import threading
from collections.abc import Iterator
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from nodeservice.results.source import PutStopped

_stop: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("results_s3_stop", default=None)


@contextlib.contextmanager
def stopped_by(stop: threading.Event) -> Iterator[None]:
    """What is sent within stops between two blocks once the event is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


class _Body(io.BytesIO):
    """A request body that is sent in blocks and stops between two of them."""

    def read(self, size: int | None = -1, /) -> bytes:
        stop = _stop.get()
        if stop is not None and stop.is_set():
            raise PutStopped
        return super().read(size)


class _HeadWithBody(HTTPConnection):
    """Sends the head of a request together with the first block of its body: the store is woken once, not twice."""

    _head: bytes | None = None
    _holds_next = False

    def request(self, method: str, url: str, body: Any = None, *args: Any, **kw: Any) -> None:
        self._head, self._holds_next = None, body is not None
        super().request(method, url, body, *args, **kw)
        if self._head is not None:  # the body was empty
            self.send(b"")

    def send(self, data: Any) -> None:
        if self._holds_next:
            self._head, self._holds_next = data, False
            return
        if self._head is not None:
            data, self._head = self._head + data, None
        super().send(data)


class _PlainConnections(urllib3.HTTPConnectionPool):
    ConnectionCls = _HeadWithBody


class _SecureConnection(_HeadWithBody, HTTPSConnection):
    """With TLS."""


class _SecureConnections(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class BlockwisePool(urllib3.PoolManager):
    """Sends bodies block by block.

    A body of type bytes goes out in one `sendall`, whose time limit covers the whole body (socket.sendall since Python
    3.5), so a slow but living link would time out. A file-like body gets the limit for each block.
    """

    is_minio = False
    """Whether the last answer says that it is from one. Other stores would keep an archive as it is."""

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self.pool_classes_by_scheme = {"http": _PlainConnections, "https": _SecureConnections}

    def urlopen(self, method: str, url: str, redirect: bool = True, **kw: Any) -> urllib3.BaseHTTPResponse:  # type: ignore[override]
        body = kw.get("body")
        if isinstance(body, bytes) and body:
            kw["body"] = _Body(body)
        response = super().urlopen(method, url, redirect, **kw)
        self.is_minio = response.headers.get("Server") == "MinIO"
        return response
