"""The verdict table: every combination of what can be known of an end, and who wins."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest

from nodeservice.core.events import ContainerExited
from nodeservice.core.model import Outcome, Reason, StopCause, StopRequest
from nodeservice.core.verdict import exit_remarks, is_retryable, of_exit, of_stop
from nodeservice.master.attempts import SURROUNDINGS

T0 = datetime(2026, 1, 1, tzinfo=UTC)
REASON_OF = {
    StopCause.CANCELLED: Reason.CANCELLED,
    StopCause.DEADLINE: Reason.DEADLINE,
    StopCause.WAIT_TIMEOUT: Reason.WAIT_TIMEOUT,
    StopCause.PULL_TIMEOUT: Reason.IMAGE_PULL_TIMEOUT,
    StopCause.DISK_LIMIT: Reason.DISK_LIMIT,
    StopCause.NODE_DISK_LOW: Reason.NODE_DISK_LOW,
    StopCause.LIMIT_NOT_ENFORCED: Reason.LIMIT_NOT_ENFORCED,
    StopCause.GPU_MEMORY_LIMIT: Reason.GPU_MEMORY_LIMIT,
    StopCause.GPU_FAULT: Reason.GPU_FAULT,
    StopCause.NODE_DRAINED: Reason.NODE_DRAINED,
    StopCause.MASTER_LOST: Reason.MASTER_LOST,
}
CODES = (0, 1, 3, 125, 126, 127, 128, 137, 139, 143, 255)


def ended(exit_code: int, *, oom_killed: bool = False, **facts: Any) -> ContainerExited:
    return ContainerExited(at=T0, exit_code=exit_code, oom_killed=oom_killed, **facts)


def expected(facts: ContainerExited, stop: StopRequest | None) -> Reason:
    """The table in words: our signal, the engine's going, success, no command, own limit, host, GPU, engine, the task."""
    finished = facts.finished_at
    too_late = stop is not None and finished is not None and finished < stop.requested_at
    if stop is not None and (stop.cause is StopCause.CANCELLED or not too_late):
        return REASON_OF[stop.cause]
    if facts.by_engine:
        return Reason.ENGINE_FAULT
    if facts.exit_code == 0:
        return Reason.COMPLETED
    if facts.error and facts.exit_code in (126, 127):
        return Reason.COMMAND_NOT_FOUND
    if facts.oom_killed:
        return Reason.MEMORY_LIMIT
    if facts.host_oom_killed:
        return Reason.HOST_OUT_OF_MEMORY
    if facts.gpu_fault:
        return Reason.GPU_FAULT
    if facts.error and facts.exit_code in (125, 128, 255):
        return Reason.ENGINE_FAULT
    return Reason.EXIT_NONZERO


def test_the_whole_table_is_as_described() -> None:
    stops = [None, *(StopRequest(cause=cause, requested_at=T0) for cause in StopCause)]
    ends = (None, T0 - timedelta(seconds=1), T0, T0 + timedelta(seconds=1))
    count = 0
    for code, own, host, error, gpu_fault, by_engine, finished, stop in product(
        CODES, (False, True), (False, True), ("", "boom"), ("", "XID 79"), (False, True), ends, stops
    ):
        facts = ended(
            code,
            oom_killed=own,
            host_oom_killed=host,
            error=error,
            gpu_fault=gpu_fault,
            by_engine=by_engine,
            finished_at=finished,
        )
        verdict = of_exit(facts, stop)
        assert verdict.reason is expected(facts, stop), facts
        assert verdict.exit_code == code
        assert (verdict.outcome is Outcome.SUCCEEDED) == (verdict.reason is Reason.COMPLETED)
        assert (verdict.outcome is Outcome.CANCELLED) == (verdict.reason is Reason.CANCELLED)
        count += 1
    assert count == len(CODES) * 2 * 2 * 2 * 2 * 2 * len(ends) * len(stops)


@pytest.mark.parametrize("code", CODES)
def test_no_exit_code_alone_means_a_lack_of_memory(code: int) -> None:
    verdict = of_exit(ended(code))
    assert verdict.reason not in (Reason.MEMORY_LIMIT, Reason.HOST_OUT_OF_MEMORY)


def test_a_task_that_ended_by_itself_just_before_its_deadline_was_not_ended_by_it() -> None:
    stop = StopRequest(cause=StopCause.DEADLINE, requested_at=T0)
    just_before = ended(0, finished_at=T0 - timedelta(milliseconds=1))
    assert of_exit(just_before, stop).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(("own", "host", "words"), [(True, False, "memory limit"), (False, True, "on the host")])
def test_a_kill_beside_exit_0_is_told_as_a_remark(own: bool, host: bool, words: str) -> None:
    facts = ended(0, oom_killed=own, host_oom_killed=host)
    assert of_exit(facts).outcome is Outcome.SUCCEEDED
    (remark,) = exit_remarks(facts)
    assert words in remark


@pytest.mark.parametrize("code", [0, 3])
def test_a_log_that_may_lack_something_is_told_whatever_the_exit_code(code: int) -> None:
    (remark,) = exit_remarks(ended(code, engine_was_away=True))
    assert "log" in remark
    assert exit_remarks(ended(code)) == ()


@pytest.mark.parametrize("cause", list(StopCause))
def test_every_cause_of_ours_has_a_verdict_and_says_what_it_was_given(cause: StopCause) -> None:
    plain = of_stop(StopRequest(cause=cause, requested_at=T0))
    assert plain.message
    assert of_stop(StopRequest(cause=cause, requested_at=T0, message="because")).message == "because"
    assert plain.reason is REASON_OF[cause]


def test_a_task_that_failed_is_not_said_to_have_exited_with_0() -> None:
    assert exit_remarks(ended(137, oom_killed=True, gpu_fault="Xid 79")) == ()
    (remark,) = exit_remarks(ended(0, oom_killed=True, by_engine=True))
    assert "log" in remark


def test_a_signal_that_nobody_here_sent_is_named_as_what_it_may_have_been() -> None:
    assert "may mean signal 9;" in of_exit(ended(137)).message
    assert "signal" not in of_exit(ended(128)).message + of_exit(ended(193)).message


def test_what_the_node_or_its_surroundings_broke_may_be_tried_again_and_nothing_else() -> None:
    of_the_node = {
        Reason.NODE_FAULT,
        Reason.ENGINE_FAULT,
        Reason.GPU_FAULT,
        Reason.COLLECT_FAILED,
        Reason.CONTAINER_LOST,
        Reason.NODE_DRAINED,
        Reason.MASTER_LOST,
        Reason.HOST_OUT_OF_MEMORY,
        Reason.LIMIT_NOT_ENFORCED,
        Reason.NODE_DISK_LOW,
    }
    assert {reason for reason in Reason if is_retryable(reason)} == of_the_node | {
        Reason(name) for name in SURROUNDINGS
    }
