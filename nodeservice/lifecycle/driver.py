"""One queue feeds the core: decide, journal, and only then act.

All that happens to attempts passes through `Driver`, in batches: everything waiting in the queue is decided on, written in
one synced journal transaction, and then answered and acted on. So one sync serves many, and nothing is ever answered or
done that a crash could forget, but for stops while the journal fails or hangs. Only notes that a crash may forget
(`machine.Step.can_wait`) travel with the next write, which comes within a fraction of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import structlog

from nodeservice.core import admission, machine
from nodeservice.core import effects as fx
from nodeservice.core import events as ev
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId, Phase, StopCause, StopRequest, TaskRecord, TaskSpec, TraceIds
from nodeservice.core.verdict import AT_ONCE
from nodeservice.errors import InvariantError, NodeServiceError, TransientError
from nodeservice.lifecycle.batch_writer import BatchWriter
from nodeservice.lifecycle.inbox import Assign, Batch, Occurred, Resume, Settled, fail
from nodeservice.lifecycle.patience import AgeClock
from nodeservice.lifecycle.story import summary
from nodeservice.ports import Clock, Journal, TraceSink

log = structlog.get_logger(__name__)

StartEffect = Callable[[TaskRecord, fx.Effect], None]
Changed = Callable[[TaskRecord], None]
_MAX_BATCH = 512
_MAX_LIVE_COUNT = 10_000
_UNWRITTEN_SECONDS = 1.0
"""For how long a stop waits for the journal before it is carried out all the same."""


class Driver:
    """The single writer of records, ledger and journal."""

    def __init__(
        self,
        *,
        journal: Journal,
        ledger: Ledger,
        clock: Clock,
        traces: TraceSink,
        finished_retention_count: int = 2_000,
        finished_retention_seconds: float = 7 * 86_400.0,
    ) -> None:
        self._journal = journal
        self._clock = clock
        self._present = AgeClock(clock)
        self._traces = traces
        self._finished_retention_count = finished_retention_count
        self._finished_retention = timedelta(seconds=finished_retention_seconds)
        self._records: dict[AttemptId, TaskRecord] = {}
        self._live: dict[AttemptId, TaskRecord] = {}
        self._attempts: dict[str, tuple[int, ...]] = {}
        """The numbers of a task's known attempts, in order."""
        self._finished: dict[AttemptId, None] = {}
        self._queue: asyncio.Queue[Assign | Occurred | Resume | Settled] = asyncio.Queue()
        self._listeners: list[Changed] = []
        self._forgotten: list[Callable[[AttemptId], None]] = []
        self._start_effect: StartEffect = lambda _record, _effect: None
        self.ledger = ledger
        self.draining = False
        """The process is ending."""
        self.cordoned = False
        """Somebody wants no new work here."""
        self.conditions: dict[str, str] = {}
        """What is wrong with this node now, by name, in words. While there is any, it takes no new work."""
        self.warnings: dict[str, str] = {}
        """What else is wrong, by name, in words: it holds back only the tasks that need it."""
        self._looks: set[tuple[AttemptId, bool]] = set()
        """Stops that are looked after soon, by attempt and whether they allow no grace."""
        self._is_idle = False
        """All that was posted is decided on and journalled."""
        self.knows_all = asyncio.Event()
        """Not set while what only the engine knows, and what has its part of the node, is looked for: nobody is admitted."""
        self.knows_all.set()
        self._writer = BatchWriter(journal, ledger, clock, ask_for_write=self._ask_for_write)

    # ---- wiring ---------------------------------------------------------------------------------------------------

    def connect(self, start_effect: StartEffect) -> None:
        """Say who acts. Called once, before `run`."""
        self._start_effect = start_effect

    def on_change(self, listener: Changed) -> None:
        """Call `listener` with each record after it was journalled. It must be quick and must not raise."""
        self._listeners.append(listener)

    def on_forget(self, listener: Callable[[AttemptId], None]) -> None:
        """Call `listener` for each finished attempt that falls out of memory."""
        self._forgotten.append(listener)

    # ---- what others ask ------------------------------------------------------------------------------------------

    def get(self, id_: AttemptId) -> TaskRecord | None:
        return self._records.get(id_)

    def newest(self, task_id: str) -> TaskRecord | None:
        """The record of the highest attempt known of a task."""
        attempts = self._attempts.get(task_id)
        return None if attempts is None else self._records.get(AttemptId(task_id, attempts[-1]))

    def is_live(self, id_: AttemptId | None) -> bool:
        """Whether it is known and unfinished."""
        return id_ in self._live

    def live(self) -> list[TaskRecord]:
        """All unfinished attempts, oldest first."""
        return list(self._live.values())

    def finished(self) -> list[TaskRecord]:
        """All attempts that are over and still remembered."""
        return [self._records[id_] for id_ in self._finished]

    @property
    def journal_error(self) -> str | None:
        """Why the journal cannot be written now."""
        return self._writer.trouble

    def all_conditions(self) -> dict[str, str]:
        """The node's conditions, and what its tasks and its journal make of it."""
        found = {**self.conditions, **self._stuck_condition()}
        if self.journal_error is not None:
            found["JOURNAL_UNWRITABLE"] = self.journal_error
        return found

    def _stuck_condition(self) -> dict[str, str]:
        stuck = ", ".join([str(record.id) for record in self.live() if record.stuck][:5])
        remedy = "a restart of the engine or the host may be needed"
        return {"TASK_STUCK": f"not to be ended: {stuck}; {remedy}"} if stuck else {}

    async def assign(self, spec: TaskSpec, *, trace: TraceIds, received_at: datetime) -> TaskRecord:
        """Admit the attempt; returns once it is durable. Raises RequestError or CapacityError with the reason."""
        await self.knows_all.wait()
        if self.journal_error is not None:
            # In the queue it would wait for as long as the journal does, and then run for a caller who has given up.
            raise self._writer.refusal()
        answer: asyncio.Future[TaskRecord] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Assign(spec, trace, received_at, answer))
        return await answer

    async def request_stop(self, id_: AttemptId, stop: StopRequest) -> TaskRecord:
        """Ask for the end; returns once the request is durable, not once it is carried out."""
        answer: asyncio.Future[TaskRecord] = asyncio.get_running_loop().create_future()
        event = ev.StopRequested(at=stop.requested_at, stop=stop)
        self._queue.put_nowait(Occurred(id_, event, answer))
        self._see_to_stop(id_, event)
        return await answer

    def post(self, id_: AttemptId, event: ev.Event) -> None:
        """Tell what happened. Never blocks."""
        self._queue.put_nowait(Occurred(id_, event))
        if isinstance(event, ev.StopRequested):
            self._see_to_stop(id_, event)

    def end(self, id_: AttemptId, cause: StopCause, message: str = "") -> None:
        """Tell that this service wants it to end from now on. Never blocks."""
        now = self._clock.now()
        self.post(id_, ev.StopRequested(at=now, stop=StopRequest(cause=cause, requested_at=now, message=message)))

    async def settled(self) -> None:
        """Return once all that was posted before is journalled."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Settled(answer))
        await answer

    def _ask_for_write(self) -> None:
        self._queue.put_nowait(Settled(asyncio.get_running_loop().create_future()))

    def _see_to_stop(self, id_: AttemptId, event: ev.StopRequested) -> None:
        """A limit holds, and a cancel is obeyed, also while the journal can't be written, or hangs."""
        if _kind_of_stop(id_, event) in self._looks:
            return  # whoever asked before sees to it; keepers ask again and again
        if self.journal_error is not None:
            self._stop_unwritten(id_, event)
        else:
            self._look_later(id_, event)

    def _look_later(self, id_: AttemptId, event: ev.StopRequested) -> None:
        self._looks.add(_kind_of_stop(id_, event))
        asyncio.get_running_loop().call_later(_UNWRITTEN_SECONDS, self._stop_unwritten, id_, event)

    def _stop_unwritten(self, id_: AttemptId, event: ev.StopRequested) -> None:
        """Stop what is not told to yet, and again while it isn't. Stopping twice does no harm."""
        self._looks.discard(_kind_of_stop(id_, event))
        known = self._records.get(id_)
        if known is None or self._is_idle:
            return  # it was decided on
        record = self._writer.pending(id_) or known
        if not Phase.STARTING <= record.phase <= Phase.RUNNING:
            return
        # That it runs may be what can't be written. Where it doesn't yet, nothing is stopped, and the next look is soon.
        as_known = replace(record, phase=Phase.RUNNING, stop=known.stop, escalation=known.escalation)
        step = machine.advance(as_known, event)
        for effect in step.effects:
            self._start_effect(step.record, effect)
        if step.effects:
            self._look_later(id_, event)

    # ---- start and run --------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Take up what the journal holds. Call before `run`; nothing is acted on yet."""
        for record in await self._journal.load():
            self._remember(record)
            if record.phase is Phase.FINISHED:
                self._finished[record.id] = None
        self.ledger.restore(self._records.values())

    def adopt(self, record: TaskRecord) -> None:
        """Take up an attempt that the journal lost, as rebuilt from its container's labels."""
        self.ledger.restore([record])
        self._queue.put_nowait(Resume(record))

    def resume_all(self) -> None:
        for record in self.live():
            self._queue.put_nowait(Resume(record))

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            batch = Batch()
            self._is_idle = True
            item = await self._queue.get()
            self._is_idle = False
            self._decide(item, batch)
            for _ in range(_MAX_BATCH):
                try:
                    self._decide(self._queue.get_nowait(), batch)
                except asyncio.QueueEmpty:
                    break
            if batch.can_wait and not batch.answers and not batch.settled:
                self._writer.defer(batch)
            else:
                await self._writer.write(batch)
            self._publish(batch)
            await self._forget_old()

    # ---- decide ---------------------------------------------------------------------------------------------------

    def _decide(self, item: Assign | Occurred | Resume | Settled, batch: Batch) -> None:
        match item:
            case Assign():
                self._decide_assign(item, batch)
            case Occurred():
                self._decide_event(item, batch)
            case Settled():
                batch.settled.append(item.answer)
            case Resume():
                record = batch.changed.get(item.record.id) or self._records.get(item.record.id) or item.record
                step = machine.resume(record, at=self._clock.now())
                if item.record.id not in self._records:
                    step = replace(step, changed=True)
                self._note(step, batch)

    def _decide_assign(self, item: Assign, batch: Batch) -> None:
        if item.answer.cancelled():
            return

        def known(spec: TaskSpec) -> TaskRecord | None:
            return batch.changed.get(spec.id) or self._records.get(spec.id)

        try:
            existing = admission.admit(
                item.spec,
                known=known,
                ledger=self.ledger,
                draining=self.draining or self.cordoned,
                conditions={**self.conditions, **self._stuck_condition()},
                live_count=len(self._live) + len(batch.admitted),
                max_live_count=_MAX_LIVE_COUNT,
            )
            if existing is None:
                spec = item.spec
                lease = self.ledger.grant(spec.id, spec.request, exclusive_cpus=spec.exclusive_cpus, gpu=spec.gpu)
                self._note(
                    machine.accept(
                        spec=item.spec,
                        lease=lease,
                        trace=item.trace,
                        received_at=item.received_at,
                        accepted_at=self._clock.now(),
                    ),
                    batch,
                )
                batch.admitted.add(item.spec.id)
            batch.answers.append((item.answer, item.spec.id))
        except NodeServiceError as error:
            fail(item.answer, error)

    def _decide_event(self, item: Occurred, batch: Batch) -> None:
        record = batch.changed.get(item.id) or self._records.get(item.id)
        if record is None:
            if item.answer is not None:
                fail(item.answer, InvariantError(f"{item.id} is not known here"))
            return
        try:
            self._note(machine.advance(record, item.event), batch)
        except InvariantError as error:
            log.error("task.invariant", task_id=item.id.task_id, attempt=item.id.attempt, error=str(error))
            if item.answer is not None:
                fail(item.answer, error)
            return
        if item.answer is not None:
            batch.answers.append((item.answer, item.id))

    def _note(self, step: machine.Step, batch: Batch) -> None:
        if step.changed:
            batch.changed[step.record.id] = step.record
            batch.can_wait = batch.can_wait and step.can_wait
        batch.effects += [(step.record.id, effect) for effect in step.effects]

    # ---- journal, then act ----------------------------------------------------------------------------------------

    def _publish(self, batch: Batch) -> None:
        for id_, record in batch.changed.items():
            before = self._records.get(id_)
            self._remember(record)
            self._trace(before, record)
            if record.phase is Phase.FINISHED:
                self._finished[id_] = None
                log.info("task.finished", **summary(record))
            for listener in self._listeners:
                try:
                    listener(record)
                except Exception:
                    log.exception("driver.listener_failed", task_id=id_.task_id)
        for answer, id_ in batch.answers:
            if not answer.done():
                answer.set_result(self._records[id_])
        for settled in batch.settled:
            if not settled.done():
                settled.set_result(None)
        for id_, effect in batch.effects:
            match effect:
                case fx.ReleaseCompute():
                    self.ledger.release_compute(id_)
                case fx.ReleaseDisk():
                    self.ledger.release_disk(id_)
                case _:
                    self._start_effect(self._records[id_], effect)

    def _remember(self, record: TaskRecord) -> None:
        self._records[record.id] = record
        if record.phase is Phase.FINISHED:
            self._live.pop(record.id, None)
        else:
            self._live[record.id] = record
        known = self._attempts.get(record.id.task_id, ())
        if record.id.attempt not in known:
            self._attempts[record.id.task_id] = tuple(sorted((*known, record.id.attempt)))

    def _trace(self, before: TaskRecord | None, record: TaskRecord) -> None:
        ended_before = sum(1 for timing in before.timings if timing.ended_at is not None) if before else 0
        for timing in record.timings[ended_before:]:
            if timing.ended_at is not None:
                self._traces.phase_ended(record, timing)
        if record.phase is Phase.FINISHED:
            self._traces.task_ended(record)

    async def _forget_old(self) -> None:
        """Finished attempts are remembered, so that a repeated request gets the same answer, up to a number and an age."""
        excess = len(self._finished) - self._finished_retention_count
        oldest_at = self._present.now() - self._finished_retention
        old: list[AttemptId] = []
        for id_ in self._finished:
            if len(old) >= excess and self._records[id_].timings[-1].started_at > oldest_at:
                break
            old.append(id_)
        if not old:
            return
        with contextlib.suppress(TransientError):  # the journal is full or away: they are forgotten in a later round
            await self._journal.forget(old)
            for id_ in old:
                del self._finished[id_], self._records[id_]
                self._writer.forget(id_)
                self._forget_attempt(id_)
                for listener in self._forgotten:
                    try:
                        listener(id_)
                    except Exception:
                        log.exception("driver.listener_failed", task_id=id_.task_id)

    def _forget_attempt(self, id_: AttemptId) -> None:
        left = tuple(attempt for attempt in self._attempts.pop(id_.task_id, ()) if attempt != id_.attempt)
        if left:
            self._attempts[id_.task_id] = left


def _kind_of_stop(id_: AttemptId, event: ev.StopRequested) -> tuple[AttemptId, bool]:
    return id_, event.stop.cause in AT_ONCE
