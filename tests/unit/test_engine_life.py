"""Whether the engine took a container with it: the rules as a table, and what is seen of a process that comes and goes."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nodeservice.errors import TransientError
from nodeservice.ports import ContainerState
from nodeservice.runtime import engine_life, engine_process
from nodeservice.runtime.endpoint import Endpoint, resolve_endpoint
from nodeservice.runtime.engine_life import Absence, EngineLife, EngineStart, read_start
from nodeservice.runtime.engine_process import read_engine_process

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def ended(finished: float, code: int, *, started: float = -100) -> ContainerState:
    return ContainerState(
        id="c", name="c", status="exited", pid=None, started_at=at(started), finished_at=at(finished), exit_code=code,
        oom_killed=False, error="", labels={},
    )  # fmt: skip


def absence(*, live_restore: bool = False, gone: float | None = 10, seen: bool = True) -> Absence:
    """Asked last at -5, lost at 0, its process gone at 10 (it had been shut down), another began at 20 and served at 25."""
    now = EngineStart(pid=2, ticks=2, started_at=at(20)) if seen else None
    gone_at = None if gone is None else at(gone)
    return Absence(
        heard_at=at(-5), lost_at=at(0), gone_at=gone_at, now=now, back_at=at(25), live_restore=live_restore
    )  # fmt: skip


@pytest.mark.parametrize(
    ("finished", "code", "took"),
    [
        (-1, 3, False),
        (-1, 0, False),
        (-1, 137, True),  # between the last answer and the moment that the silence was noticed
        (-6, 137, False),
        (0.01, 143, True),
        (5, 0, True),
        (10, 137, True),
        (15, 137, False),  # there was no engine that could have ended it
        (15, 0, False),
        (21, 143, True),
        (21, 0, True),
        (24, 255, True),
        (26, 137, False),
    ],
)
def test_without_live_restore_what_ended_while_an_engine_went_or_came_was_ended_by_it(
    finished: float, code: int, took: bool
) -> None:
    assert absence().took(ended(finished, code), live_restore=False) == took


@pytest.mark.parametrize(
    ("finished", "code", "took"),
    [(5, 137, False), (5, 0, False), (21, 143, False), (21, 255, True), (21, 0, True), (5, 255, False)],
)
def test_with_live_restore_only_what_the_new_engine_found_gone_is_its_doing(
    finished: float, code: int, took: bool
) -> None:
    assert absence(live_restore=True).took(ended(finished, code), live_restore=True) == took


def test_an_engine_that_comes_back_without_live_restore_ends_what_the_former_had_kept() -> None:
    assert absence(live_restore=True).took(ended(21, 143), live_restore=False)
    assert not absence(live_restore=True).took(ended(5, 143), live_restore=False)


def test_a_container_of_the_new_engine_has_nothing_to_do_with_the_old_one() -> None:
    assert not absence().took(ended(24, 137, started=22), live_restore=False)
    assert not absence().took(ended(90, 137, started=22), live_restore=False)


@pytest.mark.parametrize(("code", "took"), [(143, True), (137, True), (3, False), (0, False)])
def test_where_the_end_of_the_old_process_was_not_seen_a_signal_has_to_speak_too(code: int, took: bool) -> None:
    assert absence(gone=None).took(ended(5, code), live_restore=False) == took


@pytest.mark.parametrize(
    ("finished", "code", "took"), [(5, 143, True), (5, 0, False), (-1, 137, False), (30, 137, False)]
)
def test_an_engine_whose_process_cannot_be_seen_is_judged_by_its_silence_and_a_signal(
    finished: float, code: int, took: bool
) -> None:
    assert absence(seen=False).took(ended(finished, code), live_restore=False) == took


# ---- what is seen of a process ----------------------------------------------------------------------------------------

SERVER = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
while True:
    connection, _ = server.accept()
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
    connection.close()
"""


class Engine:
    """A process that answers at a socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.life = EngineLife(resolve_endpoint(f"unix://{path}"))
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(self.path))

    async def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()
        self.path.unlink()

    async def look(self) -> None:
        async with asyncio.timeout(10):
            while True:
                try:
                    return await self.life.look()
                except TransientError:
                    await asyncio.sleep(0.01)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    made = Engine(tmp_path / "e.sock")
    await made.start()
    await made.look()
    yield made
    made.life.close()
    if made.path.exists():
        await made.stop()


def now_ended(code: int, finished_at: datetime) -> ContainerState:
    return ended_between(finished_at - timedelta(hours=1), finished_at, code)


def ended_between(started_at: datetime, finished_at: datetime, code: int = 0) -> ContainerState:
    return ContainerState(
        id="c", name="c", status="exited", pid=None, started_at=started_at, finished_at=finished_at, exit_code=code,
        oom_killed=False, error="", labels={},
    )  # fmt: skip


async def test_what_ended_just_as_the_engine_stopped_answering_was_taken_by_it(engine: Engine) -> None:
    assert not engine.life.took(now_ended(0, datetime.now(UTC)))
    ended_at = datetime.now(UTC)
    await engine.stop()
    with pytest.raises(TransientError):
        await engine.life.look()
    await engine.start()
    await engine.look()
    assert engine.life.took(now_ended(0, ended_at))
    assert not engine.life.took(now_ended(0, ended_at - timedelta(seconds=30)))


async def test_what_ended_while_an_answer_of_the_engine_was_still_to_be_noted_may_have_been_taken_by_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a process that is frozen just then."""
    ask = engine.life._ask
    ended_at: list[datetime] = []

    def ask_and_be_slow(path: Callable[[], str]) -> object:
        answer = ask(path)
        ended_at.append(datetime.now(UTC))
        time.sleep(2 * engine_life._SLACK.total_seconds())
        return answer

    with monkeypatch.context() as patches:
        patches.setattr(engine.life, "_ask", ask_and_be_slow)
        await engine.look()
    await engine.stop()
    await engine.start()
    await engine.look()
    assert engine.life.took(now_ended(143, ended_at[-1]))


async def test_an_engine_that_was_silent_and_is_still_the_same_took_nothing(engine: Engine) -> None:
    engine.path.rename(engine.path.with_suffix(".away"))
    with pytest.raises(TransientError):
        await engine.life.look()
    ended_at = datetime.now(UTC)
    engine.path.with_suffix(".away").rename(engine.path)
    await engine.look()
    assert not engine.life.took(now_ended(137, ended_at))


async def test_of_what_ended_before_the_first_look_a_former_engine_may_have_been_the_cause(engine: Engine) -> None:
    long_ago = datetime.now(UTC) - timedelta(minutes=30)
    assert engine.life.took(now_ended(143, long_ago))
    assert not engine.life.took(now_ended(0, long_ago))
    assert not engine.life.took(now_ended(3, long_ago))
    engine.life.live_restore = True
    assert not engine.life.took(now_ended(143, long_ago))
    assert engine.life.took(now_ended(255, long_ago))  # as one writes down that finds it gone


@pytest.mark.parametrize(
    ("minutes_after_start", "code", "took"),
    [(1, 0, True), (9, 3, True), (30, 0, False), (30, 3, False), (30, 255, True)],
)
async def test_what_ended_unseen_long_after_the_engine_had_come_ended_by_itself(
    engine: Engine, minutes_after_start: int, code: int, took: bool
) -> None:
    """It began before this engine only by a clock that was set an hour forward since."""
    assert engine.life._first is not None
    began_at = datetime.now(UTC) - timedelta(minutes=40)
    engine.life._first = replace(engine.life._first, started_at=began_at)
    started_at, finished_at = began_at - timedelta(minutes=50), began_at + timedelta(minutes=minutes_after_start)
    assert engine.life.took(ended_between(started_at, finished_at, code)) == took


async def test_what_ran_when_the_host_was_shut_down_did_not_end_by_itself(engine: Engine) -> None:
    now = datetime.now(UTC)
    minute = timedelta(minutes=1)
    ended = ended_between(now - minute, now)
    assert not engine.life.fell_with_the_host(ended)
    engine.life.host_stops = {ended.id: now}
    assert engine.life.fell_with_the_host(ended)
    assert engine.life.fell_with_the_host(replace(ended, finished_at=now + minute))
    assert not engine.life.fell_with_the_host(replace(ended, finished_at=now - minute)), "it had ended before"
    assert not engine.life.fell_with_the_host(replace(ended, id="another", finished_at=now + minute))


async def test_of_a_container_that_had_another_engine_at_its_start_the_log_may_lack_something(engine: Engine) -> None:
    begun_at = datetime.now(UTC)
    assert engine.life.was_away(ended_between(begun_at - timedelta(minutes=1), begun_at))
    assert not engine.life.was_away(ended_between(begun_at, begun_at + timedelta(milliseconds=1)))
    ended_at = datetime.now(UTC)
    await engine.look()
    await engine.stop()
    while_away = datetime.now(UTC)
    await engine.start()
    await engine.look()
    after = datetime.now(UTC)
    assert not engine.life.was_away(ended_between(begun_at, ended_at))
    assert engine.life.was_away(ended_between(begun_at, while_away))
    assert engine.life.was_away(ended_between(begun_at, after))
    assert not engine.life.was_away(ended_between(after, after))


async def test_no_descriptor_of_a_former_engine_stays_open(engine: Engine) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await engine.stop()
        await engine.start()
        await engine.look()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_the_start_of_a_process_is_read_and_one_that_is_not_there_is_none() -> None:
    own = read_start(os.getpid())
    assert own is not None
    assert timedelta(0) < datetime.now(UTC) - own.started_at < timedelta(hours=3)
    again = read_start(os.getpid())
    assert again is not None
    assert again.ticks == own.ticks
    assert read_start(2**22 + 1) is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ECONNREFUSED])
def test_an_engine_that_cannot_be_reached_for_now_does_not_make_its_limits_unknown(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_endpoint: Endpoint, *, timeout_seconds: float) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Endpoint, "connect", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        read_engine_process(resolve_endpoint("unix:///e.sock"))


@pytest.mark.parametrize("is_there", [True, False])
def test_an_engine_that_goes_while_it_is_looked_at_does_not_make_its_limits_unknown(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is there and is hidden (in `tmp_path` there is no /proc) has limits that cannot be known."""
    monkeypatch.setattr(engine_process, "_listener", lambda _connection: os.getpid() if is_there else 2**22 + 1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "e.sock"))
        listener.listen()
        endpoint = resolve_endpoint(f"unix://{tmp_path}/e.sock")
        if is_there:
            assert read_engine_process(endpoint, root=tmp_path).open_files_max is None
        else:
            with pytest.raises(FileNotFoundError):
                read_engine_process(endpoint, root=tmp_path)
