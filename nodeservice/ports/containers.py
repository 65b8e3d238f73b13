"""Who runs containers, and what they are made from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from nodeservice.core.model import DEFAULT_OPEN_FILES, PullPolicy


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
    open_files_max: int | None = None
    """The most that it can give to a container's process; None where not known."""
    has_sys_resource: bool | None = None
    """Whether it has CAP_SYS_RESOURCE, with which what it writes for containers passes ext4's quotas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogMark:
    """Where a reading of a log stands after the bytes that it gave so far.

    `is_gap`: bytes may be missing here, `may_lack`: anywhere before, since the engine threw them away before they were read.
    """

    position: str
    is_gap: bool = False
    may_lack: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledImage:
    """`digest` is what to create from and what to report: `name@sha256:…` if the registry gave one, else the image id."""

    digest: str
    image_id: str
    size_bytes: int
    name: str
    """The name asked for, as `LocalImage` writes it."""
    volumes: tuple[str, ...] = ()
    """Where it declares volumes: the engine mounts one at each of these places that nothing else is mounted at."""
    is_new: bool = False
    """This pull brought it: under no name was it on this host before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalImage:
    """An image on this host. Names are written out, registry included: `docker.io/library/busybox:1`.

    `digests` are names of the form `repository@sha256:…`. `is_used`: some container, of whomever, was made from it.
    `size_bytes` counts layers that it shares with others too.
    """

    image_id: str
    tags: tuple[str, ...]
    digests: tuple[str, ...]
    size_bytes: int
    is_used: bool


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
    stop_signal: str = "SIGTERM"
    """What the engine sends by itself, when it shuts down."""
    open_files_limit: int = DEFAULT_OPEN_FILES
    open_files_asked: bool = False
    """As in `TaskSpec`."""
    cpu_ids: tuple[int, ...] = ()
    """Logical CPUs to run on; empty means all."""
    read_bytes_per_second: int | None = None
    write_bytes_per_second: int | None = None
    gpu_env: tuple[tuple[str, str], ...] = ()
    """What keeps the task to its part of a GPU. Of the task's own environment, nothing that chooses GPUs gets through."""
    rate_devices: tuple[Path, ...] = ()
    """Block devices on which the container itself gets these rates, beside the cgroup of the task's own."""


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
    ended_by_engine: bool = False
    """The engine's own going or coming ended it; known from `wait_exited` alone."""
    engine_was_away: bool = False
    """It was restarted while the container lived, which may have cost a part of its log; known from `wait_exited` alone."""
    layer: tuple[Path, ...] = ()
    """Where its writable layer lies on this host, with the file system's own work directory; empty where not known."""
    beside: tuple[Path, ...] = ()
    """What else it can write to that the engine made for it: volumes of the image, /etc/hosts and the like."""

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

    async def list_images(self) -> Sequence[LocalImage]:
        """All images with a name or none, whoever made them; without layers that only other images are made of."""
        ...

    async def remove_image(self, name: str) -> bool:
        """Take away this name (or id); with its last name an image goes. One already gone is success.

        False where the engine refuses: a container or another image needs it. It is never forced.
        """
        ...

    async def create(self, spec: ContainerSpec) -> str:
        """Create, and return the id. A container of that name with the same labels is returned as it is.

        Raises RequestError (CREATE_FAILED, IMAGE_NOT_FOUND).
        """
        ...

    def is_untouched(self, container_id: str) -> bool:
        """Whether it was created through here, anew, and nobody has tried to start it since."""
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

    def read_log(
        self,
        container_id: str,
        *,
        follow: bool,
        after: str | None = None,
        on_mark: Callable[[LogMark], None] | None = None,
    ) -> AsyncIterator[bytes]:
        """Both streams, in the order that the engine recorded, from the first byte; ends at exit when following.

        Raises TransientError when the stream breaks. A repeated read gives the same bytes from the start, as long as the
        engine's own copy has not reached its bound; then it throws the oldest away. `on_mark` is called between two pieces,
        by engines whose records tell where they stand: with a position now and then, from which a later reading goes on
        (`after`), and where bytes may be missing.
        """
        ...

    async def run_inside(self, container_id: str, argv: Sequence[str], *, timeout_seconds: float) -> str:
        """Run a program in a running container, under its limits; its standard output, which is not to be trusted.

        Raises RequestError (EXEC_FAILED) for one that is not there, ends otherwise than with 0, or writes more than 64 KiB;
        TransientError (EXEC_TIMEOUT) for one that takes too long, and lives on then until the container ends;
        NodeFaultError (CONTAINER_LOST) where the container does not run.
        """
        ...

    async def stop(self, container_id: str, *, grace_seconds: float, signal: str = "SIGTERM") -> None:
        """Send the signal, wait, send SIGKILL. A container already gone or ended is success."""
        ...

    async def kill(self, container_id: str) -> None:
        """Send SIGKILL. A container already gone or ended is success."""
        ...

    async def remove(self, container_id: str) -> None:
        """Remove with its writable layer, killing it if it runs. A container already gone is success."""
        ...

    async def list_owned(self, node_id: str) -> Sequence[ContainerState]:
        """All containers, running or not, whose labels name this node and that bear our name.

        Labels alone are not enough: an image that was made of a task's container has them, and all that is run from it.
        Of one that the engine lists and fails to describe only id, name, status and labels are known.
        """
        ...

    async def close(self) -> None: ...
