"""What waits for the driver, and what one round of it decides."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import datetime

from nodeservice.core import effects as fx
from nodeservice.core import events as ev
from nodeservice.core.model import AttemptId, TaskRecord, TaskSpec, TraceIds
from nodeservice.errors import NodeServiceError


@dataclass(slots=True)
class Assign:
    spec: TaskSpec
    trace: TraceIds
    received_at: datetime
    answer: asyncio.Future[TaskRecord]


@dataclass(slots=True)
class Occurred:
    id: AttemptId
    event: ev.Event
    answer: asyncio.Future[TaskRecord] | None = None


@dataclass(slots=True)
class Resume:
    record: TaskRecord


@dataclass(slots=True)
class Settled:
    answer: asyncio.Future[None]


@dataclass(slots=True)
class Batch:
    """What one round decided, before it is journalled."""

    changed: dict[AttemptId, TaskRecord] = field(default_factory=dict)
    effects: list[tuple[AttemptId, fx.Effect]] = field(default_factory=list)
    answers: list[tuple[asyncio.Future[TaskRecord], AttemptId]] = field(default_factory=list)
    admitted: set[AttemptId] = field(default_factory=set)
    settled: list[asyncio.Future[None]] = field(default_factory=list)
    can_wait: bool = True
    """For the disk: nothing in it depends on being remembered."""


def fail(answer: asyncio.Future[TaskRecord], error: NodeServiceError) -> None:
    """Tell who asked, unless he has given up."""
    if not answer.done():
        answer.set_exception(error)
