"""Turns an adapter's error into the reason that the outcome will carry, and goes on trying where that may help."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from nodeservice.core.model import AttemptId, Reason, TaskRecord
from nodeservice.errors import NodeFaultError, NodeServiceError, TransientError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.patience import Patience, back_off

log = structlog.get_logger(__name__)
T = TypeVar("T")


def reason_of(error: NodeServiceError, otherwise: Reason) -> Reason:
    """The error's own reason where the outcome knows it."""
    try:
        return Reason(error.reason)
    except ValueError:
        return otherwise


async def persist(
    context: Context, call: Callable[[], Awaitable[T]], *, current: Callable[[], TaskRecord | None] = lambda: None
) -> T:
    """Repeat a call while the engine is away. Raises NodeFaultError (NODE_FAULT) once the limit has passed.

    Also once the `current` record, if it is asked for, says that the task is to end.
    """
    failures = 0
    patience = Patience(context.clock, context.settings.engine_give_up_seconds)
    while True:
        try:
            return await call()
        except TransientError as error:
            record = current()
            if patience.is_over or (record is not None and record.stop is not None):
                raise NodeFaultError(
                    f"the container engine stayed away: {error}",
                    reason="NODE_FAULT",
                    hint="check the engine on this node",
                ) from error
            failures += 1
            log.warning("engine.retry", failures=failures, error=str(error))
            await back_off(context.clock, context.settings.step_backoff, failures)


async def until_done(context: Context, id_: AttemptId, doing: str, work: Callable[[], Awaitable[bool]]) -> None:
    """Repeat work beside a running task, whatever goes wrong with it, until it says that it is done.

    A bound is never given up because it could not be set, or looked at, once. It ends with the task that it is beside.
    """
    failures = 0
    while True:
        failures += 1
        story = {"doing": doing, "task_id": id_.task_id, "attempt": id_.attempt, "failures": failures}
        try:
            if await work():
                return
        except NodeServiceError as error:
            log.warning("task.bound_failed", error=str(error), **story)
        except Exception:
            log.exception("task.bound_failed", **story)
        await back_off(context.clock, context.settings.step_backoff, failures)
