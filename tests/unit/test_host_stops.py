"""What ran when the host was shut down is remembered over the boots that follow, and over no more."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from nodeservice.core.model import (
    AttemptId,
    Lease,
    Phase,
    PhaseTiming,
    Resources,
    TaskRecord,
    TaskSpec,
    TraceIds,
)
from nodeservice.daemon.host_stops import HostStops
from nodeservice.testing.failing_journal import FailingJournal
from nodeservice.testing.memory_journal import MemoryJournal

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


async def test_what_ran_is_known_after_the_next_boot() -> None:
    journal = MemoryJournal()
    assert await HostStops(journal, boot_id="1").ended() == {}
    await HostStops(journal, boot_id="1").note(NOW, ["b", "a"])
    assert await HostStops(journal, boot_id="2").ended() == {"a": NOW, "b": NOW}


async def test_a_shutdown_that_was_called_off_ended_nothing() -> None:
    journal = MemoryJournal()
    await HostStops(journal, boot_id="1").note(NOW, ["a"])
    assert await HostStops(journal, boot_id="1").ended() == {}


async def test_of_several_shutdowns_the_first_counts() -> None:
    """Of a worker that never came to look at what the first one had ended: the engine did not come up in between."""
    journal = MemoryJournal()
    await HostStops(journal, boot_id="1").note(NOW, ["a"])
    await HostStops(journal, boot_id="2").note(NOW + timedelta(minutes=5), ["a", "b"])
    assert await HostStops(journal, boot_id="3").ended() == {"a": NOW, "b": NOW + timedelta(minutes=5)}


async def test_old_shutdowns_are_forgotten() -> None:
    journal = MemoryJournal()
    for number in range(50):
        await HostStops(journal, boot_id=str(number)).note(NOW, [f"container-{number}"])
    ended = await HostStops(journal, boot_id="now").ended()
    assert "container-49" in ended
    assert len(ended) < 20


def found(phase: Phase, task_id: str = "t") -> TaskRecord:
    request = Resources(cpu_milli=1, memory_bytes=1, disk_bytes=1)
    task = TaskSpec(id=AttemptId(task_id), image="i", request=request, pids_limit=1, fingerprint="f")
    timings = (PhaseTiming(name="so far", started_at=NOW),)
    lease, trace = Lease(granted=request), TraceIds(trace_id="1" * 32, span_id="2" * 16)
    return TaskRecord(spec=task, lease=lease, trace=trace, accepted_at=NOW, phase=phase, timings=timings)


async def test_after_a_fall_of_the_host_results_that_nobody_had_read_are_in_doubt_until_they_are_done_with() -> None:
    journal = FailingJournal(MemoryJournal())
    assert await HostStops(journal, boot_id="1").in_doubt([]) == frozenset()
    live = [found(phase, phase.name) for phase in Phase]
    journal.fail_next(1)
    for _ in range(3):  # a start whose note failed, and one after a crash of the worker alone
        in_doubt = await HostStops(journal, boot_id="2").in_doubt(live)
        assert {id_.task_id for id_ in in_doubt} == {"RUNNING", "COLLECTING"}
    assert await HostStops(journal, boot_id="2").in_doubt([found(Phase.RUNNING, "new")]) == frozenset()
    assert await HostStops(journal, boot_id="2").in_doubt(live) == frozenset()


async def test_nothing_is_in_doubt_when_the_host_was_shut_down_or_the_worker_never_saw_another_boot() -> None:
    journal = MemoryJournal()
    live = [found(Phase.COLLECTING)]
    assert await HostStops(journal, boot_id="1").in_doubt(live) == frozenset()
    await HostStops(journal, boot_id="1").note(NOW, [])
    assert await HostStops(journal, boot_id="2").in_doubt(live) == frozenset()


async def test_a_journal_that_cannot_be_written_does_not_hold_up_the_stop() -> None:
    journal = FailingJournal(MemoryJournal())
    journal.fail_next(1)
    await HostStops(journal, boot_id="1").note(NOW, ["a"])
    assert await HostStops(journal, boot_id="2").ended() == {}


def test_the_boot_is_the_kernels() -> None:
    assert HostStops(MemoryJournal())._boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
