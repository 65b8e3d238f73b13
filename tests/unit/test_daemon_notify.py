"""What the real processes tell a service manager, over a real socket, without a container engine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nodeservice.daemon.serving import _come_round
from nodeservice.daemon.told import SOCKET_NAME, Told, ask, telling
from nodeservice.errors import NodeServiceError, TransientError
from nodeservice.journal.sqlite import SqliteJournal
from nodeservice.service_manager import ServiceManager

SECONDS = 60.0


class Service:
    """A process as systemd starts one, and what it tells."""

    def __init__(self, path: Path, *words: str, **environment: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path / "notify"))
        self.socket.settimeout(SECONDS)
        self.log = path / "log"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nodeservice", *words, "--state-dir", path / "state"],
                stderr=stream,
                stdin=subprocess.DEVNULL,
                env=os.environ
                | {"NOTIFY_SOCKET": str(path / "notify"), "WATCHDOG_USEC": "200000"}
                | {"DOCKER_HOST": f"unix://{path}/no-engine", **environment},
            )

    def heard(self, beginning: str) -> str:
        """The next message that begins so; what comes before is passed over."""
        while True:
            message = self.socket.recv(65536).decode()
            if message.startswith(beginning):
                return message

    def told_so_far(self) -> list[str]:
        """Without waiting for more."""
        found = []
        self.socket.setblocking(False)
        while True:
            try:
                found.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return found

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    services: list[Service] = []

    def start(*words: str, **environment: str) -> Service:
        services.append(Service(tmp_path, *words, **environment))
        return services[-1]

    yield start
    for service in services:
        service.close()


def test_a_worker_that_only_waits_for_the_engine_is_ready_and_says_so(started: Any) -> None:
    worker = started("serve", "--insecure", "--listen", "127.0.0.1:0")
    assert "STATUS=takes no tasks: the container engine at unix:" in worker.heard("READY=1")
    worker.heard("WATCHDOG=1")
    worker.heard("WATCHDOG=1")
    assert worker.end() == 0
    assert worker.heard("STOPPING=1") == "STOPPING=1\nSTATUS=stops; containers that run now run on"


def test_who_asks_on_the_host_hears_how_the_worker_is_until_it_ends(started: Any, tmp_path: Path) -> None:
    state = tmp_path / "state"
    worker = started("serve", "--insecure", "--listen", "127.0.0.1:0", NODESERVICE_HEARTBEAT_SECONDS="60")
    worker.heard("READY=1")
    said = asyncio.run(ask(state))
    assert said is not None
    assert (said.pid, said.mode, said.conditions) == (worker.process.pid, "ACTIVE", [])
    assert said.status.startswith("takes no tasks: the container engine at unix:")
    assert [words.partition(":")[0] for words in said.warnings] == ["HEARTBEAT_SLOW"]
    assert (state / SOCKET_NAME).stat().st_mode & 0o777 == 0o600
    assert (state / "results").stat().st_mode & 0o007 == 0
    assert worker.end() == 0
    assert asyncio.run(ask(state)) is None
    assert not (state / SOCKET_NAME).exists()


def test_what_a_killed_worker_leaves_answers_nobody_and_is_in_no_way(started: Any, tmp_path: Path) -> None:
    state = tmp_path / "state"
    for _ in range(2):
        worker = started("serve", "--insecure", "--listen", "127.0.0.1:0")
        worker.heard("READY=1")
        said = asyncio.run(ask(state))
        assert said is not None
        assert said.pid == worker.process.pid
        worker.close()
        (tmp_path / "notify").unlink()
        assert asyncio.run(ask(state)) is None


async def test_a_daemon_that_hangs_up_is_no_daemon_that_does_not_run(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)  # longer than the kernel takes for the address of a socket
    deep.mkdir()

    def broken() -> Told:
        raise OSError("cannot say")

    async with telling(deep, broken):
        with pytest.raises(TransientError, match="does not tell how it is"):
            await ask(deep)


def test_a_frozen_worker_tells_nothing(started: Any) -> None:
    worker = started("serve", "--insecure", "--listen", "127.0.0.1:0")
    worker.heard("WATCHDOG=1")
    worker.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED | os.WNOWAIT)
    worker.told_so_far()
    worker.socket.settimeout(1.0)  # five times the period
    with pytest.raises(TimeoutError):
        worker.socket.recv(65536)
    worker.process.send_signal(signal.SIGCONT)
    worker.socket.settimeout(SECONDS)
    worker.heard("WATCHDOG=1")


def test_wrong_certificates_are_found_before_anything_is_said_to_be_ready(started: Any, tmp_path: Path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_text("no PEM")
    worker = started("serve", "--tls-cert", tmp_path / "cert", "--tls-key", tmp_path / "key", "--listen", "127.0.0.1:0")
    assert worker.process.wait(timeout=SECONDS) == 78, worker.log.read_text()
    assert worker.told_so_far() == []


def test_the_master_tells_when_it_serves_and_what_it_holds(started: Any) -> None:
    pytest.importorskip("sqlalchemy", reason="the master's packages are not installed")
    master = started("master", "--insecure", "--listen", "127.0.0.1:0")
    assert master.heard("READY=1") == "READY=1\nSTATUS=0 tasks queued, 0 with nodes; 0 of 0 nodes active"
    master.heard("WATCHDOG=1")
    master.heard("WATCHDOG=1")
    assert master.end() == 0
    master.heard("STOPPING=1")


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[socket.socket]:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    found.bind(str(tmp_path / "notify"))
    found.setblocking(False)
    yield found
    found.close()


async def test_a_journal_whose_thread_hangs_silences_the_watchdog(tmp_path: Path, notify: socket.socket) -> None:
    """The loop runs on all the while."""
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    assert await journal.get_note("any") is None
    node: Any = SimpleNamespace(journal=journal)
    manager = ServiceManager(str(tmp_path / "notify"), watchdog_seconds=0.02)
    hanging = threading.Event()
    journal._thread.submit(hanging.wait)
    loop = asyncio.get_running_loop()
    try:
        async with manager.watching(lambda: _come_round(node), lambda: "well"):
            assert await loop.sock_recv(notify, 100) == b"STATUS=well"
            for _ in range(20):
                await asyncio.sleep(0.005)
            with pytest.raises(BlockingIOError):
                notify.recv(100)
            hanging.set()
            async with asyncio.timeout(SECONDS):
                assert await loop.sock_recv(notify, 100) == b"WATCHDOG=1"
    finally:
        hanging.set()
        await journal.close()


async def test_a_journal_that_cant_be_read_has_come_round(tmp_path: Path) -> None:
    """A full or broken disk is told in other ways; another start would not mend it."""
    (tmp_path / "journal.sqlite").mkdir()
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    node: Any = SimpleNamespace(journal=journal)
    with pytest.raises(NodeServiceError):
        await journal.get_note("any")
    await _come_round(node)
    await journal.close()
