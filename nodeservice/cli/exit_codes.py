"""What the exit code of `run` and `wait` tells, and that of `doctor`.

0 is success and a task that failed by its own code ends with that code. The others follow what is usual: `timeout` (124),
the shell (126, 127, 128 + signal) and sysexits.h (64–78).
"""

from __future__ import annotations

from enum import IntEnum

from nodeservice.core.model import Outcome, Reason
from nodeservice.errors import CapacityError, ConfigError, NodeServiceError, RequestError, TransientError


class ExitCode(IntEnum):
    USAGE = 2
    IMAGE = 65
    """The image is not there or may not be pulled (EX_DATAERR)."""
    NOT_FOUND = 66
    """The master knows no such task or node (EX_NOINPUT)."""
    UNAVAILABLE = 69
    """No engine, master or node answers (EX_UNAVAILABLE)."""
    NODE_FAULT = 70
    """The node failed, not the task (EX_SOFTWARE)."""
    DISK_LIMIT = 73
    """The task wrote more than its disk limit and was killed for it (EX_CANTCREAT)."""
    RESULTS = 74
    """The task ended, its results are not where they belong (EX_IOERR)."""
    REJECTED = 75
    """Refused: invalid, or it does not fit (EX_TEMPFAIL)."""
    CONFIG = 78
    DEADLINE = 124
    START_FAILED = 126
    COMMAND_NOT_FOUND = 127
    CANCELLED = 130
    MEMORY_LIMIT = 137
    OUTPUT_CLOSED = 141
    """Whoever read the output went away; the task was cancelled (128 + SIGPIPE)."""


class DoctorCode(IntEnum):
    """What the exit code of `doctor` tells."""

    SOUND = 0
    """Every limit is hard or watched."""
    NOT_KEPT = 1
    """At least one is missing or failed."""
    NOT_EXAMINED = 2
    """Nothing could be tried: no engine, no image."""


_BY_REASON = {
    Reason.DEADLINE: ExitCode.DEADLINE,
    Reason.WAIT_TIMEOUT: ExitCode.DEADLINE,
    Reason.DISK_LIMIT: ExitCode.DISK_LIMIT,
    Reason.MEMORY_LIMIT: ExitCode.MEMORY_LIMIT,
    Reason.GPU_MEMORY_LIMIT: ExitCode.MEMORY_LIMIT,
    Reason.COMMAND_NOT_FOUND: ExitCode.COMMAND_NOT_FOUND,
    Reason.CREATE_FAILED: ExitCode.START_FAILED,
    Reason.START_FAILED: ExitCode.START_FAILED,
    Reason.RESULTS_NOT_STORED: ExitCode.RESULTS,
    Reason.COLLECT_FAILED: ExitCode.RESULTS,
    Reason.IMAGE_NOT_FOUND: ExitCode.IMAGE,
    Reason.IMAGE_ACCESS_DENIED: ExitCode.IMAGE,
    Reason.IMAGE_PULL_FAILED: ExitCode.IMAGE,
    Reason.IMAGE_PULL_TIMEOUT: ExitCode.IMAGE,
}


def code_of_error(error: NodeServiceError) -> ExitCode:
    """For what a command could not do."""
    match error:
        case RequestError() | CapacityError():
            return ExitCode.REJECTED
        case ConfigError():
            return ExitCode.CONFIG
        case _ if error.reason == "JOURNAL_CORRUPT":
            return ExitCode.CONFIG
        case TransientError():
            return ExitCode.UNAVAILABLE
        case _:
            return ExitCode.NODE_FAULT


def exit_code_of(*, outcome: str, reason: str, exit_code: int | None) -> int:
    """The process exit code for how an attempt ended, as words from JSON or the wire."""
    match outcome:
        case Outcome.SUCCEEDED:
            return 0
        case Outcome.CANCELLED:
            return ExitCode.CANCELLED
        case Outcome.REJECTED:
            return ExitCode.REJECTED
    if reason == Reason.EXIT_NONZERO and exit_code is not None:
        return exit_code & 0xFF or 1
    try:
        return _BY_REASON.get(Reason(reason), ExitCode.NODE_FAULT)
    except ValueError:
        return ExitCode.NODE_FAULT
