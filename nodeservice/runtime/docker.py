"""Runs containers with the Docker Engine, or with Podman behind its Docker-compatible socket."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import datetime
from functools import partial

import structlog

from nodeservice.core.model import PullPolicy
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
from nodeservice.runtime import docker_calls as calls
from nodeservice.runtime.connection import EngineConnection
from nodeservice.runtime.docker_spec import check_mount_sources, create_body
from nodeservice.runtime.docker_state import if_named, init_failure
from nodeservice.runtime.endpoint import resolve_endpoint
from nodeservice.runtime.engine_life import EngineLife
from nodeservice.runtime.errors import InitMissingError, command_error
from nodeservice.runtime.exits import ExitWatcher
from nodeservice.runtime.gpu_access import GpuAccess, choose_gpu_access
from nodeservice.runtime.inside import run_inside
from nodeservice.runtime.libpod import libpod_body, needs_native
from nodeservice.runtime.local_images import list_images, remove_image
from nodeservice.runtime.log_choice import choose_reading
from nodeservice.runtime.profile import EngineProfile
from nodeservice.runtime.pulls import ImagePulls

log = structlog.get_logger(__name__)

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,254}")
_SIGKILL_EXIT_CODE = 137
_NOT_FOUND_EXIT_CODE = 127
_NOT_EXECUTABLE_EXIT_CODE = 126
_INIT_FAILURE_EXIT_CODE = 1
"""Podman's init program ends with this instead of those two, Docker's for what is neither missing nor forbidden."""
_EXEC_FAILURE_EXIT_CODES = frozenset({_NOT_EXECUTABLE_EXIT_CODE, _NOT_FOUND_EXIT_CODE, _INIT_FAILURE_EXIT_CODE})
_LOST_EXIT_CODE = 255
"""Docker's, for an end that it missed and of which its containerd knows nothing either."""
_OOM_LOOKS_SECONDS = (0.02, 0.08, 0.15, 0.25)
_KILL_PATIENCE_SECONDS = 10.0
_REMOVAL_PATIENCE_SECONDS = 10.0
_REMOVAL_LOOK_SECONDS = 0.1
_FIRST_RETRY_SECONDS = 0.2
_MAX_INIT_MESSAGE_BYTES = 8192


class DockerRuntime:
    """Implements `ports.ContainerRuntime`. Belongs to the event loop that first uses it.

    Construction never fails for an engine that is down: methods raise TransientError then, and work again when it is back.
    Raises ConfigError for a `base_url` that cannot be used. Every container gets the label `nodeservice.node`.
    """

    def __init__(
        self,
        *,
        node_id: str,
        base_url: str | None = None,
        pull_total_timeout_seconds: float = 1800,
        pull_inactivity_timeout_seconds: float = 120,
        relist_seconds: float = 10,
    ) -> None:
        self._node_id = node_id
        self._relist_seconds = relist_seconds
        self._connection = EngineConnection(resolve_endpoint(base_url))
        self._pulls = ImagePulls(
            self._connection,
            total_timeout_seconds=pull_total_timeout_seconds,
            inactivity_timeout_seconds=pull_inactivity_timeout_seconds,
        )
        self._exits = ExitWatcher(
            self._connection, node_id=node_id, relist_seconds=relist_seconds, on_connected=self._engine_connected
        )
        self._life = EngineLife(self._connection.endpoint)
        self._looking: asyncio.Task[None] | None = None
        self._known_profile: EngineProfile | None = None
        self._profile_is_stale = True
        self._lacks_init = False
        self._never_started: set[str] = set()

    @property
    def endpoint_url(self) -> str:
        """Where the engine is looked for."""
        return self._connection.endpoint.url

    @property
    def degraded(self) -> tuple[str, ...]:
        """Sentences on what tasks do without on this engine; empty until the engine has been asked once."""
        return self._known_profile.degraded if self._known_profile else ()

    @property
    def trouble(self) -> str:
        """Why the engine did not answer when it was last asked; empty when it did."""
        return self._connection.trouble

    def ended_with_the_host(self, stops: Mapping[str, datetime]) -> None:
        """Containers that ran when the host was shut down, each with when that began."""
        self._life.host_stops = stops

    async def facts(self) -> EngineFacts:
        return (await self._profile(fresh=True)).facts

    async def gpu_access(self, gpu_uuids: Sequence[str] = ()) -> GpuAccess:
        """How these GPUs would be asked for now; with none named, the best way for any."""
        return choose_gpu_access((await self._profile(fresh=True)).gpus, gpu_uuids)

    async def pull(self, image: str, *, policy: PullPolicy, on_progress: PullProgress | None = None) -> PulledImage:
        return await self._pulls.pull(image, policy=policy, on_progress=on_progress)

    async def list_images(self) -> Sequence[LocalImage]:
        return await self._connection.call(list_images, doing="list images")

    async def remove_image(self, name: str) -> bool:
        return await self._connection.call(lambda client: remove_image(client, name), doing=f"remove image {name!r}")

    async def create(self, spec: ContainerSpec) -> str:
        """As the port says; a cancelled caller waits for the engine's answer, so no container appears behind its back."""
        if not _NAME.fullmatch(spec.name):
            raise RequestError(f"{spec.name[:80]!r} cannot be a container's name", reason="CREATE_FAILED", field="name")
        # What can hand GPUs changes under the engine: a new MIG layout, a CDI specification written anew.
        profile = await self._profile(fresh=bool(spec.gpu_uuids))
        try:
            container_id, is_new = await self._create(spec, profile)
        except InitMissingError:
            self._lacks_init = True
            container_id, is_new = await self._create(spec, await self._profile(fresh=True))
        if is_new:
            self._never_started.add(container_id)
        return container_id

    def is_untouched(self, container_id: str) -> bool:
        return container_id in self._never_started

    async def start(self, container_id: str) -> ContainerState:
        """As the port says; a cancelled caller waits for the engine's answer, as with `create`.

        Raises NodeFaultError (CONTAINER_LOST) for one that does not exist, and NODE_FAULT for a GPU stack that fails.
        """
        # Starting one that has ended would run the task a second time. One that was created here a moment ago need not
        # be looked at first.
        if container_id not in self._never_started:
            state = await self.find(container_id)
            if state is None:
                raise calls.lost(container_id)
            if state.has_run:
                return state
        self._never_started.discard(container_id)
        init_binary = (await self._profile()).init_binary
        self._exits.expect(container_id)
        started: ContainerState | None = None
        try:
            started = await self._connection.call_to_end(
                lambda client: calls.start(client, container_id, init_binary=init_binary), doing="start a container"
            )
        finally:
            if started is None or not started.is_running:
                self._exits.dismiss(container_id)
            else:
                self._exits.runs_as(container_id, started.pid)
        if started is None:
            raise calls.lost(container_id)
        if (said := await self._command_failure(started)) is not None:
            raise command_error(said)
        return started

    async def find(self, name_or_id: str) -> ContainerState | None:
        if not _NAME.fullmatch(name_or_id):
            return None
        state = await self._connection.call(
            lambda client: calls.inspect(client, name_or_id), doing="look at a container"
        )
        return if_named(state, name_or_id)

    async def wait_exited(self, container_id: str) -> ContainerState | None:
        """As the port says. One that was created and never started is not running either, and returned at once.

        Where an init process runs, a command that could not be executed ends like any other, with 127 or 126; `error` then
        says so ("exec …: No such file or directory").
        """
        retry_seconds = _FIRST_RETRY_SECONDS
        with self._exits.watch(container_id) as changed:
            while True:
                try:
                    if not self._life.is_known:
                        await self._life.look()
                    await changed.wait()
                    changed.clear()
                    state = await self._look_at(container_id)
                    if state is None or not state.is_running:
                        return await self._settled(state, was_missed=self._exits.was_missed(container_id))
                    self._exits.runs_as(container_id, state.pid)
                except (TransientError, NodeFaultError) as error:
                    log.info("engine.wait_interrupted", container_id=container_id, reason=error.reason)
                    changed.clear()
                    await _wait_for(changed, retry_seconds)
                    changed.set()
                    retry_seconds = min(2 * retry_seconds, self._relist_seconds)
                else:
                    retry_seconds = _FIRST_RETRY_SECONDS

    async def read_log(
        self,
        container_id: str,
        *,
        follow: bool,
        after: str | None = None,
        on_mark: Callable[[LogMark], None] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        reading = await choose_reading(
            self._connection,
            await self._profile(),
            container_id,
            until_end=partial(self.wait_exited, container_id) if follow else None,
            after=after,
            on_mark=on_mark,
        )
        async with aclosing(reading) as pieces:
            async for piece in pieces:
                yield piece

    async def run_inside(self, container_id: str, argv: Sequence[str], *, timeout_seconds: float) -> str:
        return await run_inside(self._connection, container_id, argv, timeout_seconds=timeout_seconds)

    async def stop(self, container_id: str, *, grace_seconds: float, signal: str = "SIGTERM") -> None:
        """As the port says. Raises TransientError (CONTAINER_NOT_STOPPING) if it lives on 10 s after SIGKILL."""
        if not await self._signal(container_id, signal) or await self._ended_within(container_id, grace_seconds):
            return
        log.info("container.killed_after_grace", container_id=container_id, grace_seconds=grace_seconds)
        if not await self._signal(container_id, "SIGKILL"):
            return
        if not await self._ended_within(container_id, _KILL_PATIENCE_SECONDS):
            raise TransientError(
                f"container {container_id[:12]} still runs {_KILL_PATIENCE_SECONDS:g} s after SIGKILL",
                reason="CONTAINER_NOT_STOPPING",
                hint="a process may hang in the kernel (disk, network file system, GPU driver)",
            )

    async def kill(self, container_id: str) -> None:
        await self._signal(container_id, "SIGKILL")

    async def remove(self, container_id: str) -> None:
        self._never_started.discard(container_id)
        self._exits.dismiss(container_id)
        if await self._connection.call(lambda client: calls.remove(client, container_id), doing="remove a container"):
            return
        deadline = asyncio.get_running_loop().time() + _REMOVAL_PATIENCE_SECONDS
        while await self.find(container_id) is not None:
            if asyncio.get_running_loop().time() > deadline:
                raise TransientError(f"container {container_id[:12]} is being removed for long", reason="ENGINE_ERROR")
            await asyncio.sleep(_REMOVAL_LOOK_SECONDS)

    async def list_owned(self, node_id: str) -> Sequence[ContainerState]:
        label = f"{labels.NODE}={node_id}"
        listed = await self._connection.call(
            lambda client: client.containers(all=True, filters={"label": [label]}), doing="list containers"
        )
        looks = (partial(calls.look_at_listed, entry=entry) for entry in listed if calls.bears_our_name(entry))
        states = await asyncio.gather(*(self._connection.call(look, doing="look at a container") for look in looks))
        return [state for state in states if state is not None]

    async def close(self) -> None:
        await self._pulls.close()
        await self._exits.close()
        if self._looking is not None:
            self._looking.cancel()
        self._life.close()
        await self._connection.close()

    # ---- inside ----

    async def _create(self, spec: ContainerSpec, profile: EngineProfile) -> tuple[str, bool]:
        """The id, and whether it is new."""
        access = choose_gpu_access(profile.gpus, spec.gpu_uuids) if spec.gpu_uuids else None
        volumes = await self._pulls.volumes_of(spec.image)
        is_native = needs_native(profile, access, volumes)
        make = libpod_body if is_native else create_body
        body = make(spec, profile, node_id=self._node_id, access=access)
        if access is not None:
            log.info("gpu.access", name=spec.name, how=access.words, passed_over=list(access.passed_over))
        if profile.makes_mount_sources:
            await asyncio.to_thread(check_mount_sources, spec)
        return await self._connection.call_to_end(
            lambda client: calls.create(client, spec, body, native=is_native, volumes=volumes),
            doing=f"create {spec.name}",
        )

    async def _profile(self, *, fresh: bool = False) -> EngineProfile:
        if self._known_profile is not None and not self._profile_is_stale and not fresh:
            return self._known_profile
        before = self.degraded
        profile = await self._connection.call(
            lambda client: calls.profile(client, self._connection.endpoint, lacks_init=self._lacks_init),
            doing="describe itself",
        )
        self._known_profile, self._profile_is_stale = profile, False
        self._life.live_restore = profile.live_restore
        if not self._life.is_known:
            await self._look()
        for sentence in set(profile.degraded) - set(before):
            log.warning("engine.degraded", what=sentence)
        return profile

    def _engine_connected(self) -> None:
        """The engine may have been restarted with another configuration: ask it again before the next container."""
        self._profile_is_stale = True
        self._connection.trouble = ""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="engine-look")

    async def _look(self) -> None:
        with suppress(TransientError):
            await self._life.look()

    async def _look_at(self, container_id: str) -> ContainerState | None:
        """As `find`, and who answers is seen: one that is being shut down still tells of ends, but takes nobody in."""
        if not _NAME.fullmatch(container_id):
            return None
        status, body = await self._life.ask(lambda: self._connection.api_path(f"/containers/{container_id}/json"))
        return if_named(calls.inspected(status, body), container_id)

    async def _signal(self, container_id: str, signal: str) -> bool:
        """False if there was nothing to signal."""
        return await self._connection.call(
            lambda client: calls.signal(client, container_id, signal), doing=f"send {signal}", urgent=True
        )

    async def _ended_within(self, container_id: str, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.wait_exited(container_id)
        except TimeoutError:
            return False
        return True

    async def _settled(self, state: ContainerState | None, *, was_missed: bool) -> ContainerState | None:
        """The final state. The engine notes an out-of-memory kill apart from the exit, and perhaps a moment later."""
        if state is None:
            return None
        if state.exit_code == _SIGKILL_EXIT_CODE:
            for pause_seconds in _OOM_LOOKS_SECONDS:
                if state.oom_killed:
                    break
                await asyncio.sleep(pause_seconds)
                again = await self.find(state.id)
                if again is None:
                    break
                state = again
        if not (await self._profile()).is_podman:
            state = replace(state, ended_by_engine=self._life.took(state), engine_was_away=self._life.was_away(state))
        is_made_up = was_missed and state.exit_code == _LOST_EXIT_CODE
        if is_made_up or state.ended_by_engine or self._life.fell_with_the_host(state):
            return replace(state, ended_by_engine=True)
        if (said := await self._command_failure(state)) is not None:
            exit_code = _NOT_FOUND_EXIT_CODE if "No such file" in said else _NOT_EXECUTABLE_EXIT_CODE
            return replace(state, error=said, exit_code=exit_code)
        return state

    async def _command_failure(self, state: ContainerState) -> str | None:
        """What the init process said of a command that it could not execute, None otherwise.

        With an init process the engine's start always succeeds, and its complaint is all there is in the log.
        """
        if state.exit_code not in _EXEC_FAILURE_EXIT_CODES or state.error:
            return None
        text = b""
        try:
            async with aclosing(self.read_log(state.id, follow=False)) as pieces:
                async for piece in pieces:
                    text += piece
                    if len(text) > _MAX_INIT_MESSAGE_BYTES:
                        return None
        except NodeServiceError as error:
            log.info("container.log_unreadable", container_id=state.id, reason=error.reason)
            return None
        return init_failure(text)


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
