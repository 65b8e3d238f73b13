"""Logs that Podman's conmon writes: whole, across replacement, and without a thread left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeservice.errors import TransientError
from nodeservice.ports import LogMark
from nodeservice.runtime.log_file import read_log_file, take_records
from nodeservice.threads import Threads
from tests.busy_threads import busy_threads


@pytest.fixture
def readers() -> Iterator[Threads]:
    threads = Threads(4, name="engine-log")
    yield threads
    threads.close()


def record(text: bytes, kind: bytes = b"F") -> bytes:
    return b"2026-01-01T00:00:00.000000001+00:00 stdout " + kind + b" " + text + b"\n"


def test_records_of_a_log_file_give_back_the_bytes_that_were_written() -> None:
    written = record(b"a b  c") + record(b"\0\xff" * 9, b"P") + record(b"") + record(b"") + record(b"end", b"P")
    records, rest = take_records(written + b"2026-01-")
    assert (b"".join(records.texts), rest) == (b"a b  c\n" + b"\0\xff" * 9 + b"\n\nend", b"2026-01-")
    records, rest = take_records(b"2026-01-")
    assert (records.texts, rest) == ([], b"2026-01-")


async def test_a_log_file_is_followed_across_its_replacement_to_its_end(tmp_path: Path, readers: Threads) -> None:
    path, ended = tmp_path / "ctr.log", asyncio.Event()
    pieces = read_log_file(path, readers, until_end=ended.wait)
    path.write_bytes(record(b"one") + record(b"two")[:-5])
    assert await anext(pieces) == b"one\n"
    with path.open("ab") as stream:
        stream.write(record(b"two")[-5:])
    assert await anext(pieces) == b"two\n"
    fresh = tmp_path / "ctr.log.tmp"
    fresh.write_bytes(record(b"four"))
    with path.open("ab") as stream:
        stream.write(record(b"three"))
    fresh.rename(path)
    ended.set()
    assert b"".join([piece async for piece in pieces]) == b"three\nfour\n"
    assert b"".join([piece async for piece in read_log_file(path, readers, until_end=None)]) == b"four\n"
    assert [piece async for piece in read_log_file(tmp_path / "none", readers, until_end=None)] == []


async def test_a_reader_that_leaves_a_log_file_takes_its_thread_with_it(tmp_path: Path, readers: Threads) -> None:
    path = tmp_path / "ctr.log"
    path.write_bytes(record(b"one"))
    pieces = read_log_file(path, readers, until_end=asyncio.Event().wait)
    assert await anext(pieces) == b"one\n"
    await pieces.aclose()
    async with asyncio.timeout(10):
        while busy_threads("engine-log"):
            await asyncio.sleep(0.01)


async def test_a_log_file_that_cannot_be_read_is_a_broken_stream(tmp_path: Path, readers: Threads) -> None:
    with pytest.raises(TransientError) as caught:
        await anext(read_log_file(tmp_path, readers, until_end=None))
    assert caught.value.reason == "LOG_STREAM_BROKEN"


async def test_a_log_file_whose_records_were_replaced_unread_says_so(tmp_path: Path, readers: Threads) -> None:
    path = tmp_path / "ctr.log"
    marks: list[LogMark] = []

    async def read(after: str | None) -> bytes:
        pieces = read_log_file(path, readers, until_end=None, after=after, on_mark=marks.append)
        return b"".join([piece async for piece in pieces])

    path.write_bytes(record(b"one"))
    assert await read(None) == b"one\n"
    position = marks[-1].position
    path.write_bytes(record(b"one") + record(b"two"))
    assert await read(position) == b"two\n"
    assert not any(mark.is_gap for mark in marks)
    path.write_bytes(record(b"nine").replace(b"T00:00:00", b"T00:00:09"))
    assert await read(position) == b"nine\n"
    assert any(mark.is_gap for mark in marks)
