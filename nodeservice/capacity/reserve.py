"""What is kept for the host: the operating system, the engine and this service. Pure.

The defaults follow the idea of the reservations of managed Kubernetes nodes, kept simple: a fixed part that a host needs
however small it is, and a share that grows with its size, up to a bound beyond which more would be waste.
"""

from __future__ import annotations

from dataclasses import dataclass

from nodeservice.core.model import GIB, MIB, Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """None means the default for a host of that size."""

    cpu_milli: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None


def reserved_for_host(reserve: Reserve, capacity: Resources) -> Resources:
    """What the configuration or the default keeps back.

    Defaults: CPU 0.1 core and 1 % of the rest (an engine starting containers needs the former, heartbeats and uploads of
    many tasks the latter); memory 5 %, from 256 MiB to 2 GiB; disk 5 %, from 1 to 20 GiB (images and logs beside results).
    """
    cpu_milli = 100 + (capacity.cpu_milli - 100) // 100
    memory_bytes = min(max(256 * MIB, capacity.memory_bytes // 20), 2 * GIB)
    disk_bytes = min(max(GIB, capacity.disk_bytes // 20), 20 * GIB)
    return Resources(
        cpu_milli=cpu_milli if reserve.cpu_milli is None else reserve.cpu_milli,
        memory_bytes=memory_bytes if reserve.memory_bytes is None else reserve.memory_bytes,
        disk_bytes=disk_bytes if reserve.disk_bytes is None else reserve.disk_bytes,
    )


def allocatable_of(capacity: Resources, *, reserve: Reserve, disk_free_bytes: int, gpu_count: int) -> Resources:
    """What tasks may have. Space that is used already is not ours to give; `gpu_count` are the GPUs that are well."""
    kept = reserved_for_host(reserve, capacity)
    return Resources(
        cpu_milli=max(0, capacity.cpu_milli - kept.cpu_milli),
        memory_bytes=max(0, capacity.memory_bytes - kept.memory_bytes),
        disk_bytes=max(0, disk_free_bytes - kept.disk_bytes),
        gpu_count=gpu_count,
    )
