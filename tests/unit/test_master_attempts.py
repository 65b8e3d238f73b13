"""Attempts that follow each other: random stories of a task book with nodes that get lost, come back and report late."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nodeservice.errors import TransientError
from nodeservice.master.attempts import (
    SURROUNDINGS,
    Budget,
    Claim,
    Moment,
    Taken,
    claim,
    current,
    recalled,
    report,
    retry_of,
    take_back,
)
from nodeservice.master.clock import MasterClock
from nodeservice.master.reconcile import MISSES, Reconciler
from nodeservice.master.rows import Key, State, TaskRow
from nodeservice.master.tasks import TaskBook
from nodeservice.wire import master_worker_pb2 as pb
from tests.unit.master_memory import MemoryMasterStore

NODES = ("w0", "w1", "w2")
TASKS = ("t0", "t1", "t2")
"""By their number: how often their users allow another attempt; the last also for failures of its own."""
NODE_RETRIES = 2
ENDS: tuple[dict[str, Any], ...] = (
    {"status": "success", "outcome": "SUCCEEDED", "reason": "COMPLETED"},
    {"status": "failed", "outcome": "FAILED", "reason": "EXIT_NONZERO", "retryable": False},
    {"status": "failed", "outcome": "FAILED", "reason": "NODE_DRAINED", "retryable": True},
    {"status": "failed", "outcome": "FAILED", "reason": "IMAGE_PULL_FAILED", "retryable": True},
    {"status": "weird"},
)
CANCELLED: dict[str, Any] = {"status": "cancelled", "outcome": "CANCELLED", "reason": "CANCELLED"}


@dataclass
class Node:
    """`had`: all that it ever took, which it would never take a second time."""

    name: str
    running: set[Key] = field(default_factory=set)
    outbox: dict[Key, pb.TaskResult] = field(default_factory=dict)
    had: set[Key] = field(default_factory=set)

    def end(self, key: Key, how: dict[str, Any]) -> None:
        self.running.discard(key)
        self.outbox[key] = pb.TaskResult(task_id=key[0], attempt=key[1], worker_id=self.name, **how)


class World:
    """A book and three nodes. Each step is one thing that can happen, chosen by two numbers."""

    def __init__(self) -> None:
        self.store = MemoryMasterStore()
        self.nodes = {name: Node(name) for name in NODES}
        self.decided: dict[str, tuple[int, State, bytes]] = {}
        self.decisive: Counter[str] = Counter()
        self.most: dict[str, int] = {}
        self.unwanted: set[str] = set()
        self.takers: dict[Key, set[str]] = {}

    async def step(self, what: str, one: int, other: int) -> None:
        with contextlib.suppress(TransientError):
            await getattr(self, f"_{what}")(one, other)
        self.store.fails = self.store.forgets_to_answer = False
        async with self.book._changing():
            pass

    async def start(self) -> None:
        self.book = TaskBook(self.store, MasterClock(), node_retries=NODE_RETRIES)  # type: ignore[arg-type]
        self.reconciler = Reconciler(self.book, self._recall)
        await self.book.load()

    # ---- what can happen ------------------------------------------------------------------------------------------------

    async def _submit(self, one: int, other: int) -> None:
        task = pb.Task(task_id=TASKS[one % 3], docker_image="i", max_retries=one % 3, retry_own_failures=one % 3 == 2)
        await self.book.submit(task, refuse=lambda _: None)

    async def _assign(self, one: int, other: int) -> None:
        queued = [row for row in self.book.open_rows() if row.state is State.QUEUED]
        if queued:
            await self.book.assign([(queued[one % len(queued)].key, NODES[other % 3])])

    async def _offer(self, one: int, other: int) -> None:
        """The call arrives; the answer may be lost."""
        offered = [row for row in self.book.open_rows() if row.worker_id and not row.accepted]
        if offered:
            row = offered[one % len(offered)]
            node = self.nodes[row.worker_id]
            if row.key not in node.had:
                node.had.add(row.key)
                node.running.add(row.key)
                self.takers.setdefault(row.key, set()).add(node.name)
            if other % 3:
                await self.book.accepted(row.key, row.worker_id)

    async def _refuse(self, one: int, other: int) -> None:
        offered = [row for row in self.book.open_rows() if row.worker_id and not row.accepted]
        for row in offered[:1]:
            if row.key not in self.nodes[row.worker_id].had:
                await self.book.refused(row.key, row.worker_id, reason="FULL", message="", final=other == 7)

    async def _end(self, one: int, other: int) -> None:
        node = self.nodes[NODES[one % 3]]
        for key in sorted(node.running)[:1]:
            node.end(key, ENDS[other % len(ENDS)])

    async def _report(self, one: int, other: int) -> None:
        node = self.nodes[NODES[one % 3]]
        for key, result in sorted(node.outbox.items())[:1]:
            unknown = self.store.rows[key].result is None
            try:
                taken = await self.book.complete(result)
            except TransientError:
                newest = current([row for row in self.store.rows.values() if row.task_id == key[0]])
                self.decisive[key[0]] += unknown and newest.key == key and newest.result is not None
                raise  # written, and the answer lost: this report ended the task, and comes again
            self.decisive[key[0]] += taken is Taken.ENDED
            assert taken is not Taken.ASIDE
            if other % 3:
                del node.outbox[key]

    async def _lose(self, one: int, other: int) -> None:
        name = NODES[one % 3]
        for row in self.book.open_rows():
            if row.worker_id == name:
                await self.book.lose(row.key, name, "silent")

    async def _beat(self, one: int, other: int) -> None:
        node = self.nodes[NODES[one % 3]]
        listed = [*((key, "RUNNING") for key in node.running), *((key, "REPORTING") for key in node.outbox)]
        running = [pb.RunningTask(task_id=key[0], attempt=key[1], phase=phase) for key, phase in sorted(listed)]
        await self.reconciler.compare(node.name, running)

    def _recall(self, key: Key, worker_id: str) -> None:
        newest = current([row for row in self.store.rows.values() if row.task_id == key[0]])
        assert newest.key != key or newest.state.is_final, "what counts is never recalled"
        if key in self.nodes[worker_id].running:
            self.nodes[worker_id].end(key, CANCELLED)

    async def _cancel(self, one: int, other: int) -> None:
        row = await self.book.find(TASKS[one % 3])
        if row is None or row.state.is_final:
            return
        self.unwanted.add(row.task_id)
        row = await self.book.request_cancel(row)
        if row.worker_id and row.key in self.nodes[row.worker_id].running and other % 2:
            self.nodes[row.worker_id].end(row.key, CANCELLED)

    async def _restart(self, one: int, other: int) -> None:
        await self.start()

    async def _fail_next(self, one: int, other: int) -> None:
        """The store takes nothing during one step, or takes it and does not say so; whoever asked does so again."""
        self.store.fails, self.store.forgets_to_answer = other % 2 == 0, other % 2 == 1
        await getattr(self, f"_{STEPS[one % len(STEPS)]}")(other, other)

    # ---- what always holds ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        by_task: dict[str, list[TaskRow]] = {}
        for row in self.store.rows.values():
            by_task.setdefault(row.task_id, []).append(row)
        stored_open = [row for row in self.store.rows.values() if not row.state.is_final]
        # How far a task that runs has got is in memory alone.
        remembered = {row.key: replace(row, phase="") for row in self.book.open_rows()}
        assert remembered == {row.key: replace(row, phase="") for row in stored_open}
        for task_id, rows in by_task.items():
            self._check_task(task_id, rows)
        assert all(len(names) == 1 for names in self.takers.values()), "an attempt was taken by two nodes"

    def _check_task(self, task_id: str, rows: list[TaskRow]) -> None:
        newest = current(rows)
        assert [row.key for row in rows if not row.state.is_final] in ([], [newest.key])
        numbers = sorted(row.attempt for row in rows)
        assert numbers == [*range(1, len(rows) + 1)]
        assert len(rows) >= self.most.get(task_id, 0)
        self.most[task_id] = len(rows)
        assert newest.state not in (State.LOST, State.DROPPED)
        assert newest.state is not State.CANCELLED or task_id in self.unwanted
        assert not any(row.result is not None and row.late_result is not None for row in rows)
        assert all(row.node_retries <= NODE_RETRIES and row.user_retries <= row.task.max_retries for row in rows)
        dropped = sum(1 for row in rows if row.state is State.DROPPED)
        assert len(rows) - dropped <= 1 + NODE_RETRIES + newest.task.max_retries + dropped
        assert self.decisive[task_id] <= 1
        if task_id in self.decided:
            assert (newest.attempt, newest.state, _bytes(newest)) == self.decided[task_id], "a task ended twice"
        elif newest.state.is_final:
            self.decided[task_id] = (newest.attempt, newest.state, _bytes(newest))
            assert self.decisive[task_id] == (1 if newest.result is not None else 0)
        else:
            assert self.decisive[task_id] == 0

    async def come_to_an_end(self) -> None:
        """Everybody is well from here on: each task ends, and no node is left with anything."""
        for _ in range(60):
            for number in range(3):
                for _ in range(MISSES):
                    await self._beat(number, 0)
                await self._assign(0, number)
                await self._offer(0, 1)
                while self.nodes[NODES[number]].running:
                    await self._end(number, 0)
                while self.nodes[NODES[number]].outbox:
                    await self._report(number, 1)
                self.check()
            if not self.book.open_rows() and not any(node.running for node in self.nodes.values()):
                return
        raise AssertionError(f"never ends: {self.book.open_rows()} {self.nodes}")


STEPS = ("submit", "assign", "offer", "refuse", "end", "report", "lose", "beat", "cancel", "restart")
USUAL = ("assign", "offer") * 4 + ("end", "lose", "beat") * 2 + ("report",)
story = st.lists(
    st.tuples(st.sampled_from((*USUAL, *STEPS, "fail_next")), st.integers(0, 7), st.integers(0, 7)),
    min_size=30,
    max_size=60,
)


def _bytes(row: TaskRow) -> bytes:
    return b"" if row.result is None else row.result.SerializeToString(deterministic=True)


@settings(deadline=None)
@given(story)
@example(  # lost, taken back, lost again, late
    [
        ("submit", 0, 0), ("assign", 0, 0), ("offer", 0, 1), ("lose", 0, 0), ("beat", 0, 0), ("lose", 0, 0),
        ("assign", 0, 1), ("offer", 0, 1), ("end", 0, 0), ("report", 0, 1), ("lose", 1, 0), ("beat", 1, 0),
    ]
)  # fmt: skip
@example(  # the result of a lost attempt is taken while no node has the next
    [
        ("submit", 1, 0),
        ("assign", 0, 0),
        ("offer", 0, 1),
        ("lose", 0, 0),
        ("end", 0, 0),
        ("report", 0, 0),
        ("report", 0, 0),
    ]
)
@example(  # the report is stored and its answer lost
    [("assign", 0, 0), ("offer", 0, 0), ("end", 0, 0), ("fail_next", 5, 3), ("report", 0, 0)]
)
@example(  # recalled, and then the next attempt is queued again: what ends by our own wish is not taken back
    [
        ("assign", 2, 0), ("offer", 0, 1), ("lose", 0, 0), ("assign", 2, 1), ("offer", 0, 1), ("beat", 0, 0), ("end", 1, 2),
        ("report", 1, 1), ("beat", 0, 0),
    ]
)  # fmt: skip
def test_whatever_happens_a_task_ends_once_by_one_report_and_within_its_budgets(
    steps: list[tuple[str, int, int]],
) -> None:
    async def go() -> None:
        world = World()
        await world.start()
        for number in range(3):
            await world.step("submit", number, 0)
        for what, one, other in steps:
            await world.step(what, one, other)
            world.check()
        await world.come_to_an_end()

    asyncio.run(go())


def attempt(**fields: Any) -> TaskRow:
    task = pb.Task(task_id="t", max_retries=fields.pop("max_retries", 0), retry_own_failures=fields.pop("own", False))
    return TaskRow(
        task_id="t", attempt=1, sequence=1, task=task, state=State.RUNNING, worker_id="w", submitted_at_ms=1,
        queued_at_ms=1, **fields,
    )  # fmt: skip


def result(reason: str, *, retryable: bool | None, outcome: str = "FAILED") -> pb.TaskResult:
    return pb.TaskResult(
        task_id="t", worker_id="w", status="failed", outcome=outcome, reason=reason, retryable=retryable
    )


def test_faults_of_a_node_never_use_up_what_the_user_allows() -> None:
    for reason in ("NODE_DRAINED", "MASTER_LOST", "GPU_FAULT", "ENGINE_FAULT", "COLLECT_FAILED", "SOMETHING_NEW"):
        told = result(reason, retryable=True)
        assert retry_of(attempt(max_retries=5), told, node_retries=1) is Budget.NODE
        assert retry_of(attempt(max_retries=5, node_retries=1), told, node_retries=1) is None


def test_what_another_node_would_not_change_is_tried_again_as_often_as_the_user_allows() -> None:
    for reason in SURROUNDINGS:
        told = result(reason, retryable=True)
        assert retry_of(attempt(), told, node_retries=3) is None
        assert retry_of(attempt(max_retries=1), told, node_retries=0) is Budget.USER
        assert retry_of(attempt(max_retries=1, user_retries=1), told, node_retries=3) is None


def test_a_failure_of_its_own_is_tried_again_only_where_the_user_says_so() -> None:
    for retryable in (False, None):
        told = result("EXIT_NONZERO", retryable=retryable)
        assert retry_of(attempt(max_retries=1), told, node_retries=3) is None
        assert retry_of(attempt(max_retries=1, own=True), told, node_retries=3) is Budget.USER
        assert retry_of(attempt(own=True), told, node_retries=3) is None


def test_only_the_node_that_lost_an_attempt_may_go_on_with_it() -> None:
    lost = replace(attempt(), state=State.LOST)
    waiting = replace(attempt(), attempt=2, sequence=2, state=State.QUEUED, worker_id="")
    assert claim([lost, waiting], lost, "w") is Claim.TAKE_BACK
    assert claim([lost, waiting], lost, "other") is Claim.RECALL
    given = replace(waiting, state=State.ASSIGNED, worker_id="other")
    assert claim([lost, given], lost, "w") is Claim.RECALL
    assert claim([recalled(lost), waiting], recalled(lost), "w") is Claim.RECALL, "it may be ending"
    assert claim([lost, given], given, "w") is Claim.RECALL, "it has an attempt that it was never known to have taken"


def test_an_attempt_that_came_back_is_followed_by_one_of_a_new_number_that_keeps_off_its_node() -> None:
    lost = replace(attempt(), state=State.LOST)
    dropped = replace(attempt(), attempt=2, sequence=2, state=State.QUEUED, worker_id="")
    moment = Moment(now_ms=1, next_sequence=3)
    back, dropped = take_back([lost, dropped], lost, "RUNNING", moment=moment)
    told = result("NODE_DRAINED", retryable=True)
    taken, (ended, following) = report([back, dropped], back, told, node_retries=1, moment=moment)
    assert (taken, ended.attempt, following.attempt, following.task.attempt) == (Taken.FOLLOWED, 1, 3, 3)
    assert following.avoid == (back.worker_id,)


def test_neither_success_nor_cancellation_is_tried_again() -> None:
    for outcome in ("SUCCEEDED", "CANCELLED"):
        told = result("X", retryable=True, outcome=outcome)
        assert retry_of(attempt(max_retries=9, own=True), told, node_retries=9) is None
    told = result("NODE_DRAINED", retryable=True)
    assert retry_of(attempt(cancel_requested=True), told, node_retries=9) is None
