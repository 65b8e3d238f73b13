"""Keeps the one client of the engine: connects late, calls it in named threads, translates its errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from nodeservice.errors import TransientError
from nodeservice.runtime.endpoint import Endpoint
from nodeservice.runtime.errors import engine_unavailable, translate
from nodeservice.runtime.streams import EngineStream
from nodeservice.threads import Threads

if TYPE_CHECKING:
    from docker import APIClient

T = TypeVar("T")

_CALL_THREADS = 16
_SIGNAL_THREADS = 4
_READER_THREADS = 4096
"""More than containers that run at a time: one that waited for its turn would lose what its log is bounded to."""
_CONNECT_TIMEOUT_SECONDS = 5.0
_CALL_TIMEOUT_SECONDS = 120
_GREETING_TIMEOUT_SECONDS = 10
"""For the first answer. Who takes connections and is silent counts as no engine, long before a call would."""


class EngineConnection:
    """The client is made at the first call that finds an engine, and serves all threads from then on.

    Signals have threads of their own, so a burst of slow starts never delays a kill.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._client: APIClient | None = None
        self._connecting = threading.Lock()
        self._is_closed = False
        self.trouble = ""
        """Why the engine did not answer when it was last asked; empty when it did."""
        self._calls = Threads(_CALL_THREADS, name="engine-call")
        self._signals = Threads(_SIGNAL_THREADS, name="engine-signal")
        self.readers = Threads(_READER_THREADS, name="engine-log")
        """For what follows a container from its start to its end. Made when needed, and kept: a start of a thread is waited
        for."""

    def client(self) -> APIClient:
        """Blocking. Raises TransientError when no engine answers."""
        with self._connecting:
            if self._client is None:
                client = self._connect()
                if self._is_closed:
                    client.close()
                self._client = client
            return self._client

    def stream(self) -> EngineStream:
        return EngineStream(self.endpoint, connect_timeout_seconds=_CONNECT_TIMEOUT_SECONDS)

    def api_path(self, path: str) -> str:
        """The path under the version that engine and client agreed on. Blocking, as `client` is."""
        return f"/v{self.client().api_version}{path}"

    async def call(self, work: Callable[[APIClient], T], *, doing: str, urgent: bool = False) -> T:
        """Run blocking `work` with the client in a thread. What it raises is translated; see `errors.translate`.

        Cancelling the caller does not stop the work: the engine may still do it.
        """
        pool = self._signals if urgent else self._calls
        return await pool.run(lambda: self._run(work, doing))

    async def call_to_end(self, work: Callable[[APIClient], T], *, doing: str) -> T:
        """As `call`, but a cancelled caller waits until the work has ended, so nothing appears behind its back."""
        call = self._calls.begin(lambda: self._run(work, doing))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait({call}, timeout=_CALL_TIMEOUT_SECONDS)
            if call.done() and not call.cancelled():
                call.exception()
            raise

    async def close(self) -> None:
        """Take nothing new. Running calls go on for as long as the process does: no engine is waited for."""
        self._is_closed = True
        self._calls.close()
        self._signals.close()
        self.readers.close()
        if self._client is not None:
            self._client.close()

    def _run(self, work: Callable[[APIClient], T], doing: str) -> T:
        try:
            answer = work(self.client())
        except Exception as error:
            translated = translate(error, doing=doing)
            self.trouble = str(translated) if isinstance(translated, TransientError) else ""
            if translated is error:
                raise
            raise translated from error
        self.trouble = ""
        return answer

    def _connect(self) -> APIClient:
        from docker.errors import DockerException

        from nodeservice.runtime.engine_client import EngineClient

        try:
            client = EngineClient(
                self.endpoint,
                version="auto",
                timeout=_GREETING_TIMEOUT_SECONDS,
                max_pool_size=_CALL_THREADS + _SIGNAL_THREADS,
            )
        except (DockerException, OSError) as error:
            raise engine_unavailable(error, address=self.endpoint.url) from error
        client.timeout = _CALL_TIMEOUT_SECONDS
        # A local socket needs neither proxies nor netrc, which requests would look up anew for every call.
        client.trust_env = False
        return client
