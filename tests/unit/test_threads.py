"""Blocking work in threads: results, errors, order, cancelling, the end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from nodeservice.threads import Threads
from tests.busy_threads import busy_threads


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Closed; open at the end, so that no thread stays."""
    found = threading.Event()
    yield found
    found.set()


async def until_busy(name: str) -> None:
    async with asyncio.timeout(30):
        while not busy_threads(name):
            await asyncio.sleep(0.001)


async def test_results_and_errors_come_back() -> None:
    threads = Threads(2, name="back")
    assert await threads.run(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(lambda: next(iter(())))
    assert await threads.run(threading.get_ident) != threading.get_ident()
    threads.close()
    await threads.ended()


async def test_one_thread_keeps_the_order_and_serves_many() -> None:
    threads = Threads(1, name="order")
    found: list[int] = []
    await asyncio.gather(*(threads.run(lambda number=number: found.append(number)) for number in range(500)))  # type: ignore[misc]
    assert found == [*range(500)]
    threads.close()
    await threads.ended()


async def test_no_more_threads_than_allowed_and_none_before_there_is_work(gate: threading.Event) -> None:
    threads = Threads(3, name="counted")
    assert not _named("counted")
    for _ in range(20):
        await threads.run(lambda: None)
    assert 1 <= len(_named("counted")) <= 3
    waiting = [asyncio.ensure_future(threads.run(gate.wait)) for _ in range(8)]
    await asyncio.sleep(0)
    assert len(_named("counted")) == 3
    gate.set()
    assert await asyncio.gather(*waiting) == [True] * 8
    threads.close()
    await threads.ended()
    assert not _named("counted")


async def test_where_no_thread_is_to_be_had_those_that_are_there_do_the_work(
    monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    threads = Threads(3, name="scarce")
    start = threading.Thread.start

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        await threads.run(lambda: "too early")
    monkeypatch.setattr(threading.Thread, "start", start)
    first = asyncio.ensure_future(threads.run(gate.wait))
    await until_busy("scarce")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    second = asyncio.ensure_future(threads.run(lambda: "second"))
    await asyncio.sleep(0)
    assert not second.done()
    gate.set()
    assert await first
    assert await second == "second"
    monkeypatch.setattr(threading.Thread, "start", start)
    threads.close()
    await threads.ended()


@pytest.fixture
def scarcity(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether threads can be had."""
    start = threading.Thread.start

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    return lambda scarce: monkeypatch.setattr(threading.Thread, "start", refuse if scarce else start)


async def test_work_for_which_no_thread_was_to_be_had_does_not_wait_for_the_end_of_other_work(
    monkeypatch: pytest.MonkeyPatch, gate: threading.Event, scarcity: Callable[[bool], None]
) -> None:
    monkeypatch.setattr("nodeservice.threads._RETRY_SECONDS", 0.005)
    threads = Threads(3, name="retried")
    first = asyncio.ensure_future(threads.run(gate.wait))
    await until_busy("retried")
    scarcity(True)
    others = [asyncio.ensure_future(threads.run(lambda: "done")) for _ in range(2)]
    await asyncio.sleep(0.02)
    assert not any(other.done() for other in others)
    scarcity(False)
    async with asyncio.timeout(30):
        assert await asyncio.gather(*others) == ["done", "done"]
    assert not first.done()
    gate.set()
    await first
    threads.close()
    await threads.ended()


async def test_a_thread_that_takes_over_work_without_one_is_not_counted_as_free(
    monkeypatch: pytest.MonkeyPatch, gate: threading.Event, scarcity: Callable[[bool], None]
) -> None:
    monkeypatch.setattr("nodeservice.threads._RETRY_SECONDS", 3600.0)
    threads, short = Threads(3, name="taken"), threading.Event()
    first = asyncio.ensure_future(threads.run(short.wait))
    await until_busy("taken")
    scarcity(True)
    second = asyncio.ensure_future(threads.run(gate.wait))
    await asyncio.sleep(0)
    scarcity(False)
    short.set()
    await first
    await until_busy("taken")
    async with asyncio.timeout(30):
        assert await threads.run(lambda: "at once") == "at once"
    assert not second.done()
    gate.set()
    await second
    threads.close()
    await threads.ended()


async def test_work_never_waits_behind_other_work_while_there_may_be_more_threads(gate: threading.Event) -> None:
    threads = Threads(64, name="many")
    for _ in range(200):  # threads end and take up work at every moment
        await asyncio.gather(*(threads.run(lambda: None) for _ in range(5)))
    blocked = [asyncio.ensure_future(threads.run(gate.wait)) for _ in range(30)]
    async with asyncio.timeout(30):
        assert await threads.run(lambda: "at once") == "at once"
    gate.set()
    await asyncio.gather(*blocked)
    threads.close()
    await threads.ended()


async def test_what_is_cancelled_before_it_began_is_left_out(gate: threading.Event) -> None:
    threads = Threads(1, name="cancelled")
    first = asyncio.ensure_future(threads.run(gate.wait))
    done: list[str] = []
    second = asyncio.ensure_future(threads.run(lambda: done.append("second")))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.set()
    assert await first
    await threads.run(lambda: done.append("third"))
    assert done == ["third"]
    threads.close()
    await threads.ended()


async def test_closing_leaves_out_what_waits_and_ends_what_runs(gate: threading.Event) -> None:
    threads = Threads(1, name="closing")
    done: list[str] = []

    def work() -> str:
        gate.wait()
        done.append("first")
        return "well"

    first = asyncio.ensure_future(threads.run(work))
    second = asyncio.ensure_future(threads.run(lambda: done.append("second")))
    await until_busy("closing")
    threads.close()
    with pytest.raises(RuntimeError, match="closing: closed"):
        await threads.run(lambda: None)
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.set()
    assert await first == "well"
    await threads.ended()
    assert done == ["first"]
    threads.close()  # again


async def test_the_end_of_work_that_never_ends_is_not_waited_for(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeservice.threads._END_SECONDS", 0.01)
    threads = Threads(2, name="endless")
    for _ in range(2):
        threads.submit(lambda: bool(gate.wait()))
    await until_busy("endless")
    threads.close()
    await threads.ended()
    assert busy_threads("endless")


async def test_work_that_nobody_waits_for_may_fail() -> None:
    threads = Threads(1, name="unheard")

    def fail() -> None:
        raise ValueError("unheard")

    threads.submit(fail)
    assert await threads.run(lambda: "goes on") == "goes on"
    threads.close()
    await threads.ended()


async def test_nothing_that_was_done_lives_on() -> None:
    class Result:
        pass

    threads = Threads(1, name="freed")
    result = await threads.run(Result)
    there = weakref.ref(result)
    del result
    await threads.run(lambda: None)
    gc.collect()
    assert there() is None
    threads.close()
    await threads.ended()


def test_a_loop_that_ended_meanwhile_does_no_harm(gate: threading.Event) -> None:
    threads = Threads(1, name="late")

    async def begin() -> None:
        work = asyncio.ensure_future(threads.run(gate.wait))
        await until_busy("late")
        work.cancel()

    asyncio.run(begin())
    gate.set()
    assert asyncio.run(_run(threads)) == "again"
    threads.close()


async def _run(threads: Threads) -> str:
    answer = await threads.run(lambda: "again")
    threads.close()
    await threads.ended()
    return answer


def _named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]
