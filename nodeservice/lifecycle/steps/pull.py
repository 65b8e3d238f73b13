"""Makes the image present."""

from __future__ import annotations

import asyncio
import posixpath

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import PullPolicy, Reason, TaskRecord
from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.patience import Patience, back_off
from nodeservice.lifecycle.steps import prepare
from nodeservice.lifecycle.steps.failure import reason_of
from nodeservice.ports import PulledImage

log = structlog.get_logger(__name__)
RESULT_PLACES = ("/results", "/output")
"""Where a task finds its results directory."""


async def pull(context: Context, record: TaskRecord) -> ev.Event:
    """Make present what the task asks for; what else it needs is begun meanwhile."""
    clock, spec = context.clock, record.spec
    prepare.begin(context, record)
    try:
        image = await fetch(context, record, spec.image, policy=spec.pull_policy)
    except (RequestError, NodeFaultError, TransientError) as error:
        return ev.StepFailed(at=clock.now(), reason=reason_of(error, Reason.IMAGE_PULL_FAILED), message=str(error))
    log.info("image.pulled", task_id=spec.id.task_id, image=spec.image, digest=image.digest)
    return ev.ImagePulled(at=clock.now(), digest=image.digest)


async def fetch(context: Context, record: TaskRecord, name: str, *, policy: PullPolicy) -> PulledImage:
    """Pull, and try again when the registry or the engine is at fault: that is not the task's doing.

    All tries together have `pull_timeout_seconds`, from the begin of the phase, also over a restart; where no time was left
    then, one try has as long as the runtime gives it. Raises RequestError, NodeFaultError, or the last TransientError.
    """
    settings, clock = context.settings, context.clock
    patience = Patience(clock, settings.pull_timeout_seconds, since=record.timings[-1].started_at)
    failures = 0
    while True:
        try:
            seconds = None if patience.is_over and not failures else max(0.0, patience.left_seconds)
            image = await _try(context, record, name, policy=policy, seconds=seconds)
        except TransientError as error:
            failures += 1
            log.warning("image.pull_failed", task_id=record.id.task_id, image=name, failures=failures, error=str(error))
            if failures >= settings.pull_attempt_count or patience.is_over:
                message = f"gave up after {failures} tries: {error.message}"
                raise TransientError(message, reason=error.reason, hint=error.hint) from error
            await back_off(clock, settings.step_backoff, failures)
        else:
            await context.images.used(record.id, image)
            _refuse_if_it_hides_results(name, image)
            return image


async def _try(
    context: Context, record: TaskRecord, name: str, *, policy: PullPolicy, seconds: float | None
) -> PulledImage:
    try:
        async with asyncio.timeout(seconds):
            return await context.runtime.pull(name, policy=policy, on_progress=context.on_pull_progress(record.id))
    except TimeoutError:
        limit = context.settings.pull_timeout_seconds
        message = f"pulling {name!r} was given up: it took longer than {limit:g} s"
        raise TransientError(message, reason=Reason.IMAGE_PULL_TIMEOUT) from None


def _refuse_if_it_hides_results(name: str, image: PulledImage) -> None:
    """A volume below the results directory would take what is written there, and go with the container."""
    for volume in image.volumes:
        place = posixpath.normpath("/" + volume.lstrip("/"))
        if place.startswith(tuple(f"{results}/" for results in RESULT_PLACES)):
            raise RequestError(
                f"image {name!r} declares a volume at {volume}: what the task writes there would not be stored",
                reason="CREATE_FAILED",
                field="image",
                hint="build it without this VOLUME",
            )
