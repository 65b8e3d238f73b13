"""Reads a node's report: how the attempt ended, whatever generation of the protocol the node speaks."""

from __future__ import annotations

from nodeservice.master.checks import check_attempt, check_id
from nodeservice.master.rows import State
from nodeservice.wire import master_worker_pb2 as pb

_BY_STATUS = {"success": State.SUCCEEDED, "cancelled": State.CANCELLED}
_BY_OUTCOME = {state.value: state for state in (State.SUCCEEDED, State.FAILED, State.CANCELLED)}
_DEFAULT_REASON = {State.SUCCEEDED: "COMPLETED", State.FAILED: "FAILED", State.CANCELLED: "CANCELLED"}


def check_report(result: pb.TaskResult) -> None:
    """Raises RequestError for a report that can belong to no task."""
    check_id("task_id", result.task_id)
    check_id("worker_id", result.worker_id)
    if result.HasField("attempt"):
        check_attempt("attempt", result.attempt)


def outcome_of(result: pb.TaskResult) -> tuple[State, str, str]:
    """State, reason and message. The exact outcome wins; any old status but success and cancelled is a failure."""
    state = _BY_OUTCOME.get(result.outcome) or _BY_STATUS.get(result.status, State.FAILED)
    return state, result.reason[:128] or _DEFAULT_REASON[state], result.message[:2000]
