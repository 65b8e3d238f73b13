"""Freezes what the attempt left: its log, its usage, its files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import Collected, Outcome, TaskRecord, Usage
from nodeservice.errors import NodeFaultError, NodeServiceError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.patience import back_off
from nodeservice.lifecycle.steps.run import make_sure_it_ended
from nodeservice.ports import ResultBundle

log = structlog.get_logger(__name__)

_FELL = (
    "the host went down, and was not shut down, after the task had ended and before its results had been read: what it "
    "wrote last may be missing"
)


async def collect(context: Context, driver: Driver, record: TaskRecord) -> ev.Event:
    """Make sure that nothing runs any more, then drain, read and freeze. Safe to repeat."""
    container, counted = await make_sure_it_ended(context, driver, record)
    has_run = record.started_at is not None or (container is not None and container.has_run)
    if not has_run:  # it may have come to its end before they were made
        await context.filing.run(lambda: context.dirs.prepare(record.id))
    if record.lease.gpu_uuids and container is not None and container.has_run:
        await context.gpus.returned(record)
    driver.post(record.id, ev.ContainerGone(at=context.clock.now()))
    unread = None
    if container is not None and container.has_run:
        unread = await _drain_log(context, record, container.id)
    usage = await _bill(context, record, counted)
    is_success = record.verdict is not None and record.verdict.outcome is Outcome.SUCCEEDED
    if (
        record.id in context.in_doubt
        and is_success
        and not await context.filing.run(lambda: _is_frozen(context, record))
    ):
        return ev.CollectFailed(at=context.clock.now(), message=_FELL, usage=usage)
    try:
        bundle = await _freeze(context, record)
    except NodeServiceError as error:
        return ev.CollectFailed(at=context.clock.now(), message=f"cannot collect the results: {error}", usage=usage)
    context.frozen[record.id] = bundle
    collected = replace(
        _collected(context, record, bundle), log_error=unread, log_has_gap=context.logs.has_gap(record.id)
    )
    return ev.ResultsCollected(at=context.clock.now(), collected=collected, usage=usage)


def _is_frozen(context: Context, record: TaskRecord) -> bool:
    """The digests of all files are on the disk: what is not as it was is found out."""
    try:
        context.bundles.reopen(record.spec, context.dirs.root(record.id))
    except NodeServiceError:
        return False
    return True


async def _drain_log(context: Context, record: TaskRecord, container_id: str) -> str | None:
    """Bring the log to its end. What went wrong, where the engine can't give the rest: no reason to lose the results too."""
    failures = 0
    while True:
        try:
            await context.logs.capture(record.id, container_id, context.dirs.log(record.id), follow=False)
        except NodeServiceError as error:
            failures += 1
            log.error("log.not_drained", task_id=record.id.task_id, failures=failures, error=str(error))
            if failures >= context.settings.collect_attempt_count:
                return str(error)
            await back_off(context.clock, context.settings.step_backoff, failures)
        else:
            return None


async def _bill(context: Context, record: TaskRecord, counted: Usage) -> Usage:
    """What the kernel counted, beside what was observed while it ran."""
    written = await context.disk.use(record.id)
    return replace(
        counted,
        disk_peak_bytes=written.peak_bytes if written is not None else None,
        network_received_bytes=record.usage.network_received_bytes,
        network_sent_bytes=record.usage.network_sent_bytes,
        gpus=context.gpus.usage(record.id) if record.lease.gpu_uuids else (),
    )


async def _freeze(context: Context, record: TaskRecord) -> ResultBundle:
    """Collect, and try again for a while: a full disk may be freed, and giving up loses results."""
    root, log_path = context.dirs.root(record.id), context.dirs.log(record.id)
    failures = 0
    while True:
        try:
            if not context.dirs.results(record.id).is_dir():  # without them it would seem to have written nothing
                raise NodeFaultError(f"{context.dirs.results(record.id)} is gone", reason="COLLECT_FAILED")
            return await context.collecting.run(lambda: context.bundles.collect(record.spec, root, log_path))
        except NodeServiceError as error:
            failures += 1
            log.error("results.collect_failed", task_id=record.id.task_id, failures=failures, error=str(error))
            if failures >= context.settings.collect_attempt_count:
                raise
            await back_off(context.clock, context.settings.step_backoff, failures)


def _collected(context: Context, record: TaskRecord, bundle: ResultBundle) -> Collected:
    path = context.dirs.log(record.id)
    return Collected(
        log_bytes=path.stat().st_size if path.exists() else 0,
        log_tail=context.logs.tail(record.id, path),
        **held(context, bundle),
    )


def held(context: Context, bundle: ResultBundle) -> dict[str, Any]:
    """The fields of `Collected` that tell of a bundle."""
    return {
        "manifest_sha256": context.bundles.digest(bundle),
        "file_count": len(bundle.files),
        "total_bytes": bundle.manifest.total_bytes,
        "paths": _bounded([file.entry.path for file in bundle.files], context.settings.path_list_max_bytes),
        "skipped": _bounded(list(bundle.manifest.skipped), context.settings.path_list_max_bytes // 8),
        "skipped_count": len(bundle.manifest.skipped),
    }


def _bounded(texts: list[str], max_bytes: int) -> tuple[str, ...]:
    kept: list[str] = []
    for text in texts:
        max_bytes -= len(text.encode(errors="replace")) + 8
        if max_bytes < 0:
            break
        kept.append(text)
    return tuple(kept)
