"""Starts, watches and stops the container."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import AttemptId, Phase, Reason, StopCause, TaskRecord, Usage
from nodeservice.core.verdict import has_no_grace
from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.lifecycle.context import Context, Ended
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.steps import gpus
from nodeservice.lifecycle.steps.create import bound_disk
from nodeservice.lifecycle.steps.failure import persist, reason_of, until_done
from nodeservice.lifecycle.stretch import Stretch
from nodeservice.limits.gpu_view import read_gpu_uuids
from nodeservice.limits.receipt import receipt
from nodeservice.ports import ContainerState, labels

log = structlog.get_logger(__name__)
_STUCK_LOOK_SECONDS = 1.0
_ALONE_SECONDS = 0.05
_INSIDE_SECONDS = 10.0
"""For a program of the driver's: its first call on an idle GPU takes seconds."""


async def start(context: Context, record: TaskRecord) -> ev.Event:
    """Bound its layer, start it, and read back the limits that are now in force."""
    if record.stop is not None:
        return ev.StepFailed(at=context.clock.now(), reason=Reason.CANCELLED, message="stopped before it was started")
    container_id = _container(record)
    stretch, is_new = Stretch(context.clock), context.runtime.is_untouched(container_id)
    try:
        if not is_new:
            await bound_disk(context, record)
        if context.disk.holds_layers():
            await persist(context, lambda: _bound_layer(context, record, container_id))
        state = await persist(context, lambda: _start_once(context, record, container_id))
    except (RequestError, NodeFaultError) as error:
        return await _not_started(context, record, error)
    await context.disk.add_layer(record.id, state.layer, state.beside)
    await context.cgroups.look_after(record.id)
    gpu_part = await gpus.bound(context, record, state.pid)
    readings = [*await context.cgroups.readings(record.id)]
    if state.pid:
        readings += context.processes.readings(state.pid)
        if record.lease.gpu_uuids:
            readings.append(await read_gpu_uuids(state.pid, _inside(context, container_id)))
    told = receipt(
        record.spec,
        record.lease,
        gpus=context.gpu_nodes(),
        readings=readings,
        disk=await context.disk.bound(record.id),
        engine=state.limits,
        gpu_part=gpu_part,
    )
    now = context.clock.now()
    return ev.ContainerStarted(
        at=now,
        started_at=stretch.within(state.started_at) if is_new else min(now, state.started_at or now),
        limits=told.as_dict(),
        not_enforced=told.mismatches if state.is_running else (),
    )


async def _not_started(context: Context, record: TaskRecord, error: RequestError | NodeFaultError) -> ev.StepFailed:
    """Engines have many words for a process that the kernel refused to make for them, none of which speaks of that."""
    reason, message = reason_of(error, Reason.START_FAILED), str(error)
    if reason is Reason.START_FAILED and (crowded := await context.cgroups.crowded(record.id)):
        reason = Reason.NODE_FAULT
        message = (
            f"{message}; no room is left for the processes of a start: {crowded} (raise TasksMax or pids.max there)"
        )
    return ev.StepFailed(at=context.clock.now(), reason=reason, message=message)


async def _start_once(context: Context, record: TaskRecord, container_id: str) -> ContainerState:
    """Start it in a cgroup that has its limits.

    Raises NodeFaultError (ENGINE_FAULT) for one that ran and whose engine, killed in the middle of its start, forgot it.

    Docker hands a container to containerd before it notes the start; the next engine ends what it finds there, and shows a
    container that never ran. The kernel's counts outlive both, and this service too.
    """
    if not context.runtime.is_untouched(container_id):
        if await context.cgroups.was_used(record.id):
            await _refuse_if_forgotten(context, container_id)
        else:
            if record.lease.gpu_uuids:
                await _refuse_if_taken(context, record, container_id)
            # It may have gone with the host's last boot, and an engine that finds none makes one without limits.
            await context.cgroups.prepare(record.spec, record.lease.cpu_ids)
    return await context.runtime.start(container_id)


async def _refuse_if_forgotten(context: Context, container_id: str) -> None:
    state = await context.runtime.find(container_id)
    if state is not None and not state.has_run:
        raise NodeFaultError(
            f"the engine was ended while it started {container_id[:12]}",
            reason="ENGINE_FAULT",
            hint="whether the command has run is not known, so it is not run again in this attempt",
        )


async def _refuse_if_taken(context: Context, record: TaskRecord, container_id: str) -> None:
    """Since it was made its GPUs were nobody's: the service that made it has ended."""
    state = await context.runtime.find(container_id)
    if state is not None and not state.has_run and (why := await context.gpus.ready(record)):
        raise NodeFaultError(f"A GPU of the task could not be made ready: {why}", reason="GPU_FAULT")


def _inside(context: Context, container_id: str) -> Callable[[Sequence[str]], Awaitable[str]]:
    return lambda argv: context.runtime.run_inside(container_id, argv, timeout_seconds=_INSIDE_SECONDS)


async def _bound_layer(context: Context, record: TaskRecord, container_id: str) -> None:
    created = await context.runtime.find(container_id)
    if created is not None:
        await context.disk.add_layer(record.id, created.layer, created.beside)


async def watch(context: Context, driver: Driver, record: TaskRecord) -> ev.Event:
    """Follow the log, watch the disk, observe what goes with the container, wait for the end."""
    id_, container_id, stretch = record.id, _container(record), Stretch(context.clock)
    are_gpus_followed = False
    with contextlib.suppress(TransientError, NodeFaultError):
        are_gpus_followed = await gpus.follow(context, record)
    # A task that ends at once needs none of what goes on beside it: its log is read in one piece, when results are
    # collected. After a restart its disk is to be bound again, whatever comes.
    if context.disk.seen(id_) is None:
        context.unbound.add(id_)
    is_known = id_ not in context.unbound
    observed = _Observed(record.usage)
    beside: list[asyncio.Task[None]] = []

    def accompany() -> None:
        work = {
            "log": context.logs.follow_until_end(id_, container_id, context.dirs.log(id_)),
            "disk": _end_at_the_disk_limit(context, driver, record),
            "observe": _observe(context, record, observed),
        }
        if not is_known:
            work["bound"] = until_done(context, id_, "bound its disk", lambda: _bound_again(context, record))
        if not are_gpus_followed:
            work["gpus"] = until_done(context, id_, "follow its GPUs", lambda: gpus.follow(context, record))
        beside.extend(asyncio.create_task(some, name=f"{name} {id_}") for name, some in work.items())

    timer = asyncio.get_running_loop().call_later(_ALONE_SECONDS if is_known else 0, accompany)
    try:
        state = await context.runtime.wait_exited(container_id)
        timer.cancel()
        if beside:
            follower, *others = beside
            for task in others:
                task.cancel()
            with contextlib.suppress(TimeoutError):  # what is left is drained when results are collected
                async with asyncio.timeout(context.settings.log_drain_seconds):
                    await follower
    finally:
        timer.cancel()
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    context.unbound.discard(id_)
    now = context.clock.now()
    if state is None:
        return ev.ContainerLost(at=now, message="the container was removed from the engine while it ran")
    if state.exit_code is None:
        return ev.ContainerLost(
            at=now, message=f"the engine lost the container's exit status ({state.status} {state.error})"
        )
    if record.lease.gpu_uuids:
        await context.gpus.ended(id_, well=state.exit_code == 0)
    kills, usage = await context.cgroups.at_end(id_)
    context.ended[id_] = Ended(container=state, usage=usage)
    # The kernel's word on whose limit it was counts more than the engine's, which knows only that there was a kill.
    host_oom_killed = bool(kills.outside) and not kills.own_limit
    return ev.ContainerExited(
        at=now,
        exit_code=state.exit_code,
        oom_killed=bool(kills.own_limit) or (state.oom_killed and not host_oom_killed),
        host_oom_killed=host_oom_killed,
        error=state.error,
        finished_at=None if stretch.clock_was_set else state.finished_at,
        ran=stretch.ran(record.started_at, state),
        observed=observed.usage,
        gpu_fault=context.gpus.fault(id_),
        by_engine=state.ended_by_engine,
        engine_was_away=state.engine_was_away,
    )


class _Observed:
    def __init__(self, usage: Usage) -> None:
        self.usage = usage


async def _observe(context: Context, record: TaskRecord, observed: _Observed) -> None:
    """Keep the last sight of what the kernel forgets when the container ends. The first look is early, for short tasks."""
    container_id = _container(record)
    pause = context.settings.observe_seconds / 8
    pid: int | None = None
    while True:
        await context.clock.sleep(pause)
        pause = min(context.settings.observe_seconds, pause * 2)
        await context.cgroups.look_after(record.id)
        if pid is None:
            with contextlib.suppress(TransientError, NodeFaultError):
                state = await context.runtime.find(container_id)
                pid = state.pid if state is not None else None
        counted = context.processes.network(pid) if pid else None
        if counted is not None:
            observed.usage = Usage(network_received_bytes=counted[0], network_sent_bytes=counted[1])


async def _bound_again(context: Context, record: TaskRecord) -> bool:
    """After a restart, which forgot it. What can't be had of the one does not keep the other from being watched."""
    try:
        await bound_disk(context, record)
    finally:
        await _bound_layer(context, record, _container(record))
    context.unbound.discard(record.id)
    return True


async def _end_at_the_disk_limit(context: Context, driver: Driver, record: TaskRecord) -> None:
    async def end() -> bool:
        used, limit = await context.disk.crossed(record.id), record.spec.request.disk_bytes
        message = f"Wrote {used.bytes} bytes in {used.file_count} files; its disk limit is {limit} bytes."
        driver.end(record.id, StopCause.DISK_LIMIT, message)
        return True

    await until_done(context, record.id, "watch its disk", end)


async def stop(context: Context, driver: Driver, record: TaskRecord) -> None:
    """Stop signal, grace, SIGKILL, repeated until the engine has done it. The end itself is told by `watch`.

    What broke a limit gets no grace. One that outlives SIGKILL is told as stuck, and killed again and again.
    """
    container_id = _container(record)
    grace_seconds = 0.0 if has_no_grace(record) else record.spec.grace_seconds
    patience = grace_seconds + context.settings.kill_patience_seconds
    while True:
        try:
            async with asyncio.timeout(patience):
                await context.runtime.stop(container_id, grace_seconds=grace_seconds, signal=record.spec.stop_signal)
                found = await context.runtime.find(container_id)
            if found is None or not found.is_running:
                log.debug("container.stopped", task_id=record.id.task_id, gone=found is None)
                return
            continue  # it had not been started yet when it was to be stopped
        except TimeoutError:
            _tell_stuck(context, driver, record.id)
        except (TransientError, NodeFaultError) as error:
            log.warning("container.stop_failed", task_id=record.id.task_id, error=str(error))
            if error.reason == "CONTAINER_NOT_STOPPING":
                _tell_stuck(context, driver, record.id)
        grace_seconds, patience = 0.0, context.settings.kill_patience_seconds
        await context.cgroups.kill(record.id)
        await context.clock.sleep(_STUCK_LOOK_SECONDS)


async def make_sure_it_ended(
    context: Context, driver: Driver, record: TaskRecord
) -> tuple[ContainerState | None, Usage]:
    """The attempt's container, ended for certain, with nothing left in its cgroup, and what the kernel counted there.

    None where none can have been started; then an engine that is away is not waited for. Else takes as long as it takes:
    what cannot be ended keeps its lease.
    """
    id_ = record.id
    may_have_run = record.container_id is not None or id_ in context.taken_up
    ended = context.ended.pop(id_, None)
    if ended is not None and ended.usage is not None:
        return ended.container, ended.usage
    found = ended.container if ended is not None else None
    while True:
        try:
            async with asyncio.timeout(context.settings.kill_patience_seconds):
                if found is None and may_have_run:
                    found = await context.runtime.find(labels.container_name(id_))
                while found is not None and found.is_running:
                    await context.runtime.kill(found.id)
                    found = await context.runtime.wait_exited(found.id)
                while (usage := await context.cgroups.usage(id_)) is None:
                    await context.cgroups.kill(id_)
                    await context.clock.sleep(0.02)
            return found, usage
        except TimeoutError:
            _tell_stuck(context, driver, id_)
            await context.cgroups.kill(id_)
            await context.clock.sleep(_STUCK_LOOK_SECONDS)
        except TransientError:
            await context.cgroups.kill(id_)  # whatever runs there is to end, also while the engine is away
            raise


def _tell_stuck(context: Context, driver: Driver, id_: AttemptId) -> None:
    known = driver.get(id_)
    if known is not None and known.phase < Phase.RUNNING:
        return  # the engine is silent, and whether anything runs is not known
    patience = context.settings.kill_patience_seconds
    log.error("container.stuck", task_id=id_.task_id, attempt=id_.attempt, seconds=patience)
    message = (
        f"Something of it was still alive {patience:g} s after SIGKILL; its resources stay taken until it is gone."
    )
    driver.post(id_, ev.ContainerStuck(at=context.clock.now(), message=message))


def _container(record: TaskRecord) -> str:
    return record.container_id or labels.container_name(record.id)
