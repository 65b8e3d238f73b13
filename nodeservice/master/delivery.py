"""Sends assignments and cancellations to nodes, and repeats them until each is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import structlog

from nodeservice.errors import TransientError
from nodeservice.master.clock import MasterClock
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.rows import Key, TaskRow
from nodeservice.master.tasks import TaskBook
from nodeservice.wire import master_worker_pb2 as pb

log = structlog.get_logger(__name__)

ASSIGN_DEADLINE_SECONDS = 10.0
CANCEL_DEADLINE_SECONDS = 30.0
FINAL_REASONS = frozenset({"INVALID_REQUEST", "TASK_CONFLICT"})
"""A node's refusals that no other node and no later time would change."""

_CONCURRENT_CALLS = 32
_CANCELS_APART = 6
"""A cancellation that was answered is repeated after so many pauses, should the attempt still be there."""
_Name = tuple[Key, str, str]
"""Of a call: attempt, node, kind."""


@dataclass(slots=True)
class Refusal:
    """A node that refused an attempt is not asked again for it before `until` (monotonic)."""

    until: float
    pause_seconds: float


class Delivery:
    """One call at a time per attempt; a call that was not answered is repeated after `retry_seconds`."""

    def __init__(
        self,
        book: TaskBook,
        nodes: NodeRegistry,
        clock: MasterClock,
        *,
        retry_seconds: float,
        on_room: Callable[[], None],
    ) -> None:
        self._book = book
        self._nodes = nodes
        self._clock = clock
        self._retry_seconds = retry_seconds
        self._on_room = on_room
        self._slots = asyncio.Semaphore(_CONCURRENT_CALLS)
        self._calls: dict[_Name, asyncio.Task[None]] = {}
        self._next_try: dict[_Name, float] = {}
        self._refusals: dict[Key, dict[str, Refusal]] = {}
        self._cancelled: set[Key] = set()
        self._unanswered: dict[Key, float] = {}
        self._closed = False

    def excluded(self, key: Key) -> frozenset[str]:
        """Nodes that refused the attempt a moment ago."""
        now = self._clock.monotonic()
        return frozenset(worker for worker, refusal in self._refusals.get(key, {}).items() if refusal.until > now)

    def unanswered(self) -> dict[Key, float]:
        """Since when (monotonic) the node of an attempt has not said whether it takes it."""
        return dict(self._unanswered)

    def due(self) -> None:
        """Start every call that is due: assignments without an answer, cancellations that were not passed on."""
        rows = self._book.open_rows()
        self._forget({row.key for row in rows})
        waiting = {row.key for row in rows if row.worker_id and not row.accepted}
        self._unanswered = {key: since for key, since in self._unanswered.items() if key in waiting}
        for row in rows:
            if not row.worker_id:
                continue
            if not row.accepted:
                self._start(row.key, row.worker_id, "assign")
            elif row.cancel_requested:
                self._start(row.key, row.worker_id, "cancel")

    async def pass_on_cancel(self, row: TaskRow, *, wait_seconds: float) -> bool:
        """Pass a cancellation on now; False when the node has not answered in time (it is repeated by then)."""
        if not row.accepted:
            return False
        self._start(row.key, row.worker_id, "cancel")
        call = self._calls.get((row.key, row.worker_id, "cancel"))
        if call is not None:
            await asyncio.wait({call}, timeout=wait_seconds)
        return row.key in self._cancelled or self._book.get_open(row.key) is None

    def recall(self, key: Key, worker_id: str) -> None:
        """Have a node end an attempt that is not its any more. Not kept: a node that goes on lists it again."""
        self._start(key, worker_id, "cancel")

    async def close(self) -> None:
        self._closed = True
        calls = list(self._calls.values())
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    # ---- one call -----------------------------------------------------------------------------------------------------

    def _start(self, key: Key, worker_id: str, kind: str) -> None:
        name = (key, worker_id, kind)
        if self._closed or name in self._calls or self._next_try.get(name, 0.0) > self._clock.monotonic():
            return
        self._next_try[name] = self._clock.monotonic() + self._retry_seconds
        call = asyncio.create_task(self._call(name), name=f"{kind} {key[0]}.{key[1]}")
        self._calls[name] = call
        call.add_done_callback(lambda _: self._calls.pop(name, None))

    async def _call(self, name: _Name) -> None:
        key, worker_id, kind = name
        try:
            async with self._slots:
                stub = self._nodes.stub(worker_id)
                if stub is None:
                    return
                if kind == "cancel":
                    await self._cancel(stub, key, worker_id)
                elif (row := self._book.get_open(key)) is not None and (row.worker_id, row.accepted) == (
                    worker_id,
                    False,
                ):
                    await self._assign(stub, row)
        except grpc.aio.AioRpcError as error:
            why = f"node {worker_id} does not answer: {error.code().name} {error.details() or ''}".rstrip()
            log.warning(f"{kind}.unanswered", task_id=key[0], attempt=key[1], error=why)
            held = self._book.get_open(key)
            if held is not None and held.worker_id == worker_id:
                self._book.explain({key: ("NODE_UNREACHABLE", why)})
                if kind == "assign":
                    self._unanswered.setdefault(key, self._clock.monotonic())
        except TransientError as error:
            log.error("store.unavailable", task_id=key[0], error=str(error))

    async def _assign(self, stub: Any, row: TaskRow) -> None:
        if row.cancel_requested and await self._is_unknown(stub, row):
            await self._book.refused(row.key, row.worker_id, reason="NOT_FOUND", message="", final=False)
            self._on_room()
            return
        task = pb.Task()
        task.CopyFrom(row.task)
        task.attempt = row.attempt
        # The end of an open attempt is not known here. Metadata, since the task itself must be the one that it was before.
        metadata = [("nodeservice-report-again", "1")]
        if row.traceparent:
            metadata.append(("traceparent", row.traceparent))
        ack: pb.TaskAck = await stub.AssignTask(task, timeout=ASSIGN_DEADLINE_SECONDS, metadata=metadata)
        self._unanswered.pop(row.key, None)
        if ack.success:
            await self._book.accepted(row.key, row.worker_id)
            log.info("task.assigned", task_id=row.task_id, attempt=row.attempt, worker_id=row.worker_id)
            self.due()
            return
        reason = ack.reason[:128] or "REFUSED"
        log.info("task.refused", task_id=row.task_id, worker_id=row.worker_id, reason=reason, message=ack.message[:500])
        self._note_refusal(row)
        await self._book.refused(
            row.key,
            row.worker_id,
            reason=reason,
            message=f"node {row.worker_id}: {ack.message[:2000]}",
            final=reason in FINAL_REASONS,
        )
        self._on_room()

    async def _cancel(self, stub: Any, key: Key, worker_id: str) -> None:
        task_id, attempt = key
        request = pb.TaskID(task_id=task_id, attempt=attempt)
        ack: pb.TaskAck = await stub.CancelTask(request, timeout=CANCEL_DEADLINE_SECONDS)
        log.info(
            "task.cancel_passed_on",
            task_id=task_id,
            attempt=attempt,
            worker_id=worker_id,
            success=ack.success,
            message=ack.message[:500],
        )
        # Either the report of the end is under way, or the node has lost the task; a heartbeat without it tells.
        self._cancelled.add(key)
        name = (key, worker_id, "cancel")
        self._next_try[name] = self._clock.monotonic() + _CANCELS_APART * self._retry_seconds

    async def _is_unknown(self, stub: Any, row: TaskRow) -> bool:
        """Only who has it is offered what is cancelled, to tell of its end again: who has lost it would start it anew."""
        request = pb.TaskID(task_id=row.task_id, attempt=row.attempt)
        ack: pb.TaskAck = await stub.CancelTask(request, timeout=CANCEL_DEADLINE_SECONDS)
        return not ack.success and ack.reason == "NOT_FOUND"

    def _note_refusal(self, row: TaskRow) -> None:
        refusals = self._refusals.setdefault(row.key, {})
        before = refusals.get(row.worker_id)
        pause = min(self._retry_seconds, before.pause_seconds * 2) if before else min(0.25, self._retry_seconds)
        refusals[row.worker_id] = Refusal(until=self._clock.monotonic() + pause, pause_seconds=pause)
        self._next_try.pop((row.key, row.worker_id, "assign"), None)

    def _forget(self, open_keys: set[Key]) -> None:
        """Drop what is remembered of attempts that have ended."""
        now = self._clock.monotonic()
        self._next_try = {name: at for name, at in self._next_try.items() if name[0] in open_keys or at > now}
        self._refusals = {key: refusals for key, refusals in self._refusals.items() if key in open_keys}
        self._cancelled &= open_keys
