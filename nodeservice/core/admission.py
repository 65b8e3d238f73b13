"""Decides whether this node takes a task: validity, identity, room. Hostile input ends here.

Ids become names of containers, directories and objects, so they are held to a narrow alphabet instead of being escaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from nodeservice.core.gpu_request import check_gpu_request
from nodeservice.core.ledger import Ledger, Shortfall
from nodeservice.core.model import GIB, TaskRecord, TaskSpec
from nodeservice.errors import CapacityError, RequestError, invalid_request
from nodeservice.task_bounds import (
    ID,
    TIMES,
    check_cpu,
    check_grace,
    check_memory,
    check_open_files,
    check_pids,
    check_rate,
    check_seconds,
    check_stop_signal,
    check_words,
    is_utf8,
    shown,
)

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAX_ATTEMPT = 1_000_000
_MAX_TEXT = 256


def check_task_id(task_id: str) -> None:
    """Raise RequestError (INVALID_REQUEST) unless the id is safe as a name and in a path."""
    if not task_id:
        raise invalid_request("task_id", "is empty", "give every task an id")
    if not ID.match(task_id):
        raise invalid_request(
            "task_id",
            f"is {shown(task_id)}, which is not safe as a name",
            "use 1–128 of A–Z a–z 0–9 . _ - beginning with a letter or digit, and no '..'",
        )


def check(spec: TaskSpec) -> None:
    """Raise RequestError (INVALID_REQUEST) naming the field, the value and the remedy."""
    check_task_id(spec.id.task_id)
    if not 1 <= spec.id.attempt <= _MAX_ATTEMPT:
        raise invalid_request("attempt", f"is {spec.id.attempt}", f"count attempts from 1 to {_MAX_ATTEMPT}")
    if not spec.image:
        raise invalid_request("docker_image", "is empty", "name an image, such as debian:12")
    for field, text in (
        ("docker_image", spec.image),
        ("user_id", spec.user_id),
        ("task_name", spec.task_name),
        ("task_type", spec.task_type),
    ):
        if len(text) > _MAX_TEXT or _CONTROL.search(text) or not is_utf8(text):
            raise invalid_request(
                field, f"is {shown(text)}", f"use at most {_MAX_TEXT} characters and no control characters"
            )
    if spec.command is not None and spec.argv:
        raise invalid_request("argv", "is given beside command", "give one of the two")
    check_words(spec.command or "", spec.argv, spec.env)
    _check_amounts(spec)


def _check_amounts(spec: TaskSpec) -> None:
    request = spec.request
    for field, value in (
        ("req_cpu", request.cpu_milli),
        ("req_memory", request.memory_bytes),
        ("req_storage", request.disk_bytes),
        ("req_gpu", request.gpu_count),
    ):
        if value < 0:
            raise invalid_request(field, f"is {value}", "ask for zero or more")
    check_cpu(request.cpu_milli, exclusive=spec.exclusive_cpus)
    check_memory(request.memory_bytes)
    check_pids(spec.pids_limit)
    check_grace(spec.grace_seconds)
    check_gpu_request(spec.gpu, gpu_count=request.gpu_count)
    _check_details(spec)


def _check_details(spec: TaskSpec) -> None:
    for field in TIMES:
        check_seconds(field, getattr(spec, field))
    check_stop_signal(spec.stop_signal)
    check_open_files(spec.open_files_limit)
    for field in ("read_bytes_per_second", "write_bytes_per_second"):
        check_rate(field, getattr(spec, field))


def admit(
    spec: TaskSpec,
    *,
    known: Callable[[TaskSpec], TaskRecord | None],
    ledger: Ledger,
    draining: bool,
    conditions: Mapping[str, str],
    live_count: int,
    max_live_count: int,
) -> TaskRecord | None:
    """The record of this very attempt where it is known already: the answer is the same as then. None: it is admitted.

    Raises RequestError (INVALID_REQUEST, TASK_CONFLICT) or CapacityError. Reasons of the latter: INSUFFICIENT_…,
    NODE_DRAINING, or the name of a condition of this node.
    """
    check(spec)
    existing = known(spec)
    if existing is not None:
        if existing.spec.fingerprint == spec.fingerprint:
            return existing
        raise RequestError(
            f"task {spec.id.task_id} attempt {spec.id.attempt} was accepted before with another specification",
            reason="TASK_CONFLICT",
            field="task_id",
            hint="use a new task_id, or a new attempt",
        )
    if draining:
        raise CapacityError("this node takes no new tasks", reason="NODE_DRAINING", hint="assign it elsewhere")
    for name, words in conditions.items():
        raise CapacityError(
            f"this node is not well: {words}", reason=name, hint="assign it elsewhere, and look after this node"
        )
    if live_count >= max_live_count:
        raise CapacityError(
            f"this node already holds {live_count} unfinished tasks",
            reason="INSUFFICIENT_SLOTS",
            hint="assign it elsewhere",
        )
    missing = ledger.shortfall(spec.request, exclusive_cpus=spec.exclusive_cpus, gpu=spec.gpu)
    if missing is not None:
        raise _no_room(missing)
    return None


_RESOURCES = {
    "cpu_milli": ("INSUFFICIENT_CPU", "req_cpu", "CPU"),
    "memory_bytes": ("INSUFFICIENT_MEMORY", "req_memory", "memory"),
    "disk_bytes": ("INSUFFICIENT_STORAGE", "req_storage", "storage"),
    "gpu_count": ("INSUFFICIENT_GPU", "req_gpu", "GPU"),
    "cpu_ids": ("INSUFFICIENT_CPU", "exclusive_cpus", "exclusive cores"),
}


def _no_room(missing: Shortfall) -> CapacityError:
    reason, field, name = _RESOURCES[missing.resource]
    asked, available = _amount(missing.resource, missing.asked), _amount(missing.resource, missing.available)
    if missing.words:
        message = f"not enough {name}: {missing.words}"
        hint = "try again later or elsewhere" if missing.ever else "ask for less, or elsewhere"
    elif missing.ever:
        message, hint = f"not enough {name}: {asked} asked, {available} free", "try again later or elsewhere"
    else:
        message, hint = (
            f"not enough {name}: {asked} asked, this node allocates {available} in all",
            "ask for less, or elsewhere",
        )
    return CapacityError(message, reason=reason, field=field, hint=hint)


def _amount(resource: str, value: int) -> str:
    match resource:
        case "cpu_milli":
            return f"{value / 1000:g} cores"
        case "memory_bytes" | "disk_bytes":
            return f"{value / GIB:.3f} GiB"
        case _:
            return str(value)
