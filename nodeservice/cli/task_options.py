"""The environment and the finer limits of a task, as options that `run` and `submit` share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from nodeservice.cli.units import parse_bytes, parse_seconds
from nodeservice.errors import RequestError
from nodeservice.task_bounds import check_open_files, is_utf8

WaitTimeout = Annotated[str | None, typer.Option(help="From acceptance to the start, the pull included.")]
PullTimeout = Annotated[str | None, typer.Option(help="For the image's pull.")]
TotalTimeout = Annotated[str | None, typer.Option(help="From acceptance to the end: an absolute deadline.")]
StopSignal = Annotated[str | None, typer.Option(help="What asks the task to end, such as SIGINT. Default: SIGTERM.")]
ExclusiveCpus = Annotated[bool, typer.Option("--exclusive-cpus", help="Whole cores of its own instead of a share.")]
OpenFiles = Annotated[int | None, typer.Option(help="File descriptors of one process. Default: 65536.")]
ReadRate = Annotated[str | None, typer.Option(help="Bytes a second read from block devices, such as 50m.")]
WriteRate = Annotated[str | None, typer.Option(help="Bytes a second written to block devices, such as 50m.")]

OPTIONS = {
    "docker_image": "the image",
    "argv": "the command",
    "command": "the command",
    "env": "--env",
    "task_id": "--task-id",
    "task_name": "--name",
    "user_id": "--user",
    "target_worker_id": "--target",
    "attempt": "--attempt",
    "max_retries": "--max-retries",
    "pull_policy": "--pull",
    "req_cpu": "--cpus",
    "cpu_milli": "--cpus",
    "req_memory": "--memory",
    "memory_bytes": "--memory",
    "req_storage": "--disk",
    "disk_bytes": "--disk",
    "req_gpu": "--gpus",
    "gpu.model": "--gpu-model",
    "gpu.min_memory_bytes": "--gpu-min-memory",
    "gpu.min_compute_capability": "--gpu-capability",
    "gpu.mig_profile": "--gpu-mig",
    "gpu.uuids": "--gpu-uuid",
    "gpu.share": "--gpu-memory",
    "gpu.share.memory_bytes": "--gpu-memory",
    "gpu.share.sm_percent": "--gpu-sms",
    "timeout_seconds": "--timeout",
    "wait_timeout_seconds": "--wait-timeout",
    "pull_timeout_seconds": "--pull-timeout",
    "total_timeout_seconds": "--total-timeout",
    "grace_seconds": "--grace",
    "stop_signal": "--stop-signal",
    "pids_limit": "--pids",
    "open_files_limit": "--open-files",
    "exclusive_cpus": "--exclusive-cpus",
    "read_bytes_per_second": "--read-rate",
    "write_bytes_per_second": "--write-rate",
}
"""Field of the wire → what a person typed."""


def by_option(message: str) -> str:
    """A refusal that begins with a field of the wire, with the option in its place."""
    field, space, rest = message.partition(" ")
    name = field.removesuffix(":")
    return f"{OPTIONS.get(name, name)}{field.removeprefix(name)}{space}{rest}"


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
    """Those that were given, by the name that core and wire both use. Raises RequestError."""
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
        check_open_files(open_files)
        given["open_files_limit"] = open_files
    return given


def variables(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Each NAME=VALUE; a bare NAME takes this process's value, and is left out where it has none. Raises RequestError."""
    return [_variable(text) for text in texts if "=" in text or not text or text in os.environ]


def _variable(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not name:
        raise RequestError(
            f"--env is {text[:40]!r}", reason="INVALID_REQUEST", field="env", hint="give NAME=VALUE or NAME"
        )
    if not mark:
        value = os.environ[name]
        if not is_utf8(value):
            raise RequestError(
                f"the value of {name} is not UTF-8", reason="INVALID_REQUEST", field="env", hint="encode it, as base64"
            )
    return name, value
