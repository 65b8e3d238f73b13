"""Tables for people fit a terminal, and options mean the same to `run` and `submit`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from rich.console import Console

from nodeservice.cli import render
from nodeservice.cli.cells import bytes_ratio
from nodeservice.cli.gpu_json import gpus_document
from nodeservice.cli.gpu_tables import gpu_tables
from nodeservice.cli.render import show_nodes
from nodeservice.cli.task_json import node_document, task_summary
from nodeservice.cli.task_options import limits_given
from nodeservice.wire import master_worker_pb2 as pb

NOTHING: dict[str, object] = {
    "wait_timeout": None, "pull_timeout": None, "total_timeout": None, "stop_signal": None, "exclusive_cpus": False,
    "open_files": None, "read_rate": None, "write_rate": None,
}  # fmt: skip


def test_the_last_heartbeat_of_a_node_is_shown_to_the_second_and_its_version(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = pb.NodeView(
        worker_id="node-1", state="ACTIVE", last_heartbeat_unix_ms=1_764_000_000_123, node_version="0.1.0"
    )
    show_nodes([node_document(view), node_document(pb.NodeView(worker_id="never-heard"))])
    lines = capsys.readouterr().out.splitlines()
    assert next(line.rstrip() for line in lines if "node-1" in line).endswith(" 11-24 16:00:00  0.1.0")
    assert "16:00" not in next(line for line in lines if "never-heard" in line)


def test_of_many_nodes_with_gpus_the_trouble_alone_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    gpus = [pb.GpuInfo(uuid="GPU-a", state="WELL"), pb.GpuInfo(uuid="GPU-b", state="FAULTY", state_reason="XID 79")]
    views = [node_document(pb.NodeView(worker_id=f"node-{number}", gpus=gpus)) for number in range(17)]
    show_nodes(views[:16])
    assert "GPU-a" in capsys.readouterr().out
    show_nodes(views)
    out = capsys.readouterr().out
    assert ("GPU-a" in out, "GPUs of 17 nodes are not listed" in out) == (False, True)
    assert "node-16 GPU-b FAULTY: XID 79" in out


def _tasks() -> list[dict[str, object]]:
    """As long as they come: ids like those of a master, the longest words for state and reason."""
    ended = pb.TaskView(
        task=pb.Task(task_id="task-1764000000", docker_image="registry.example.org/team/training:2026.11", attempt=2),
        state="REJECTED", worker_id="gpu-node-17", reason="INSUFFICIENT_MEMORY", submitted_at_unix_ms=1_764_000_000_000,
        message="req_memory is 64 bytes (ask for at least 6 MiB), and more words than fit into one line of a terminal",
    )  # fmt: skip
    running = pb.TaskView(task=pb.Task(task_id="run-2", docker_image="busybox"), state="RUNNING", phase="COLLECTING")
    return [task_summary(ended), task_summary(running)]


def _drawn(columns: int, monkeypatch: pytest.MonkeyPatch, *, gpus: Sequence[dict[str, object]] = ()) -> list[str]:
    out = io.StringIO()
    at_width = Console(file=out, width=columns, highlight=False)
    monkeypatch.setattr(render, "console", lambda: at_width)
    if gpus:
        for part in gpu_tables(gpus, title="GPUs"):
            at_width.print(part)
    else:
        render.show_tasks(_tasks())
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= columns
    return lines


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_a_list_of_tasks_breaks_no_word_and_keeps_what_matters_most(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = _drawn(columns, monkeypatch)
    words = {word for line in lines for word in line.split()}
    assert {"TASK", "task-1764000000", "STATE", "REJECTED", "REASON", "INSUFFICIENT_MEMORY"} <= words
    if columns >= 80:
        assert {"req_memory", "64", "bytes", "(ask", "least", "MiB),", "and", "more", "words"} <= words
    if columns >= 120:
        assert {"gpu-node-17", "COLLECTING", "AGE"} <= words
    assert ("registry.example.org/team/training:2026.11" in words) == (columns >= 200)


def test_a_pipe_gets_each_task_whole_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_tasks([task | {"message": "w" * 119, "image": "i" * 300} for task in _tasks()])
    line = next(line for line in capsys.readouterr().out.splitlines() if "task-1764000000" in line)
    assert "w" * 119 in line
    assert "i" * 300 in line


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_of_gpus_break_no_word(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    info = pb.GpuInfo(
        uuid="GPU-00000000-0000-0000-0000-000000000001", name="NVIDIA A100-SXM4-80GB", state="SUSPECT", leasable=True,
        pci_address="00000000:19:00.0", compute_capability="8.0", ecc_enabled=True, memory_total_bytes=80 * 2**30,
        share_methods=["mps", "watched"],
    )  # fmt: skip
    words = {word for line in _drawn(columns, monkeypatch, gpus=gpus_document([info])) for word in line.split()}
    assert {info.uuid, "STATE", "SUSPECT", "HELD", "free", "CAPABILITY", "8.0", "POWER", "PARTS"} <= words


def test_how_old_a_task_is_stands_in_its_largest_unit() -> None:
    now = datetime(2026, 11, 30, 12, tzinfo=UTC)
    ages = {
        "2026-11-30T12:00:05.000+00:00": "0s",
        "2026-11-30T11:59:18.000+00:00": "42s",
        None: "",
        "2026-11-30T11:00:01.000+00:00": "59m",
        "2026-11-30T09:00:00.000+00:00": "3h",
        "2026-11-18T11:00:00.000+00:00": "12d",
    }
    assert {instant: render._age(instant, now) for instant in ages} == ages


@pytest.mark.parametrize("name", ["wait", "pull", "total"])
def test_a_time_limit_of_zero_is_none(name: str) -> None:
    given = limits_given(**NOTHING | {f"{name}_timeout": "0s"})  # type: ignore[arg-type]
    assert given == {f"{name}_timeout_seconds": None}
    assert not pb.Task(**given).HasField(f"{name}_timeout_seconds")  # type: ignore[arg-type]


def test_a_part_of_an_amount_is_shown_in_the_unit_of_the_whole() -> None:
    assert bytes_ratio(512 * 1024**2, 22 * 1024**3) == "0.5/22 GiB"
    assert bytes_ratio(0, 0) == "0/0 B"
