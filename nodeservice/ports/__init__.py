"""All interfaces between the lifecycle and the world, in one place.

An adapter translates the errors of its technology into `nodeservice.errors` at this boundary. Every method may be called
again after a crash; each says what repetition means.
"""

from nodeservice.ports.cgroups import (
    TaskCgroups,
)
from nodeservice.ports.containers import (
    ContainerRuntime,
    ContainerSpec,
    ContainerState,
    EngineFacts,
    Mount,
    PulledImage,
    PullProgress,
)
from nodeservice.ports.host import (
    CapacitySource,
    Clock,
    DiskFacts,
    Gpu,
    GpuInventory,
    GpuProvider,
    HostFacts,
    NodeCapacity,
    UsageSample,
)
from nodeservice.ports.journal import (
    Journal,
    TraceSink,
    Uplink,
)
from nodeservice.ports.results import (
    Bundles,
    ResultBundle,
    ResultFile,
    ResultStore,
)

__all__ = [
    "Bundles",
    "CapacitySource",
    "Clock",
    "ContainerRuntime",
    "ContainerSpec",
    "ContainerState",
    "DiskFacts",
    "EngineFacts",
    "Gpu",
    "GpuInventory",
    "GpuProvider",
    "HostFacts",
    "Journal",
    "Mount",
    "NodeCapacity",
    "PullProgress",
    "PulledImage",
    "ResultBundle",
    "ResultFile",
    "ResultStore",
    "TaskCgroups",
    "TraceSink",
    "Uplink",
    "UsageSample",
]
