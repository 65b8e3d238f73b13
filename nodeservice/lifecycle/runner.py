"""Runs effects as asyncio tasks: one per attempt and kind, retried, interruptible, gone at shutdown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine

import structlog

from nodeservice.core import effects as fx
from nodeservice.core import events as ev
from nodeservice.core import machine
from nodeservice.core.model import AttemptId, Phase, Reason, TaskRecord
from nodeservice.core.verdict import has_no_grace, of_failure
from nodeservice.errors import TransientError
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.patience import back_off
from nodeservice.lifecycle.steps import clean_up, collect, create, pull, report, run, upload

log = structlog.get_logger(__name__)

_PHASE_OF: dict[type[fx.Effect], Phase] = {
    type(effect): phase for phase, row in machine.ENTRY.items() for effect in row
}
_TRIES_BEFORE_ABANDONING = 5
Key = tuple[AttemptId, type[fx.Effect]]


class Runner:
    """Starts effects that the driver journalled, and posts how they ended."""

    def __init__(self, context: Context, driver: Driver) -> None:
        self._context = context
        self._driver = driver
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._closing = False

    def start(self, record: TaskRecord, effect: fx.Effect) -> None:
        """Begin. An effect of a phase that is already over, and one already under way, are left alone."""
        if self._closing:
            return
        match effect:
            case fx.CancelStep():
                self._interrupt(record.id, fx.PullImage)
            case fx.StopContainer() | fx.KillContainer():
                if Phase.STARTING <= record.phase <= Phase.RUNNING:
                    self._end(record)
            case _:
                if record.phase is _PHASE_OF[type(effect)]:
                    self._spawn(record.id, effect, self._carry_out(record.id, effect))

    async def settle_reports(self) -> None:
        """Begin nothing any more, and wait for the answers to reports that the master is taking just now.

        Cut off, they would be sent a second time after the next start. The driver has to be running, to note the answers.
        """
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._context.settings.settle_reports_seconds):
                await self._context.uplink.settled()
                await asyncio.sleep(0)  # the steps post what they heard
                await self._driver.settled()

    async def close(self) -> None:
        """Interrupt everything. Containers run on; the next start takes them up again."""
        self._closing = True
        tasks = [*self._tasks.values(), *self._context.preparing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._context.creating.values(), return_exceptions=True)

    def _spawn(self, id_: AttemptId, effect: fx.Effect, work: Coroutine[None, None, None]) -> None:
        key = (id_, type(effect))
        if key in self._tasks:
            work.close()
            return
        task = asyncio.create_task(work, name=f"{type(effect).__name__} {id_}")
        self._tasks[key] = task
        task.add_done_callback(lambda _done: self._tasks.pop(key, None))

    def _interrupt(self, id_: AttemptId, kind: type[fx.Effect]) -> None:
        task = self._tasks.get((id_, kind))
        if task is not None:
            task.cancel()

    def _end(self, record: TaskRecord) -> None:
        """Where no grace is allowed, a gentle end that is under way gives way; no gentle one begins beside the other."""
        stop = run.stop(self._context, self._driver, record)
        if has_no_grace(record):
            self._interrupt(record.id, fx.StopContainer)
            self._spawn(record.id, fx.KillContainer(), stop)
        elif (record.id, fx.KillContainer) in self._tasks:
            stop.close()
        else:
            self._spawn(record.id, fx.StopContainer(), stop)

    async def _carry_out(self, id_: AttemptId, effect: fx.Effect) -> None:
        """Run the step until it tells how it went. A step that fails in a way it doesn't know is tried again."""
        failures = 0
        while True:
            record = self._driver.get(id_)
            if record is None or record.phase is not _PHASE_OF[type(effect)]:
                return
            try:
                event = await self._step(effect)(record)
                break
            except (Exception, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
                    raise
                failures += 1
                story = {"step": type(effect).__name__, "task_id": id_.task_id, "failures": failures}
                if isinstance(error, TransientError):
                    log.warning("step.failed", error=str(error), **story)
                else:
                    log.exception("step.failed", **story)
                if record.phase <= Phase.RUNNING and failures >= _TRIES_BEFORE_ABANDONING:
                    verdict = of_failure(Reason.NODE_FAULT, f"{type(effect).__name__} failed on this node: {error}")
                    event = ev.TaskAbandoned(at=self._context.clock.now(), verdict=verdict)
                    break
                await back_off(self._context.clock, self._context.settings.step_backoff, failures)
        self._tasks.pop((id_, type(effect)), None)
        self._driver.post(id_, event)

    def _step(self, effect: fx.Effect) -> Callable[[TaskRecord], Awaitable[ev.Event]]:
        context = self._context
        steps: dict[type[fx.Effect], Callable[[TaskRecord], Awaitable[ev.Event]]] = {
            fx.PullImage: lambda record: pull.pull(context, record),
            fx.CreateContainer: lambda record: create.create(context, self._driver, record),
            fx.StartContainer: lambda record: run.start(context, record),
            fx.WatchContainer: lambda record: run.watch(context, self._driver, record),
            fx.CollectResults: lambda record: collect.collect(context, self._driver, record),
            fx.UploadResults: lambda record: upload.upload(context, self._driver, record),
            fx.ReportOutcome: lambda record: report.report(context, record),
            fx.CleanUp: lambda record: clean_up.clean_up(context, record),
            fx.StoreRetained: lambda record: upload.store_retained(context, record),
        }
        return steps[type(effect)]
