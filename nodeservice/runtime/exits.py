"""Tells who waits that a container may have ended: one event stream for all, and a periodic look at the list."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import structlog

from nodeservice.errors import NodeServiceError
from nodeservice.ports import labels
from nodeservice.runtime import docker_calls as calls
from nodeservice.runtime.connection import EngineConnection
from nodeservice.runtime.docker_state import read_status
from nodeservice.runtime.streams import EngineStream, StreamRefusedError

log = structlog.get_logger(__name__)

_ENDINGS = frozenset({"die", "died", "destroy", "remove"})
"""Docker's words and Podman's."""
_OVERLAP_SECONDS = 2.0
_FIRST_BACKOFF_SECONDS = 0.1
_LAST_BACKOFF_SECONDS = 5.0
_JOIN_SECONDS = 2.0


class ExitWatcher:
    """A waiter holds an asyncio.Event that is set whenever its container is worth a look.

    Nothing is missed: a waiter looks after it was registered, or was registered before the container's start; events of the
    last two seconds are asked for again at each connect, for the engine answers before it listens; a new connection wakes
    everybody; and what the engine forgot to tell is found by the list.

    Docker can miss an exit itself: one that comes while its containerd is restarted. It then shows a container as running
    for ever, until a signal to it is refused by containerd. So what is listed as running and has no process, twice in a row,
    is sent one that does no harm (SIGURG is ignored by default).
    """

    def __init__(
        self,
        connection: EngineConnection,
        *,
        node_id: str,
        relist_seconds: float,
        on_connected: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._label = f"{labels.NODE}={node_id}"
        self._relist_seconds = relist_seconds
        self._on_connected = on_connected
        self._signals: dict[str, set[asyncio.Event]] = {}
        self._expected: dict[str, asyncio.Event] = {}
        self._pids: dict[str, int] = {}
        self._gone: set[str] = set()
        self._reminded: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._relisting: asyncio.Task[None] | None = None
        self._stopping = threading.Event()
        self._stream_lock = threading.Lock()
        self._stream: EngineStream | None = None

    def expect(self, container_id: str) -> None:
        """Register before its start, for a `watch` that comes after it."""
        self._start()
        if container_id not in self._expected:
            self._expected[container_id] = self._register(container_id)

    def dismiss(self, container_id: str) -> None:
        """Take back `expect`. Harmless where there was none."""
        signal = self._expected.pop(container_id, None)
        if signal is not None:
            self._unregister(container_id, signal)

    @contextlib.contextmanager
    def watch(self, container_id: str) -> Iterator[asyncio.Event]:
        """The event is set at each sign that a look is worth while, and at the beginning unless it was expected.

        Clear it before each look.
        """
        self._start()
        signal = self._expected.pop(container_id, None)
        if signal is None:
            signal = self._register(container_id)
            signal.set()
        try:
            yield signal
        finally:
            self._unregister(container_id, signal)

    def runs_as(self, container_id: str, pid: int | None) -> None:
        """Tell the process of one that is waited for or expected, as the engine shows it."""
        if pid is not None and container_id in self._signals:
            self._pids[container_id] = pid

    def was_missed(self, container_id: str) -> bool:
        """Whether the engine had to be told of its end, while it is waited for."""
        return container_id in self._reminded

    def cut(self) -> None:
        """Break the event stream, as a fault would; it is taken up again. For tests and for a suspected stall."""
        with self._stream_lock:
            if self._stream is not None:
                self._stream.abort()

    async def close(self) -> None:
        self._stopping.set()
        self.cut()
        if self._relisting is not None:
            self._relisting.cancel()
            await asyncio.wait({self._relisting})
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)

    def _start(self) -> None:
        if self._stopping.is_set():
            return
        if self._relisting is None:
            self._loop = asyncio.get_running_loop()
            self._relisting = asyncio.create_task(self._relist(), name="engine-relist")
        self._listen()

    def _listen(self) -> None:
        """Follow events, once. While no thread is to be had the list alone tells, and each round of it tries again."""
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._follow_events, name="engine-events", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("engine.events_not_followed", error=str(error))
        else:
            self._thread = thread

    def _register(self, container_id: str) -> asyncio.Event:
        signal = asyncio.Event()
        self._signals.setdefault(container_id, set()).add(signal)
        return signal

    def _unregister(self, container_id: str, signal: asyncio.Event) -> None:
        signals = self._signals[container_id]
        signals.discard(signal)
        if not signals:
            del self._signals[container_id]
            self._pids.pop(container_id, None)
            self._reminded.discard(container_id)

    def _poke(self, *keys: str) -> None:
        for key in keys:
            for signal in self._signals.get(key, ()):
                signal.set()

    def _poke_all(self) -> None:
        self._poke(*self._signals)

    async def _relist(self) -> None:
        while True:
            await asyncio.sleep(self._relist_seconds)
            self._listen()
            if not self._signals:
                continue
            try:
                listed = await self._connection.call(
                    lambda client: client.containers(filters={"label": [self._label]}), doing="list containers"
                )
            except (NodeServiceError, RuntimeError) as error:  # the latter where not one thread can be started
                log.debug("engine.relist_failed", error=str(error))
                continue
            running: set[str] = set()
            for entry in listed:
                if read_status(str(entry.get("State", ""))) == "running":
                    running.add(str(entry["Id"]))
                    running.update(name.removeprefix("/") for name in entry.get("Names") or ())
            self._poke(*(self._signals.keys() - running))
            gone = {id_ for id_, pid in self._pids.items() if id_ in running and not Path(f"/proc/{pid}").exists()}
            for container_id in gone & self._gone:
                await self._remind(container_id)
            self._gone = gone

    async def _remind(self, container_id: str) -> None:
        """Let the engine find out that it has ended. Once: where processes can't be seen from here, all seem to be gone."""
        log.warning("engine.exit_missed", container_id=container_id)
        try:
            await self._connection.call(
                lambda client: calls.signal(client, container_id, "SIGURG"), doing="send SIGURG", urgent=True
            )
        except (NodeServiceError, RuntimeError) as error:
            log.debug("engine.not_reminded", error=str(error))
        else:
            self._pids.pop(container_id, None)
            self._reminded.add(container_id)

    # ---- in the thread ----

    def _follow_events(self) -> None:
        backoff = _FIRST_BACKOFF_SECONDS
        since = time.time()
        while not self._stopping.is_set():
            stream = self._connection.stream()
            with self._stream_lock:
                self._stream = stream
            try:
                connecting_at = time.time()
                self._open(stream, since - _OVERLAP_SECONDS)
                backoff, since = _FIRST_BACKOFF_SECONDS, connecting_at
                self._tell(self._on_connected)
                self._tell(self._poke_all)
                for message in stream.messages():
                    since = time.time()
                    self._handle(message)
                log.debug("engine.events_ended")
            except (NodeServiceError, StreamRefusedError, OSError, http.client.HTTPException) as error:
                if not self._stopping.is_set():
                    log.info("engine.events_lost", error=str(error), error_type=type(error).__name__)
            except Exception:
                log.exception("engine.events_failed")
            finally:
                with contextlib.suppress(OSError):
                    stream.close()
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, _LAST_BACKOFF_SECONDS)

    def _open(self, stream: EngineStream, since: float) -> None:
        filters = {"type": ["container"], "label": [self._label], "event": sorted(_ENDINGS)}
        # Fractions of a second are not understood by every engine.
        query = {"since": str(int(since)), "filters": json.dumps(filters)}
        stream.open("GET", self._connection.api_path("/events"), query=query)

    def _handle(self, message: dict[str, Any]) -> None:
        action = str(message.get("Action") or message.get("status") or "")
        if action not in _ENDINGS:
            return
        actor = message.get("Actor") or {}
        container_id = str(actor.get("ID") or message.get("id") or "")
        name = str((actor.get("Attributes") or {}).get("name") or "")
        self._tell(lambda: self._poke(container_id, name))

    def _tell(self, work: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has been closed without us
            self._loop.call_soon_threadsafe(work)
