"""The book of task attempts, over a store in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nodeservice.errors import TransientError
from nodeservice.master.clock import MasterClock
from nodeservice.master.rows import State, TaskRow
from nodeservice.master.tasks import TaskBook
from nodeservice.wire import master_worker_pb2 as pb
from tests.unit.master_memory import MemoryMasterStore


@pytest.fixture
def store() -> MemoryMasterStore:
    return MemoryMasterStore()


@pytest.fixture
def book(store: MemoryMasterStore) -> TaskBook:
    return TaskBook(store, MasterClock())  # type: ignore[arg-type]


async def submit(book: TaskBook, task_id: str = "t", **fields: Any) -> TaskRow:
    return await book.submit(pb.Task(task_id=task_id, docker_image="busybox", **fields), refuse=lambda _: None)


async def test_a_client_that_hangs_up_during_the_write_leaves_a_task_that_is_scheduled(
    store: MemoryMasterStore, book: TaskBook
) -> None:
    store.gate.clear()
    submitting = asyncio.create_task(submit(book))
    while not book._lock.locked():
        await asyncio.sleep(0)
    for _ in range(2):
        submitting.cancel()
        await asyncio.sleep(0)
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert [row.task_id for row in book.open_rows()] == ["t"]
    assert (await submit(book)).state is State.QUEUED, "the same task again is the same row"


async def test_who_follows_an_attempt_that_has_not_ended_costs_the_database_nothing(
    store: MemoryMasterStore, book: TaskBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = await submit(book)
    monkeypatch.setattr(store, "find_task", None)
    assert await book.find(*row.key) == row


async def test_a_write_that_fails_changes_nothing_in_memory(store: MemoryMasterStore, book: TaskBook) -> None:
    await submit(book)
    store.fails = True
    with pytest.raises(TransientError):
        await book.assign([(("t", 1), "w")])
    with pytest.raises(TransientError):
        await submit(book, "u")
    assert [(row.task_id, row.state) for row in book.open_rows()] == [("t", State.QUEUED)]


async def test_a_write_whose_answer_was_lost_is_found_again(store: MemoryMasterStore, book: TaskBook) -> None:
    store.forgets_to_answer = True
    with pytest.raises(TransientError):
        await submit(book)
    store.forgets_to_answer = False
    assert (await submit(book)).state is State.QUEUED
    assert [row.key for row in book.open_rows()] == [("t", 1)]
    store.forgets_to_answer = True
    with pytest.raises(TransientError):
        await book.assign([(("t", 1), "w")])
    store.forgets_to_answer = False
    await book.note_phases("w", {("t", 1): "RUNNING"})
    assert [(row.state, row.worker_id) for row in book.open_rows()] == [(State.RUNNING, "w")]


async def test_that_a_task_runs_is_written_once_and_its_later_phases_are_shown(
    store: MemoryMasterStore, book: TaskBook
) -> None:
    row = await submit(book)
    await book.assign([(row.key, "w")])
    await book.note_phases("w", {row.key: "PULLING"})
    written = store.rows[row.key]
    assert (written.state, written.accepted) == (State.RUNNING, True)
    await book.note_phases("w", {row.key: "UPLOADING"})
    assert store.rows[row.key] is written
    assert [row.phase for row in book.open_rows()] == ["UPLOADING"]
    restarted = TaskBook(store, MasterClock())  # type: ignore[arg-type]
    await restarted.load()
    assert [(row.state, row.phase) for row in restarted.open_rows()] == [(State.RUNNING, "")]
    await book.unaccepted([row.key])
    await book.note_phases("w", {row.key: "UPLOADING"})
    assert store.rows[row.key].accepted
