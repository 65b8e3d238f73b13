"""The book of task attempts: every change of state goes through here, and is durable before anybody is told.

Attempts that have not ended are kept in memory beside the store; those that have ended are read from the store. One lock
orders the changes, so that a check and the write that follows it see the same row.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import structlog

from nodeservice.errors import RequestError
from nodeservice.master import attempts as course
from nodeservice.master.attempts import Claim, Moment, Taken
from nodeservice.master.checks import check_task, request_of
from nodeservice.master.clock import MasterClock
from nodeservice.master.request import Request
from nodeservice.master.rows import Key, OrphanRow, State, TaskRow, Untold, Wanted
from nodeservice.master.store import MasterStore
from nodeservice.master.submissions import conflict, submitted_before
from nodeservice.wire import master_worker_pb2 as pb

log = structlog.get_logger(__name__)


NODE_RETRIES = 3


class TaskBook:
    """`node_retries`: how often a task is tried again after faults of nodes, apart from what its user allows."""

    def __init__(self, store: MasterStore, clock: MasterClock, *, node_retries: int = NODE_RETRIES) -> None:
        self._store = store
        self._clock = clock
        self._node_retries = node_retries
        self._lock = asyncio.Lock()
        self._in_doubt: set[str] = set()
        """Tasks of which a write failed. A database may have taken it, and only its answer was lost."""
        self._open: dict[Key, TaskRow] = {}
        self._requests: dict[Key, Request] = {}
        self._last_sequence = 0
        self._changed = asyncio.Event()

    async def load(self) -> None:
        """Take up what the store holds; called once, before anything else. In which phase a task is its node tells anew."""
        self._last_sequence = await self._store.last_sequence()
        rows = await self._store.open_tasks()
        self._remember(replace(row, phase="") if row.state is State.RUNNING else row for row in rows)
        if self._open:
            log.info("master.resumed", open_count=len(self._open))

    # ---- looking ------------------------------------------------------------------------------------------------------

    def open_rows(self) -> list[TaskRow]:
        """All that have not ended, in the order of the queue."""
        return sorted(self._open.values(), key=lambda row: row.sequence)

    def held_by(self, worker_id: str) -> dict[Key, TaskRow]:
        """The open attempts that are assigned to a node, in no order."""
        return {key: row for key, row in self._open.items() if row.worker_id == worker_id}

    def get_open(self, key: Key) -> TaskRow | None:
        return self._open.get(key)

    def request(self, key: Key) -> Request:
        """What an open attempt asks for."""
        return self._requests[key]

    def assigned(self) -> dict[str, dict[Key, Request]]:
        """Per node, what each of its open attempts asks for."""
        found: dict[str, dict[Key, Request]] = {}
        for row in self._open.values():
            if row.worker_id:
                found.setdefault(row.worker_id, {})[row.key] = self._requests[row.key]
        return found

    async def find(self, task_id: str, attempt: int | None = None) -> TaskRow | None:
        """An attempt in whatever state; without `attempt` the current one."""
        if attempt is not None and (row := self._open.get((task_id, attempt))) is not None:
            return row
        found = await self._store.find_task(task_id, attempt)
        return None if found is None else self._open.get(found.key, found)

    async def attempts(self, task_id: str) -> list[TaskRow]:
        """All of a task, the oldest first."""
        return [self._open.get(row.key, row) for row in await self._store.attempts(task_id)]

    async def newest(self, limit: int, wanted: Wanted) -> list[TaskRow]:
        """The current attempt of each task that is wanted, the newest first."""
        return [self._open.get(row.key, row) for row in await self._store.newest_tasks(limit, wanted)]

    def changed(self) -> asyncio.Event:
        """Set at the next change of any attempt's state; take a new one for each wait, and before looking."""
        return self._changed

    # ---- clients ------------------------------------------------------------------------------------------------------

    async def submit(
        self, task: pb.Task, *, traceparent: str = "", refuse: Callable[[Request], RequestError | None]
    ) -> TaskRow:
        """Queue a task; durable when this returns. The same task again gives the same row.

        `refuse` is asked with what the task requests and says why it can't be, or None. Raises RequestError.
        """
        named = pb.Task()
        named.CopyFrom(task)
        now_ms = self._clock.unix_ms()
        if not named.task_id:
            named.task_id = f"task-{now_ms // 1000}-{secrets.token_hex(4)}"
        named.submitted_at = named.submitted_at or now_ms // 1000
        request = check_task(named)
        attempt = named.attempt if named.HasField("attempt") else 1
        async with self._changing():
            known = await self.attempts(named.task_id)
            if known and attempt <= known[-1].attempt:
                return submitted_before(named, attempt, known)
            if known and not course.current(known).state.is_final:
                raise conflict(named, f"attempt {known[-1].attempt} has not ended; it is {known[-1].state}")
            refusal = refuse(request)
            if refusal is not None:
                raise refusal
            row = TaskRow(
                task_id=named.task_id,
                attempt=attempt,
                sequence=self._last_sequence + 1,
                task=named,
                traceparent=traceparent,
                submitted_at_ms=now_ms,
                queued_at_ms=now_ms,
            )
            await self._save([row])
        log.info("task.queued", task_id=row.task_id, attempt=row.attempt, image=named.docker_image)
        return row

    async def request_cancel(self, row: TaskRow) -> TaskRow:
        """A queued attempt ends at once; an assigned one is marked, to be passed on. Returns what it is now."""
        async with self._changing():
            current = self._open.get(row.key)
            if current is None:
                return await self._store.find_task(*row.key) or row
            if current.state is State.QUEUED:
                changed = self._ended(current, State.CANCELLED, "CANCELLED", "cancelled before it was assigned")
            else:
                changed = replace(current, cancel_requested=True)
            await self._save([changed])
            return changed

    # ---- the scheduler ------------------------------------------------------------------------------------------------

    async def assign(self, choices: Sequence[tuple[Key, str]]) -> list[TaskRow]:
        """Write "ASSIGNED to W" before anything is sent. Attempts that are no longer queued are left out."""
        now_ms = self._clock.unix_ms()
        async with self._changing():
            rows = [
                replace(
                    row,
                    state=State.ASSIGNED,
                    worker_id=worker_id,
                    accepted=False,
                    assigned_at_ms=now_ms,
                    reason="",
                    message="",
                )
                for key, worker_id in choices
                if (row := self._open.get(key)) is not None and row.state is State.QUEUED
            ]
            await self._save(rows)
        return rows

    async def accepted(self, key: Key, worker_id: str) -> None:
        """The node has it durably."""
        async with self._changing():
            row = self._held(key, worker_id)
            if row is not None and not row.accepted:
                await self._save([replace(row, accepted=True, reason="", message="")])

    async def unaccepted(self, keys: Iterable[Key]) -> None:
        """The node no longer lists them: they are to be offered to it again."""
        async with self._changing():
            rows = [row for key in keys if (row := self._open.get(key)) is not None and row.accepted]
            await self._save([replace(row, accepted=False) for row in rows])

    async def refused(self, key: Key, worker_id: str, *, reason: str, message: str, final: bool) -> None:
        """The node does not take it: back to the queue, or REJECTED when `final`; CANCELLED where that was asked."""
        async with self._changing():
            row = self._held(key, worker_id)
            if row is None:
                return
            if row.cancel_requested:
                changed = self._ended(row, State.CANCELLED, "CANCELLED", "cancelled; its node does not have it")
            elif final:
                changed = course.rejected(row, reason, message, now_ms=self._clock.unix_ms())
            else:
                changed = replace(
                    row, state=State.QUEUED, worker_id="", assigned_at_ms=0, phase="", reason=reason, message=message
                )
            await self._save([changed])

    async def reject(self, refusals: Mapping[Key, tuple[str, str]]) -> None:
        """Queued attempts that no node can ever hold: reason and message of each."""
        now_ms = self._clock.unix_ms()
        async with self._changing():
            await self._save(
                [
                    course.rejected(row, reason, message, now_ms=now_ms)
                    for key, (reason, message) in refusals.items()
                    if (row := self._open.get(key)) is not None and row.state is State.QUEUED
                ]
            )

    async def lose(self, key: Key, worker_id: str, message: str) -> None:
        """The node is given up: another attempt follows, unless a cancellation was asked for or all retries are used."""
        async with self._changing():
            row = self._held(key, worker_id)
            if row is None:
                return
            changed = course.lose(
                await self.attempts(row.task_id),
                row,
                message,
                node_retries=self._node_retries,
                moment=self._moment(),
            )
            await self._save(changed)
        log.warning(
            "task.lost",
            task_id=row.task_id,
            attempt=row.attempt,
            worker_id=worker_id,
            state=changed[0].state.value,
            next_attempt=changed[1].attempt if changed[1:] else None,
        )

    def explain(self, notes: Mapping[Key, tuple[str, str]]) -> None:
        """Why attempts still wait: shown, and not worth a write."""
        for key, (reason, message) in notes.items():
            row = self._open.get(key)
            if row is not None and not row.state.is_final and (row.reason, row.message) != (reason, message):
                self._open[key] = replace(row, reason=reason, message=message)

    # ---- nodes --------------------------------------------------------------------------------------------------------

    async def note_phases(self, worker_id: str, phases: Mapping[Key, str]) -> None:
        """What a heartbeat says of the node's attempts; that one runs is written once, its later phases are only shown."""
        async with self._changing():
            begun: list[TaskRow] = []
            for key, phase in phases.items():
                row = self._held(key, worker_id)
                if row is None or (row.phase, row.accepted) == (phase, True):
                    continue
                noted = replace(row, state=State.RUNNING, accepted=True, phase=phase, reason="", message="")
                if row.state is State.RUNNING and row.accepted:
                    self._open[key] = noted
                else:
                    begun.append(noted)
            await self._save(begun)

    async def complete(self, result: pb.TaskResult) -> Taken:
        """Take a report; durable when this returns.

        The resources of the attempt are free from here on, once, however often the report comes.
        """
        async with self._changing():
            attempts = await self.attempts(result.task_id)
            own = [row for row in attempts if row.worker_id == result.worker_id]
            attempt = result.attempt if result.HasField("attempt") else own[-1].attempt if own else 1
            row = next((row for row in own if row.attempt == attempt), None)
            if row is None:
                await self._keep_orphan(result, attempt)
                return Taken.ASIDE
            taken, changed = course.report(
                attempts, row, result, node_retries=self._node_retries, moment=self._moment()
            )
            await self._save(changed)
        if changed:
            log.info(
                "task.ended" if taken is not Taken.LATE else "report.late",
                task_id=row.task_id,
                attempt=attempt,
                worker_id=row.worker_id,
                state=changed[0].state.value,
                reason=result.reason or changed[0].reason,
                next_attempt=changed[1].attempt if taken is Taken.FOLLOWED else None,
            )
        return taken

    async def listed(self, worker_id: str, task_id: str, attempt: int | None, phase: str) -> TaskRow | None:
        """A node lists an attempt that it does not hold; a lost one that may go on is taken back.

        `attempt` None is the last that it held. Returns the attempt if the node shall end it; what is not known here is left
        alone.
        """
        async with self._changing():
            attempts = await self.attempts(task_id)
            of_node = [row.attempt for row in attempts if row.worker_id == worker_id]
            wanted = of_node[-1] if attempt is None and of_node else attempt
            row = next((row for row in attempts if row.attempt == wanted), None)
            if row is None:
                return None
            claim = course.claim(attempts, row, worker_id)
            if claim is Claim.TAKE_BACK:
                changed = course.take_back(attempts, row, phase, moment=self._moment())
                await self._save(changed)
                log.info(
                    "task.taken_back",
                    task_id=row.task_id,
                    attempt=row.attempt,
                    worker_id=worker_id,
                    dropped_attempt=changed[1].attempt,
                )
            elif claim is Claim.RECALL and row.state is State.LOST and not row.cancel_requested:
                await self._save([course.recalled(row)])
            return row if claim is Claim.RECALL else None

    # ---- retention ----------------------------------------------------------------------------------------------------

    async def forget(
        self, before_ms: int, after: tuple[int, int], untold: Untold
    ) -> tuple[int, tuple[int, int] | None]:
        """As `MasterStore.forget_tasks`, while no task changes."""
        async with self._changing():
            return await self._store.forget_tasks(before_ms, after, untold)

    async def _keep_orphan(self, result: pb.TaskResult, attempt: int) -> None:
        log.warning("report.orphan", task_id=result.task_id, attempt=attempt, worker_id=result.worker_id)
        await self._store.save_orphan(
            OrphanRow(
                task_id=result.task_id,
                attempt=attempt,
                worker_id=result.worker_id,
                result=result,
                received_at_ms=self._clock.unix_ms(),
            )
        )

    # ---- inside the lock ------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _changing(self) -> AsyncIterator[None]:
        """One change at a time, and none before memory and store agree."""
        async with self._lock:
            for task_id in tuple(self._in_doubt):
                stored = await self._store.attempts(task_id)
                for key in [key for key in self._open if key[0] == task_id]:
                    del self._open[key], self._requests[key]
                self._remember(stored)
                self._in_doubt.discard(task_id)
            yield

    def _held(self, key: Key, worker_id: str) -> TaskRow | None:
        row = self._open.get(key)
        return row if row is not None and row.worker_id == worker_id and worker_id else None

    def _ended(self, row: TaskRow, state: State, reason: str, message: str) -> TaskRow:
        return course.ended(row, state, reason, message, now_ms=self._clock.unix_ms())

    def _moment(self) -> Moment:
        return Moment(now_ms=self._clock.unix_ms(), next_sequence=self._last_sequence + 1)

    async def _save(self, rows: Sequence[TaskRow]) -> None:
        """Store first, then memory, then wake whoever waits.

        A caller that is cancelled meanwhile (its client hung up) leaves both or none: the write goes on in its thread.
        """
        if not rows:
            return
        saving = asyncio.ensure_future(self._store.save_tasks(rows))
        cancelled: asyncio.CancelledError | None = None
        while not saving.done():
            try:
                await asyncio.wait({saving})
            except asyncio.CancelledError as error:
                cancelled = error
        failure = saving.exception()
        if failure is not None:
            self._in_doubt.update(row.task_id for row in rows)
            raise cancelled or failure
        self._remember(rows)
        self._changed.set()
        self._changed = asyncio.Event()
        if cancelled is not None:
            raise cancelled

    def _remember(self, rows: Iterable[TaskRow]) -> None:
        for row in rows:
            self._last_sequence = max(self._last_sequence, row.sequence)
            if row.state.is_final:
                self._open.pop(row.key, None)
                self._requests.pop(row.key, None)
            else:
                self._open[row.key] = row
                if row.key not in self._requests:
                    self._requests[row.key] = request_of(row.task)
