"""A capture that begins again, in this process or the next, goes on where the one before stood."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nodeservice.core.model import AttemptId
from nodeservice.errors import TransientError
from nodeservice.lifecycle.logs import LogBook
from nodeservice.ports import LogMark
from nodeservice.testing.fake_runtime import FakeRuntime

T = AttemptId("t")
BROKEN = TransientError("cut", reason="LOG_STREAM_BROKEN")


class ScriptedLog(FakeRuntime):
    """Gives one reading after the other, and notes from where each was to go on."""

    def __init__(self, *readings: list[bytes | LogMark | TransientError]) -> None:
        super().__init__()
        self._readings = list(readings)
        self.asked: list[str | None] = []

    async def read_log(
        self,
        container_id: str,
        *,
        follow: bool,
        after: str | None = None,
        on_mark: Callable[[LogMark], None] | None = None,
    ) -> AsyncIterator[bytes]:
        self.asked.append(after)
        for piece in self._readings.pop(0):
            if isinstance(piece, TransientError):
                raise piece
            if isinstance(piece, bytes):
                yield piece
            elif on_mark is not None:
                on_mark(piece)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def book(runtime: FakeRuntime, max_bytes: int = 1000) -> LogBook:
    return LogBook(runtime, max_bytes=max_bytes, tail_bytes=100)


async def captured(logs: LogBook, path: Path) -> bytes:
    await logs.capture(T, "c", path, follow=False)
    return path.read_bytes()


def can_keep_attributes(path: Path) -> bool:
    path.touch()
    try:
        os.setxattr(path, "user.nodeservice.test", b"")
    except OSError:
        return False
    return True


async def test_a_capture_of_the_next_process_goes_on_from_the_position_and_skips_what_came_after_it(path: Path) -> None:
    if not can_keep_attributes(path):
        pytest.skip("the file system of the test directory keeps no extended attributes")
    runtime = ScriptedLog([b"one\n", LogMark(position="p"), b"two\n", BROKEN], [b"two\n", b"three\n"])
    with pytest.raises(TransientError):
        await captured(book(runtime), path)
    assert await captured(book(runtime), path) == b"one\ntwo\nthree\n"
    assert runtime.asked == [None, "p"]


async def test_without_extended_attributes_the_same_process_still_knows_the_position(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    monkeypatch.setattr(os, "getxattr", refuse)
    script: list[bytes | LogMark | TransientError] = [b"one\n", LogMark(position="p"), BROKEN]
    runtime = ScriptedLog(script, [b"two\n"], [b"one\n", b"two\n", b"three\n"])
    logs = book(runtime)
    with pytest.raises(TransientError):
        await captured(logs, path)
    assert await captured(logs, path) == b"one\ntwo\n"
    assert await captured(book(runtime), path) == b"one\ntwo\nthree\n"
    assert runtime.asked == [None, "p", None]


async def test_a_gap_is_told_at_its_place_and_nothing_after_it_is_skipped(path: Path) -> None:
    again: list[bytes | LogMark | TransientError] = [LogMark(position="p", is_gap=True), b"nine\n"]
    runtime = ScriptedLog([b"one\n", LogMark(position="p"), b"two\n", BROKEN], again)
    logs = book(runtime)
    with pytest.raises(TransientError):
        await captured(logs, path)
    assert not logs.has_gap(T)
    stored = await captured(logs, path)
    assert stored.startswith(b"one\ntwo\n\n[nodeservice: lines may be missing here: ")
    assert stored.endswith(b"]\nnine\n")
    assert logs.has_gap(T)


async def test_a_gap_at_the_limit_ends_the_log_as_one_that_was_cut(path: Path) -> None:
    runtime = ScriptedLog([b"x" * 95, LogMark(position="p", is_gap=True), b"more"])
    stored = await captured(book(runtime, max_bytes=100), path)
    assert b"may be missing here" in stored
    assert stored.endswith(b"log cut here, at the limit of 100 bytes]\n")


async def test_a_file_that_lost_its_end_with_the_host_is_captured_without_the_position(path: Path) -> None:
    runtime = ScriptedLog([b"one\ntwo\n", LogMark(position="p")], [b"one\ntwo\n"])
    logs = book(runtime)
    await captured(logs, path)
    os.truncate(path, 2)
    assert await captured(logs, path) == b"one\ntwo\n"
    assert runtime.asked == [None, None]
