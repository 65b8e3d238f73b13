"""What the steps share: the ports they act through and the settings they obey."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nodeservice.core.model import AttemptId, TaskRecord
from nodeservice.core.retry import Backoff
from nodeservice.lifecycle.logs import LogBook
from nodeservice.lifecycle.workdir import WorkDirs
from nodeservice.ports import Bundles, Clock, ContainerRuntime, PullProgress, ResultStore, TaskCgroups, Uplink


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the lifecycle behaves. Durations in seconds, sizes in bytes."""

    worker_id: str
    log_max_bytes: int
    upload_give_up_seconds: float = 3600.0
    retries_kept_results: bool = True
    """False where the process ends with the task, so that nobody is left to upload later."""
    pull_attempt_count: int = 5
    collect_attempt_count: int = 12
    engine_give_up_seconds: float = 300.0
    log_drain_seconds: float = 5.0
    path_list_max_bytes: int = 512 * 1024
    """Bound on the paths named in a report, since gRPC messages end at 4 MiB; the manifest names all."""
    step_backoff: Backoff = field(default_factory=lambda: Backoff(first_seconds=0.5, max_seconds=30.0))
    report_backoff: Backoff = field(default_factory=lambda: Backoff(first_seconds=0.5, max_seconds=60.0))
    store_backoff: Backoff = field(default_factory=lambda: Backoff(first_seconds=0.5, max_seconds=30.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    runtime: ContainerRuntime
    cgroups: TaskCgroups
    store: ResultStore
    fallback: ResultStore | None
    """A directory on this host; None where the store is that directory itself."""
    uplink: Uplink
    clock: Clock
    logs: LogBook
    dirs: WorkDirs
    bundles: Bundles
    settings: Settings
    encode_record: Callable[[TaskRecord], str]
    """For the label that lets a container tell its whole story."""
    receipt: Callable[..., dict[str, object]]
    on_pull_progress: Callable[[AttemptId], PullProgress | None]
