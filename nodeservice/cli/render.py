"""Tables for people, from the objects that `--json` would print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.text import Text

from nodeservice.cli.cells import bytes_ratio, bytes_text, printable, state, table, text
from nodeservice.cli.fitted import FittedTable, console
from nodeservice.cli.gpu_tables import asked_words, bill_table, complaints, driver_words, gpu_tables, part_words
from nodeservice.cli.receipt_view import other_limits, receipt_rows, receipt_summary

if TYPE_CHECKING:
    from rich.console import Console


_LONGEST_MESSAGE = 120
_MOST_WITH_GPUS = 16
"""Nodes: of more, two tables each would be thousands of lines."""


def show_tasks(tasks: Sequence[Mapping[str, Any]]) -> None:
    """The column of GPUs is there where any task asks for some. AGE is how long ago it was submitted."""
    gpus = ("GPU",) if any(task["gpu_count"] or task["gpu"] for task in tasks) else ()
    made = FittedTable(
        ("TASK", "TRY", "STATE", *gpus, "PHASE", "AGE", "NODE", "IMAGE", "REASON", "MESSAGE"),
        text="MESSAGE",
        spare=("IMAGE", "TRY", "PHASE", *gpus, "NODE", "AGE", "MESSAGE"),
    )
    now = datetime.now(UTC)
    for task in tasks:
        made.add_row(
            text(task["task_id"]),
            str(task["attempt"]),
            state(task["state"]),
            *([_gpu_cell(task)] if gpus else []),
            text(task["phase"]),
            _age(task["submitted_at"], now),
            text(task["worker_id"]),
            text(task["image"]),
            text(task["reason"]),
            text(_beginning(task["message"] or "")),
        )
    console().print(made)


def _age(instant: str | None, now: datetime) -> str:
    """`42s`, `5m`, `3h`, `12d`. The clock of a master may be ahead of ours."""
    if not instant:
        return ""
    seconds = max(0, int((now - datetime.fromisoformat(instant)).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _beginning(words: str) -> str:
    """`show` has all of it."""
    return words if len(words) <= _LONGEST_MESSAGE else f"{words[: _LONGEST_MESSAGE - 1]}…"


def _gpu_cell(task: Mapping[str, Any]) -> str:
    if not task["gpu_count"] and not task["gpu"]:
        return ""
    return text(asked_words(task["gpu_count"], task["gpu"], brief=True))


def show_nodes(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Amounts are assigned / allocatable. Below the table what is wrong, and the GPUs of each node."""
    out = console()
    made = FittedTable(
        ("NODE", "STATE", "ADDRESS", "CPU", "MEMORY", "DISK", "GPU", "TASKS", "HEARD OF (UTC)", "VERSION"),
        text="ADDRESS",
        spare=("ADDRESS", "VERSION", "DISK", "HEARD OF (UTC)", "MEMORY"),
    )
    for node in nodes:
        assigned, allocatable = node["assigned"], node["allocatable"]
        made.add_row(
            text(node["worker_id"]),
            "CORDONED" if node["draining"] and node["state"] == "ACTIVE" else state(node["state"]),
            text(node["address"]),
            f"{assigned['cpu_milli'] / 1000:g}/{allocatable['cpu_milli'] / 1000:g}",
            bytes_ratio(assigned["memory_bytes"], allocatable["memory_bytes"]),
            bytes_ratio(assigned["disk_bytes"], allocatable["disk_bytes"]),
            "fault" if _lacks_driver(node) else f"{assigned['gpu_count']}/{allocatable['gpu_count']}",
            str(len(node["running_tasks"])),
            text(_second(node["last_heartbeat_at"])),
            text(node["version"] or ""),
        )
    out.print(made)
    for node in nodes:
        for words in (*node["conditions"], *node["warnings"]):
            out.print(Text(printable(f"{node['worker_id']} {words}"), style="red"))
    with_gpus = [node for node in nodes if node["gpus"]]
    if len(with_gpus) > _MOST_WITH_GPUS:
        for node in with_gpus:
            for words in complaints(node["gpus"]):
                out.print(Text(f"{printable(node['worker_id'])} ").append_text(words))
        out.print(
            text(f"The GPUs of {len(with_gpus)} nodes are not listed: name up to {_MOST_WITH_GPUS} to see theirs.")
        )
    else:
        for node in with_gpus:
            versions = driver_words(node["gpu_driver_version"], node["cuda_version"])
            title = text(f"GPUs of {node['worker_id']}" + (f": {versions}" if versions else ""))
            for part in gpu_tables(node["gpus"], title=title):
                out.print(part)


def _lacks_driver(node: Mapping[str, Any]) -> bool:
    """How many GPUs there are is not known then; the warning says why."""
    return not node["gpus"] and any(str(words).startswith("GPU_DRIVER") for words in node["warnings"])


def _second(instant: str | None) -> str:
    """Of an ISO 8601 instant, what people look for."""
    return instant[5:19].replace("T", " ") if instant else ""


def show_task(task: Mapping[str, Any]) -> None:
    """The full story: how it ended, why, how long each phase took, what was used and what was granted."""
    out = console()
    facts = table("", "", header=False)
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
        f"{bytes_text(request['disk_bytes'])} disk, {asked_words(request['gpu_count'], request['gpu'])}",
        "submitted": task["submitted_at"],
        "assigned": task["assigned_at"],
        "finished": task["finished_at"],
        "results": task["result_location"],
        "manifest": task["manifest"]["sha256"] if task["manifest"] else None,
        "trace": task["trace_id"],
        "GPUs": ", ".join(task["gpu_uuids"]),
        "GPU part": part_words(task["gpu_part"]) if task["gpu_part"] else None,
    }
    for label, value in rows.items():
        if value not in (None, ""):
            facts.add_row(label, state(value) if label == "state" else text(value))
    used = [(name, value) for name, value in task["usage"].items() if value is not None and name != "gpus"]
    for name, value in used:
        facts.add_row(*_usage_row(name, value))
    for name, value in _flat(other_limits(task["limits"])):
        facts.add_row(f"limit {name}", text(value))
    for remark in task["remarks"]:
        facts.add_row("remark", text(remark))
    out.print(facts)
    _show_attempts(task["attempts"], out)
    if task["usage"]["gpus"]:
        out.print(bill_table(task["usage"]["gpus"]))
    _show_receipt(task["limits"], out)
    if task["phases"]:
        phases = table("PHASE", "START", "SECONDS")
        for phase in task["phases"]:
            phases.add_row(text(phase["name"]), text(phase["start"]), f"{phase['duration']:.3f}")
        out.print(phases)


def _show_attempts(attempts: Sequence[Mapping[str, Any]], out: Console) -> None:
    """Where there was more than one, or a lost one that told its end after all."""
    if len(attempts) < 2 and not any(one["late_outcome"] for one in attempts):
        return
    made = FittedTable(
        ("TRY", "STATE", "NODE", "QUEUED", "ENDED", "REASON", "MESSAGE", "TOLD LATE"),
        text="MESSAGE",
        spare=("QUEUED", "ENDED", "NODE", "MESSAGE"),
    )
    for one in attempts:
        late = f"{one['late_outcome']} {one['late_reason']}" if one["late_outcome"] else ""
        made.add_row(
            str(one["attempt"]),
            state(one["state"]),
            text(one["worker_id"]),
            text(_second(one["queued_at"])),
            text(_second(one["finished_at"])),
            text(one["reason"]),
            text(_beginning(one["message"] or "")),
            text(late),
        )
    out.print(made)


def _show_receipt(limits: object, out: Console) -> None:
    rows = list(receipt_rows(limits))
    if rows:
        receipt = FittedTable(
            ("LIMIT", "ASKED", "IN FORCE", "KEPT", "READ FROM"), text="IN FORCE", spare=("READ FROM", "ASKED")
        )
        for cells in rows:
            receipt.add_row(*(text(cell) for cell in cells))
        out.print(receipt)
    for sentence in receipt_summary(limits):
        if sentence.startswith("limit not"):
            out.print(text(sentence), style="red")


def _usage_row(name: str, value: float) -> tuple[str, str]:
    label = f"used {name.removesuffix('_bytes').removesuffix('_count').replace('_', ' ')}"
    return label, bytes_text(int(value)) if name.endswith("_bytes") else f"{value:g}"


def _flat(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}{key} ")]
    return [(prefix.strip(), value)] if prefix else []
