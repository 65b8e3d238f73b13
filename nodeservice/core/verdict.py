"""Decides how an attempt ended, from facts alone. Never inferred from exit code 137.

The first failure is final; success is provisional until the results are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nodeservice.core.events import ContainerExited
from nodeservice.core.model import Outcome, Reason, StopCause, StopRequest, TaskRecord, Verdict

_SIGNAL_BASE = 128
_HIGHEST_SIGNAL = 64
_NOT_EXECUTED = (126, 127)
"""What shells and the engine's init program exit with for a command that cannot be, or is not found (POSIX 2.8.2)."""
_NOT_AN_EXIT = (125, 128, 255)
"""What engines write down, beside an error, for a process whose own exit they don't know."""

_OF_STOP: Mapping[StopCause, tuple[Outcome, Reason, str]] = {
    StopCause.CANCELLED: (Outcome.CANCELLED, Reason.CANCELLED, "Cancelled on request."),
    StopCause.DEADLINE: (Outcome.FAILED, Reason.DEADLINE, "The task ran longer than its time limit."),
    StopCause.WAIT_TIMEOUT: (Outcome.FAILED, Reason.WAIT_TIMEOUT, "The task had not started in time."),
    StopCause.PULL_TIMEOUT: (Outcome.FAILED, Reason.IMAGE_PULL_TIMEOUT, "The image was not pulled in time."),
    StopCause.DISK_LIMIT: (Outcome.FAILED, Reason.DISK_LIMIT, "The task wrote more than its disk limit."),
    StopCause.NODE_DISK_LOW: (Outcome.FAILED, Reason.NODE_DISK_LOW, "The host was about to run out of disk."),
    StopCause.GPU_MEMORY_LIMIT: (
        Outcome.FAILED,
        Reason.GPU_MEMORY_LIMIT,
        "The task took more GPU memory than its limit.",
    ),
    StopCause.MASTER_LOST: (Outcome.FAILED, Reason.MASTER_LOST, "The master was not heard for too long."),
    StopCause.NODE_DRAINED: (Outcome.FAILED, Reason.NODE_DRAINED, "The node was to be empty by now."),
    StopCause.GPU_FAULT: (Outcome.FAILED, Reason.GPU_FAULT, "A GPU of the task failed."),
    StopCause.LIMIT_NOT_ENFORCED: (Outcome.FAILED, Reason.LIMIT_NOT_ENFORCED, "A limit does not hold on this node."),
}
AT_ONCE = frozenset(
    {StopCause.DISK_LIMIT, StopCause.NODE_DISK_LOW, StopCause.LIMIT_NOT_ENFORCED, StopCause.GPU_MEMORY_LIMIT}
)
"""Causes for which the task gets no grace: each moment more breaks a promise made to others."""
_RETRYABLE = frozenset(
    {
        Reason.CONTAINER_LOST,
        Reason.ENGINE_FAULT,
        Reason.GPU_FAULT,
        Reason.HOST_OUT_OF_MEMORY,
        Reason.IMAGE_PULL_FAILED,
        Reason.IMAGE_PULL_TIMEOUT,
        Reason.LIMIT_NOT_ENFORCED,
        Reason.MASTER_LOST,
        Reason.NODE_DISK_LOW,
        Reason.NODE_DRAINED,
        Reason.NODE_FAULT,
        Reason.RESULTS_NOT_STORED,
        Reason.COLLECT_FAILED,
        Reason.WAIT_TIMEOUT,
    }
)


def has_no_grace(record: TaskRecord) -> bool:
    """Whether it is to be killed at once, be that the first thing that was requested or not."""
    return any(request is not None and request.cause in AT_ONCE for request in (record.stop, record.escalation))


def changes_the_end(record: TaskRecord, cause: StopCause) -> bool:
    """Whether one more request would do anything: the first does, and one that takes the grace from a gentler one."""
    return record.stop is None or (cause in AT_ONCE and not has_no_grace(record))


def is_retryable(reason: Reason) -> bool:
    """Whether the same task may well succeed elsewhere or later: the node or its surroundings failed, not the task."""
    return reason in _RETRYABLE


def of_stop(stop: StopRequest, *, exit_code: int | None = None) -> Verdict:
    """What was requested decides, whatever code the container then ended with."""
    outcome, reason, message = _OF_STOP[stop.cause]
    return Verdict(outcome=outcome, reason=reason, message=stop.message or message, exit_code=exit_code)


def of_what_may_run(stop: StopRequest) -> StopRequest:
    """Requested while the engine had not answered to the start: the words that say that it never ran say too much then."""
    if stop.cause is not StopCause.WAIT_TIMEOUT:
        return stop
    known = of_stop(stop).message.removesuffix(".")
    return replace(stop, message=f"{known}, as far as is known: the engine had not answered, and it may have run.")


def of_exit(ended: ContainerExited, stop: StopRequest | None = None) -> Verdict:
    """The verdict on a container that ended, with what had been requested of it."""
    exit_code = ended.exit_code
    if stop is not None and not _ended_before(ended, stop):
        return of_stop(stop, exit_code=exit_code)
    if ended.by_engine:
        message = f"The engine or the host was stopped or started anew, which ended the task; it left code {exit_code}."
        return Verdict(outcome=Outcome.FAILED, reason=Reason.ENGINE_FAULT, message=message, exit_code=exit_code)
    if exit_code == 0:
        return Verdict(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message="Exited with code 0.", exit_code=0)
    reason, message = _cause(ended)
    return Verdict(outcome=Outcome.FAILED, reason=reason, message=message, exit_code=exit_code)


def _ended_before(ended: ContainerExited, stop: StopRequest) -> bool:
    """It had ended by itself when we decided to end it. Whoever cancelled has been told so already: that stands."""
    if stop.cause is StopCause.CANCELLED or ended.finished_at is None:
        return False
    return ended.finished_at < stop.requested_at


def _cause(ended: ContainerExited) -> tuple[Reason, str]:
    exit_code, error = ended.exit_code, ended.error
    if error and exit_code in _NOT_EXECUTED:
        return Reason.COMMAND_NOT_FOUND, f"The command could not be executed: {error}"
    if ended.oom_killed:
        return Reason.MEMORY_LIMIT, "The kernel killed a process of the task: it needed more memory than its limit."
    if ended.host_oom_killed:
        message = "The kernel killed a process of the task for lack of memory on the host, not at the task's own limit."
        return Reason.HOST_OUT_OF_MEMORY, message
    if ended.gpu_fault:
        return Reason.GPU_FAULT, f"Exited with code {exit_code} after a GPU of it failed: {ended.gpu_fault}"
    if error and exit_code in _NOT_AN_EXIT:
        return Reason.ENGINE_FAULT, f"The engine could not run the container to its end: {error}"
    message = f"Exited with code {exit_code}."
    if _SIGNAL_BASE < exit_code <= _SIGNAL_BASE + _HIGHEST_SIGNAL:
        signal = exit_code - _SIGNAL_BASE
        message = f"Exited with code {exit_code}, which may mean signal {signal}; no stop by this service is on record."
    if error:
        message = f"{message} The engine says: {error}"
    return Reason.EXIT_NONZERO, message


def exit_remarks(ended: ContainerExited) -> tuple[str, ...]:
    """What a reader of the verdict must still be told."""
    remarks: list[str] = []
    if ended.engine_was_away or ended.by_engine:
        remarks.append("The container engine was restarted while the task ran: its log may lack what was printed then.")
    if ended.exit_code != 0 or ended.by_engine:
        return tuple(remarks)
    anyway = "although the task exited with code 0"
    if ended.oom_killed:
        remarks.append(f"A process of the task was killed at the memory limit {anyway}.")
    elif ended.host_oom_killed:
        remarks.append(f"A process of the task was killed for lack of memory on the host {anyway}.")
    if ended.gpu_fault:
        remarks.append(f"A GPU of the task failed {anyway}: {ended.gpu_fault}")
    return tuple(remarks)


def of_failure(reason: Reason, message: str) -> Verdict:
    return Verdict(outcome=Outcome.FAILED, reason=reason, message=message)


def first_failure(current: Verdict | None, later: Verdict) -> Verdict:
    """Keep the first failure or cancellation; a provisional success gives way to `later`, and keeps its exit code."""
    if current is None:
        return later
    if current.outcome is not Outcome.SUCCEEDED:
        return current
    exit_code = later.exit_code if later.exit_code is not None else current.exit_code
    return Verdict(outcome=later.outcome, reason=later.reason, message=later.message, exit_code=exit_code)
