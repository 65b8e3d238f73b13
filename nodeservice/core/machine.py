"""The life of one attempt as a table: (phase, event) → next record and what to do.

`accept` makes the first record, `advance` applies an event, `resume` says what to do with a record found in the journal.
The driver journals the returned record before it runs the returned effects (but see `Step.can_wait`), so entering a phase
and recovering in it are the same look-up (`ENTRY`). A phase only rises; a failure is a jump forward that still collects,
uploads, reports and cleans up what exists. An event that comes late (a duplicate, or the result of work that a stop
overtook) changes nothing; one that comes early is our own bug and carries the story.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from nodeservice.core import effects as fx
from nodeservice.core import events as ev
from nodeservice.core import verdict as verdicts
from nodeservice.core.model import (
    Lease,
    Phase,
    PhaseTiming,
    Reason,
    StopCause,
    StopRequest,
    TaskRecord,
    TaskSpec,
    TraceIds,
    Verdict,
)
from nodeservice.errors import InvariantError

ADMIT = "admit"
PHASE_NAMES: Mapping[Phase, str] = {
    Phase.PULLING: "pull",
    Phase.CREATING: "create",
    Phase.STARTING: "start",
    Phase.RUNNING: "run",
    Phase.COLLECTING: "collect",
    Phase.UPLOADING: "upload",
    Phase.REPORTING: "report",
    Phase.CLEANING: "clean_up",
    Phase.RETAINING: "retain",
}
ENTRY: Mapping[Phase, tuple[fx.Effect, ...]] = {
    Phase.PULLING: (fx.PullImage(),),
    Phase.CREATING: (fx.CreateContainer(),),
    Phase.STARTING: (fx.StartContainer(),),
    Phase.RUNNING: (fx.WatchContainer(),),
    Phase.COLLECTING: (fx.CollectResults(),),
    Phase.UPLOADING: (fx.UploadResults(),),
    Phase.REPORTING: (fx.ReportOutcome(),),
    Phase.CLEANING: (fx.CleanUp(),),
    Phase.RETAINING: (fx.StoreRetained(),),
    Phase.FINISHED: (),
}


@dataclass(frozen=True, slots=True)
class Step:
    """The next record and what to do once it is journalled. `changed` False: nothing to journal.

    `can_wait`: what it notes would be found out again, and done again without harm, by a service that has lost the note. So
    the effects need not wait for the disk.
    """

    record: TaskRecord
    effects: tuple[fx.Effect, ...] = ()
    changed: bool = True
    can_wait: bool = False


def accept(*, spec: TaskSpec, lease: Lease, trace: TraceIds, received_at: datetime, accepted_at: datetime) -> Step:
    """The first record of an admitted attempt."""
    limit = spec.total_timeout_seconds
    record = TaskRecord(
        spec=spec,
        lease=lease,
        trace=trace,
        accepted_at=accepted_at,
        expires_at=None if limit is None else accepted_at + timedelta(seconds=limit),
        phase=Phase.PULLING,
        timings=(
            PhaseTiming(name=ADMIT, started_at=received_at, ended_at=accepted_at),
            PhaseTiming(name=PHASE_NAMES[Phase.PULLING], started_at=accepted_at),
        ),
    )
    return Step(record, ENTRY[Phase.PULLING])


def advance(record: TaskRecord, event: ev.Event) -> Step:
    """Apply one event. Raises InvariantError for one that cannot have happened yet."""
    row = TRANSITIONS[type(event)]
    handler = row.get(record.phase)
    if handler is not None:
        return handler(record, event)
    if record.phase > min(row):
        return Step(record, changed=False)
    story = " → ".join(timing.name for timing in record.timings)
    raise InvariantError(
        f"{type(event).__name__} reached {record.id} in {record.phase.name}, too early; its story: {story}"
    )


def resume(record: TaskRecord, *, at: datetime) -> Step:
    """What to do with a record found after a restart.

    A stop that was journalled before the container ran is honoured without making or starting it; one that was journalled
    while it ran is sent again, without grace where that was taken from it.
    """
    if record.stop is not None and record.phase < Phase.RUNNING:
        return _give_up(record, at, verdicts.of_stop(record.stop))
    effects = ENTRY[record.phase]
    if record.stop is not None and record.phase is Phase.RUNNING:
        effects = (*effects, fx.StopContainer())
    return Step(record, effects, changed=False)


# ---- moves ------------------------------------------------------------------------------------------------------------


def _enter(
    record: TaskRecord,
    phase: Phase,
    at: datetime,
    *before: fx.Effect,
    lasted: timedelta | None = None,
    **changes: Any,
) -> Step:
    """Rise to `phase`: close the running timing, open the next, and look up what to do. `changes` are to the record.

    `lasted`: how long the phase lasted that is over, where that is known better than from `at`.
    """
    *earlier, running = record.timings
    ended_at = max(at, running.started_at) if lasted is None else running.started_at + lasted
    timings = (*earlier, replace(running, ended_at=ended_at))
    if phase is not Phase.FINISHED:
        timings = (*timings, PhaseTiming(name=PHASE_NAMES[phase], started_at=max(at, running.started_at)))
    return Step(replace(record, phase=phase, timings=timings, **changes), (*before, *ENTRY[phase]))


def _can_wait(step: Step) -> Step:
    return replace(step, can_wait=True)


def _give_up(record: TaskRecord, at: datetime, verdict: Verdict, *before: fx.Effect) -> Step:
    """The run is over before or without an exit: collect what exists."""
    return _enter(record, Phase.COLLECTING, at, *before, verdict=verdicts.first_failure(record.verdict, verdict))


# ---- handlers: one per kind of event ----------------------------------------------------------------------------------


def _stop_while_pulling(record: TaskRecord, event: ev.StopRequested) -> Step:
    stopped = replace(record, stop=event.stop)
    return _give_up(stopped, event.at, verdicts.of_stop(event.stop), fx.CancelStep())


def _stop_noted(record: TaskRecord, event: ev.StopRequested) -> Step:
    """A create is under way in the engine: its answer decides what there is to stop."""
    stopped = _requested(record, event.stop)
    return Step(stopped, changed=stopped is not record)


def _stop_while_starting(record: TaskRecord, event: ev.StopRequested) -> Step:
    """It may run already though the engine has not answered, and may not answer for long."""
    event = replace(event, stop=verdicts.of_what_may_run(event.stop))
    step = _stop_noted(record, event)
    return replace(step, effects=(fx.StopContainer(),) if step.changed else ())


def _stop_while_running(record: TaskRecord, event: ev.StopRequested) -> Step:
    stopped = _requested(record, event.stop)
    if stopped is record:
        return Step(record, changed=False)
    return Step(stopped, (fx.StopContainer() if record.stop is None else fx.KillContainer(),))


def _requested(record: TaskRecord, stop: StopRequest) -> TaskRecord:
    """The first request decides on the verdict. One that allows no grace takes it from a gentler one, and is remarked on."""
    if not verdicts.changes_the_end(record, stop.cause):
        return record
    if record.stop is None:
        return replace(record, stop=stop)
    remark = f"While it was being ended its grace was taken from it: {verdicts.of_stop(stop).message}"
    return replace(record, escalation=stop, remarks=(*record.remarks, remark))


def _pulled(record: TaskRecord, event: ev.ImagePulled) -> Step:
    return _can_wait(_enter(record, Phase.CREATING, event.at, image_digest=event.digest))


def _step_failed(record: TaskRecord, event: ev.StepFailed) -> Step:
    failure = verdicts.of_failure(event.reason, event.message)
    verdict = verdicts.of_stop(record.stop) if record.stop is not None else failure
    return _give_up(record, event.at, verdict)


def _created(record: TaskRecord, event: ev.ContainerCreated) -> Step:
    if record.stop is not None:
        created = replace(record, container_id=event.container_id)
        return _give_up(created, event.at, verdicts.of_stop(record.stop))
    return _can_wait(_enter(record, Phase.STARTING, event.at, container_id=event.container_id))


def _started(record: TaskRecord, event: ev.ContainerStarted) -> Step:
    timeout = record.spec.timeout_seconds
    deadline = None if timeout is None else event.started_at + timedelta(seconds=timeout)
    if event.not_enforced:
        message = f"Killed, because a limit does not hold: {'; '.join(event.not_enforced)}."
        broken = StopRequest(cause=StopCause.LIMIT_NOT_ENFORCED, requested_at=event.started_at, message=message)
        record = _requested(record, broken)
    step = _enter(
        record,
        Phase.RUNNING,
        min(event.at, event.started_at),
        started_at=event.started_at,
        deadline_at=deadline,
        limits={**record.limits, **event.limits},
    )
    if record.stop is not None:
        return replace(step, effects=(*step.effects, fx.StopContainer()))
    return step


def _exited(record: TaskRecord, event: ev.ContainerExited) -> Step:
    """It ran until the container ended, however much later that was found out."""
    remarks = (*record.remarks, *verdicts.exit_remarks(event))
    return _enter(
        record,
        Phase.COLLECTING,
        min(event.at, event.finished_at or event.at),
        lasted=event.ran,
        verdict=verdicts.of_exit(event, record.stop),
        remarks=remarks,
        usage=event.observed,
        stuck=False,
    )


def _lost(record: TaskRecord, event: ev.ContainerLost) -> Step:
    lost = verdicts.of_failure(Reason.CONTAINER_LOST, event.message)
    verdict = verdicts.of_stop(record.stop) if record.stop is not None else lost
    return _give_up(record, event.at, verdict)


def _stuck(record: TaskRecord, event: ev.ContainerStuck) -> Step:
    if record.stuck:
        return Step(record, changed=False)
    return Step(replace(record, stuck=True, remarks=(*record.remarks, event.message)))


def _gone(record: TaskRecord, event: ev.ContainerGone) -> Step:
    """What it computed with is free for others; reading its log and its files takes the disk alone."""
    if record.compute_released:
        return Step(record, changed=False)
    return _can_wait(Step(replace(record, compute_released=True, stuck=False), (fx.ReleaseCompute(),)))


def _collected(record: TaskRecord, event: ev.ResultsCollected) -> Step:
    skipped = event.collected.skipped
    remarks = record.remarks
    if skipped:
        count = event.collected.skipped_count
        what = f"{count} paths were left out or renamed, as the manifest tells, such as {skipped[0]}"
        remarks = (*remarks, what)
    if event.collected.log_error:
        remarks = (*remarks, f"the log may lack its end: {event.collected.log_error}")
    if event.collected.log_has_gap:
        remarks = (
            *remarks,
            "the log may lack lines, where it says so: the engine's own log was full before they were read",
        )
    step = _enter(
        record,
        Phase.UPLOADING,
        event.at,
        fx.ReleaseCompute(),
        collected=event.collected,
        remarks=remarks,
        usage=event.usage,
        stuck=False,
        compute_released=True,
    )
    return _can_wait(step)


def _collect_failed(record: TaskRecord, event: ev.CollectFailed) -> Step:
    failure = verdicts.of_failure(Reason.COLLECT_FAILED, event.message)
    return _enter(
        record,
        Phase.REPORTING,
        event.at,
        fx.ReleaseCompute(),
        verdict=verdicts.first_failure(record.verdict, failure),
        remarks=(*record.remarks, event.message),
        usage=event.usage,
        stuck=False,
        compute_released=True,
    )


def _stored(record: TaskRecord, event: ev.ResultsStored) -> Step:
    stored = replace(record, collected=event.collected or record.collected, remarks=(*record.remarks, *event.remarks))
    return _enter(stored, Phase.REPORTING, event.at, result_location=event.location)


def _retained(record: TaskRecord, event: ev.ResultsRetained) -> Step:
    """A success whose results are not where they belong is none; the exit code stays beside it."""
    failure = verdicts.of_failure(Reason.RESULTS_NOT_STORED, event.message)
    return _enter(
        record,
        Phase.REPORTING,
        event.at,
        verdict=verdicts.first_failure(record.verdict, failure),
        remarks=(*record.remarks, event.message),
        result_location=event.location,
        retained=event.will_retry,
    )


def _acknowledged(record: TaskRecord, event: ev.ReportAcknowledged) -> Step:
    return _enter(record, Phase.CLEANING, event.at, reported=True)


def _cleaned(record: TaskRecord, event: ev.CleanedUp) -> Step:
    if record.retained:
        return _enter(record, Phase.RETAINING, event.at)
    return _can_wait(_enter(record, Phase.FINISHED, event.at, fx.ReleaseDisk(), disk_released=True))


def _stored_late(record: TaskRecord, event: ev.ResultsStored) -> Step:
    return _enter(
        record,
        Phase.FINISHED,
        event.at,
        fx.ReleaseDisk(),
        result_location=event.location,
        retained=False,
        disk_released=True,
    )


def _given_up(record: TaskRecord, event: ev.ResultsGivenUp) -> Step:
    """How it ended was reported before."""
    return _enter(
        record,
        Phase.FINISHED,
        event.at,
        fx.ReleaseDisk(),
        remarks=(*record.remarks, event.message),
        retained=False,
        disk_released=True,
    )


def _abandoned(record: TaskRecord, event: ev.TaskAbandoned) -> Step:
    return _give_up(record, event.at, event.verdict, fx.CancelStep())


Handler = Callable[[TaskRecord, Any], Step]  # the key of its row says which event: no type can say that

TRANSITIONS: Mapping[type[ev.Event], Mapping[Phase, Handler]] = {  # the diagram in docs/architecture.md is this table
    ev.StopRequested: {
        Phase.PULLING: _stop_while_pulling,
        Phase.CREATING: _stop_noted,
        Phase.STARTING: _stop_while_starting,
        Phase.RUNNING: _stop_while_running,
    },
    ev.ImagePulled: {Phase.PULLING: _pulled},
    ev.StepFailed: {
        Phase.PULLING: _step_failed,
        Phase.CREATING: _step_failed,
        Phase.STARTING: _step_failed,
    },
    ev.ContainerCreated: {Phase.CREATING: _created},
    ev.ContainerStarted: {Phase.STARTING: _started},
    ev.ContainerExited: {Phase.RUNNING: _exited},
    ev.ContainerLost: {Phase.STARTING: _lost, Phase.RUNNING: _lost},
    ev.ContainerStuck: {Phase.RUNNING: _stuck, Phase.COLLECTING: _stuck},
    ev.ContainerGone: {Phase.COLLECTING: _gone},
    ev.ResultsCollected: {Phase.COLLECTING: _collected},
    ev.CollectFailed: {Phase.COLLECTING: _collect_failed},
    ev.ResultsStored: {Phase.UPLOADING: _stored, Phase.RETAINING: _stored_late},
    ev.ResultsRetained: {Phase.UPLOADING: _retained},
    ev.ResultsGivenUp: {Phase.RETAINING: _given_up},
    ev.ReportAcknowledged: {Phase.REPORTING: _acknowledged},
    ev.CleanedUp: {Phase.CLEANING: _cleaned},
    ev.TaskAbandoned: {
        Phase.PULLING: _abandoned,
        Phase.CREATING: _abandoned,
        Phase.STARTING: _abandoned,
        Phase.RUNNING: _abandoned,
    },
}
