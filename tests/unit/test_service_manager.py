"""What systemd is told, over a real Unix datagram socket; and when it is told nothing, and so starts the process anew."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeservice import service_manager
from nodeservice.service_manager import ServiceManager, host_is_stopping


class Listener:
    """systemd's side."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        """All that has come since the last look."""
        found = []
        while True:
            try:
                found.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return found

    async def next(self) -> str:
        async with asyncio.timeout(30):
            return (await asyncio.get_running_loop().sock_recv(self.socket, 65536)).decode()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    found = Listener(str(tmp_path / "notify"))
    yield found
    found.socket.close()


def manager_of(listener: Listener, **more: str) -> ServiceManager:
    return ServiceManager.of({"NOTIFY_SOCKET": listener.socket.getsockname(), **more})


async def nothing() -> None:
    return None


def test_readiness_and_the_end_are_told_with_a_status_of_one_line(listener: Listener) -> None:
    manager = manager_of(listener)
    manager.ready("waits\nfor the engine")
    manager.stopping("stops")
    manager.tell("3 tasks")
    assert listener.heard() == ["READY=1\nSTATUS=waits for the engine", "STOPPING=1\nSTATUS=stops"]


def test_a_status_is_told_when_it_changes_and_only_then(listener: Listener) -> None:
    manager = manager_of(listener)
    for status in ("1 task", "1  task", "2 tasks"):
        manager.tell(status)
    assert listener.heard() == ["STATUS=1 task", "STATUS=2 tasks"]


def test_an_abstract_socket_is_found() -> None:
    name = f"nodeservice-test-{os.getpid()}"
    listener = Listener(f"\0{name}")
    try:
        ServiceManager.of({"NOTIFY_SOCKET": f"@{name}"}).ready("here")
        assert listener.heard() == ["READY=1\nSTATUS=here"]
    finally:
        listener.socket.close()


def test_the_variables_are_not_handed_to_programs_that_are_started() -> None:
    environment = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "1", "PATH": "/bin"}
    ServiceManager.of(environment)
    assert environment == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_kept_only_where_it_is_asked_of_this_process(
    listener: Listener, variables: dict[str, str], expected: float | None
) -> None:
    assert manager_of(listener, **variables).watchdog_seconds == expected


def test_nobody_listening_changes_nothing(tmp_path: Path) -> None:
    for manager in (ServiceManager(), ServiceManager(str(tmp_path / "gone"), watchdog_seconds=1)):
        manager.ready("here")
        manager.stopping("gone")


async def test_the_watchdog_hears_of_a_process_that_gets_on_again_and_again(listener: Listener) -> None:
    manager = manager_of(listener, WATCHDOG_USEC="20000")
    async with manager.watching(nothing, lambda: "well"):
        told = [await listener.next() for _ in range(4)]
    assert sorted(told) == ["STATUS=well", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]


async def test_the_watchdog_hears_nothing_while_something_does_not_come_round(listener: Listener) -> None:
    manager = manager_of(listener, WATCHDOG_USEC="20000")
    stuck, called = asyncio.Event(), asyncio.Event()

    async def progress() -> None:
        called.set()
        await stuck.wait()

    async with manager.watching(progress, lambda: "well"):
        await called.wait()
        for _ in range(20):  # much longer than the period
            await asyncio.sleep(0.005)
        assert listener.heard() == ["STATUS=well"]
        stuck.set()
        assert await listener.next() == "WATCHDOG=1"


async def test_what_fails_has_come_round(listener: Listener) -> None:
    async def progress() -> None:
        raise OSError("the disk is full, which a restart would not change")

    async with manager_of(listener, WATCHDOG_USEC="20000").watching(progress, lambda: "full"):
        assert {await listener.next(), await listener.next()} == {"STATUS=full", "WATCHDOG=1"}


async def test_nothing_is_told_after_the_block(listener: Listener) -> None:
    before = asyncio.all_tasks()
    async with manager_of(listener, WATCHDOG_USEC="20000").watching(nothing, lambda: "well"):
        await listener.next()
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize(
    ("script", "is_stopping"),
    [("echo stopping; exit 1", True), ("echo running", False), ("echo offline; exit 1", False), (None, False)],
)
async def test_systemd_is_asked_whether_the_host_goes_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, is_stopping: bool
) -> None:
    if script is not None:
        (tmp_path / "systemctl").write_text(f"#!/bin/sh\n[ $1 = is-system-running ] || exit 2\n{script}\n")
        (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await host_is_stopping() is is_stopping


async def test_a_systemd_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "systemctl").write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(service_manager, "_ANSWER_SECONDS", 0.05)
    assert not await host_is_stopping()
