"""Stores the results, or keeps them on this host until the store takes them."""

from __future__ import annotations

import asyncio
import random

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import TaskRecord
from nodeservice.errors import NodeFaultError, NodeServiceError, RequestError, TransientError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.patience import Patience
from nodeservice.ports import ResultBundle

log = structlog.get_logger(__name__)

_REFUSALS_BEFORE_KEEPING = 3


async def upload(context: Context, record: TaskRecord) -> ev.Event:
    """Try until it is stored. Past the limit, or when the store refuses us, keep the results here instead.

    The limit counts from the start of the phase, so a restart doesn't prolong it. Where even the directory on this host
    takes nothing (a full disk), both are tried for ever: no report goes out before the results are safe somewhere.
    """
    settings = context.settings
    bundle = context.frozen.pop(record.id, None)
    if bundle is None:
        bundle = await asyncio.to_thread(context.bundles.reopen, record.spec, context.dirs.root(record.id))
    patience = Patience(context.clock, settings.upload_give_up_seconds, since=record.timings[-1].started_at)
    failures = refusals = 0
    while True:
        try:
            return ev.ResultsStored(location=await context.store.put(bundle), at=context.clock.now())
        except (TransientError, NodeFaultError, RequestError) as error:
            context.store_in_doubt.set()
            failures += 1
            refusals += isinstance(error, NodeFaultError)
            log.warning("results.not_stored", task_id=record.id.task_id, failures=failures, error=str(error))
            hopeless = isinstance(error, RequestError)
            over = patience.is_over or refusals >= _REFUSALS_BEFORE_KEEPING
            if hopeless or over:
                kept = await _keep_here(
                    context, bundle, error, will_retry=settings.retries_kept_results and not hopeless
                )
                if kept is not None:
                    return kept
            pause, left = _pause(context, failures), patience.left_seconds
            # The last try is at the limit, not one long pause after it.
            await context.clock.sleep(min(pause, left) if left > 0 else pause)


async def _keep_here(
    context: Context, bundle: ResultBundle, cause: NodeServiceError, *, will_retry: bool
) -> ev.ResultsRetained | None:
    if context.fallback is None:
        return None
    try:
        location = await context.fallback.put(bundle)
    except NodeServiceError as error:
        log.error("results.not_kept", task_id=bundle.spec.id.task_id, error=str(error))
        return None
    later = "; they are uploaded when it takes them" if will_retry else ""
    message = f"The results are complete at {location}, since the result store did not take them{later}: {cause}"
    return ev.ResultsRetained(at=context.clock.now(), location=location, message=message, will_retry=will_retry)


async def store_retained(context: Context, record: TaskRecord) -> ev.Event:
    """Upload results that were kept here, for as long as it takes; then drop the copy, leaving a pointer."""
    moved_to = await asyncio.to_thread(context.bundles.moved_to, record.spec)
    if moved_to is not None:
        await asyncio.to_thread(context.bundles.discard_kept, record.spec, moved_to)
        return ev.ResultsStored(at=context.clock.now(), location=moved_to)
    bundle = await asyncio.to_thread(context.bundles.kept, record.spec)
    failures = 0
    while True:
        try:
            location = await context.store.put(bundle)
        except NodeServiceError as error:
            failures += 1
            if failures in (1, 10) or failures % 100 == 0:
                log.warning("results.still_retained", task_id=record.id.task_id, failures=failures, error=str(error))
            await context.clock.sleep(_pause(context, failures))
        else:
            await asyncio.to_thread(context.bundles.discard_kept, record.spec, location)
            log.info("results.stored_late", task_id=record.id.task_id, location=location)
            return ev.ResultsStored(at=context.clock.now(), location=location)


def _pause(context: Context, failures: int) -> float:
    return context.settings.store_backoff.delay(failures, random.random())  # noqa: S311
