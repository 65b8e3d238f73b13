"""Which deadlines hold, in every phase."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from nodeservice.core.deadlines import Deadline, deadlines
from nodeservice.core.model import (
    AttemptId,
    Lease,
    Phase,
    PhaseTiming,
    Resources,
    StopCause,
    StopRequest,
    TaskRecord,
    TaskSpec,
    TraceIds,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def record(phase: Phase, **limits: float) -> TaskRecord:
    """Accepted at 0, in its phase since 10, and, if it runs, with its running time over at 100."""
    spec = TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=1, fingerprint="f", **limits)  # type: ignore[arg-type]
    total = limits.get("total_timeout_seconds")
    return TaskRecord(
        spec=spec,
        lease=Lease(granted=Resources()),
        trace=TraceIds(trace_id="1" * 32, span_id="2" * 16),
        accepted_at=T0,
        phase=phase,
        timings=(PhaseTiming(name="admit", started_at=T0, ended_at=T0), PhaseTiming(name="now", started_at=at(10))),
        expires_at=None if total is None else at(total),
        deadline_at=at(100) if phase is Phase.RUNNING else None,
    )


def first(record: TaskRecord) -> Deadline | None:
    return min(deadlines(record), key=lambda deadline: deadline.at, default=None)


@pytest.mark.parametrize(
    ("phase", "limits", "expected"),
    [
        (Phase.PULLING, {}, None),
        (Phase.PULLING, {"pull_timeout_seconds": 5.0}, (15, StopCause.PULL_TIMEOUT)),
        (Phase.PULLING, {"pull_timeout_seconds": 50.0, "wait_timeout_seconds": 30.0}, (30, StopCause.WAIT_TIMEOUT)),
        (Phase.STARTING, {"pull_timeout_seconds": 5.0, "wait_timeout_seconds": 30.0}, (30, StopCause.WAIT_TIMEOUT)),
        (Phase.RUNNING, {"wait_timeout_seconds": 30.0}, (100, StopCause.DEADLINE)),
        (Phase.RUNNING, {"total_timeout_seconds": 90.0}, (90, StopCause.DEADLINE)),
        (Phase.RUNNING, {"total_timeout_seconds": 900.0}, (100, StopCause.DEADLINE)),
        (Phase.CREATING, {"total_timeout_seconds": 4.0}, (4, StopCause.DEADLINE)),
        (Phase.COLLECTING, {"total_timeout_seconds": 4.0}, None),
        (Phase.UPLOADING, {"total_timeout_seconds": 4.0}, None),
    ],
)
def test_the_first_deadline_of_a_phase_counts(
    phase: Phase, limits: dict[str, float], expected: tuple[float, StopCause] | None
) -> None:
    deadline = first(record(phase, **limits))
    assert (deadline and (deadline.at, deadline.cause)) == (expected and (at(expected[0]), expected[1]))


def test_a_task_that_is_being_ended_has_no_deadline_any_more() -> None:
    stop = StopRequest(cause=StopCause.CANCELLED, requested_at=T0)
    assert deadlines(replace(record(Phase.RUNNING), stop=stop)) == []


def test_each_message_names_its_limit() -> None:
    limits = {"timeout_seconds": 1, "pull_timeout_seconds": 2.5, "wait_timeout_seconds": 3, "total_timeout_seconds": 4}
    for phase, shown in ((Phase.PULLING, ["4 s.", "3 s.", "2.5 s."]), (Phase.RUNNING, ["1 s.", "4 s."])):
        messages = [deadline.message for deadline in deadlines(record(phase, **limits))]
        assert [message.rpartition(" of ")[2] for message in messages] == shown
