"""A container runtime in memory, scripted per image."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from nodeservice.core.model import GIB, PullPolicy
from nodeservice.errors import NodeFaultError, NodeServiceError, RequestError, TransientError
from nodeservice.ports import (
    ContainerSpec,
    ContainerState,
    EngineFacts,
    LocalImage,
    LogMark,
    PulledImage,
    PullProgress,
    labels,
)
from nodeservice.testing.fake_images import FakeImage, FakeImageShelf

__all__ = ["FakeImage", "FakeRuntime"]


@dataclass(slots=True, kw_only=True)
class _Container:
    spec: ContainerSpec
    image: FakeImage
    state: ContainerState
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class FakeRuntime:
    """Implements `ports.ContainerRuntime` for one event loop. Images are known by name, by digest and by id.

    `calls` has (method, first argument) of every call, in order. `pull_counts` has the real pulls per image. `unavailable`
    set to true is an engine that does not answer: all methods raise TransientError, and waits go on when it is false again.
    """

    def __init__(
        self, *, images: Mapping[str, FakeImage] | None = None, node_id: str = "node", cpu_count: int = 8
    ) -> None:
        self.images: dict[str, FakeImage] = dict(images or {"demo": FakeImage()})
        self.calls: list[tuple[str, str]] = []
        self.marks: list[LogMark] = []
        self.specs: list[ContainerSpec] = []
        """The specs of all containers that were created."""
        self._node_id = node_id
        self._cpu_count = cpu_count
        self._shelf = FakeImageShelf(self.images)
        self._containers: dict[str, _Container] = {}
        self._untouched: set[str] = set()
        self._failures: dict[str, deque[NodeServiceError]] = defaultdict(deque)
        self._available = asyncio.Event()
        self._available.set()
        self._serial = 0

    # ---- the script ----

    def fail_next(self, method: str, error: NodeServiceError) -> None:
        """Let the next call of that method raise this before it does anything; repeat for several in a row.

        For `read_log` it is raised after the first half of the output.
        """
        self._failures[method].append(error)

    def finish(self, container_id: str, exit_code: int = 0, *, oom_killed: bool = False) -> None:
        """End a running container."""
        container = self._containers[container_id]
        if container.state.is_running:
            self._end(container, exit_code, oom_killed=oom_killed)

    def lose(self, container_id: str) -> None:
        """Let a container vanish, as after someone else's `rm -f`."""
        _tell(self._containers.pop(container_id))

    def write(self, container_id: str, output: bytes) -> None:
        """Append to the log of a container."""
        container = self._containers[container_id]
        container.image = replace(container.image, output=container.image.output + output)
        _tell(container)

    def drop_image(self, name: str) -> None:
        """Let an image vanish, as after someone else's `image rm`."""
        self._shelf.present.discard(name)

    def has_image(self, name: str) -> bool:
        return name in self._shelf.present

    def refuse_removal_of(self, full_name: str) -> None:
        """As an engine does for an image that another is built on."""
        self._shelf.needed.add(full_name)

    def release_pulls(self) -> None:
        self._shelf.gate.set()

    @property
    def pull_counts(self) -> Mapping[str, int]:
        return self._shelf.pull_counts

    @property
    def running(self) -> tuple[str, ...]:
        """The ids of the containers that run."""
        return tuple(id_ for id_, container in self._containers.items() if container.state.is_running)

    @property
    def unavailable(self) -> bool:
        return not self._available.is_set()

    @unavailable.setter
    def unavailable(self, value: bool) -> None:
        if value:
            self._available.clear()
        else:
            self._available.set()

    # ---- the port ----

    async def facts(self) -> EngineFacts:
        self._called("facts", "")
        return EngineFacts(
            name="fake",
            version="1",
            api_version="1",
            root_dir=Path("/"),
            storage_driver="memory",
            cgroup_driver="none",
            cgroup_version=2,
            cpu_count=self._cpu_count,
            memory_bytes=64 * GIB,
        )

    async def pull(self, image: str, *, policy: PullPolicy, on_progress: PullProgress | None = None) -> PulledImage:
        self._called("pull", image)
        return await self._shelf.pull(image, policy, on_progress)

    async def list_images(self) -> Sequence[LocalImage]:
        self._called("list_images", "")
        return self._shelf.listed({container.spec.image for container in self._containers.values()})

    async def remove_image(self, name: str) -> bool:
        self._called("remove_image", name)
        return self._shelf.remove(name, {container.spec.image for container in self._containers.values()})

    async def create(self, spec: ContainerSpec) -> str:
        self._called("create", spec.name)
        for container in self._containers.values():
            if container.spec.name == spec.name:
                if _fingerprint(container.spec) != _fingerprint(spec):
                    raise RequestError(
                        f"another container is named {spec.name!r}", reason="CREATE_FAILED", field="name"
                    )
                return container.state.id
        name = self._shelf.name_of(spec.image)
        if name is None or name not in self._shelf.present:
            raise RequestError(f"image {spec.image!r} is not here", reason="IMAGE_NOT_FOUND", field="image")
        self._serial += 1
        id_ = hashlib.sha256(f"{self._node_id} {self._serial}".encode()).hexdigest()
        self.specs.append(spec)
        self._containers[id_] = _Container(
            spec=spec,
            image=self.images[name],
            state=ContainerState(
                id=id_,
                name=spec.name,
                status="created",
                pid=None,
                started_at=None,
                finished_at=None,
                exit_code=None,
                oom_killed=False,
                error="",
                labels={**spec.labels, labels.NODE: self._node_id},
                limits={
                    "cpu_milli": spec.cpu_milli,
                    "memory_bytes": spec.memory_bytes,
                    "memory_swap_bytes": spec.memory_bytes,
                    "pids_limit": spec.pids_limit,
                },
            ),
        )
        self._untouched.add(id_)
        return id_

    def is_untouched(self, container_id: str) -> bool:
        return container_id in self._untouched

    async def start(self, container_id: str) -> ContainerState:
        self._untouched.discard(container_id)
        self._called("start", container_id)
        container = self._containers.get(container_id)
        if container is None:
            raise NodeFaultError(f"container {container_id[:12]} does not exist", reason="CONTAINER_LOST")
        if container.state.has_run:
            return container.state
        if not container.image.has_command:
            raise RequestError("the command could not be executed", reason="COMMAND_NOT_FOUND")
        self._serial += 1
        container.state = replace(
            container.state, status="running", pid=100_000 + self._serial, started_at=datetime.now(UTC)
        )
        started = container.state
        if not container.image.holds:
            self._end(container, container.image.exit_code)
        return started

    async def find(self, name_or_id: str) -> ContainerState | None:
        self._called("find", name_or_id)
        return self._look(name_or_id)

    async def wait_exited(self, container_id: str) -> ContainerState | None:
        self._called("wait_exited", container_id, even_unavailable=True)
        while True:
            await self._available.wait()
            container = self._containers.get(container_id)
            if container is None:
                return None
            if not container.state.is_running:
                return container.state
            await container.changed.wait()

    async def read_log(
        self,
        container_id: str,
        *,
        follow: bool,
        after: str | None = None,
        on_mark: Callable[[LogMark], None] | None = None,
    ) -> AsyncIterator[bytes]:
        """Tells no positions; `marks` are told after the output that there is at first."""
        self._called("read_log", container_id, may_fail=False)
        broken = self._failures["read_log"].popleft() if self._failures["read_log"] else None
        container = self._containers.get(container_id)
        if container is None:
            raise NodeFaultError(f"container {container_id[:12]} does not exist", reason="CONTAINER_LOST")
        if broken is not None:
            if half := container.image.output[: len(container.image.output) // 2]:
                yield half
            raise broken
        done_bytes = 0
        while True:
            has_output = container.state.has_run
            if has_output and (piece := container.image.output[done_bytes:]):
                done_bytes += len(piece)
                yield piece
                while on_mark is not None and self.marks:
                    on_mark(self.marks.pop(0))
                continue
            if not follow or not container.state.is_running or container_id not in self._containers:
                return
            await container.changed.wait()

    async def run_inside(self, container_id: str, argv: Sequence[str], *, timeout_seconds: float) -> str:
        self._called("run_inside", container_id)
        container = self._containers.get(container_id)
        if container is None or not container.state.is_running:
            raise NodeFaultError(f"container {container_id[:12]} does not run", reason="CONTAINER_LOST")
        if tuple(argv) not in container.image.inside:
            raise RequestError(f"{argv[0]} could not be run inside", reason="EXEC_FAILED")
        return container.image.inside[tuple(argv)]

    async def stop(self, container_id: str, *, grace_seconds: float, signal: str = "SIGTERM") -> None:
        self._called("stop", container_id)
        container = self._containers.get(container_id)
        if container is None or not container.state.is_running:
            return
        if not container.image.ignores_term:
            self._end(container, 143)
            return
        try:
            async with asyncio.timeout(grace_seconds):
                while container.state.is_running and container_id in self._containers:
                    await container.changed.wait()
        except TimeoutError:
            if container_id in self._containers:
                self.finish(container_id, 137)

    async def kill(self, container_id: str) -> None:
        self._called("kill", container_id)
        if container_id in self._containers:
            self.finish(container_id, 137)

    async def remove(self, container_id: str) -> None:
        self._called("remove", container_id)
        if container_id in self._containers:
            self.finish(container_id, 137)
            self.lose(container_id)

    async def list_owned(self, node_id: str) -> Sequence[ContainerState]:
        self._called("list_owned", node_id)
        return [
            container.state
            for container in self._containers.values()
            if container.state.labels.get(labels.NODE) == node_id and container.state.name.startswith(labels.PREFIX)
        ]

    async def close(self) -> None:
        self.calls.append(("close", ""))
        await self._shelf.close()

    # ---- inside ----

    def _called(self, method: str, argument: str, *, even_unavailable: bool = False, may_fail: bool = True) -> None:
        self.calls.append((method, argument))
        if may_fail and self._failures[method]:
            raise self._failures[method].popleft()
        if self.unavailable and not even_unavailable:
            raise TransientError("the engine is not available", reason="ENGINE_UNAVAILABLE")

    def _look(self, name_or_id: str) -> ContainerState | None:
        for container in self._containers.values():
            if name_or_id in {container.state.id, container.state.name}:
                return container.state
        return None

    def _end(self, container: _Container, exit_code: int, *, oom_killed: bool = False) -> None:
        container.state = replace(
            container.state,
            status="exited",
            pid=None,
            finished_at=datetime.now(UTC),
            exit_code=exit_code,
            oom_killed=oom_killed,
        )
        _tell(container)


def _tell(container: _Container) -> None:
    """Wake all who wait for this container. Each change has an event of its own, so that no waiter takes another's."""
    changed, container.changed = container.changed, asyncio.Event()
    changed.set()


def _fingerprint(spec: ContainerSpec) -> object:
    return spec.labels.get(labels.SPEC) or dict(spec.labels)
