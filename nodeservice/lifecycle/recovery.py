"""Rebuilds the node's work after a restart, from journal ∪ labelled containers, and sweeps what nobody claims."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import structlog

from nodeservice.core.model import AttemptId, Phase, PhaseTiming, TaskRecord
from nodeservice.errors import NodeServiceError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.patience import back_off
from nodeservice.ports import ContainerState, labels

log = structlog.get_logger(__name__)

ENGINE_NOT_LISTED = "ENGINE_NOT_LISTED"

Decode = Callable[[str], TaskRecord]


async def recover(context: Context, driver: Driver, decode: Decode) -> None:
    """Resume what the journal knows, then adopt or remove what only the engine knows.

    Waits for an engine that is away or that fails at it. Run it beside the driver: journalled work goes on meanwhile, and
    nothing new is taken.
    """
    leftover = await asyncio.to_thread(context.dirs.all)
    driver.resume_all()
    failures = 0
    while True:
        try:
            containers = await context.runtime.list_owned(context.settings.worker_id)
            break
        except NodeServiceError as error:
            log.warning("recovery.not_listed", error=str(error))
            driver.conditions[ENGINE_NOT_LISTED] = (
                f"what runs here already is not known, since the engine does not list it: {error}"
            )
            driver.knows_all.set()  # so that who wants something accepted hears this
            failures += 1
            await back_off(context.clock, context.settings.step_backoff, failures)
    claimed = {id_ for container in containers if (id_ := await _take_up(context, driver, decode, container))}
    driver.conditions.pop(ENGINE_NOT_LISTED, None)
    driver.knows_all.set()
    await _sweep(context, driver, [id_ for id_ in leftover if id_ not in claimed])


async def _take_up(context: Context, driver: Driver, decode: Decode, container: ContainerState) -> AttemptId | None:
    """Resume, adopt or remove it, if it is ours. The attempt whose directory is needed from now on, if there is one."""
    id_ = identity(container)
    if id_ is None:
        log.warning("recovery.not_ours", container=container.name, id=container.id)
        return None
    if driver.is_live(id_):
        return id_
    if driver.get(id_) is None:
        record = _from_labels(container, decode)
        if record is not None and record.id == id_:
            log.warning(
                "recovery.adopted", task_id=record.id.task_id, attempt=record.id.attempt, container=container.name
            )
            context.taken_up.add(record.id)
            driver.adopt(record)
            return record.id
    log.warning("recovery.orphan_removed", container=container.name, id=container.id)
    try:
        await context.runtime.remove(container.id)
    except NodeServiceError as error:
        log.error("recovery.orphan_not_removed", container=container.name, error=str(error))
        return id_  # it may still be writing there
    return None


def identity(container: ContainerState) -> AttemptId | None:
    """Whose it is, by its labels. None where its name says otherwise: an image may bring any label, but no name."""
    task_id, attempt = container.labels.get(labels.TASK_ID), container.labels.get(labels.ATTEMPT, "")
    if not task_id or not attempt.isdecimal() or container.name != f"{labels.PREFIX}{task_id}.{attempt}":
        return None
    return AttemptId(task_id, int(attempt))


def _from_labels(container: ContainerState, decode: Decode) -> TaskRecord | None:
    """The record as it was when the container was made, brought up to what the engine shows now."""
    story = container.labels.get(labels.RECORD)
    if story is None:
        return None
    try:
        record = decode(story)
    except NodeServiceError as error:
        log.error("recovery.unreadable_labels", container=container.name, error=str(error))
        return None
    if container.started_at is None:
        return replace(record, container_id=container.id)
    limit = record.spec.timeout_seconds
    running = PhaseTiming(name="run", started_at=container.started_at)
    ended = tuple(replace(timing, ended_at=timing.ended_at or container.started_at) for timing in record.timings)
    return replace(
        record,
        container_id=container.id,
        phase=Phase.RUNNING,
        timings=(*ended, running),
        started_at=container.started_at,
        deadline_at=None if limit is None else container.started_at + timedelta(seconds=limit),
    )


async def _sweep(context: Context, driver: Driver, leftover: list[AttemptId]) -> None:
    """Remove work directories that were there at the start and that no unfinished attempt owns."""
    for id_ in leftover:
        if driver.is_live(id_):
            continue
        try:
            await asyncio.to_thread(context.dirs.remove, id_)
        except OSError as error:
            log.error("recovery.not_swept", directory=str(id_), error=str(error))
        else:
            log.warning("recovery.swept", directory=str(id_))
