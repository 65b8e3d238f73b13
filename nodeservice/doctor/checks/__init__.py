"""All probes. Each module has those of one subject, with their judgement."""

from __future__ import annotations

from nodeservice.doctor.checks import compute, confinement, disk, io, time
from nodeservice.doctor.probe import Probe


def all_probes(*, cpu_count: int, has_swap: bool) -> tuple[Probe, ...]:
    """`cpu_count` and `has_swap` are this host's."""
    return (
        *compute.probes(cpu_count=cpu_count, has_swap=has_swap),
        *disk.probes(),
        *io.probes(),
        *time.probes(),
        *confinement.probes(),
    )
