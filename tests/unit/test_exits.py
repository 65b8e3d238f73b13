"""Ends of containers are noticed also by a process that could not start a thread when it wanted to."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from nodeservice.runtime.exits import ExitWatcher
from nodeservice.runtime.streams import StreamRefusedError


class Stream:
    def open(self, method: str, path: str, *, query: object) -> None:
        raise StreamRefusedError("no events here")

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class Connection:
    """To an engine without containers, whose events cannot be had."""

    def __init__(self) -> None:
        self.streams_count = 0
        self.lists_count = 0
        self.failures: list[Exception] = []
        self.listed: list[dict[str, Any]] = []
        self.sent: list[str] = []

    def api_path(self, path: str) -> str:
        return path

    def stream(self) -> Stream:
        self.streams_count += 1
        return Stream()

    async def call(self, work: object, *, doing: str, urgent: bool = False) -> list[dict[str, Any]]:
        if urgent:
            self.sent.append(doing)
            return []
        self.lists_count += 1
        if self.failures:
            raise self.failures.pop()
        return self.listed


@pytest.fixture
def threads_to_refuse(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of threads; each is refused once, as by a kernel that has no more of them."""
    refused: list[str] = []
    start = threading.Thread.start

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name in refused:
            refused.remove(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_refuse)
    return refused


def watcher_of(connection: Connection, *, relist_seconds: float) -> ExitWatcher:
    return ExitWatcher(
        connection,  # type: ignore[arg-type]
        node_id="n",
        relist_seconds=relist_seconds,
        on_connected=lambda: None,
    )


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not check():
            await asyncio.sleep(0.002)


async def test_a_thread_that_could_not_be_started_is_tried_again_and_the_list_tells_meanwhile(
    threads_to_refuse: list[str],
) -> None:
    connection = Connection()
    watcher = watcher_of(connection, relist_seconds=0.01)
    threads_to_refuse += ["engine-events", "engine-events"]
    with watcher.watch("c") as changed:
        assert connection.streams_count == 0
        changed.clear()
        async with asyncio.timeout(30):
            await changed.wait()
        await until(lambda: connection.streams_count > 0)
    assert threads_to_refuse == []
    await watcher.close()


async def test_a_watcher_whose_thread_never_started_can_be_closed(threads_to_refuse: list[str]) -> None:
    watcher = watcher_of(Connection(), relist_seconds=3600)
    threads_to_refuse += ["engine-events"]
    watcher.expect("c")
    await watcher.close()


async def test_the_list_is_looked_at_again_after_a_look_for_which_no_thread_was_to_be_had() -> None:
    connection = Connection()
    connection.failures = [RuntimeError("can't start new thread")]
    watcher = watcher_of(connection, relist_seconds=0.01)
    with watcher.watch("c"):
        await until(lambda: connection.lists_count > 1)
    await watcher.close()


@pytest.mark.parametrize("is_there", [True, False])
async def test_an_engine_that_has_missed_an_exit_is_sent_a_signal_for_what_has_no_process_any_more(
    is_there: bool,
) -> None:
    connection = Connection()
    connection.listed = [{"Id": "c", "Names": ["/n"], "State": "running"}]
    watcher = watcher_of(connection, relist_seconds=0.01)
    with watcher.watch("c"):
        watcher.runs_as("c", os.getpid() if is_there else 2**22 + 1)
        await until(lambda: connection.lists_count > 5)
        assert connection.sent == ([] if is_there else ["send SIGURG"])
        assert watcher.was_missed("c") is not is_there
    assert not watcher.was_missed("c")
    await watcher.close()
