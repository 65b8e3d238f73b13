"""What the steps share: the ports they act through and the settings they obey."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nodeservice.core.model import AttemptId, TaskRecord, Usage
from nodeservice.core.retry import Backoff
from nodeservice.lifecycle.gpu_keeper import GpuKeeper
from nodeservice.lifecycle.image_keeper import ImageKeeper
from nodeservice.lifecycle.logs import LogBook
from nodeservice.lifecycle.workdir import WorkDirs
from nodeservice.limits.device_nodes import GpuNodes
from nodeservice.ports import (
    Bundles,
    Clock,
    ContainerRuntime,
    ContainerState,
    FreeSpace,
    ProcessReader,
    PullProgress,
    ResultBundle,
    ResultsFolder,
    ResultStore,
    TaskCgroups,
    TaskDisk,
    Uplink,
)
from nodeservice.threads import Threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the lifecycle behaves. Durations in seconds, sizes in bytes."""

    worker_id: str
    log_max_bytes: int
    upload_give_up_seconds: float = 3600.0
    retries_kept_results: bool = True
    """False where the process ends with the task, so that nobody is left to upload later."""
    pull_attempt_count: int = 5
    pull_timeout_seconds: float = 3600.0
    collect_attempt_count: int = 12
    engine_give_up_seconds: float = 300.0
    log_drain_seconds: float = 5.0
    kill_patience_seconds: float = 10.0
    """From SIGKILL to calling a container stuck."""
    keep_host_seconds: float = 5.0
    """Between two looks at the host's free disk and at the share of it that tasks have."""
    keep_free_disk_bytes: int = 0
    settle_reports_seconds: float = 5.0
    """At the end, for the master's answers to reports that are under way."""
    observe_seconds: float = 2.0
    """Between two looks at what a running container has used that goes when it ends."""
    gpu_mps_pipe_dir: Path | None = None
    """Where an MPS server listens, for tasks with a part of a GPU that is in exclusive process mode."""
    image_look_seconds: float = 60.0
    """Between two looks at the engine's disk, to make room there."""
    sweep_seconds: float = 600.0
    """Between two looks for what nobody claims and what is old."""
    orphan_grace_seconds: float = 600.0
    """For how long something has to be seen as nobody's before it is removed."""
    results_retention_seconds: float | None = None
    salvage_retention_seconds: float | None = None
    janitor_dry_run: bool = False
    """Removals of orphans, images and old results are logged, and not made."""
    path_list_max_bytes: int = 512 * 1024
    """Bound on the paths named in a report, since gRPC messages end at 4 MiB; the manifest names all."""
    check_store_seconds: float = 30.0
    """Between two questions to the store whether it takes results; sooner when it was just seen to take none."""
    store_trouble_seconds: float = 5.0
    """Between them while it would not."""
    first_check_seconds: float = 2.0
    """How long the store's first answer is waited for at the start; one that is away keeps nobody."""
    step_backoff: Backoff = field(default_factory=lambda: Backoff(first_seconds=0.5, max_seconds=30.0))
    report_backoff: Backoff = field(default_factory=lambda: Backoff(first_seconds=0.5, max_seconds=60.0))
    store_backoff: Backoff = field(default_factory=lambda: Backoff(first_seconds=0.5, max_seconds=30.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A container whose end was seen, and what the kernel had counted then; `usage` is None if a process was left."""

    container: ContainerState
    usage: Usage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    runtime: ContainerRuntime
    cgroups: TaskCgroups
    disk: TaskDisk
    free_space: FreeSpace
    store: ResultStore
    fallback: ResultStore | None
    """A directory on this host; None where the store is that directory itself."""
    folder: ResultsFolder
    """That directory, whatever the store is."""
    uplink: Uplink
    clock: Clock
    logs: LogBook
    dirs: WorkDirs
    bundles: Bundles
    settings: Settings
    encode_record: Callable[[TaskRecord], str]
    """For the label that lets a container tell its whole story."""
    processes: ProcessReader
    gpus: GpuKeeper
    images: ImageKeeper
    on_pull_progress: Callable[[AttemptId], PullProgress | None]
    on_capacity_change: Callable[[], None] = lambda: None
    """Called when this node has more or less for tasks than it had."""
    on_stored: Callable[[int], None] = lambda _bytes: None
    """Called when the configured store has taken so many bytes of results."""
    gpu_nodes: Callable[[], Sequence[GpuNodes]] = tuple
    """The device nodes of all GPUs of this host, as they are now; of those not in it, the count alone is checked."""
    preparing: dict[AttemptId, asyncio.Task[str | None]] = field(default_factory=dict)
    """What was begun for those that have no container yet: see `steps.prepare`."""
    creating: dict[AttemptId, asyncio.Task[str]] = field(default_factory=dict)
    """Containers that are being made, also for those that were stopped meanwhile."""
    ended: dict[AttemptId, Ended] = field(default_factory=dict)
    """Those that are not collected yet: neither the engine nor the kernel need be asked again."""
    frozen: dict[AttemptId, ResultBundle] = field(default_factory=dict)
    """Results that were collected here and are not uploaded yet: they need not be read from their manifest again."""
    in_doubt: frozenset[AttemptId] = frozenset()
    """Those that had been started when the host fell: what they wrote last may not have come to the disk."""
    taken_up: set[AttemptId] = field(default_factory=set)
    """Those that another process began: they may have come further than their records say."""
    unbound: set[AttemptId] = field(default_factory=set)
    """Those that were taken up after a restart and whose disk is not bound again yet."""
    store_in_doubt: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the store did not take results, so that it is asked what is wrong."""
    collecting: Threads = field(default_factory=lambda: Threads(2, name="nodeservice-collect"))
    """Hashes for as long as there are results: apart from all short work, which would have to wait for it."""
    filing: Threads = field(default_factory=lambda: Threads(4, name="nodeservice-files"))
    """For short work on directories."""
