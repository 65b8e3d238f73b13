"""Decides how an attempt ended, from facts alone. Never inferred from exit code 137.

The first failure is final; success is provisional until the results are stored.
"""

from __future__ import annotations

from nodeservice.core.model import Outcome, Reason, StopCause, StopRequest, Verdict

_SIGNAL_BASE = 128
_HIGHEST_SIGNAL = 64
_NOT_EXECUTED = (126, 127)
"""What shells and the engine's init program exit with for a command that cannot be, or is not found (POSIX 2.8.2)."""


def of_stop(stop: StopRequest, *, exit_code: int | None = None) -> Verdict:
    """What was requested decides, whatever code the container then ended with."""
    match stop.cause:
        case StopCause.CANCELLED:
            return Verdict(
                outcome=Outcome.CANCELLED,
                reason=Reason.CANCELLED,
                message=stop.message or "Cancelled on request.",
                exit_code=exit_code,
            )
        case StopCause.DEADLINE:
            return Verdict(
                outcome=Outcome.FAILED,
                reason=Reason.DEADLINE,
                message=stop.message or "The task ran longer than its time limit.",
                exit_code=exit_code,
            )


def of_exit(*, exit_code: int, oom_killed: bool, error: str, stop: StopRequest | None) -> Verdict:
    """The verdict on a container that ended."""
    if stop is not None:
        return of_stop(stop, exit_code=exit_code)
    if exit_code == 0:
        return Verdict(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message="Exited with code 0.", exit_code=0)
    if error and exit_code in _NOT_EXECUTED:
        return Verdict(
            outcome=Outcome.FAILED,
            reason=Reason.COMMAND_NOT_FOUND,
            message=f"The command could not be executed: {error}",
            exit_code=exit_code,
        )
    if oom_killed:
        return Verdict(
            outcome=Outcome.FAILED,
            reason=Reason.MEMORY_LIMIT,
            message="The kernel killed a process of the task: it needed more memory than its limit.",
            exit_code=exit_code,
        )
    message = f"Exited with code {exit_code}."
    if _SIGNAL_BASE < exit_code <= _SIGNAL_BASE + _HIGHEST_SIGNAL:
        signal = exit_code - _SIGNAL_BASE
        message = f"Exited with code {exit_code}, which may mean signal {signal}; this service did not send it."
    if error:
        message = f"{message} The engine says: {error}"
    return Verdict(outcome=Outcome.FAILED, reason=Reason.EXIT_NONZERO, message=message, exit_code=exit_code)


def exit_remark(*, exit_code: int, oom_killed: bool) -> str | None:
    """What a reader of a success must still be told."""
    if oom_killed and exit_code == 0:
        return "A process of the task was killed at the memory limit although the task exited with code 0."
    return None


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
