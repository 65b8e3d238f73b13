"""Stores the results, or keeps them on this host until the store takes them; what no store can take is moved aside."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import TaskRecord
from nodeservice.core.retry import is_worth_telling
from nodeservice.errors import NamesRefusedError, NodeFaultError, NodeServiceError, RequestError, TransientError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.patience import Patience, back_off
from nodeservice.lifecycle.steps.collect import held
from nodeservice.ports import ResultBundle

log = structlog.get_logger(__name__)

_REFUSALS_BEFORE_KEEPING = 3
_FOR_EVER = ("MANIFEST_INVALID", "RESULT_CHANGED", "RESULT_CONFLICT", "RESULT_NAME_REFUSED")
"""Reasons that pass with no store and no time: other results lie in the place of these, or these are not whole any more."""


async def upload(context: Context, driver: Driver, record: TaskRecord) -> ev.Event:
    """Try until it is stored. Past the limit, or when the store refuses us, keep the results here instead.

    The limit counts from the start of the phase, so a restart doesn't prolong it. Where even the directory on this host
    takes nothing (a full disk), both are tried for ever: no report goes out before the results are safe somewhere. What can
    never be stored is moved aside; so is all else where the process ends with the task.
    """
    settings = context.settings
    bundle = context.frozen.pop(record.id, None)
    patience = Patience(context.clock, settings.upload_give_up_seconds, since=record.timings[-1].started_at)
    failures = refusals = 0
    while True:
        try:
            if bundle is None:
                bundle = await asyncio.to_thread(context.bundles.reopen, record.spec, context.dirs.root(record.id))
            return _stored(context, record, bundle, await _store(context, bundle))
        except NamesRefusedError as error:
            log.warning("results.names_refused", task_id=record.id.task_id, count=len(error.names), error=str(error))
            root = context.dirs.root(record.id)
            bundle = await asyncio.to_thread(context.bundles.leave_out, record.spec, root, error.names)
            continue
        except (TransientError, NodeFaultError, RequestError) as error:
            context.store_in_doubt.set()
            failures += 1
            refusals += isinstance(error, NodeFaultError)
            log.warning("results.not_stored", task_id=record.id.task_id, failures=failures, error=str(error))
            hopeless = isinstance(error, RequestError)
            over = patience.is_over or refusals >= _REFUSALS_BEFORE_KEEPING
            if hopeless or over:
                will_retry = settings.retries_kept_results and not hopeless
                kept = await _keep_here(context, bundle, error, will_retry=will_retry) if bundle is not None else error
                if isinstance(kept, ev.ResultsRetained):
                    return kept
                is_last = kept.reason in _FOR_EVER or not settings.retries_kept_results
                if is_last and failures >= _REFUSALS_BEFORE_KEEPING:
                    return await _set_aside(context, driver, record, kept)
                del kept
        bundle = None  # its names can take much memory, and are read again in no time
        pause, left = settings.store_backoff.delay(failures, random.random()), patience.left_seconds  # noqa: S311
        # The last try is at the limit, not one long pause after it.
        await context.clock.sleep(min(pause, left) if left > 0 else pause)


async def _store(context: Context, bundle: ResultBundle) -> str:
    location = await context.store.put(bundle)
    context.on_stored(bundle.manifest.total_bytes)
    return location


def _stored(context: Context, record: TaskRecord, bundle: ResultBundle, location: str) -> ev.ResultsStored:
    """Also where names were left out, be that before a restart."""
    now, known = context.clock.now(), record.collected
    if known is None or known.manifest_sha256 == context.bundles.digest(bundle):
        return ev.ResultsStored(at=now, location=location)
    less = replace(known, **held(context, bundle))
    example = next((line for line in less.skipped if line not in known.skipped), "")
    remark = (
        f"{known.file_count - less.file_count} results could not be stored, as the manifest tells, such as {example}"
    )
    return ev.ResultsStored(at=now, location=location, collected=less, remarks=(remark,))


async def _keep_here(
    context: Context, bundle: ResultBundle, cause: NodeServiceError, *, will_retry: bool
) -> ev.ResultsRetained | NodeServiceError:
    """What keeps them from this host is an answer too."""
    if context.fallback is None:
        return cause
    try:
        location = await context.fallback.put(bundle)
    except NodeServiceError as error:
        log.error("results.not_kept", task_id=bundle.spec.id.task_id, error=str(error))
        return error
    later = "; they are uploaded when it takes them" if will_retry else ""
    message = f"The results are complete at {location}, since the result store did not take them{later}: {cause}"
    return ev.ResultsRetained(at=context.clock.now(), location=location, message=message, will_retry=will_retry)


async def _set_aside(
    context: Context, driver: Driver, record: TaskRecord, cause: NodeServiceError
) -> ev.ResultsRetained:
    """Whoever is cut off after the move finds no work directory any more, and comes here again."""
    await driver.settled()  # that it was collected: else it would be collected anew, from nothing
    place = await asyncio.to_thread(context.dirs.salvage, record.id)
    log.error("results.set_aside", task_id=record.id.task_id, place=str(place), error=str(cause))
    where = f"What there is of the results stays in {place} on this host" if place else "The results are gone"
    message = f"{where}, since they can't be stored: {cause}"
    location = place.as_uri() if place else ""
    return ev.ResultsRetained(at=context.clock.now(), location=location, message=message, will_retry=False)


async def store_retained(context: Context, record: TaskRecord) -> ev.Event:
    """Upload results that were kept here, for as long as it takes; then drop the copy, leaving a pointer.

    What no store can take any more is not tried for ever, since it holds its disk: it stays where it is. It is tried for a
    while all the same, since the file system that it lies on may only be away.
    """
    patience = Patience(context.clock, context.settings.upload_give_up_seconds)
    failures = 0
    while True:
        try:
            location = await asyncio.to_thread(context.bundles.moved_to, record.spec)
            if location is None:
                location = await _store(context, await asyncio.to_thread(context.bundles.kept, record.spec))
        except NodeServiceError as error:
            failures += 1
            if is_worth_telling(failures):
                log.warning("results.still_retained", task_id=record.id.task_id, failures=failures, error=str(error))
            if error.reason in _FOR_EVER and patience.is_over:
                log.error("results.given_up", task_id=record.id.task_id, error=str(error))
                message = f"What was kept on this host can't be uploaded: {error}"
                return ev.ResultsGivenUp(at=context.clock.now(), message=message)
        else:
            await asyncio.to_thread(context.bundles.discard_kept, record.spec, location)
            log.info("results.stored_late", task_id=record.id.task_id, location=location)
            return ev.ResultsStored(at=context.clock.now(), location=location)
        await back_off(context.clock, context.settings.store_backoff, failures)
