"""The nouns of GPUs: what a task asks for, what can be leased, what was granted, what was used. Pure.

A GPU and a MIG instance are named by their UUID, never by an index: the order changes across restarts of the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class ShareMethod(StrEnum):
    """Who keeps a task to its part of a GPU."""

    MIG = "mig"
    """An instance of its own: memory and compute are held by the hardware."""
    DRIVER = "driver"
    """The driver's limit on the cgroup: memory is held, compute is not (NVML 13, driver 615 and newer)."""
    MPS = "mps"
    """The MPS server's limits on each process; the processes of a task together are watched."""
    WATCHED = "watched"
    """This service measures the memory, and ends the task once it crosses its limit; compute is not held."""


HOLDS_COMPUTE = frozenset({ShareMethod.MIG, ShareMethod.MPS})
"""Methods that keep a task to its share of the SMs too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShare:
    """A part of one GPU: in thousandths of it, from which memory and compute follow, or by amounts (0 is unspecified)."""

    milli: int = 0
    memory_bytes: int = 0
    sm_percent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRequest:
    """Which GPUs will do, beside their count (`Resources.gpu_count`). Empty fields accept any.

    `model` is a part of the product name, in any case. `mig_profile` asks for MIG instances instead of whole GPUs. With a
    `share` the count is 0: it is a part of one GPU.
    """

    model: str = ""
    min_memory_bytes: int = 0
    min_compute_capability: tuple[int, int] | None = None
    mig_profile: str = ""
    uuids: tuple[str, ...] = ()
    share: GpuShare | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUnit:
    """What can be leased: a whole GPU that is not split, or a MIG instance."""

    uuid: str
    name: str
    memory_bytes: int
    """What tasks can allocate: without what the driver keeps."""
    compute_capability: tuple[int, int] = (0, 0)
    mig_profile: str = ""
    parent_uuid: str = ""
    """Of a MIG instance: the GPU that it is a part of."""
    memory_milli: int = 1000
    """Of a MIG instance: its part of the parent's memory, in thousandths. Likewise `compute_milli`."""
    compute_milli: int = 1000
    counts: bool = True
    """Whether it is given to a task that asks for a count alone. MIG instances are so only where the operator says it."""
    numa_node: int | None = None
    closeness: Mapping[str, int] = field(default_factory=dict)
    """How well it reaches other units, by UUID: higher is better, and what is not named is 0."""
    unwell: str = ""
    """Why it takes no new task now, in words; empty where it is well."""
    share_methods: tuple[ShareMethod, ...] = ()
    """What can keep tasks to parts of it, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPart:
    """What a lease holds of its one GPU. `sm_percent` 0: no share of the compute. A MIG instance is held with all it has."""

    memory_bytes: int
    sm_percent: int
    method: ShareMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUsage:
    """What one attempt used of one GPU, or what the GPU did while the attempt alone held it. None: not known."""

    uuid: str
    name: str = ""
    seconds: float = 0.0
    """How long it was observed."""
    utilization_mean_percent: float | None = None
    utilization_peak_percent: float | None = None
    memory_peak_bytes: int | None = None
    """Of the attempt's own processes where the driver tells them apart, else of the whole GPU."""
    energy_joules: float | None = None
    """None on a GPU that was shared: the driver counts the whole."""
    throttled_seconds: float | None = None
    """How long heat or power held it back."""
    xids: tuple[int, ...] = ()
    """The driver's error events on it (XID), each kind once."""
