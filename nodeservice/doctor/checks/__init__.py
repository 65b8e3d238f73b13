"""All probes. Each module has those of one subject, with their judgement."""

from __future__ import annotations

from dataclasses import replace

from nodeservice.doctor.checks import compute, confinement, disk, gpu, io, time
from nodeservice.doctor.probe import Probe


def all_probes(*, cpu_count: int, has_swap: bool, patience: float = 1.0) -> tuple[Probe, ...]:
    """`cpu_count` and `has_swap` are this host's. `patience` multiplies the time that each may take."""
    unhurried = (
        *compute.probes(cpu_count=cpu_count, has_swap=has_swap),
        *disk.probes(),
        *io.probes(),
        *confinement.probes(patience),
        *gpu.probes(patience),
    )
    stretched = [replace(probe, timeout_seconds=probe.timeout_seconds * patience) for probe in unhurried]
    return (*stretched, *time.probes(patience))
