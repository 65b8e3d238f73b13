"""All interfaces between the lifecycle and the world, in one place.

An adapter translates the errors of its technology into `nodeservice.errors` at this boundary. Every method may be called
again after a crash; each says what repetition means.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from nodeservice.core.model import (
    AttemptId,
    Manifest,
    ManifestEntry,
    PhaseTiming,
    PullPolicy,
    Resources,
    TaskRecord,
    TaskSpec,
    Usage,
)


class Clock(Protocol):
    """Time as the lifecycle sees it."""

    def now(self) -> datetime:
        """The present instant, aware UTC."""
        ...

    async def sleep(self, seconds: float) -> None: ...


# ---- containers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What the engine says of itself. `root_dir` holds its images and writable layers."""

    name: str
    version: str
    api_version: str
    root_dir: Path
    storage_driver: str
    cgroup_driver: str
    cgroup_version: int
    cpu_count: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledImage:
    """`digest` is what to create from and what to report: `name@sha256:…` if the registry gave one, else the image id."""

    digest: str
    image_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """Everything a container is made from. `argv` None means the image's own command; `shell` wraps `/bin/sh -c`.

    `gpu_uuids` empty means that no GPU may be visible. Memory is hard, with swap off. `log_max_bytes` bounds what the
    engine itself keeps of the log.
    """

    name: str
    image: str
    argv: tuple[str, ...] | None
    shell: str | None
    env: tuple[tuple[str, str], ...]
    labels: Mapping[str, str]
    cpu_milli: int
    memory_bytes: int
    pids_limit: int
    mounts: tuple[Mount, ...]
    gpu_uuids: tuple[str, ...]
    log_max_bytes: int
    grace_seconds: float
    cgroup_parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerState:
    """One look at a container. `status` is created, running, exited or dead (others are mapped onto these)."""

    id: str
    name: str
    status: str
    pid: int | None
    started_at: datetime | None
    finished_at: datetime | None
    exit_code: int | None
    oom_killed: bool
    error: str
    labels: Mapping[str, str]
    limits: Mapping[str, object] = field(default_factory=dict)
    """The limits as the engine holds them: cpu_milli, memory_bytes, memory_swap_bytes, pids_limit."""

    @property
    def has_run(self) -> bool:
        return self.started_at is not None

    @property
    def is_running(self) -> bool:
        return self.status == "running"


PullProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total so far known), from any thread."""


class ContainerRuntime(Protocol):
    """Who runs containers.

    All methods raise TransientError when the engine cannot be reached or does not answer in time, and NodeFaultError when
    it answers that it is broken.
    """

    async def facts(self) -> EngineFacts: ...

    async def pull(self, image: str, *, policy: PullPolicy, on_progress: PullProgress | None = None) -> PulledImage:
        """Make the image present. One pull per image, however many wait; cancelling the last waiter ends the pull.

        Raises RequestError (IMAGE_NOT_FOUND, IMAGE_ACCESS_DENIED), TransientError (IMAGE_PULL_FAILED: retried by the
        caller; IMAGE_PULL_TIMEOUT: the inactivity or total limit passed).
        """
        ...

    async def create(self, spec: ContainerSpec) -> str:
        """Create, and return the id. A container of that name with the same labels is returned as it is.

        Raises RequestError (CREATE_FAILED, IMAGE_NOT_FOUND).
        """
        ...

    async def start(self, container_id: str) -> ContainerState:
        """Start. One that runs or ran already is success. Raises RequestError (COMMAND_NOT_FOUND, START_FAILED)."""
        ...

    async def find(self, name_or_id: str) -> ContainerState | None:
        """The container now, or None if there is none."""
        ...

    async def wait_exited(self, container_id: str) -> ContainerState | None:
        """Return once it is not running (with its final state), or None once it does not exist. Never times out.

        An engine that goes away is waited for: the wait goes on when it is back.
        """
        ...

    def read_log(self, container_id: str, *, follow: bool) -> AsyncIterator[bytes]:
        """Both streams, in the order that the engine recorded, from the first byte; ends at exit when following.

        Raises TransientError when the stream breaks. A repeated read gives the same bytes from the start.
        """
        ...

    async def stop(self, container_id: str, *, grace_seconds: float) -> None:
        """Send SIGTERM, wait, send SIGKILL. A container already gone or ended is success."""
        ...

    async def kill(self, container_id: str) -> None:
        """Send SIGKILL. A container already gone or ended is success."""
        ...

    async def remove(self, container_id: str) -> None:
        """Remove with its writable layer, killing it if it runs. A container already gone is success."""
        ...

    async def list_owned(self, node_id: str) -> Sequence[ContainerState]:
        """All containers, running or not, whose labels name this node."""
        ...

    async def close(self) -> None: ...


class TaskCgroups(Protocol):
    """A cgroup of the task's own, made before the container and readable after it."""

    async def prepare(self, spec: TaskSpec) -> str | None:
        """Make it with the task's limits; the value for the engine's cgroup parent, None where it cannot be used."""
        ...

    async def effective(self, id_: AttemptId) -> Mapping[str, object]:
        """The limits as the kernel holds them now, read back; empty where there is no such cgroup."""
        ...

    async def usage(self, id_: AttemptId) -> Usage: ...

    async def remove(self, id_: AttemptId) -> None:
        """Remove. One already gone is success."""
        ...

    async def close(self) -> None: ...


# ---- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFile:
    """A collected file and where it lies on this host."""

    entry: ManifestEntry
    source: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultBundle:
    """The frozen output of one attempt, ready to be stored. `manifest_bytes` is the canonical `manifest.json`."""

    spec: TaskSpec
    worker_id: str
    files: tuple[ResultFile, ...]
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def prefix(self) -> str:
        """`<task_id>/<attempt>`: a zombie attempt can never overwrite a newer one."""
        return f"{self.spec.id.task_id}/{self.spec.id.attempt}"


class ResultStore(Protocol):
    """Where results become durable."""

    async def put(self, bundle: ResultBundle) -> str:
        """Store every file, verify, store the manifest last, and return the location (a URL).

        When it returns, all can be read. Repeating is safe; what is already there and verified is not sent again.
        Raises TransientError (try again), NodeFaultError (the store refuses us: credentials, policy), RequestError
        (RESULT_TOO_LARGE for this kind of store).
        """
        ...

    async def close(self) -> None: ...


class Bundles(Protocol):
    """How output on this host becomes a bundle. All methods block; call them from a thread."""

    def collect(self, spec: TaskSpec, work_dir: Path, log_path: Path) -> ResultBundle:
        """Freeze a work directory; one that is frozen already is taken as it is. Raises NodeFaultError (COLLECT_FAILED)."""
        ...

    def reopen(self, spec: TaskSpec, work_dir: Path) -> ResultBundle:
        """The bundle of a frozen work directory."""
        ...

    def kept(self, spec: TaskSpec) -> ResultBundle:
        """The bundle of results that were kept on this host since the store did not take them."""
        ...

    def discard_kept(self, spec: TaskSpec, location: str) -> None:
        """Drop the kept copy, leaving a pointer to where it is now. Repeating is harmless."""
        ...

    def digest(self, bundle: ResultBundle) -> str:
        """sha256 of the bundle's manifest, in hex."""
        ...


# ---- memory of tasks --------------------------------------------------------------------------------------------------


class Journal(Protocol):
    """Durable memory of attempts. What `save` returned from survives a power cut."""

    async def load(self) -> Sequence[TaskRecord]:
        """All records, unfinished and finished ones that are still remembered, oldest first."""
        ...

    async def save(self, records: Sequence[TaskRecord]) -> None:
        """Write all or nothing, synced. The last write per attempt wins. Raises TransientError (JOURNAL_UNWRITABLE)."""
        ...

    async def forget(self, ids: Sequence[AttemptId]) -> None: ...

    async def get_note(self, key: str) -> str | None:
        """A small fact kept beside the records, such as the master's address."""
        ...

    async def set_note(self, key: str, value: str) -> None: ...

    async def close(self) -> None: ...


class Uplink(Protocol):
    """The way to the master."""

    async def report(self, record: TaskRecord) -> None:
        """Deliver the outcome; returning means acknowledged. Raises TransientError otherwise, also when refused."""
        ...


class TraceSink(Protocol):
    """Takes finished spans. Never blocks, never raises."""

    def phase_ended(self, record: TaskRecord, timing: PhaseTiming) -> None: ...

    def task_ended(self, record: TaskRecord) -> None: ...

    async def close(self) -> None:
        """Send what is left, within a bound of seconds."""
        ...


# ---- the host ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU, named by its UUID. Optional values are None where the driver does not tell."""

    uuid: str
    name: str
    memory_total_bytes: int
    memory_used_bytes: int | None = None
    utilization_percent: float | None = None
    pci_address: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuInventory:
    """`error` is set when a driver is there but does not work; no driver at all is an empty list and no error."""

    gpus: tuple[Gpu, ...] = ()
    driver_version: str | None = None
    error: str | None = None


class GpuProvider(Protocol):
    async def inventory(self) -> GpuInventory:
        """What is there now. Never raises for a missing or broken driver: that is in the answer."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    path: Path
    filesystem: str
    device: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What this host has and what of it can be used from here (affinity, cpuset and cgroup limits respected)."""

    hostname: str
    kernel: str
    cgroup_version: int
    cpu_model: str
    cpu_logical_count: int
    """What the board has."""
    cpu_physical_count: int
    cpu_usable_milli: int
    """What processes here can use: the smallest of affinity, cpuset and quota."""
    memory_total_bytes: int
    memory_limit_bytes: int
    """The smaller of the total and the cgroup limits above us."""
    memory_available_bytes: int
    disk: DiskFacts
    """Of the state directory."""
    engine_disk: DiskFacts | None
    """Of the engine's root, None without an engine."""
    engine: EngineFacts | None
    engine_error: str | None
    gpus: GpuInventory


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCapacity:
    """capacity ⊇ allocatable; `reserved` is the difference, kept for the host."""

    host: HostFacts
    capacity: Resources
    reserved: Resources
    allocatable: Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSample:
    """Load of the whole host in percent 0–100."""

    cpu_percent: float
    memory_percent: float
    disk_percent: float
    gpu_percent: float


class CapacitySource(Protocol):
    async def read(self) -> NodeCapacity: ...

    async def sample(self) -> UsageSample: ...
