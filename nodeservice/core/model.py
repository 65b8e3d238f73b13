"""The nouns of the domain: what was asked, what was granted, how far it came, how it ended.

All values are frozen. Quantities carry their unit in the name; instants end in `_at` and are aware UTC datetimes, which the
core only compares and passes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import NamedTuple

from nodeservice.core.gpus import GpuPart, GpuRequest, GpuUsage

GIB = 1024**3
MIB = 1024**2
DEFAULT_OPEN_FILES = 65_536


class AttemptId(NamedTuple):
    """Identity of one attempt at a task. `task_id` is validated at the boundary (see `core.admission`)."""

    task_id: str
    attempt: int = 1

    def __str__(self) -> str:
        return f"{self.task_id}.{self.attempt}"


class PullPolicy(StrEnum):
    ALWAYS = "always"
    IF_NOT_PRESENT = "if-not-present"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """An amount of each resource that the ledger counts."""

    cpu_milli: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    gpu_count: int = 0

    def plus(self, other: Resources) -> Resources:
        return Resources(
            cpu_milli=self.cpu_milli + other.cpu_milli,
            memory_bytes=self.memory_bytes + other.memory_bytes,
            disk_bytes=self.disk_bytes + other.disk_bytes,
            gpu_count=self.gpu_count + other.gpu_count,
        )

    def minus(self, other: Resources) -> Resources:
        """The difference, which may be negative; `clamped` cuts it at zero."""
        return Resources(
            cpu_milli=self.cpu_milli - other.cpu_milli,
            memory_bytes=self.memory_bytes - other.memory_bytes,
            disk_bytes=self.disk_bytes - other.disk_bytes,
            gpu_count=self.gpu_count - other.gpu_count,
        )

    def clamped(self) -> Resources:
        return Resources(
            cpu_milli=max(0, self.cpu_milli),
            memory_bytes=max(0, self.memory_bytes),
            disk_bytes=max(0, self.disk_bytes),
            gpu_count=max(0, self.gpu_count),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What the master asked for, normalised: exact units, defaults filled in. Equal specs are the same request.

    `command` runs as `/bin/sh -c command`; `argv` replaces the image's command and leaves its entrypoint; both unset means
    the image's own. `timeout_seconds` counts from the container's start; None means no limit. `env` keeps its order.
    `fingerprint` is a digest of the request as it came: two requests are the same if it is, even where a default of this
    node changed between them.
    """

    id: AttemptId
    image: str
    command: str | None = None
    argv: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    request: Resources
    gpu: GpuRequest = field(default_factory=GpuRequest)
    pids_limit: int
    timeout_seconds: float | None = None
    grace_seconds: float = 10.0
    stop_signal: str = "SIGTERM"
    wait_timeout_seconds: float | None = None
    """From acceptance to the container's start, the pull included."""
    pull_timeout_seconds: float | None = None
    total_timeout_seconds: float | None = None
    """From acceptance to the container's end, whatever it is busy with."""
    disconnect_limit_seconds: float | None = None
    """For how long it may go on while the master is not heard; None for ever."""
    exclusive_cpus: bool = False
    """Whole cores of its own, instead of a share of all."""
    open_files_limit: int = DEFAULT_OPEN_FILES
    open_files_asked: bool = False
    """Somebody asked for that many, so that it is kept or refused. Of the default an engine gives what it may."""
    read_bytes_per_second: int | None = None
    """Of each block device; None is no limit. Likewise for `write_bytes_per_second`."""
    write_bytes_per_second: int | None = None
    pull_policy: PullPolicy = PullPolicy.IF_NOT_PRESENT
    user_id: str = ""
    task_name: str = ""
    task_type: str = ""
    sla_multiplier: float = 0.0
    submitted_at_unix: int = 0
    fingerprint: str


class Phase(IntEnum):
    """Where an attempt is. Phases only rise."""

    PULLING = 1
    CREATING = 2
    STARTING = 3
    RUNNING = 4
    COLLECTING = 5
    UPLOADING = 6
    REPORTING = 7
    CLEANING = 8
    RETAINING = 9
    """Reported, container gone, results kept on this host until the store takes them."""
    FINISHED = 10


class Outcome(StrEnum):
    """How an attempt ended. REJECTED is never journalled: it answers a request that was not accepted."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    REJECTED = "REJECTED"


class Reason(StrEnum):
    """Machine-readable cause of an outcome."""

    COMPLETED = "COMPLETED"
    EXIT_NONZERO = "EXIT_NONZERO"
    MEMORY_LIMIT = "MEMORY_LIMIT"
    DISK_LIMIT = "DISK_LIMIT"
    DEADLINE = "DEADLINE"
    WAIT_TIMEOUT = "WAIT_TIMEOUT"
    """It had not started, as far as is known, within the time that it was willing to wait."""
    GPU_MEMORY_LIMIT = "GPU_MEMORY_LIMIT"
    GPU_FAULT = "GPU_FAULT"
    """A GPU of it failed, or could not be made ready; the message says how."""
    MASTER_LOST = "MASTER_LOST"
    """Ended since the master was not heard for longer than the task allows."""
    NODE_DRAINED = "NODE_DRAINED"
    """Ended since its node was to be empty by then."""
    LIMIT_NOT_ENFORCED = "LIMIT_NOT_ENFORCED"
    """A limit read back after the start was not the one that was promised."""
    HOST_OUT_OF_MEMORY = "HOST_OUT_OF_MEMORY"
    """Killed for lack of memory that others took; it was within its own limit."""
    NODE_DISK_LOW = "NODE_DISK_LOW"
    """Ended because the host was about to run out of disk; it was within its own limit."""
    ENGINE_FAULT = "ENGINE_FAULT"
    CANCELLED = "CANCELLED"
    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    IMAGE_ACCESS_DENIED = "IMAGE_ACCESS_DENIED"
    IMAGE_PULL_FAILED = "IMAGE_PULL_FAILED"
    IMAGE_PULL_TIMEOUT = "IMAGE_PULL_TIMEOUT"
    COMMAND_NOT_FOUND = "COMMAND_NOT_FOUND"
    """The engine could not execute the command: missing, not executable, or the image has no shell for `command`."""
    CREATE_FAILED = "CREATE_FAILED"
    START_FAILED = "START_FAILED"
    CONTAINER_LOST = "CONTAINER_LOST"
    """The container vanished without our doing; its exit status is unknown."""
    COLLECT_FAILED = "COLLECT_FAILED"
    RESULTS_NOT_STORED = "RESULTS_NOT_STORED"
    NODE_FAULT = "NODE_FAULT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How it ended and why. Success is provisional until the result is stored; the first failure is final."""

    outcome: Outcome
    reason: Reason
    message: str
    exit_code: int | None = None


class StopCause(StrEnum):
    """Why this service ends an attempt."""

    CANCELLED = "CANCELLED"
    DEADLINE = "DEADLINE"
    WAIT_TIMEOUT = "WAIT_TIMEOUT"
    PULL_TIMEOUT = "PULL_TIMEOUT"
    DISK_LIMIT = "DISK_LIMIT"
    NODE_DISK_LOW = "NODE_DISK_LOW"
    LIMIT_NOT_ENFORCED = "LIMIT_NOT_ENFORCED"
    GPU_MEMORY_LIMIT = "GPU_MEMORY_LIMIT"
    GPU_FAULT = "GPU_FAULT"
    NODE_DRAINED = "NODE_DRAINED"
    MASTER_LOST = "MASTER_LOST"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    """What was requested, kept apart from the phase. The first request is final; a stricter one can only hasten the end."""

    cause: StopCause
    requested_at: datetime
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTiming:
    """One row of the task's story. `ended_at` is None while the phase lasts."""

    name: str
    started_at: datetime
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What one attempt was granted. CPU, memory and GPUs go back when the container is verified gone, disk at clean-up."""

    granted: Resources
    gpu_uuids: tuple[str, ...] = ()
    """GPUs or MIG instances."""
    gpu_part: GpuPart | None = None
    """Set where it holds a part of its one GPU; else all of each."""
    cpu_ids: tuple[int, ...] = ()
    """Logical CPUs that are its alone; empty for a share of those that are nobody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the attempt used, read from the kernel where it could be. None means: could not be read."""

    memory_peak_bytes: int | None = None
    cpu_seconds: float | None = None
    cpu_throttled_seconds: float | None = None
    pids_peak_count: int | None = None
    oom_kill_count: int | None = None
    """Processes of it that were killed for lack of memory; where the kernel doesn't count, at least so many."""
    read_bytes: int | None = None
    """From block devices, so not from the page cache; likewise `written_bytes`. On cgroup v1 as last seen while it ran."""
    written_bytes: int | None = None
    disk_peak_bytes: int | None = None
    """The most that was seen of what it wrote: layer, scratch, results and log."""
    network_received_bytes: int | None = None
    """As last seen while it ran: the interface goes with the container. Likewise `network_sent_bytes`."""
    network_sent_bytes: int | None = None
    gpus: tuple[GpuUsage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """One stored file. `path` is relative, `/`-separated, without `..`; `sha256` is hex."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that was collected. Its canonical JSON is the file `manifest.json`, written last as the commit marker."""

    task_id: str
    attempt: int
    files: tuple[ManifestEntry, ...]
    skipped: tuple[str, ...] = ()
    """Paths left out, each with the reason: symbolic links, devices, sockets, unreadable names."""

    @property
    def total_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The frozen output of an attempt. The full file list stays in `manifest.json`, which `manifest_sha256` fixes."""

    manifest_sha256: str
    file_count: int
    total_bytes: int
    log_bytes: int
    log_tail: str
    paths: tuple[str, ...]
    """Relative paths, cut at a bound that keeps reports small; `file_count` tells the truth."""
    skipped: tuple[str, ...] = ()
    """The first of the paths that were left out or renamed, cut likewise; `skipped_count` tells the truth."""
    skipped_count: int = 0
    log_error: str | None = None
    """Why the log may lack its end, where the engine could not give the rest of it."""
    log_has_gap: bool = False
    """The log may lack lines, where it says so: the engine's own copy was full before they were read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceIds:
    """W3C trace context of the attempt: hex ids. `parent_span_id` is the caller's, if it sent one."""

    trace_id: str
    span_id: str
    parent_span_id: str | None = None
    sampled: bool = True

    @property
    def traceparent(self) -> str:
        """The header value that the container gets as TRACEPARENT (W3C Trace Context, version 00)."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord:
    """All that is known of one attempt; what the journal stores and recovery starts from."""

    spec: TaskSpec
    lease: Lease
    trace: TraceIds
    accepted_at: datetime
    phase: Phase
    timings: tuple[PhaseTiming, ...]
    stop: StopRequest | None = None
    escalation: StopRequest | None = None
    """What took the rest of the grace from a gentler `stop`. The verdict stays that of `stop`."""
    verdict: Verdict | None = None
    image_digest: str | None = None
    container_id: str | None = None
    expires_at: datetime | None = None
    """The absolute deadline, fixed at acceptance."""
    started_at: datetime | None = None
    deadline_at: datetime | None = None
    """The end of its running time, fixed at the start."""
    limits: Mapping[str, object] = field(default_factory=dict)
    """The limits asked and those read back, JSON-able; see `limits.receipt`."""
    usage: Usage = field(default_factory=Usage)
    collected: Collected | None = None
    result_location: str | None = None
    retained: bool = False
    """The configured store did not take the results in time: they lie in the fallback directory, to be uploaded later."""
    remarks: tuple[str, ...] = ()
    stuck: bool = False
    """Its container could not be ended: it keeps its lease, and the node takes no new work meanwhile."""
    compute_released: bool = False
    disk_released: bool = False
    reported: bool = False

    @property
    def id(self) -> AttemptId:
        return self.spec.id
