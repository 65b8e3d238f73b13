"""The environment and the finer limits of a task, as options that `run` and `submit` share."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from nodeservice.cli.units import parse_bytes, parse_seconds
from nodeservice.errors import RequestError

WaitTimeout = Annotated[str | None, typer.Option(help="From acceptance to the start, the pull included.")]
PullTimeout = Annotated[str | None, typer.Option(help="For the image's pull.")]
TotalTimeout = Annotated[str | None, typer.Option(help="From acceptance to the end: an absolute deadline.")]
StopSignal = Annotated[str | None, typer.Option(help="What asks the task to end, such as SIGINT. Default: SIGTERM.")]
ExclusiveCpus = Annotated[bool, typer.Option("--exclusive-cpus", help="Whole cores of its own instead of a share.")]
OpenFiles = Annotated[int | None, typer.Option(min=16, help="File descriptors of one process. Default: 65536.")]
ReadRate = Annotated[str | None, typer.Option(help="Bytes a second read from block devices, such as 50m.")]
WriteRate = Annotated[str | None, typer.Option(help="Bytes a second written to block devices, such as 50m.")]


def limits_given(
    *,
    wait_timeout: str | None,
    pull_timeout: str | None,
    total_timeout: str | None,
    stop_signal: str | None,
    exclusive_cpus: bool,
    open_files: int | None,
    read_rate: str | None,
    write_rate: str | None,
) -> dict[str, Any]:
    """Those that were given, by the name that core and wire both use. Raises RequestError naming the option."""
    given: dict[str, Any] = {}
    for name, typed in (("wait", wait_timeout), ("pull", pull_timeout), ("total", total_timeout)):
        if typed is not None:
            # 0 is no limit, as on the wire.
            given[f"{name}_timeout_seconds"] = parse_seconds(typed, option=f"--{name}-timeout") or None
    for name, typed in (("read", read_rate), ("write", write_rate)):
        if typed is not None:
            given[f"{name}_bytes_per_second"] = parse_bytes(typed, option=f"--{name}-rate")
    if stop_signal is not None:
        signal = stop_signal.upper()
        given["stop_signal"] = signal if signal.startswith("SIG") else f"SIG{signal}"
    if exclusive_cpus:
        given["exclusive_cpus"] = True
    if open_files is not None:
        given["open_files_limit"] = open_files
    return given


def variable(text: str) -> tuple[str, str]:
    """NAME=VALUE; a bare NAME takes this process's value. Raises RequestError."""
    name, mark, value = text.partition("=")
    if not name:
        raise RequestError(
            f"--env is {text[:40]!r}", reason="INVALID_REQUEST", field="env", hint="give NAME=VALUE or NAME"
        )
    if not mark:
        value = os.environ.get(name, "")
        if not is_utf8(value):
            raise RequestError(
                f"the value of {name} is not UTF-8", reason="INVALID_REQUEST", field="env", hint="encode it, as base64"
            )
    return name, value


def is_utf8(text: str) -> bool:
    """Whether arguments or environment held it as UTF-8; Python keeps other bytes as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
