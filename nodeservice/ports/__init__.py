"""All interfaces between the lifecycle and the world, in one place.

An adapter translates the errors of its technology into `nodeservice.errors` at this boundary. Every method may be called
again after a crash; each says what repetition means.
"""

from nodeservice.ports.cgroups import (
    OomFacts,
    ProcessReader,
    Reading,
    TaskCgroups,
)
from nodeservice.ports.containers import (
    ContainerRuntime,
    ContainerSpec,
    ContainerState,
    EngineFacts,
    LocalImage,
    LogMark,
    Mount,
    PulledImage,
    PullProgress,
)
from nodeservice.ports.disk import (
    DiskBound,
    DiskUse,
    Enforcement,
    FreeSpace,
    Room,
    TaskDisk,
)
from nodeservice.ports.gpus import (
    NOBODY,
    Gpu,
    GpuBound,
    GpuInventory,
    GpuProcess,
    GpuProvider,
    GpuXid,
    MigInstance,
    ProcessOwners,
)
from nodeservice.ports.host import (
    CapacitySource,
    Clock,
    DiskFacts,
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
    ResultsFolder,
    ResultStore,
)

__all__ = [
    "NOBODY",
    "Bundles",
    "CapacitySource",
    "Clock",
    "ContainerRuntime",
    "ContainerSpec",
    "ContainerState",
    "DiskBound",
    "DiskFacts",
    "DiskUse",
    "Enforcement",
    "EngineFacts",
    "FreeSpace",
    "Gpu",
    "GpuBound",
    "GpuInventory",
    "GpuProcess",
    "GpuProvider",
    "GpuXid",
    "HostFacts",
    "Journal",
    "LocalImage",
    "LogMark",
    "MigInstance",
    "Mount",
    "NodeCapacity",
    "OomFacts",
    "ProcessOwners",
    "ProcessReader",
    "PullProgress",
    "PulledImage",
    "Reading",
    "ResultBundle",
    "ResultFile",
    "ResultStore",
    "ResultsFolder",
    "Room",
    "TaskCgroups",
    "TaskDisk",
    "TraceSink",
    "Uplink",
    "UsageSample",
]
