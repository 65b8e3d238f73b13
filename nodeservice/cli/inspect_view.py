"""Shows what a node has: as a table for people, as a dict for machines. Pure rendering."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nodeservice.cli.gpu_tables import driver_words, gpu_tables
from nodeservice.cli.inspect_gpus import gpu_dicts
from nodeservice.core.model import Resources
from nodeservice.daemon.look import Seen
from nodeservice.ports import DiskFacts, EngineFacts, HostFacts, NodeCapacity

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def seen_as_dict(seen: Seen) -> dict[str, object]:
    """JSON-able; exact values, the unit in every name. `free` is allocatable less what is leased.

    `degraded` tells in sentences what tasks do without on this engine.
    """
    capacity, host = seen.capacity, seen.capacity.host
    return {
        "host": {
            "hostname": host.hostname,
            "kernel": host.kernel,
            "cgroup_version": host.cgroup_version,
            "cpu": {
                "model": host.cpu_model,
                "logical_count": host.cpu_logical_count,
                "physical_count": host.cpu_physical_count,
                "usable_milli": host.cpu_usable_milli,
            },
            "memory": {
                "total_bytes": host.memory_total_bytes,
                "limit_bytes": host.memory_limit_bytes,
                "available_bytes": host.memory_available_bytes,
            },
            "disk": _disk_dict(host.disk),
        },
        "engine": _engine_dict(host.engine, host.engine_disk, seen.degraded),
        "engine_error": host.engine_error,
        "daemon": asdict(seen.daemon) if seen.daemon is not None else None,
        "daemon_error": seen.daemon_error,
        "gpus": gpu_dicts(seen),
        "gpu_driver_version": host.gpus.driver_version,
        "cuda_version": host.gpus.cuda_version,
        "gpu_error": host.gpus.error,
        "gpus_unreachable": list(host.gpus.unreachable),
        "capacity": asdict(capacity.capacity),
        "reserved": asdict(capacity.reserved),
        "allocatable": asdict(capacity.allocatable),
        "free": asdict(seen.free),
    }


def render_seen(seen: Seen, console: Console) -> None:
    """Print the tables. Text from host and engine is shown as it is, never read as markup."""
    host, found = seen.capacity.host, seen.capacity.host.gpus
    console.print(_facts("Host", _host_rows(host)))
    console.print(_facts("Engine", _engine_rows(host, seen.degraded)))
    console.print(_facts("Daemon", _daemon_rows(seen)))
    console.print(_resources(seen.capacity, seen.free))
    for words in found.complaints:
        console.print(Text(f"GPU fault: {words}", style="bold red"))
    if found.gpus:
        versions = driver_words(found.driver_version, found.cuda_version)
        for part in gpu_tables(gpu_dicts(seen), title=escape(f"GPUs: {versions}" if versions else "GPUs")):
            console.print(part)
    elif not found.complaints:
        console.print(Text("GPUs: none" if found.driver_version else "GPUs: none: no NVIDIA driver"))


def human_bytes(count: int) -> str:
    """Three significant digits at most, in units of 1024."""
    value, unit = float(count), 0
    # 1023.5 would be shown as 1024 of the smaller unit.
    while abs(value) >= 1023.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or abs(value) >= 99.95 else 1
    text = f"{value:.{digits}f}"
    return f"{text.removesuffix('.0')} {_UNITS[unit]}"


def human_cores(milli: int) -> str:
    return f"{milli / 1000:.3f}".rstrip("0").rstrip(".")


def _host_rows(host: HostFacts) -> Iterable[tuple[str, str]]:
    yield "name", host.hostname
    yield "kernel", f"{host.kernel}, cgroup v{host.cgroup_version}" if host.cgroup_version else host.kernel
    yield "CPU", host.cpu_model
    counts = f"{host.cpu_logical_count} logical, {host.cpu_physical_count} physical"
    yield "CPUs", f"{counts}, usable here {human_cores(host.cpu_usable_milli)}"
    memory = f"{human_bytes(host.memory_total_bytes)}, available {human_bytes(host.memory_available_bytes)}"
    limited = host.memory_limit_bytes < host.memory_total_bytes
    yield "memory", memory + (f", limited to {human_bytes(host.memory_limit_bytes)}" if limited else "")
    yield "state disk", _disk_text(host.disk)


def _engine_rows(host: HostFacts, degraded: Sequence[str]) -> Iterable[tuple[str, str]]:
    engine = host.engine
    if engine is None:
        yield "fault", host.engine_error or "no engine"
        return
    yield "name", f"{engine.name} {engine.version}, API {engine.api_version}"
    yield "storage", f"{engine.storage_driver} at {engine.root_dir}"
    yield "cgroups", f"v{engine.cgroup_version}, driver {engine.cgroup_driver}"
    yield "sees", f"{engine.cpu_count} CPUs, {human_bytes(engine.memory_bytes)} memory"
    if host.engine_disk is not None:
        yield "disk", _disk_text(host.engine_disk)
    for sentence in degraded:
        yield "degraded", sentence


def _daemon_rows(seen: Seen) -> Iterable[tuple[str, str]]:
    if seen.daemon is None:
        yield ("fault", seen.daemon_error) if seen.daemon_error else ("runs", "no: nothing takes tasks here")
        return
    yield "runs", f"version {seen.daemon.version}, pid {seen.daemon.pid}, {seen.daemon.mode}"
    yield "status", seen.daemon.status
    for words in seen.daemon.conditions:
        yield "condition", words
    for words in seen.daemon.warnings:
        yield "warning", words


def _facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, min_width=60)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _resources(capacity: NodeCapacity, free: Resources) -> Table:
    table = Table(title="Resources", title_justify="left", min_width=60)
    table.add_column("", style="dim")
    # Disk in use counts as reserved, since it can't be given to a task.
    for name in ("capacity", "reserved or in use", "allocatable", "free"):
        table.add_column(name, justify="right")
    columns = (capacity.capacity, capacity.reserved, capacity.allocatable, free)
    table.add_row("CPU cores", *(human_cores(column.cpu_milli) for column in columns))
    table.add_row("memory", *(human_bytes(column.memory_bytes) for column in columns))
    table.add_row("disk", *(human_bytes(column.disk_bytes) for column in columns))
    broken = bool(capacity.host.gpus.error) and not capacity.gpu_units
    table.add_row("GPUs", *("?" if broken else str(column.gpu_count) for column in columns))
    return table


def _disk_text(disk: DiskFacts) -> str:
    space = f"{human_bytes(disk.free_bytes)} free of {human_bytes(disk.total_bytes)}"
    return f"{disk.path}: {space}, {disk.filesystem} on {disk.device}"


def _disk_dict(disk: DiskFacts) -> dict[str, object]:
    return asdict(disk) | {"path": str(disk.path)}


def _engine_dict(
    engine: EngineFacts | None, disk: DiskFacts | None, degraded: Sequence[str]
) -> dict[str, object] | None:
    if engine is None:
        return None
    return {
        "name": engine.name,
        "version": engine.version,
        "api_version": engine.api_version,
        "root_dir": str(engine.root_dir),
        "storage_driver": engine.storage_driver,
        "cgroup_driver": engine.cgroup_driver,
        "cgroup_version": engine.cgroup_version,
        "cpu_count": engine.cpu_count,
        "memory_bytes": engine.memory_bytes,
        "disk": _disk_dict(disk) if disk is not None else None,
        "degraded": list(degraded),
    }
