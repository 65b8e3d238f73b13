"""What no node takes for its value alone: node and master refuse it by the same checks, so that neither passes it on.

Each raises RequestError (INVALID_REQUEST) naming the field, the value and the remedy. None is what was not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nodeservice.errors import invalid_request

TIMES = (
    "timeout_seconds",
    "wait_timeout_seconds",
    "pull_timeout_seconds",
    "total_timeout_seconds",
    "disconnect_limit_seconds",
)
ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
"""Of a task or a node: it becomes the name of containers, directories and objects."""
_MIN_MEMORY_BYTES = 6 * 1024**2
"""Docker Engine refuses less than 6 MiB."""
_MIN_CPU_MILLI = 10
"""The kernel's least quota is 1 ms in a period of 100 ms."""
DAY_SECONDS = 86_400.0
MAX_SECONDS = 366 * DAY_SECONDS
MOST_PIDS = 4_000_000
"""The kernel takes at most 4,194,304 (PID_MAX_LIMIT) in pids.max, and the runtime needs some beside."""
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL")
_MAX_OPEN_FILES = 1_048_576
"""Linux's fs.nr_open unless the host raised it."""
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}\Z")
_MAX_WORD_BYTES = 128 * 1024
"""Linux passes at most 128 KiB in one argument (MAX_ARG_STRLEN, linux/binfmts.h)."""
_MAX_ENV_COUNT = 1_000
_MIN_BYTES_PER_SECOND = 4096
"""One block a second: less would never end."""


def check_cpu(cpu_milli: int, *, exclusive: bool) -> None:
    if cpu_milli < _MIN_CPU_MILLI:
        raise invalid_request("req_cpu", f"is {cpu_milli / 1000:g} cores", "ask for at least 0.01 cores")
    if exclusive and cpu_milli % 1000:
        raise invalid_request("exclusive_cpus", f"goes with {cpu_milli / 1000:g} cores", "ask for whole cores")


def check_memory(memory_bytes: int) -> None:
    if memory_bytes < _MIN_MEMORY_BYTES:
        raise invalid_request("req_memory", f"is {memory_bytes} bytes", "ask for at least 6 MiB")


def check_pids(limit: int) -> None:
    if not 1 <= limit <= MOST_PIDS:
        raise invalid_request("pids_limit", f"is {limit}", f"allow 1 to {MOST_PIDS} processes")


def check_seconds(field: str, seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds <= MAX_SECONDS:
        raise invalid_request(field, f"is {seconds:.15g}", "use more than 0 and at most a year")


def check_grace(seconds: float) -> None:
    if not 0 <= seconds <= DAY_SECONDS:
        raise invalid_request("grace_seconds", f"is {seconds:.15g}", "use 0 to a day")


def check_stop_signal(name: str) -> None:
    if name not in STOP_SIGNALS:
        raise invalid_request("stop_signal", f"is {name[:64]!a}", f"use one of {', '.join(STOP_SIGNALS)}")


def check_open_files(limit: int) -> None:
    if not 16 <= limit <= _MAX_OPEN_FILES:
        raise invalid_request("open_files_limit", f"is {limit}", f"use 16 to {_MAX_OPEN_FILES}")


def check_rate(field: str, bytes_per_second: int | None) -> None:
    if bytes_per_second is not None and bytes_per_second < _MIN_BYTES_PER_SECOND:
        raise invalid_request(field, f"is {bytes_per_second}", f"use at least {_MIN_BYTES_PER_SECOND} bytes per second")


def check_words(command: str, argv: Iterable[str], env: Iterable[tuple[str, str]]) -> None:
    """What a process is started with."""
    for field, text in (("command", command), *(("argv", word) for word in argv)):
        if not _can_be_passed(text):
            raise invalid_request(
                field, f"is {shown(text)}", "use less than 128 KiB of UTF-8 and no NUL; put long scripts in the image"
            )
    variables = tuple(env)
    if len(variables) > _MAX_ENV_COUNT:
        raise invalid_request("env", f"has {len(variables)} variables", f"use at most {_MAX_ENV_COUNT}")
    for name, value in variables:
        if not _ENV_NAME.match(name):
            raise invalid_request("env", f"has a variable named {shown(name)}", "use letters, digits and _ in names")
        if not _can_be_passed(value):
            raise invalid_request("env", f"has a bad value for {name}", "use less than 128 KiB of UTF-8 and no NUL")


def is_utf8(text: str) -> bool:
    """Python keeps other bytes, of arguments or the environment, as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str) -> str:
    """A hostile text, fit to be shown: short and without control characters."""
    return repr(text[:40]) + (f"… ({len(text)} characters)" if len(text) > 40 else "")


def _can_be_passed(text: str) -> bool:
    """Whether it fits into one argument."""
    return "\0" not in text and is_utf8(text) and len(text.encode()) < _MAX_WORD_BYTES
