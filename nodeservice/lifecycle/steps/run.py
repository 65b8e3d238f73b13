"""Creates, starts, watches and stops the container."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import AttemptId, Reason, StopCause, StopRequest, TaskRecord
from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.lifecycle import labels
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.steps.failure import persist, reason_of
from nodeservice.ports import ContainerSpec, ContainerState, Mount

log = structlog.get_logger(__name__)


async def create(context: Context, record: TaskRecord) -> ev.Event:
    """Make work directory, cgroup and container. A stop that came meanwhile is honoured first."""
    if record.stop is not None:
        return ev.StepFailed(at=context.clock.now(), reason=Reason.CANCELLED, message="stopped before it was created")
    await asyncio.to_thread(context.dirs.prepare, record.id)
    cgroup_parent = await context.cgroups.prepare(record.spec)
    spec = container_spec(context, record, cgroup_parent)
    try:
        container_id = await persist(context, lambda: context.runtime.create(spec))
    except (RequestError, NodeFaultError) as error:
        return ev.StepFailed(at=context.clock.now(), reason=reason_of(error, Reason.CREATE_FAILED), message=str(error))
    return ev.ContainerCreated(at=context.clock.now(), container_id=container_id)


def container_spec(context: Context, record: TaskRecord, cgroup_parent: str | None) -> ContainerSpec:
    """All that the container is made from, its label story included."""
    spec, id_ = record.spec, record.id
    results = context.dirs.results(id_)
    env = (
        ("NODESERVICE_TASK_ID", id_.task_id),
        ("NODESERVICE_ATTEMPT", str(id_.attempt)),
        ("TRACEPARENT", record.trace.traceparent),
        *spec.env,
    )
    return ContainerSpec(
        name=labels.container_name(id_),
        image=record.image_digest or spec.image,
        argv=spec.argv or None,
        shell=spec.command,
        env=env,
        labels={
            labels.NODE: context.settings.worker_id,
            labels.TASK_ID: id_.task_id,
            labels.ATTEMPT: str(id_.attempt),
            labels.SPEC: spec.fingerprint,
            labels.RECORD: context.encode_record(record),
        },
        cpu_milli=spec.request.cpu_milli,
        memory_bytes=spec.request.memory_bytes,
        pids_limit=spec.pids_limit,
        mounts=(Mount(source=results, target="/results"), Mount(source=results, target="/output")),
        gpu_uuids=record.lease.gpu_uuids,
        log_max_bytes=context.settings.log_max_bytes,
        grace_seconds=spec.grace_seconds,
        cgroup_parent=cgroup_parent,
    )


async def start(context: Context, record: TaskRecord) -> ev.Event:
    """Start, and read back the limits that are now in force."""
    if record.stop is not None:
        return ev.StepFailed(at=context.clock.now(), reason=Reason.CANCELLED, message="stopped before it was started")
    container_id = _container(record)
    try:
        state = await persist(context, lambda: context.runtime.start(container_id))
    except (RequestError, NodeFaultError) as error:
        return ev.StepFailed(at=context.clock.now(), reason=reason_of(error, Reason.START_FAILED), message=str(error))
    effective = await context.cgroups.effective(record.id)
    return ev.ContainerStarted(
        at=context.clock.now(),
        started_at=state.started_at or context.clock.now(),
        limits=context.receipt(record.spec, effective, state.limits),
    )


async def watch(context: Context, driver: Driver, record: TaskRecord) -> ev.Event:
    """Follow the log, keep the deadline, wait for the end."""
    container_id = _container(record)
    follower = asyncio.create_task(
        context.logs.follow_until_end(record.id, container_id, context.dirs.log(record.id)), name=f"log {record.id}"
    )
    deadline = asyncio.create_task(_keep_deadline(context, driver, record), name=f"deadline {record.id}")
    try:
        state = await context.runtime.wait_exited(container_id)
        deadline.cancel()
        with contextlib.suppress(TimeoutError):  # what is left is drained when results are collected
            await asyncio.wait_for(follower, context.settings.log_drain_seconds)
    finally:
        for task in (follower, deadline):
            task.cancel()
        await asyncio.gather(follower, deadline, return_exceptions=True)
    now = context.clock.now()
    if state is None:
        return ev.ContainerLost(at=now, message="the container was removed from the engine while it ran")
    if state.exit_code is None:
        return ev.ContainerLost(
            at=now, message=f"the engine lost the container's exit status ({state.status} {state.error})"
        )
    kernel_kills = (await context.cgroups.usage(record.id)).oom_kill_count or 0
    oom_killed = state.oom_killed or kernel_kills > 0  # on cgroup v2 the engine misses the kill of a child
    return ev.ContainerExited(at=now, exit_code=state.exit_code, oom_killed=oom_killed, error=state.error)


async def _keep_deadline(context: Context, driver: Driver, record: TaskRecord) -> None:
    """Ask for the end at the deadline; one that passed while we were away is kept at once."""
    if record.deadline_at is None:
        return
    await sleep_until(context, record.deadline_at)
    limit = record.spec.timeout_seconds
    message = f"Ran longer than its time limit of {limit:g} s."
    driver.post(
        record.id,
        ev.StopRequested(
            at=context.clock.now(),
            stop=StopRequest(cause=StopCause.DEADLINE, requested_at=context.clock.now(), message=message),
        ),
    )


async def sleep_until(context: Context, instant: datetime) -> None:
    """Sleep until the wall clock shows `instant`; looks again at least each minute, since that clock may be set."""
    while (left := (instant - context.clock.now()).total_seconds()) > 0:
        await context.clock.sleep(min(left, 60.0))


async def stop(context: Context, record: TaskRecord) -> None:
    """SIGTERM, grace, SIGKILL, repeated until the engine has done it. The end itself is told by `watch`."""
    container_id = _container(record)
    while True:
        try:
            await context.runtime.stop(container_id, grace_seconds=record.spec.grace_seconds)
        except (TransientError, NodeFaultError) as error:
            log.warning("container.stop_failed", task_id=record.id.task_id, error=str(error))
            await context.clock.sleep(1.0)
        else:
            return


async def make_sure_it_ended(context: Context, id_: AttemptId) -> ContainerState | None:
    """The attempt's container, ended for certain; None where there is none."""
    found = await context.runtime.find(labels.container_name(id_))
    while found is not None and found.is_running:
        await context.runtime.kill(found.id)
        found = await context.runtime.wait_exited(found.id)
    return found


def _container(record: TaskRecord) -> str:
    return record.container_id or labels.container_name(record.id)
