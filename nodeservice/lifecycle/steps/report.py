"""Delivers the outcome until the master has acknowledged it. The journalled record is the outbox."""

from __future__ import annotations

import structlog

from nodeservice.core import events as ev
from nodeservice.core.model import TaskRecord
from nodeservice.core.retry import is_worth_telling
from nodeservice.errors import TransientError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.patience import back_off

log = structlog.get_logger(__name__)


async def report(context: Context, record: TaskRecord) -> ev.Event:
    failures = 0
    while True:
        try:
            await context.uplink.report(record)
        except TransientError as error:
            failures += 1
            if is_worth_telling(failures):
                log.warning("report.not_delivered", task_id=record.id.task_id, failures=failures, error=str(error))
            await back_off(context.clock, context.settings.report_backoff, failures)
        else:
            return ev.ReportAcknowledged(at=context.clock.now())
