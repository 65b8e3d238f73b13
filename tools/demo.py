"""The main job, live: a master and a node start, a batch of tasks runs, and everything promised is checked.

One task for each licence text of this host counts its words; one more allocates past its memory limit, one overruns its
time. Exit 0 only if every task ended as it should and every manifest verifies against the stored bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import grpc
from demo_processes import ENDED, START_SECONDS, running
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from nodeservice.testing.otlp import OtlpReceiver, ReceivedSpan
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

HOME = Path(__file__).resolve().parent.parent / ".demo"
LICENCES = Path("/usr/share/common-licenses")
MIB = 1024 * 1024
BATCH_SECONDS = 300.0
OTHERS_MEMORY = 48 * MIB
WIDE_COLUMNS = 90
"""From here on there is room for more space between the columns."""


@dataclass(frozen=True, slots=True)
class Expected:
    task: pb.Task
    reason: str


def main() -> int:
    console = Console()
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(OtlpReceiver())
        master = stack.enter_context(running(HOME, "master", "--listen", "127.0.0.1:0", "--insecure"))
        address = f"127.0.0.1:{master}"
        stack.enter_context(
            running(
                HOME, "serve", "--worker-id", "demo-node", "--listen", "127.0.0.1:0", "--insecure", "--master", address,
                "--results-dir", str(HOME / "results"), "--otlp-endpoint", receiver.endpoint,
            )
        )  # fmt: skip
        channel = stack.enter_context(grpc.insecure_channel(address))
        client = pb_grpc.MasterWorkerStub(channel)
        show_node(console, client)
        expected = batch()
        for item in expected:
            ack = client.SubmitTask(item.task, timeout=10)
            if not ack.success:
                console.print(f"[red]{item.task.task_id} was refused: {ack.message}")
                return 1
        views = watch(console, client, expected)
        receiver.wait_for(lambda spans: trace_of(views[0], spans) is not None, timeout_seconds=15.0)
        verdicts = [check(item, views[index]) for index, item in enumerate(expected)]
        show_results(console, views, verdicts)
        show_trace(console, views[0], receiver.spans)
    failed = [fault for fault in verdicts if fault]
    good = f"{len(verdicts) - len(failed)} of {len(verdicts)} tasks ended as they should, their manifests verified"
    console.print(f"\n{good}, in {time.monotonic() - began:.1f} s")
    return 1 if failed else 0


# ---- the parts --------------------------------------------------------------------------------------------------------


def batch() -> list[Expected]:
    texts = sorted(path.name for path in LICENCES.iterdir() if path.is_file() and not path.is_symlink())
    if not texts:
        raise SystemExit(f"there are no licence texts in {LICENCES}")
    now = int(time.time())
    count = [
        Expected(
            pb.Task(
                task_id=f"words-{name}", task_name=f"words in {name}", docker_image="nodeservice/wordcount",
                argv=["wordcount", name], cpu_milli=250, memory_bytes=OTHERS_MEMORY, disk_bytes=16 * MIB,
                timeout_seconds=60, submitted_at=now, user_id="demo",
            ),
            "COMPLETED",
        )
        for name in texts
    ]  # fmt: skip
    hog = pb.Task(
        task_id="memory-hog", task_name="allocates past its limit", docker_image="nodeservice/demo",
        command="echo allocating; tail /dev/zero", cpu_milli=250, memory_bytes=24 * MIB, disk_bytes=MIB,
        timeout_seconds=60, submitted_at=now, user_id="demo",
    )  # fmt: skip
    late = pb.Task(
        task_id="overrun", task_name="overruns its time", docker_image="nodeservice/demo",
        command="echo waiting; sleep 600", cpu_milli=100, memory_bytes=16 * MIB, disk_bytes=MIB,
        timeout_seconds=2, grace_seconds=1, submitted_at=now, user_id="demo",
    )  # fmt: skip
    return [*count, Expected(hog, "MEMORY_LIMIT"), Expected(late, "DEADLINE")]


def show_node(console: Console, client: pb_grpc.MasterWorkerStub) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        nodes = client.ListNodes(pb.ListNodesRequest(), timeout=10).nodes
        if nodes:
            amount = nodes[0].allocatable
            console.print(
                f"node [bold]{nodes[0].worker_id}[/] registered; for tasks it has\n"
                f"  {amount.cpu_milli / 1000:g} cores, {amount.memory_bytes / 2**30:.1f} GiB memory, "
                f"{amount.disk_bytes / 2**30:.1f} GiB disk, {amount.gpu_count} GPUs\n"
            )
            return
        time.sleep(0.05)
    raise SystemExit("the node did not register")


def watch(console: Console, client: pb_grpc.MasterWorkerStub, expected: list[Expected]) -> list[pb.TaskView]:
    """The live table, until all have ended."""
    give_up = time.monotonic() + BATCH_SECONDS
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        while True:
            views = {view.task.task_id: view for view in client.ListTasks(pb.ListTasksRequest(), timeout=10).tasks}
            ordered = [views[item.task.task_id] for item in expected]
            live.update(progress(ordered))
            if all(view.state in ENDED for view in ordered):
                return [client.GetTask(pb.TaskID(task_id=item.task.task_id), timeout=10) for item in expected]
            if time.monotonic() > give_up:
                raise SystemExit("the batch did not end in time")
            time.sleep(0.1)


def progress(views: list[pb.TaskView]) -> Table:
    table = Table("task", "state", "phase", box=None)
    for view in views:
        colour = {"SUCCEEDED": "green", "FAILED": "yellow", "QUEUED": "dim"}.get(view.state, "cyan")
        table.add_row(view.task.task_id, f"[{colour}]{view.state}", view.phase)
    return table


# ---- the checks -------------------------------------------------------------------------------------------------------


def check(item: Expected, view: pb.TaskView) -> str:
    """What is wrong with how the task ended; empty if nothing."""
    if view.result.reason != item.reason:
        return f"ended as {view.result.reason} ({view.result.message}), expected {item.reason}"
    location = urlsplit(view.result.result_location)
    if location.scheme != "file":
        return f"no results at {view.result.result_location!r}"
    directory = Path(unquote(location.path))
    manifest = (directory / "manifest.json").read_bytes()
    if hashlib.sha256(manifest).hexdigest() != view.result.manifest_sha256:
        return "the stored manifest is not the reported one"
    files = json.loads(manifest)["files"]
    for entry in files:
        data = (directory / entry["path"]).read_bytes()
        if len(data) != entry["size_bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            return f"{entry['path']} is not what the manifest says"
    if item.reason == "COMPLETED" and {entry["path"] for entry in files} != {"stdout.log", "summary.txt", "words.tsv"}:
        return f"unexpected files: {[entry['path'] for entry in files]}"
    return ""


def show_results(console: Console, views: list[pb.TaskView], faults: list[str]) -> None:
    """All columns are as wide as their longest text, which together fit into 80; what is wrong stands below the table."""
    gap = 2 if console.width >= WIDE_COLUMNS else 1
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for header in ("task", "outcome", "reason"):
        table.add_column(header, overflow="fold")
    for header in ("run\ns", "total\ns", "peak\nMiB"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    table.add_column("hash\nok")
    top = (HOME / "results").as_uri() + "/"
    for view, fault in zip(views, faults, strict=True):
        result = view.result
        seconds = {phase.name: phase.duration_ns / 1e9 for phase in result.phases}
        peak = f"{result.usage.memory_peak_bytes / MIB:.1f}" if result.usage.HasField("memory_peak_bytes") else "?"
        table.add_row(
            view.task.task_id, result.outcome, result.reason, f"{seconds.get('run', 0):.2f}",
            f"{sum(seconds.values()):.2f}", peak, result.result_location.removeprefix(top),
            "[red]NO" if fault else "[green]yes",
        )  # fmt: skip
    console.print(table)
    console.print(f"results are below {unquote(urlsplit(top).path)}", soft_wrap=True, highlight=False)
    for view, fault in zip(views, faults, strict=True):
        if fault:
            console.print(Text(f"{view.task.task_id}: {fault}", style="red"))


def trace_of(view: pb.TaskView, spans: Sequence[ReceivedSpan]) -> Sequence[ReceivedSpan] | None:
    """The spans of a task's trace, once the root has come."""
    found = [span for span in spans if span.trace_id == view.result.trace_id]
    return found if any(span.name == "task" for span in found) else None


def show_trace(console: Console, view: pb.TaskView, spans: Sequence[ReceivedSpan]) -> None:
    found = trace_of(view, spans)
    if found is None:
        raise SystemExit("no trace arrived")
    root = next(span for span in found if span.name == "task")
    tree = Tree(f"trace [bold]{root.trace_id}[/] of {view.task.task_id}: {milliseconds(root):.0f} ms")
    for span in sorted((span for span in found if span.parent_span_id == root.span_id), key=lambda span: span.start_ns):
        tree.add(f"{span.name:<15} +{(span.start_ns - root.start_ns) / 1e6:6.0f} ms {milliseconds(span):6.0f} ms")
    console.print()
    console.print(tree)


def milliseconds(span: ReceivedSpan) -> float:
    return (span.end_ns - span.start_ns) / 1e6


if __name__ == "__main__":
    sys.exit(main())
