"""Makes the image present."""

from __future__ import annotations

import random
from datetime import timedelta

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import Reason, TaskRecord
from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.steps.failure import reason_of

log = structlog.get_logger(__name__)


async def pull(context: Context, record: TaskRecord) -> ev.Event:
    """Pull, and try again when the registry or the engine is at fault: that is not the task's doing.

    All tries together have `pull_timeout_seconds`, from the begin of the phase, also over a restart.
    """
    settings, clock, spec = context.settings, context.clock, record.spec
    give_up_at = record.timings[-1].started_at + timedelta(seconds=settings.pull_timeout_seconds)
    failures = 0
    while True:
        try:
            image = await context.runtime.pull(
                spec.image, policy=spec.pull_policy, on_progress=context.on_pull_progress(record.id)
            )
        except (RequestError, NodeFaultError) as error:
            return ev.StepFailed(at=clock.now(), reason=reason_of(error, Reason.IMAGE_PULL_FAILED), message=str(error))
        except TransientError as error:
            failures += 1
            log.warning(
                "image.pull_failed", task_id=spec.id.task_id, image=spec.image, failures=failures, error=str(error)
            )
            if failures >= settings.pull_attempt_count or clock.now() >= give_up_at:
                message = f"gave up after {failures} tries: {error}"
                return ev.StepFailed(at=clock.now(), reason=reason_of(error, Reason.IMAGE_PULL_FAILED), message=message)
            await clock.sleep(settings.step_backoff.delay(failures, random.random()))  # noqa: S311
        else:
            log.info("image.pulled", task_id=spec.id.task_id, image=spec.image, digest=image.digest)
            return ev.ImagePulled(at=clock.now(), digest=image.digest)
