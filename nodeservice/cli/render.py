"""Tables for people, from the objects that `--json` would print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nodeservice.cli.receipt_view import other_limits, receipt_rows, receipt_summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_COLORS = {
    "SUCCEEDED": "green",
    "FAILED": "red",
    "REJECTED": "red",
    "CANCELLED": "yellow",
    "RUNNING": "cyan",
    "ACTIVE": "green",
    "INACTIVE": "red",
}


def show_tasks(tasks: Iterable[Mapping[str, Any]]) -> None:
    table = _table("TASK", "ATTEMPT", "STATE", "PHASE", "NODE", "IMAGE", "REASON", "MESSAGE")
    for task in tasks:
        table.add_row(
            _text(task["task_id"]),
            str(task["attempt"]),
            _state(task["state"]),
            _text(task["phase"]),
            _text(task["worker_id"]),
            _text(task["image"]),
            _text(task["reason"]),
            _text(task["message"]),
        )
    _console().print(table)


def show_nodes(nodes: Iterable[Mapping[str, Any]]) -> None:
    """Amounts are assigned / allocatable."""
    table = _table("NODE", "STATE", "ADDRESS", "CPU", "MEMORY", "DISK", "GPU", "TASKS", "LAST HEARTBEAT")
    for node in nodes:
        assigned, allocatable = node["assigned"], node["allocatable"]
        table.add_row(
            _text(node["worker_id"]),
            _state(node["state"]),
            _text(node["address"]),
            f"{assigned['cpu_milli'] / 1000:g}/{allocatable['cpu_milli'] / 1000:g}",
            f"{bytes_text(assigned['memory_bytes'])}/{bytes_text(allocatable['memory_bytes'])}",
            f"{bytes_text(assigned['disk_bytes'])}/{bytes_text(allocatable['disk_bytes'])}",
            f"{assigned['gpu_count']}/{allocatable['gpu_count']}",
            str(len(node["running_tasks"])),
            _text(_seconds_text(node["last_heartbeat_at"])),
        )
    _console().print(table)


def show_task(task: Mapping[str, Any]) -> None:
    """The full story: how it ended, why, how long each phase took, what was used and what was granted."""
    console = _console()
    facts = _table("", "", header=False)
    request = task["request"]
    rows = {
        "task": f"{task['task_id']}  attempt {task['attempt']}",
        "name": task["name"],
        "image": task["image"],
        "digest": task["image_digest"],
        "command": task["command"] or " ".join(task["argv"]),
        "state": task["state"],
        "phase": task["phase"],
        "node": task["worker_id"],
        "reason": task["reason"],
        "message": task["message"],
        "exit code": task["exit_code"],
        "asked": f"{request['cpu_milli'] / 1000:g} CPU, {bytes_text(request['memory_bytes'])} memory, "
        f"{bytes_text(request['disk_bytes'])} disk, {request['gpu_count']} GPU",
        "submitted": task["submitted_at"],
        "assigned": task["assigned_at"],
        "finished": task["finished_at"],
        "results": task["result_location"],
        "manifest": task["manifest"]["sha256"] if task["manifest"] else None,
        "trace": task["trace_id"],
        "GPUs": ", ".join(task["gpu_uuids"]),
    }
    for label, value in rows.items():
        if value not in (None, ""):
            facts.add_row(label, _state(value) if label == "state" else _text(value))
    for name, value in task["usage"].items():
        if value is not None:
            facts.add_row(*_usage_row(name, value))
    for name, value in _flat(other_limits(task["limits"])):
        facts.add_row(f"limit {name}", _text(value))
    for remark in task["remarks"]:
        facts.add_row("remark", _text(remark))
    console.print(facts)
    rows_of_receipt = list(receipt_rows(task["limits"]))
    if rows_of_receipt:
        receipt = _table("LIMIT", "ASKED", "IN FORCE", "KEPT", "READ FROM")
        for cells in rows_of_receipt:
            receipt.add_row(*(_text(cell) for cell in cells))
        console.print(receipt)
    for sentence in receipt_summary(task["limits"]):
        if sentence.startswith("limit not"):
            console.print(_text(sentence), style="red")
    if task["phases"]:
        phases = _table("PHASE", "START", "SECONDS")
        for phase in task["phases"]:
            phases.add_row(_text(phase["name"]), _text(phase["start"]), f"{phase['duration']:.3f}")
        console.print(phases)


def _seconds_text(instant: object) -> str:
    """`2026-01-31 23:59:59 UTC` of an ISO 8601 instant in UTC: narrow enough for a table."""
    text = "" if instant is None else str(instant)
    return f"{text[:10]} {text[11:19]} UTC" if text.endswith("+00:00") else text


def bytes_text(count: int) -> str:
    """`64 MiB`, `1.5 GiB`, for people."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.4g} {unit}"


def _usage_row(name: str, value: float) -> tuple[str, str]:
    label = f"used {name.removesuffix('_bytes').removesuffix('_count').replace('_', ' ')}"
    return label, bytes_text(int(value)) if name.endswith("_bytes") else f"{value:g}"


def _flat(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}{key} ")]
    return [(prefix.strip(), value)] if prefix else []


def _text(value: object) -> str:
    """Words from the wire: no markup, no control characters."""
    from rich.markup import escape

    text = "" if value is None else str(value)
    return escape("".join(character if character.isprintable() else "�" for character in text))


def _state(state: str) -> str:
    color = _COLORS.get(state)
    return f"[{color}]{state}[/]" if color else _text(state)


def _table(*columns: str, header: bool = True) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE if header else None, show_header=header, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    return table


def _console() -> Console:
    import sys

    from rich.console import Console

    # A pipe has no width; tables that are cut at 80 columns would lose ids.
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
