"""Tells the service manager how this process is: that it serves, what it does, and that it still gets on.

Sources: sd_notify(3) (a datagram of assignments to the Unix socket in NOTIFY_SOCKET, where `@` begins an abstract name),
sd_watchdog_enabled(3) (WATCHDOG_USEC counts for the process WATCHDOG_PID, and is best kept at half of it), systemctl(1).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping

import structlog

log = structlog.get_logger(__name__)

_TELL_SECONDS = 5.0
_STATUS_CHARS = 400
_ANSWER_SECONDS = 5.0


class ServiceManager:
    """Nothing here raises or blocks: without an address, or with nobody behind it, nothing is told."""

    def __init__(self, address: str | None = None, *, watchdog_seconds: float | None = None) -> None:
        self.watchdog_seconds = watchdog_seconds
        """Silent for longer, this process is ended and started anew; None: nobody watches."""
        self._address = address
        self._status = ""
        self._is_stopping = False

    @classmethod
    def of(cls, environment: MutableMapping[str, str]) -> ServiceManager:
        """Takes the variables out, for they are meant for this process and not for programs that it starts."""
        address = environment.pop("NOTIFY_SOCKET", "")
        period = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", "")
        is_for_us = not pid or pid == str(os.getpid())
        watched = period.isascii() and period.isdigit() and int(period) > 0 and is_for_us
        return cls(address or None, watchdog_seconds=int(period) / 1e6 if address and watched else None)

    def ready(self, status: str) -> None:
        """This process is as far as it gets by itself. Repeating is harmless."""
        self._status = _line(status)
        self._send(f"READY=1\nSTATUS={self._status}")

    def tell(self, status: str) -> None:
        """What this process does now, for a person; what was told last is not told again."""
        if not self._is_stopping and _line(status) != self._status:
            self._status = _line(status)
            self._send(f"STATUS={self._status}")

    def stopping(self, status: str) -> None:
        """The last that is told of the status."""
        self._is_stopping = True
        self._send(f"STOPPING=1\nSTATUS={_line(status)}")

    @contextlib.asynccontextmanager
    async def watching(
        self, progress: Callable[[], Awaitable[object]], status: Callable[[], str]
    ) -> AsyncIterator[None]:
        """While the block lasts, say that this process is alive each time that `progress` has returned, and its status.

        `progress` returns once all has come round that must never hang; while it does not, nothing is said. The loop itself
        is part of it: where it stands still, nobody calls. A `progress` that raises has come round.
        """
        if self._address is None:
            yield
            return
        tasks = [asyncio.create_task(self._keep_telling(status), name="status")]
        if self.watchdog_seconds is not None:
            tasks.append(asyncio.create_task(self._keep_alive(progress, self.watchdog_seconds / 2), name="watchdog"))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_alive(self, progress: Callable[[], Awaitable[object]], every_seconds: float) -> None:
        while True:
            try:
                await progress()
            except Exception as error:
                log.debug("watchdog.progress_failed", error=str(error))
            self._send("WATCHDOG=1")
            await asyncio.sleep(every_seconds)

    async def _keep_telling(self, status: Callable[[], str]) -> None:
        while True:
            self.tell(status())
            await asyncio.sleep(_TELL_SECONDS)

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sender:
                sender.connect(address)
                sender.send(message.encode(errors="replace"))
        except OSError as error:
            log.debug("service_manager.not_told", error=str(error))


async def host_is_stopping() -> bool:
    """Whether systemd says that this host is being shut down or started anew. False where there is no systemd."""
    try:
        asked = await asyncio.create_subprocess_exec(
            "systemctl", "is-system-running", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return False
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            said, _ = await asked.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            asked.kill()
        await asked.wait()
        return False
    return said.strip() == b"stopping"


def _line(text: str) -> str:
    return " ".join(text.split())[:_STATUS_CHARS]
