"""The whole lifecycle on a node in memory: what a task leads to, and what survives a kill at every journal write."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
from pathlib import Path

import pytest

from nodeservice.core.model import AttemptId, Outcome, Phase, Reason, StopCause, StopRequest
from nodeservice.core.retry import Backoff
from nodeservice.errors import CapacityError, NamesRefusedError, NodeFaultError, RequestError, TransientError
from nodeservice.ports import LogMark
from nodeservice.testing.failing_journal import FailingJournal
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from tests.unit.node_harness import NODE, World, living, running, spec

T = AttemptId("t")
DOWN = TransientError("store down", reason="STORE_UNREACHABLE")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(path=tmp_path, runtime=FakeRuntime(images={"demo": FakeImage(output=b"hello\nworld")}))


def cancel(node) -> StopRequest:  # type: ignore[no-untyped-def]
    return StopRequest(cause=StopCause.CANCELLED, requested_at=node.clock.now())


async def test_a_task_runs_stores_reports_and_leaves_nothing(world: World) -> None:
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.COMPLETED
        assert world.store.stored["t/1"]["stdout.log"] == b"hello\nworld"
        assert [report.id for report in world.uplink.reports] == [T]
        assert world.uplink.reports[0].result_location == "memory://t/1"
        assert await world.runtime.list_owned("node") == []
        assert node.dirs.all() == []
        assert node.driver.ledger.free == NODE


async def test_the_report_goes_out_only_after_the_results_are_stored(world: World) -> None:
    world.store.block()
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: world.store.put_count == 1)
        assert node.phase(T) is Phase.UPLOADING
        assert world.uplink.reports == []
        assert node.driver.ledger.leased.cpu_milli == 0, "an upload must not hold CPU"
        assert node.driver.ledger.leased.disk_bytes > 0
        world.store.unblock()
        await node.until_finished(T)
        assert len(world.uplink.reports) == 1


async def test_the_same_assignment_a_hundred_times_in_parallel_runs_once(world: World) -> None:
    async with living(world) as node:
        await asyncio.gather(*(node.assign(spec()) for _ in range(100)))
        await node.until_finished(T)
        await node.assign(spec())
        assert len(world.uplink.reports) == 1
        assert len(world.runtime.specs) == 1
        with pytest.raises(RequestError) as caught:
            await node.assign(spec(fingerprint="other"))
        assert caught.value.reason == "TASK_CONFLICT"


async def test_a_thousand_assignments_on_a_full_node_are_refused_with_the_resource(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        answers = await asyncio.gather(*(node.assign(spec(f"t{n}")) for n in range(1000)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, CapacityError)]
        assert len(refused) == 996
        assert {error.reason for error in refused} == {"INSUFFICIENT_CPU"}


@pytest.mark.parametrize("phase", [Phase.PULLING, Phase.RUNNING])
async def test_a_cancel_ends_a_task_that_pulls_or_runs(world: World, phase: Phase) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True, pull_holds=True, is_local=phase is not Phase.PULLING)
    world.runtime = FakeRuntime(images=world.runtime.images)
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: node.phase(T) is phase)
        if phase is Phase.RUNNING:
            await node.until(lambda: bool(world.runtime.running))
        await node.driver.request_stop(T, cancel(node))
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.outcome is Outcome.CANCELLED
        assert len(world.uplink.reports) == 1
        if phase is Phase.PULLING:
            assert world.runtime.specs == []


async def test_a_task_over_its_time_is_stopped_and_says_so(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        await node.assign(spec(timeout_seconds=0.05))
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.DEADLINE
        assert ("stop", record.container_id) in world.runtime.calls


async def test_a_deadline_that_passed_while_the_node_was_dead_is_kept_at_once(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        await node.assign(spec(timeout_seconds=0.3))
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
    await asyncio.sleep(0.35)
    async with living(world) as node:
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.DEADLINE


async def test_a_store_that_fails_at_first_is_tried_again(world: World) -> None:
    world.store.fail_next(5, DOWN)
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.outcome is Outcome.SUCCEEDED
        assert world.store.put_count == 6
        assert record.collected is not None
        assert node.tally.stored_bytes == record.collected.total_bytes > 0
        assert +node.tally.finished == {(Outcome.SUCCEEDED, Reason.COMPLETED): 1}


async def test_results_are_kept_here_when_the_store_stays_away(world: World) -> None:
    world.give_up_seconds = 0.0
    world.store.fail_next(1_000_000, DOWN)
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: (node.phase(T) or Phase.PULLING) >= Phase.RETAINING)
        (report,) = world.uplink.reports
        assert report.verdict is not None
        assert report.verdict.reason is Reason.RESULTS_NOT_STORED
        assert report.verdict.exit_code == 0
        assert "t/1" in world.kept.stored
        assert node.tally.stored_bytes == 0
        assert +node.tally.finished == {(Outcome.FAILED, Reason.RESULTS_NOT_STORED): 1}


async def test_a_long_pause_between_tries_does_not_prolong_the_limit(world: World) -> None:
    world.give_up_seconds, world.store_backoff = 0.05, Backoff(first_seconds=3600.0, max_seconds=3600.0)
    world.store.fail_next(1_000_000, DOWN)
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: bool(world.uplink.reports))
        assert world.store.put_count >= 2
        assert "t/1" in world.kept.stored


async def test_a_store_that_refuses_us_leads_to_kept_results_and_a_failure(world: World) -> None:
    world.store.fail_next(1_000_000, NodeFaultError("access denied", reason="STORE_ACCESS_DENIED"))
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: (node.phase(T) or Phase.PULLING) >= Phase.RETAINING)
        assert "access denied" in world.uplink.reports[0].remarks[-1]


async def test_results_too_large_for_the_store_stay_here_for_good(world: World) -> None:
    world.store.fail_next(1, RequestError("too large", reason="RESULT_TOO_LARGE"))
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.RESULTS_NOT_STORED
        assert record.result_location == "memory://t/1"


@pytest.mark.parametrize("then", [[], [DOWN]], ids=["at once", "after another trouble"])
async def test_results_whose_names_the_store_cannot_hold_are_told_and_all_others_stored(
    world: World, then: list[TransientError]
) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    world.store.fail_next(1, NamesRefusedError("2 results", names={"a:b": "no such name", "_task/MOVED": "nor this"}))
    for failure in then:
        world.store.fail_next(1, failure)
    async with living(world) as node:
        container = await running(node, spec())
        for name in ("a:b", "MOVED", "c"):
            (node.dirs.results(T) / name).write_text(name)
        world.runtime.finish(container)
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.COMPLETED
    [report] = world.uplink.reports
    assert report.remarks[-1].startswith("2 results could not be stored")
    assert report.remarks[-1].endswith("_task/MOVED: nor this")
    stored = world.store.stored["t/1"]
    assert stored.keys() == {"c", "stdout.log", "manifest.json"}
    assert report.collected is not None
    assert report.collected.manifest_sha256 == hashlib.sha256(stored["manifest.json"]).hexdigest()
    assert (report.collected.file_count, report.collected.paths) == (2, ("c", "stdout.log"))
    assert "a:b: no such name" in json.loads(stored["manifest.json"])["skipped"]


async def test_an_unreachable_master_gets_the_report_later_and_holds_no_cpu(world: World) -> None:
    world.uplink.down = True
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: node.phase(T) is Phase.REPORTING)
        assert node.driver.ledger.leased.cpu_milli == 0
        assert node.tally.finished.total() == 1
    world.uplink.down = False
    async with living(world) as node:
        await node.until_finished(T)
        assert len(world.uplink.reports) == 1
        assert node.tally.finished.total() == 0  # it was counted by the process in which it ended


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RequestError("no such image", reason="IMAGE_NOT_FOUND"), Reason.IMAGE_NOT_FOUND),
        (TransientError("429", reason="IMAGE_PULL_FAILED"), Reason.IMAGE_PULL_FAILED),
        (TransientError("silence", reason="IMAGE_PULL_TIMEOUT"), Reason.IMAGE_PULL_TIMEOUT),
    ],
)
async def test_a_failed_pull_is_still_collected_and_reported(
    world: World, failure: RequestError | TransientError, reason: Reason
) -> None:
    for _ in range(3):
        world.runtime.fail_next("pull", failure)
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is reason
        assert "manifest.json" in world.store.stored["t/1"]
        assert len(world.uplink.reports) == 1


async def test_a_pull_that_fails_once_is_tried_again(world: World) -> None:
    world.runtime.fail_next("pull", TransientError("reset", reason="IMAGE_PULL_FAILED"))
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.outcome is Outcome.SUCCEEDED


async def test_all_tries_of_a_pull_together_have_its_time_limit(world: World) -> None:
    world.pull_timeout_seconds = 0.3
    world.runtime = FakeRuntime(images={"demo": FakeImage(is_local=False, pull_holds=True)})
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.IMAGE_PULL_TIMEOUT
        assert "longer than 0.3 s" in record.verdict.message


async def test_an_engine_that_is_away_during_create_is_waited_for(world: World) -> None:
    for method in ("create", "start"):
        world.runtime.fail_next(method, TransientError("away", reason="ENGINE_UNAVAILABLE"))
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.outcome is Outcome.SUCCEEDED


async def test_a_container_that_vanishes_is_told_as_lost(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: bool(world.runtime.running))
        world.runtime.lose(world.runtime.running[0])
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.CONTAINER_LOST


async def test_a_journal_that_cannot_be_written_refuses_new_work_and_leases_nothing(world: World) -> None:
    failing = FailingJournal(world.journal)
    world.journal = failing  # type: ignore[assignment]
    async with living(world) as node:
        failing.fail_always()
        with pytest.raises(CapacityError) as caught:
            await node.assign(spec())
        assert caught.value.reason == "JOURNAL_UNWRITABLE"
        assert node.driver.ledger.free == NODE
        assert world.runtime.specs == []
        failing.heal()
        await node.until(lambda: "JOURNAL_UNWRITABLE" not in node.driver.all_conditions())  # with nothing else to write
        await node.assign(spec())
        await node.until_finished(T)


async def test_a_journal_that_fails_for_a_while_holds_the_work_and_loses_nothing(world: World) -> None:
    failing = FailingJournal(world.journal)
    world.journal = failing  # type: ignore[assignment]
    async with living(world) as node:
        await node.assign(spec())
        failing.fail_next(2)
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.outcome is Outcome.SUCCEEDED
        assert failing.failed_count == 2


async def test_a_log_over_its_limit_is_cut_with_a_word_and_its_true_end_is_reported(world: World) -> None:
    world.log_max_bytes = 100
    world.runtime.images["demo"] = FakeImage(output=b"x" * 500 + b"the end")
    async with living(world) as node:
        await node.assign(spec())
        await node.until_finished(T)
        stored = world.store.stored["t/1"]["stdout.log"]
        assert stored.startswith(b"x" * 100 + b"\n[nodeservice: log cut here")
        (report,) = world.uplink.reports
        assert report.collected is not None
        assert report.collected.log_tail.endswith("the end")


async def test_a_broken_log_stream_is_taken_up_without_gap_or_duplicate(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(output=b"0123456789" * 50)
    for _ in range(2):
        world.runtime.fail_next("read_log", TransientError("cut", reason="ENGINE_UNAVAILABLE"))
    async with living(world) as node:
        await node.assign(spec())
        await node.until_finished(T)
        assert world.store.stored["t/1"]["stdout.log"] == b"0123456789" * 50


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        (LogMark(position="p", is_gap=True), b"lines may be missing here"),
        (LogMark(position="p", may_lack=True), b"lines may be missing before"),
    ],
)
async def test_lines_that_may_be_missing_in_a_log_are_told_in_it_and_in_the_report(
    world: World, mark: LogMark, words: bytes
) -> None:
    world.runtime.images["demo"] = FakeImage(output=b"what is left")
    world.runtime.marks.append(mark)
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.outcome is Outcome.SUCCEEDED
        assert world.store.stored["t/1"]["stdout.log"].startswith(b"what is left\n[nodeservice: " + words)
        (report,) = world.uplink.reports
        assert any("the log may lack lines" in remark for remark in report.remarks)


async def test_lines_that_may_be_missing_past_the_limit_of_a_log_are_not_told(world: World) -> None:
    world.log_max_bytes = 100
    world.runtime.images["demo"] = FakeImage(output=b"x" * 500)
    world.runtime.marks.append(LogMark(position="p", is_gap=True))
    async with living(world) as node:
        await node.assign(spec())
        await node.until_finished(T)
        assert b"may be missing" not in world.store.stored["t/1"]["stdout.log"]
        (report,) = world.uplink.reports
        assert not report.remarks


async def _kill_at(world: World, writes: int | None, *, lost: bool, changes: int | None = None) -> bool:
    """Run one task until the process dies at that journal write (before it, if `lost`); False when it finished first.

    Or with that change of its record: then what this change sets off is done, and what comes of it, but nothing is written.
    """
    async with living(world, writes, lost=lost) as node:
        if changes is not None:
            seen = itertools.count(1)
            node.driver.on_change(lambda _record: node.journal.stop() if next(seen) == changes else None)
        assigned = asyncio.create_task(node.assign(spec()))
        finished = asyncio.create_task(node.until(lambda: node.phase(T) is Phase.FINISHED))
        stopped = asyncio.create_task(node.journal.stopped.wait())
        await asyncio.wait({finished, stopped}, return_when=asyncio.FIRST_COMPLETED)
        died = stopped.done()
        if changes is not None:
            await asyncio.sleep(0.05)
        for task in (assigned, finished, stopped):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return died


_WRITES, _CHANGES = 5, 10


@pytest.mark.parametrize("writes", range(1, _WRITES + 1))
@pytest.mark.parametrize("lost", [False, True], ids=["nothing done after it", "all done but not written"])
@pytest.mark.parametrize("with_cancel", [False, True], ids=["", "then cancelled"])
async def test_a_node_killed_at_any_journal_write_ends_every_task_in_one_report(
    world: World, writes: int, lost: bool, with_cancel: bool
) -> None:
    assert await _kill_at(world, writes, lost=lost)
    # The one doubt that no node can remove: killed between the master's answer and the note of it, it reports again.
    unsure = lost and writes == _WRITES
    await _assert_taken_up(world, with_cancel=with_cancel, report_count=2 if unsure else 1)


@pytest.mark.parametrize("changes", range(1, _CHANGES + 1))
@pytest.mark.parametrize("with_cancel", [False, True], ids=["", "then cancelled"])
async def test_a_node_killed_before_it_wrote_what_can_wait_ends_every_task_in_one_report(
    world: World, changes: int, with_cancel: bool
) -> None:
    """What can wait for a later write is known to nobody then, though more was done because of it."""
    assert await _kill_at(world, None, lost=True, changes=changes)
    # After "stored" comes the report, whose acknowledgement is not written then.
    unsure = changes == _CHANGES - 2
    await _assert_taken_up(world, with_cancel=with_cancel, report_count=2 if unsure else 1)


async def _assert_taken_up(world: World, *, with_cancel: bool, report_count: int) -> None:
    async with living(world) as node:
        if node.phase(T) is None:
            await node.assign(spec())
        if with_cancel and (node.phase(T) or Phase.FINISHED) < Phase.COLLECTING:
            await node.driver.request_stop(T, cancel(node))
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert len(world.uplink.reports) == report_count
        assert len(world.runtime.specs) <= 1, "no second container"
        assert "manifest.json" in world.store.stored["t/1"]
        assert node.driver.ledger.free == NODE
        assert node.dirs.all() == []
        assert await world.runtime.list_owned("node") == []


async def test_a_container_whose_journal_was_lost_is_adopted_from_its_labels(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True, output=b"still here")
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: bool(world.runtime.running))
    world.journal = type(world.journal)()
    async with living(world) as node:
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        assert node.driver.ledger.leased.cpu_milli == 1000
        world.runtime.finish(world.runtime.running[0], 3)
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.exit_code == 3
        assert world.store.stored["t/1"]["stdout.log"] == b"still here"
        assert len(world.runtime.specs) == 1
