"""Properties of the life of an attempt: any event in any phase, stops at every moment, crashes at every boundary."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeservice.core import effects as fx
from nodeservice.core import events as ev
from nodeservice.core import machine
from nodeservice.core.model import (
    AttemptId,
    Collected,
    Lease,
    Outcome,
    Phase,
    Reason,
    Resources,
    StopCause,
    StopRequest,
    TaskRecord,
    TaskSpec,
    TraceIds,
    Usage,
)
from nodeservice.core.verdict import AT_ONCE, has_no_grace, of_failure, of_stop
from nodeservice.errors import InvariantError

T0 = datetime(2026, 1, 1, tzinfo=UTC)
SPEC = TaskSpec(
    id=AttemptId("t", 1),
    image="demo",
    request=Resources(cpu_milli=1000, memory_bytes=2**26),
    pids_limit=10,
    timeout_seconds=60.0,
    fingerprint="f",
)
COLLECTED = Collected(manifest_sha256="0" * 64, file_count=1, total_bytes=1, log_bytes=1, log_tail="x", paths=("a",))


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def accepted() -> machine.Step:
    trace = TraceIds(trace_id="1" * 32, span_id="2" * 16)
    lease = Lease(granted=SPEC.request)
    return machine.accept(spec=SPEC, lease=lease, trace=trace, received_at=T0, accepted_at=T0)


def stop_request(cause: StopCause = StopCause.CANCELLED) -> ev.StopRequested:
    return ev.StopRequested(at=at(5), stop=StopRequest(cause=cause, requested_at=at(5)))


HAPPY: tuple[ev.Event, ...] = (
    ev.ImagePulled(at=at(1), digest="sha256:d"),
    ev.ContainerCreated(at=at(2), container_id="c"),
    ev.ContainerStarted(at=at(3), started_at=at(3)),
    ev.ContainerExited(at=at(4), exit_code=0, oom_killed=False),
    ev.ResultsCollected(at=at(5), collected=COLLECTED, usage=Usage()),
    ev.ResultsStored(at=at(6), location="file:///x"),
    ev.ReportAcknowledged(at=at(7)),
    ev.CleanedUp(at=at(8)),
)

EVENTS: tuple[ev.Event, ...] = (
    *HAPPY,
    stop_request(),
    *(stop_request(cause) for cause in StopCause if cause is not StopCause.CANCELLED),
    ev.ContainerStuck(at=at(9), message="alive"),
    ev.ContainerStarted(at=at(9), started_at=at(3), not_enforced=("memory_bytes: asked 1, in force no limit",)),
    ev.StepFailed(at=at(9), reason=Reason.IMAGE_NOT_FOUND, message="no"),
    ev.ContainerExited(at=at(9), exit_code=137, oom_killed=True),
    ev.ContainerExited(at=at(9), exit_code=137, oom_killed=False),
    ev.ContainerLost(at=at(9), message="gone"),
    ev.CollectFailed(at=at(9), message="disk", usage=Usage()),
    ev.ResultsRetained(at=at(9), location="file:///kept", message="down"),
    ev.ResultsRetained(at=at(9), location="file:///kept", message="too large", will_retry=False),
    ev.ResultsGivenUp(at=at(9), message="gone"),
    ev.TaskAbandoned(at=at(9), verdict=of_failure(Reason.NODE_FAULT, "bug")),
)


def after(*events: ev.Event) -> machine.Step:
    step = accepted()
    for event in events:
        step = machine.advance(step.record, event)
    return step


def in_phase(phase: Phase) -> TaskRecord:
    index = list(Phase).index(phase)
    if phase in (Phase.RETAINING, Phase.FINISHED):
        kept = (*HAPPY[:5], ev.ResultsRetained(at=at(6), location="file:///kept", message="down"), *HAPPY[6:])
        return after(*kept).record if phase is Phase.RETAINING else after(*HAPPY).record
    return after(*HAPPY[:index]).record


def test_the_run_took_as_long_as_the_container_lived_however_late_start_and_end_were_heard_of() -> None:
    record = after(
        *HAPPY[:2],
        ev.ContainerStarted(at=at(4), started_at=at(3)),
        ev.ContainerExited(at=at(3600), exit_code=0, oom_killed=False, finished_at=at(8)),
    ).record
    run = next(timing for timing in record.timings if timing.name == "run")
    assert (run.started_at, run.ended_at) == (at(3), at(8))
    assert [timing.started_at for timing in record.timings[1:]] == [timing.ended_at for timing in record.timings[:-1]]


def test_a_run_lasted_as_long_as_is_told_though_the_clock_was_set_back_since() -> None:
    exited = ev.ContainerExited(at=at(-60), exit_code=0, oom_killed=False, finished_at=at(8), ran=timedelta(seconds=5))
    record = after(*HAPPY[:2], ev.ContainerStarted(at=at(3), started_at=at(3)), exited).record
    run = next(timing for timing in record.timings if timing.name == "run")
    assert (run.started_at, run.ended_at) == (at(3), at(8))


def test_a_task_that_goes_well_passes_every_phase_and_ends_succeeded() -> None:
    record = after(*HAPPY).record
    assert record.phase is Phase.FINISHED
    assert record.verdict is not None
    assert (record.verdict.outcome, record.verdict.reason, record.verdict.exit_code) == (
        Outcome.SUCCEEDED,
        Reason.COMPLETED,
        0,
    )
    assert [timing.name for timing in record.timings] == [
        "admit", "pull", "create", "start", "run", "collect", "upload", "report", "clean_up",
    ]  # fmt: skip
    assert all(timing.ended_at is not None for timing in record.timings)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_any_event_in_any_phase_only_raises_the_phase_and_never_changes_a_failure(events: list[ev.Event]) -> None:
    record = accepted().record
    for event in events:
        try:
            step = machine.advance(record, event)
        except InvariantError:
            continue
        assert step.record.phase >= record.phase
        if record.verdict is not None and record.verdict.outcome is not Outcome.SUCCEEDED:
            assert step.record.verdict == record.verdict
        if record.stop is not None:
            assert step.record.stop == record.stop
        if step.record.phase > Phase.COLLECTING:
            assert step.record.verdict is not None
            assert step.record.compute_released
        if not step.changed:
            assert step.record == record
        ended = [timing for timing in step.record.timings if timing.ended_at is None]
        assert len(ended) == (0 if step.record.phase is Phase.FINISHED else 1)
        record = step.record


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_in_every_phase_is_a_move_or_ignored_or_refused_with_the_story(
    phase: Phase, event: ev.Event
) -> None:
    record = in_phase(phase)
    if phase < min(machine.TRANSITIONS[type(event)]):
        with pytest.raises(InvariantError, match="too early; its story: admit"):
            machine.advance(record, event)
    else:
        step = machine.advance(record, event)
        assert step.changed == (step.record != record)


@pytest.mark.parametrize("position", range(4))
def test_a_stop_is_never_followed_by_create_or_start_effects(position: int) -> None:
    stopped = machine.advance(after(*HAPPY[:position]).record, stop_request())
    forbidden = (fx.CreateContainer, fx.StartContainer)
    assert not [effect for effect in stopped.effects if isinstance(effect, forbidden)]
    step = stopped
    for event in HAPPY[position:]:
        try:
            step = machine.advance(step.record, event)
        except InvariantError:
            continue
        assert not [effect for effect in step.effects if isinstance(effect, forbidden)]
    assert step.record.verdict is not None
    assert step.record.verdict.outcome is Outcome.CANCELLED


@pytest.mark.parametrize("phase", [Phase.PULLING, Phase.CREATING, Phase.STARTING])
def test_recovery_honours_a_stop_that_was_journalled_just_before_the_crash(phase: Phase) -> None:
    record = replace(in_phase(phase), stop=StopRequest(cause=StopCause.CANCELLED, requested_at=at(5)))
    step = machine.resume(record, at=at(6))
    assert step.record.phase is Phase.COLLECTING
    assert step.effects == (fx.CollectResults(),)
    assert step.record.verdict is not None
    assert step.record.verdict.outcome is Outcome.CANCELLED


def test_recovery_of_a_running_task_that_was_to_stop_sends_the_stop_again() -> None:
    step = machine.resume(machine.advance(in_phase(Phase.RUNNING), stop_request()).record, at=at(6))
    assert step.effects == (fx.WatchContainer(), fx.StopContainer())


@pytest.mark.parametrize("phase", list(Phase))
def test_recovery_is_the_same_look_up_as_entering(phase: Phase) -> None:
    step = machine.resume(in_phase(phase), at=at(6))
    assert step.effects == machine.ENTRY[phase]
    assert not step.changed


@pytest.mark.parametrize("phase", [Phase.PULLING, Phase.CREATING, Phase.STARTING])
def test_what_may_have_run_is_not_told_as_never_started(phase: Phase) -> None:
    stop = StopRequest(cause=StopCause.WAIT_TIMEOUT, requested_at=at(5), message="Had not started within 5 s.")
    step = machine.advance(in_phase(phase), ev.StopRequested(at=at(5), stop=stop))
    failed = ev.StepFailed(at=at(6), reason=Reason.NODE_FAULT, message="the engine stayed away")
    verdict = machine.advance(step.record, failed).record.verdict
    assert verdict is not None
    assert verdict.reason is Reason.WAIT_TIMEOUT
    assert verdict.message.startswith("Had not started within 5 s")
    assert ("may have run" in verdict.message) == (phase is Phase.STARTING)


def test_a_failed_upload_is_never_reported_as_success() -> None:
    kept = ev.ResultsRetained(at=at(6), location="file:///kept", message="store down")
    record = after(*HAPPY[:5], kept).record
    assert record.verdict is not None
    assert (record.verdict.outcome, record.verdict.reason) == (Outcome.FAILED, Reason.RESULTS_NOT_STORED)
    assert record.verdict.exit_code == 0
    assert record.result_location == "file:///kept"


def test_a_failed_upload_does_not_mask_the_tasks_own_failure() -> None:
    exited = ev.ContainerExited(at=at(4), exit_code=3, oom_killed=False)
    kept = ev.ResultsRetained(at=at(6), location="file:///kept", message="store down")
    record = after(*HAPPY[:3], exited, HAPPY[4], kept).record
    assert record.verdict is not None
    assert (record.verdict.reason, record.verdict.exit_code) == (Reason.EXIT_NONZERO, 3)
    assert record.remarks == ("store down",)


def test_results_kept_on_the_host_hold_the_disk_lease_until_the_store_takes_them() -> None:
    record = in_phase(Phase.RETAINING)
    assert record.compute_released
    assert not record.disk_released
    step = machine.advance(record, ev.ResultsStored(at=at(9), location="s3://b/t/1"))
    assert step.record.phase is Phase.FINISHED
    assert step.record.result_location == "s3://b/t/1"
    assert fx.ReleaseDisk() in step.effects


def test_results_too_large_for_the_store_stay_for_good_and_end_the_attempt() -> None:
    kept = ev.ResultsRetained(at=at(6), location="file:///kept", message="too large", will_retry=False)
    assert after(*HAPPY[:5], kept, *HAPPY[6:]).record.phase is Phase.FINISHED


def test_a_cancelled_task_that_then_exits_137_was_cancelled() -> None:
    running = machine.advance(in_phase(Phase.RUNNING), stop_request()).record
    record = machine.advance(running, ev.ContainerExited(at=at(9), exit_code=137, oom_killed=False)).record
    assert record.verdict is not None
    assert (record.verdict.outcome, record.verdict.exit_code) == (Outcome.CANCELLED, 137)


def test_exit_137_without_the_kernels_word_is_not_a_memory_kill() -> None:
    record = machine.advance(
        in_phase(Phase.RUNNING), ev.ContainerExited(at=at(9), exit_code=137, oom_killed=False)
    ).record
    assert record.verdict is not None
    assert record.verdict.reason is Reason.EXIT_NONZERO


def test_an_engine_that_could_not_execute_the_command_is_not_the_tasks_own_127() -> None:
    running = in_phase(Phase.RUNNING)
    engine = ev.ContainerExited(at=at(9), exit_code=127, oom_killed=False, error="exec nope: No such file or directory")
    own = ev.ContainerExited(at=at(9), exit_code=127, oom_killed=False)
    reasons = [
        step.record.verdict.reason
        for event in (engine, own)
        if (step := machine.advance(running, event)).record.verdict
    ]
    assert reasons == [Reason.COMMAND_NOT_FOUND, Reason.EXIT_NONZERO]


def test_a_childs_memory_kill_beside_exit_0_is_a_success_with_a_remark() -> None:
    record = machine.advance(in_phase(Phase.RUNNING), ev.ContainerExited(at=at(9), exit_code=0, oom_killed=True)).record
    assert record.verdict is not None
    assert record.verdict.outcome is Outcome.SUCCEEDED
    assert "memory limit" in record.remarks[0]


def test_the_deadline_counts_from_the_engines_start_so_that_a_repeated_start_changes_nothing() -> None:
    started = ev.ContainerStarted(at=at(50), started_at=at(3))
    assert after(*HAPPY[:2], started).record.deadline_at == at(63)


def test_a_limit_that_does_not_hold_ends_the_task_at_its_start() -> None:
    started = ev.ContainerStarted(at=at(3), started_at=at(3), not_enforced=("pids_limit: asked 10, in force no limit",))
    step = after(*HAPPY[:2], started)
    assert step.effects == (fx.WatchContainer(), fx.StopContainer())
    record = machine.advance(step.record, ev.ContainerExited(at=at(4), exit_code=137, oom_killed=False)).record
    assert record.verdict is not None
    assert record.verdict.reason is Reason.LIMIT_NOT_ENFORCED
    assert "pids_limit: asked 10, in force no limit" in record.verdict.message


@pytest.mark.parametrize("cause", sorted(AT_ONCE))
def test_a_limit_that_allows_no_grace_takes_it_from_a_gentle_stop_and_leaves_the_verdict(cause: StopCause) -> None:
    gentle = machine.advance(in_phase(Phase.RUNNING), stop_request()).record
    step = machine.advance(gentle, stop_request(cause))
    assert step.effects == (fx.KillContainer(),)
    assert has_no_grace(step.record)
    assert not machine.advance(step.record, stop_request(cause)).changed
    again = machine.resume(step.record, at=at(6))
    assert again.effects == (fx.WatchContainer(), fx.StopContainer())
    assert has_no_grace(again.record), "a restart makes it no gentle stop again"
    record = machine.advance(step.record, ev.ContainerExited(at=at(9), exit_code=137, oom_killed=False)).record
    assert record.verdict is not None
    assert record.verdict.reason is Reason.CANCELLED
    (remark,) = record.remarks
    assert of_stop(StopRequest(cause=cause, requested_at=at(5))).message in remark


@pytest.mark.parametrize("later", list(StopCause))
def test_nothing_is_stricter_than_a_kill_and_a_gentle_stop_hastens_nothing(later: StopCause) -> None:
    for first in (cause for cause in StopCause if cause in AT_ONCE or later not in AT_ONCE):
        stopped = machine.advance(in_phase(Phase.RUNNING), stop_request(first)).record
        assert not machine.advance(stopped, stop_request(later)).changed


def test_a_limit_that_does_not_hold_kills_a_task_that_was_cancelled_while_it_started() -> None:
    started = ev.ContainerStarted(at=at(3), started_at=at(3), not_enforced=("pids_limit: asked 10, in force no limit",))
    step = after(*HAPPY[:2], stop_request(), started)
    assert step.effects == (fx.WatchContainer(), fx.StopContainer())
    assert has_no_grace(step.record)
    record = machine.advance(step.record, ev.ContainerExited(at=at(4), exit_code=137, oom_killed=False)).record
    assert record.verdict is not None
    assert record.verdict.reason is Reason.CANCELLED
    assert "pids_limit: asked 10, in force no limit" in record.remarks[0]


def test_a_stuck_container_keeps_its_lease_and_says_so_once() -> None:
    collecting = in_phase(Phase.COLLECTING)
    stuck = machine.advance(collecting, ev.ContainerStuck(at=at(5), message="alive"))
    assert stuck.record.stuck
    assert not stuck.record.compute_released
    assert not machine.advance(stuck.record, ev.ContainerStuck(at=at(6), message="alive")).changed
    freed = machine.advance(stuck.record, HAPPY[4]).record
    assert freed.compute_released
    assert not freed.stuck
    assert freed.remarks == ("alive",)


def test_the_absolute_deadline_is_fixed_at_acceptance() -> None:
    spec = replace(SPEC, total_timeout_seconds=30.0)
    step = machine.accept(
        spec=spec, lease=Lease(granted=spec.request), trace=accepted().record.trace, received_at=T0, accepted_at=at(1)
    )
    assert step.record.expires_at == at(31)
