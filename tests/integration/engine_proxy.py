"""A proxy before the engine's socket: counts requests, hides events, loses or falsifies answers, starts nothing, is down."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

_EVENTS = re.compile(rb"GET /v[0-9.]+/events")
_CREATE = re.compile(rb"POST /v[0-9.]+/containers/create")
_START = re.compile(rb"POST /v[0-9.]+/containers/[^/]+/start")
_PULL = re.compile(rb"POST /v[0-9.]+/images/create")
_REQUEST = re.compile(rb"(GET|POST|DELETE) /v[0-9.]+(/[^ ?]+)")
_ACTIONS = frozenset({"json", "create", "start", "stop", "kill", "logs", "wait", "prune", "exec"})
_BLOCK = 65536
_UNDESCRIBED_WORDS = b'{"message": "RWLayer of container is unexpectedly nil"}'
_UNDESCRIBED = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_UNDESCRIBED_WORDS), _UNDESCRIBED_WORDS)
)


class EngineProxy:
    """Runs in the test's event loop. `url` is for the runtime under test."""

    def __init__(self, path: Path, target: str) -> None:
        self._path = path
        self._target = target.removeprefix("unix://")
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.hides_events = False
        self.loses_next_create = False
        self.refuses_starts = False
        self.before_next_create: Callable[[], None] | None = None
        """Called once, blocking, when the next create is asked for."""
        self.cannot_describe = ""
        """The id of a container for which each look is answered as by an engine that has lost a part of it."""
        self.open_pulls_count = 0
        self.events_count = 0
        """How often events were asked for."""
        self.requests: Counter[str] = Counter()
        """By method and path without ids and names, such as `POST containers/start`."""

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    async def up(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, self._path)

    async def down(self) -> None:
        """Refuse connections and break those that are open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def cut(self) -> None:
        """Break all open connections."""
        for connection in self._connections:
            connection.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                back, upstream = await asyncio.open_unix_connection(self._target)
                answers = asyncio.create_task(_copy(back, writer))
                try:
                    await self._forward(reader, upstream, back, answers, writer)
                finally:
                    answers.cancel()
                    await asyncio.wait({answers})
        finally:
            self._connections.discard(task)
            for one in (writer, upstream):
                if one is not None:
                    one.transport.abort()

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
        back: asyncio.StreamReader,
        answers: asyncio.Task[None],
        writer: asyncio.StreamWriter,
    ) -> None:
        is_pull = False
        try:
            while block := await reader.read(_BLOCK):
                if (request := _REQUEST.match(block)) is not None:
                    self.requests[_without_id(request)] += 1
                if _PULL.match(block):
                    is_pull = True
                    self.open_pulls_count += 1
                if self.cannot_describe and f"/containers/{self.cannot_describe}/json ".encode() in block:
                    writer.write(_UNDESCRIBED)
                    await writer.drain()
                    continue
                if not await self._pass_on(block, reader, upstream, back, answers):
                    return
            if not is_pull:
                await answers
        finally:
            self.open_pulls_count -= is_pull

    async def _pass_on(
        self,
        block: bytes,
        reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
        back: asyncio.StreamReader,
        answers: asyncio.Task[None],
    ) -> bool:
        """False: break off."""
        if _EVENTS.match(block):
            self.events_count += 1
            if self.hides_events:
                return False
        if self.before_next_create is not None and _CREATE.match(block):
            meddle, self.before_next_create = self.before_next_create, None
            await asyncio.to_thread(meddle)
        if self.refuses_starts and _START.match(block):
            return False
        loses = self.loses_next_create and _CREATE.match(block)
        if loses:
            self.loses_next_create = False
            answers.cancel()
            await asyncio.wait({answers})
        upstream.write(block)
        await upstream.drain()
        if loses:
            # The body may follow in a block of its own; pass on until the engine has answered, then break off.
            body = asyncio.create_task(_copy(reader, upstream))
            await back.read(1)
            body.cancel()
            await asyncio.wait({body})
        return not loses


def _without_id(request: re.Match[bytes]) -> str:
    _, kind, *rest = request[2].decode().split("/")
    return f"{request[1].decode()} {'/'.join([kind, *(word for word in rest[-1:] if word in _ACTIONS)])}"


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(_BLOCK):
            writer.write(block)
            await writer.drain()
        writer.write_eof()
