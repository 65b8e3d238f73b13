"""Makes the container, with all that bounds it, so far as nothing has to run for that."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import AttemptId, PullPolicy, Reason, TaskRecord
from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.steps import gpus, prepare, pull
from nodeservice.lifecycle.steps.failure import persist, reason_of
from nodeservice.ports import ContainerSpec, Mount, labels

log = structlog.get_logger(__name__)
_IMAGE_ATTEMPTS = 3
_STOP_LOOK_SECONDS = 0.5


async def create(context: Context, driver: Driver, record: TaskRecord) -> ev.Event:
    """Make work directory, bounds and container. A stop that came meanwhile is honoured first."""
    if record.stop is not None:
        return _stopped(context)
    if record.lease.gpu_uuids and (why := await context.gpus.ready(record)):
        message = f"A GPU of the task could not be made ready: {why}"
        return ev.StepFailed(at=context.clock.now(), reason=Reason.GPU_FAULT, message=message)
    try:
        # What passes (TransientError) is no failure of the task: the whole step is tried again.
        cgroup_parent = await prepare.finish(context, record)
    except (RequestError, NodeFaultError) as error:
        return ev.StepFailed(at=context.clock.now(), reason=reason_of(error, Reason.CREATE_FAILED), message=str(error))
    await bound_disk(context, record)
    try:
        wanted = gpus.with_part(context, record, container_spec(context, record, cgroup_parent))
        container_id = await _unless_stopped(context, driver, record.id, _create(context, driver, record, wanted))
    except (RequestError, NodeFaultError, TransientError) as error:
        return ev.StepFailed(at=context.clock.now(), reason=reason_of(error, Reason.CREATE_FAILED), message=str(error))
    if container_id is None:
        return _stopped(context)
    return ev.ContainerCreated(at=context.clock.now(), container_id=container_id)


def _stopped(context: Context) -> ev.StepFailed:
    return ev.StepFailed(at=context.clock.now(), reason=Reason.CANCELLED, message="stopped before it was created")


async def _unless_stopped(
    context: Context, driver: Driver, id_: AttemptId, work: Coroutine[Any, Any, str]
) -> str | None:
    """What it returns, or None once the attempt is to end: an engine may be silent for minutes, and a pull last as long.

    What was broken off ends by itself, and the clean-up waits for that. Nothing runs in a container that is not started.
    """
    context.creating[id_] = making = asyncio.create_task(work, name=f"create {id_}")
    try:
        while not making.done():
            await asyncio.wait({making}, timeout=_STOP_LOOK_SECONDS)
            record = driver.get(id_)
            if record is not None and record.stop is not None and not making.done():
                return None
        del context.creating[id_]
        return await making
    finally:
        making.cancel()


async def _create(context: Context, driver: Driver, record: TaskRecord, wanted: ContainerSpec) -> str:
    """The container's id. An image that somebody removed since its pull is fetched again, the very same content.

    An image without a digest of a registry cannot be had again: what its name means now may be something else.
    """
    policy = record.spec.pull_policy
    make = partial(persist, context, lambda: context.runtime.create(wanted), current=partial(driver.get, record.id))
    for _ in range(_IMAGE_ATTEMPTS - 1):
        try:
            return await make()
        except RequestError as error:
            if error.reason != Reason.IMAGE_NOT_FOUND or policy is PullPolicy.NEVER or "@" not in wanted.image:
                raise
            log.warning("image.vanished", task_id=record.id.task_id, image=wanted.image)
            await pull.fetch(context, record, wanted.image, policy=PullPolicy.IF_NOT_PRESENT)
    return await make()


async def bound_disk(context: Context, record: TaskRecord) -> None:
    # What this service adds beside the results (log, manifest) must not meet a quota that the task has used up.
    id_ = record.id
    await context.disk.prepare(
        id_, record.spec.request.disk_bytes, work=context.dirs.results(id_), log=context.dirs.log(id_)
    )


def container_spec(context: Context, record: TaskRecord, cgroup_parent: str | None) -> ContainerSpec:
    """All that the container is made from, its label story included."""
    spec, id_ = record.spec, record.id
    is_throttled = spec.read_bytes_per_second is not None or spec.write_bytes_per_second is not None
    results = context.dirs.results(id_)
    env = (
        *spec.env,
        # Last, so that they are what they say.
        ("NODESERVICE_TASK_ID", id_.task_id),
        ("NODESERVICE_ATTEMPT", str(id_.attempt)),
        ("TRACEPARENT", record.trace.traceparent),
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
        mounts=tuple(Mount(source=results, target=place) for place in pull.RESULT_PLACES),
        gpu_uuids=record.lease.gpu_uuids,
        # What is kept of its log is within its disk limit: the engine needs no larger copy.
        log_max_bytes=min(context.settings.log_max_bytes, spec.request.disk_bytes),
        grace_seconds=spec.grace_seconds,
        cgroup_parent=cgroup_parent,
        stop_signal=spec.stop_signal,
        open_files_limit=spec.open_files_limit,
        open_files_asked=spec.open_files_asked,
        cpu_ids=record.lease.cpu_ids,
        read_bytes_per_second=spec.read_bytes_per_second,
        write_bytes_per_second=spec.write_bytes_per_second,
        rate_devices=tuple(context.cgroups.rate_devices()) if is_throttled else (),
    )
