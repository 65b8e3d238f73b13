"""What a person sees: who holds which GPU now, how each task is doing, and at the end how all went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gpu_demo.batch import GIB, NODES, Expected
from gpu_demo.checks import Attempt
from gpu_demo.machines import Machines
from nodeservice.wire import master_worker_pb2 as pb

PRETENDED = "The GPUs here are pretended: a false NVIDIA driver and a stand-in for NVIDIA's hook. All else is real."
_CELL_WIDTH = 8
_COLOURS = ("cyan", "magenta", "green", "blue", "bright_cyan", "bright_magenta", "bright_green", "bright_blue")
_STATES = {"SUCCEEDED": "green", "FAILED": "yellow", "QUEUED": "dim", "REJECTED": "red"}


def notice() -> Panel:
    return Panel(Text(PRETENDED, style="bold"), border_style="yellow", expand=False)


def progress(
    seconds: float,
    nodes: Sequence[pb.NodeView],
    expected: Sequence[Expected],
    views: Mapping[str, pb.TaskView],
    machines: Machines,
) -> RenderableType:
    colours = {item.name: _COLOURS[index % len(_COLOURS)] for index, item in enumerate(expected)}
    head = Text(f"pretended GPUs, {seconds:4.1f} s", style="dim")
    return Group(head, _placement(nodes, colours, machines), Text(), _states(expected, views, machines, nodes, colours))


def _placement(nodes: Sequence[pb.NodeView], colours: Mapping[str, str], machines: Machines) -> Table:
    """A row for each node, a column for each GPU."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("GPU", no_wrap=True, min_width=6)
    for number in range(8):
        table.add_column(str(number), width=_CELL_WIDTH, no_wrap=True)
    for node in sorted(nodes, key=lambda node: node.worker_id):
        holders: dict[str, list[str]] = {}
        for task in node.running_tasks:
            for uuid in task.gpu_uuids:
                holders.setdefault(uuid, []).append(task.task_id)
        row: list[Text] = []
        for gpu in sorted(node.gpus, key=lambda gpu: machines.places[gpu.uuid][1]):
            held = holders.get(gpu.uuid, [])
            if gpu.state == "FAULTY":
                row.append(Text("✗ faulty", style="bold white on red"))
            elif len(held) > 1:
                row.append(Text(f"{len(held)} parts", style="black on yellow"))
            elif held:
                row.append(Text(held[0][:_CELL_WIDTH].ljust(_CELL_WIDTH), style=f"black on {colours[held[0]]}"))
            else:
                row.append(Text("·", style="dim"))
        table.add_row(_short(node.worker_id), *row)
    return table


def _states(
    expected: Sequence[Expected],
    views: Mapping[str, pb.TaskView],
    machines: Machines,
    nodes: Sequence[pb.NodeView],
    colours: Mapping[str, str],
) -> Table:
    leases = {task.task_id: tuple(task.gpu_uuids) for node in nodes for task in node.running_tasks}
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for header, width in (("task", 9), ("asks", 6), ("state", 9), ("phase", 10), ("node", 6), ("GPUs", 6)):
        table.add_column(header, no_wrap=True, min_width=width)
    for item in expected:
        view = views.get(item.name)
        if view is None:
            continue
        gpus = leases.get(item.name, ()) or tuple(view.result.gpu_uuids)
        phase = "" if view.state in ("QUEUED", "FAILED", "SUCCEEDED") else view.phase.lower()
        table.add_row(
            Text(item.name, style=colours[item.name]), item.asks, Text(view.state, style=_STATES.get(view.state, "cyan")),
            view.result.reason if view.state == "FAILED" else phase, _short(view.worker_id), spans(gpus, machines),
        )  # fmt: skip
    return table


def results(attempts: Sequence[Attempt], faults: Mapping[str, str], machines: Machines) -> Table:
    """A row for each attempt, with the part of the bill that is about GPUs, all of a task together. It fits into 80 columns.

    `faults` is what is wrong with which task.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for header in ("\ntask", "\nasks", "\noutcome", "\nreason", "node:\nGPUs"):
        table.add_column(header, no_wrap=True)
    for header in ("GPU\ns", "load\n%", "energy\nkJ", "peak\nGiB", "\nXID"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("\nok")
    for attempt in attempts:
        item, result = attempt.item, attempt.result
        colour = "green" if result.outcome == "SUCCEEDED" else "yellow"
        table.add_row(
            item.name if attempt.number == 1 else f"  try {attempt.number}",
            item.asks, f"[{colour}]{result.outcome}", result.reason, _where(result, machines), *_bill(result.usage.gpus),
            "[red]NO" if faults.get(item.name) else "[green]yes",
        )  # fmt: skip
    return table


def _where(result: pb.TaskResult, machines: Machines) -> str:
    node = _short(result.worker_id).removeprefix("node ")
    return f"{node}:{spans(tuple(result.gpu_uuids), machines)}" if result.gpu_uuids else node


def _bill(used: Sequence[pb.GpuUsage]) -> list[str]:
    """GPU seconds, mean load, energy, the most memory on one GPU, error events. What is not known stays empty."""
    if not used:
        return [""] * 5
    loads = [gpu.utilization_mean_percent for gpu in used if gpu.HasField("utilization_mean_percent")]
    energies = [gpu.energy_joules for gpu in used if gpu.HasField("energy_joules")]
    peaks = [gpu.memory_peak_bytes for gpu in used if gpu.HasField("memory_peak_bytes")]
    return [
        f"{sum(gpu.seconds for gpu in used):.1f}",
        f"{sum(loads) / len(loads):.0f}" if loads else "",
        f"{sum(energies) / 1000:.1f}" if energies else "",
        f"{max(peaks) / GIB:.0f}" if peaks else "",
        " ".join(sorted({str(code) for gpu in used for code in gpu.xids})),
    ]


def spans(gpus: Sequence[str], machines: Machines) -> str:
    """Their numbers on their node: 0-3,6."""
    numbers = sorted(machines.places[gpu][1] for gpu in gpus)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _short(worker_id: str) -> str:
    """node 1, as there are but two."""
    return f"node {NODES.index(worker_id) + 1}" if worker_id in NODES else worker_id
