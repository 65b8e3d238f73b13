"""Check what comes over the wire before anything is done with it; every text and number is taken for hostile."""

from __future__ import annotations

import math
import re

from nodeservice.errors import RequestError
from nodeservice.master.amounts import GIB, Amounts
from nodeservice.master.gpu_checks import wish_of
from nodeservice.master.request import Request
from nodeservice.master.rows import State, Wanted
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
)
from nodeservice.wire import master_worker_pb2 as pb

TASK_MAX_BYTES = 1024**2
_LABEL = re.compile(r"[^\x00-\x1f\x7f/\\]{1,128}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,255}")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_PORT = re.compile(r"[0-9]{1,5}")
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_PULL_POLICIES = ("always", "if-not-present", "never")
_LARGEST = {"cpu_milli": 10**9, "memory_bytes": 2**60, "disk_bytes": 2**60}
_MOST_RETRIES = 1000
_LATEST_UNIX = 253402300799
"""The last second of the year 9999."""


def invalid(field: str, message: str, *, hint: str | None = None) -> RequestError:
    return RequestError(f"{field}: {message}", reason="INVALID_REQUEST", field=field, hint=hint)


def shown(text: str) -> str:
    """A hostile text made fit for a message: short, printable."""
    return ascii(text[:64]) + ("…" if len(text) > 64 else "")


def is_id(text: str) -> bool:
    return ID.match(text) is not None


def check_id(field: str, text: str) -> str:
    if not is_id(text):
        remedy = "1 to 128 of A-Z a-z 0-9 . _ -, a letter or digit first, no '..'"
        raise invalid(field, f"{shown(text)} is not an id", hint=remedy)
    return text


def check_attempt(field: str, attempt: int) -> int:
    if not 1 <= attempt <= 1_000_000:
        raise invalid(field, f"{attempt} is not between 1 and 1000000")
    return attempt


def check_wanted(request: pb.ListTasksRequest) -> Wanted:
    unknown = set(request.states) - {state.value for state in State}
    if unknown:
        raise invalid("states", f"{shown(min(unknown))} is none of {', '.join(State)}")
    if request.worker_id:
        check_id("worker_id", request.worker_id)
    return Wanted(states=frozenset(request.states), worker_id=request.worker_id, since_ms=max(0, request.since_unix_ms))


def check_traceparent(text: str) -> str:
    """The W3C header if it is well-formed, else an empty text: a broken trace context is no reason to refuse work."""
    return text if _TRACEPARENT.fullmatch(text) else ""


def check_address(field: str, text: str, *, default_port: int) -> str:
    """`host` or `host:port` as `host:port`; an IPv6 address stands in brackets."""
    host, separator, port_text = text.rpartition(":")
    if not separator or text.endswith("]"):
        host, port_text = text, str(default_port)
    if not _HOST.fullmatch(host) or not _PORT.fullmatch(port_text) or not 1 <= int(port_text) <= 65535:
        raise invalid(field, f"{shown(text)} is not HOST or HOST:PORT")
    return f"{host}:{int(port_text)}"


def amount_of(field: str, value: float, *, scale: int, largest: int) -> int:
    """An old field (cores, GiB, count) in exact units."""
    if not math.isfinite(value) or value < 0:
        raise invalid(field, f"{value} is not a finite number from 0 up")
    if value * scale > largest:
        raise invalid(field, f"{value} is beyond anything that exists")
    return round(value * scale)


def request_of(task: pb.Task) -> Request:
    """What the task asks for: an exact extension field wins over its `req_*` field and must not contradict it."""
    gpus = wish_of(task)
    amounts = Amounts(
        cpu_milli=_exact(task, "cpu_milli", "req_cpu", 1000),
        memory_bytes=_exact(task, "memory_bytes", "req_memory", GIB),
        disk_bytes=_exact(task, "disk_bytes", "req_storage", GIB),
        gpu_count=gpus.count,
    )
    return Request(amounts=amounts, gpus=gpus)


def _exact(task: pb.Task, field: str, old_field: str, scale: int) -> int:
    old = amount_of(old_field, getattr(task, old_field), scale=scale, largest=_LARGEST[field])
    if not task.HasField(field):
        return old
    exact = int(getattr(task, field))
    if not 0 <= exact <= _LARGEST[field]:
        raise invalid(field, f"{exact} is not between 0 and {_LARGEST[field]}")
    # A peer may round the old field to whole units or leave it empty; more than 1 % (and one unit) apart is a mistake.
    if old and abs(old - exact) > max(1, exact // 100):
        raise invalid(field, f"{exact} contradicts {old_field} = {getattr(task, old_field):g}")
    return exact


def check_task(task: pb.Task) -> Request:
    """Refuse what no node could take as it is meant; returns what the task asks for. Raises RequestError."""
    if task.ByteSize() > TASK_MAX_BYTES:
        raise invalid(
            "task", f"{task.ByteSize()} bytes are more than {TASK_MAX_BYTES}", hint="pass large input another way"
        )
    check_id("task_id", task.task_id)
    if task.HasField("attempt"):
        check_attempt("attempt", task.attempt)
    if not _IMAGE.fullmatch(task.docker_image):
        raise invalid("docker_image", f"{shown(task.docker_image)} is not the name of an image")
    if task.command and task.argv:
        raise invalid("argv", "excludes command", hint="give one of them")
    _check_texts(task)
    _check_limits(task)
    if task.HasField("pull_policy") and task.pull_policy not in _PULL_POLICIES:
        raise invalid("pull_policy", f"{shown(task.pull_policy)} is none of {', '.join(_PULL_POLICIES)}")
    if not 0 <= task.max_retries <= _MOST_RETRIES:
        raise invalid("max_retries", f"{task.max_retries} is not between 0 and {_MOST_RETRIES}")
    if not math.isfinite(task.sla_multiplier) or task.sla_multiplier < 0:
        raise invalid("sla_multiplier", f"{task.sla_multiplier} is not a finite number from 0 up")
    if not 0 <= task.submitted_at <= _LATEST_UNIX:
        raise invalid("submitted_at", f"{task.submitted_at} is not a time in Unix seconds")
    request = request_of(task)
    if request.amounts.cpu_milli or task.HasField("cpu_milli"):
        check_cpu(request.amounts.cpu_milli, exclusive=task.exclusive_cpus)
    if request.amounts.memory_bytes or task.HasField("memory_bytes"):
        check_memory(request.amounts.memory_bytes)
    return request


def _check_limits(task: pb.Task) -> None:
    """By the node's own bounds; 0 is no limit, and what is not given is the node's to choose."""
    for field in TIMES:
        check_seconds(field, getattr(task, field) or None)
    check_grace(task.grace_seconds)
    if task.HasField("pids_limit"):
        check_pids(task.pids_limit)
    if task.HasField("open_files_limit"):
        check_open_files(task.open_files_limit)
    if task.stop_signal:
        check_stop_signal(task.stop_signal)
    for field in ("read_bytes_per_second", "write_bytes_per_second"):
        check_rate(field, getattr(task, field) or None)


def _check_texts(task: pb.Task) -> None:
    if task.target_worker_id:
        check_id("target_worker_id", task.target_worker_id)
    for field, text in (("task_name", task.task_name), ("task_type", task.task_type), ("user_id", task.user_id)):
        if text and not _LABEL.fullmatch(text):
            raise invalid(field, f"{shown(text)} has characters that it may not have or is longer than 128")
    check_words(task.command, task.argv, ((variable.name, variable.value) for variable in task.env))
