"""The loop that moves the queue: assign what fits, repeat what was not answered, give up what can't be."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace

import structlog

from nodeservice.errors import NodeServiceError
from nodeservice.master.clock import MasterClock
from nodeservice.master.delivery import Delivery
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.placement import Choice, Offer, place
from nodeservice.master.plan import Candidate, make_plan
from nodeservice.master.rows import Key, State
from nodeservice.master.tasks import TaskBook

log = structlog.get_logger(__name__)

_SILENT = "NODE_SILENT"
_DEAF = "has not answered yet whether it takes what it was given"
_WAITED = "WAIT_TIMEOUT"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    retry_seconds: float = 5.0
    """Between repeats of an assignment or cancellation that a node did not answer."""
    patience_seconds: float = 60.0
    """After so long, the first task that does not fit gets a node reserved."""
    impossible_seconds: float = 30.0
    """A queued task that fits no node known by then is rejected. Nodes that start together are given this time."""
    tick_seconds: float = 1.0
    least_pause_seconds: float = 0.02
    """Between two passes, so that a burst of completions costs one pass."""


class Scheduler:
    def __init__(
        self, book: TaskBook, nodes: NodeRegistry, clock: MasterClock, settings: SchedulerSettings | None = None
    ) -> None:
        self._book = book
        self._nodes = nodes
        self._clock = clock
        self._settings = settings or SchedulerSettings()
        self._wake = asyncio.Event()
        self._queued_at: dict[Key, float] = {}
        self._waits_since: dict[Key, float] = {}
        """Since when (monotonic) each that may not wait for ever has waited."""
        self._impossible_since: dict[Key, float] = {}
        self._looked_seconds = 0.0
        """A long queue of unlike tasks takes long to look at, and nobody is answered meanwhile: others get as much time
        afterwards. What a pass waits for the database is not in it."""
        self.delivery = Delivery(book, nodes, clock, retry_seconds=self._settings.retry_seconds, on_room=self.wake)

    def wake(self) -> None:
        """Something changed that may let a task move."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. A database that does not answer delays a pass and does not end the loop."""
        try:
            while True:
                self._wake.clear()
                self._looked_seconds = 0.0
                try:
                    await self._pass()
                except NodeServiceError as error:
                    log.error("scheduler.pass_failed", error=str(error))
                await self._clock.sleep(max(self._settings.least_pause_seconds, self._looked_seconds))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.tick_seconds):
                        await self._wake.wait()
        finally:
            await self.delivery.close()

    async def _pass(self) -> None:
        now = self._clock.monotonic()
        await self._give_up_waiting(now)
        self._nodes.notice_silence()
        await self._give_up_gone_nodes()
        await self._give_up_unanswered(now)
        began = self._clock.monotonic()
        queue = self._candidates(now)
        # What all nodes have to offer is asked only where somebody waits for it: it costs some time for each node.
        offers = self._offers() if queue else ()
        plan = make_plan(queue, offers, patience_seconds=self._settings.patience_seconds)
        self._book.explain(
            {key: (why.reason, why.message) for key, why in plan.waiting.items() if why.reason != "NODE_REFUSED"}
        )
        self._book.explain({key: (why.reason, why.message) for key, why in plan.never.items()})
        self._explain_silence()
        self._looked_seconds = self._clock.monotonic() - began
        since = self._impossible_since
        self._impossible_since = {key: since.get(key, now) for key in plan.never}
        hopeless = [k for k, at in self._impossible_since.items() if now - at >= self._settings.impossible_seconds]
        if hopeless:
            await self._book.reject({key: (plan.never[key].reason, plan.never[key].message) for key in hopeless})
        if plan.assign:
            await self._book.assign(plan.assign)
        self.delivery.due()

    async def _give_up_waiting(self, now: float) -> None:
        """A queued task that has waited as long as it was willing to. On a node, the node keeps that time."""
        now_ms, since = self._clock.unix_ms(), self._waits_since
        limited = [row for row in self._book.open_rows() if row.task.wait_timeout_seconds > 0]
        self._waits_since = {
            row.key: since.get(row.key, now - max(0, now_ms - row.queued_at_ms) / 1000) for row in limited
        }
        refusals: dict[Key, tuple[str, str]] = {}
        for row in limited:
            limit = row.task.wait_timeout_seconds
            if row.state is State.QUEUED and now - self._waits_since[row.key] >= limit:
                why = f"waited {limit:g} s for a node, its wait_timeout_seconds; the last obstacle: {row.message or 'none'}"
                refusals[row.key] = (_WAITED, why)
        if refusals:
            await self._book.reject(refusals)

    def _candidates(self, now: float) -> list[Candidate]:
        rows = [row for row in self._book.open_rows() if row.state is State.QUEUED]
        self._queued_at = {row.key: self._queued_at.get(row.key, now) for row in rows}
        return [
            Candidate(
                key=row.key,
                request=self._book.request(row.key),
                target=row.task.target_worker_id,
                waited_seconds=now - self._queued_at[row.key],
                excluded=self.delivery.excluded(row.key),
                avoid=frozenset(row.avoid),
            )
            for row in rows
        ]

    def _offers(self) -> list[Offer]:
        """One that does not answer an assignment would not answer the next: who takes nothing is not to draw all tasks."""
        rows = map(self._book.get_open, self.delivery.unanswered())
        deaf = {row.worker_id for row in rows if row is not None}
        offers = self._nodes.offers(self._book.assigned())
        return [replace(o, blocked=o.blocked or _DEAF) if o.worker_id in deaf else o for o in offers]

    def _explain_silence(self) -> None:
        """A task whose node is silent stays with it; say so, and take it back when the node speaks again."""
        notes: dict[Key, tuple[str, str]] = {}
        for row in self._book.open_rows():
            if not row.worker_id:
                continue
            if not self._nodes.is_active(row.worker_id):
                notes[row.key] = (
                    _SILENT,
                    f"node {row.worker_id} is silent; the task stays there until it speaks again or is given up",
                )
            elif row.reason == _SILENT:
                notes[row.key] = ("", "")
        self._book.explain(notes)

    async def _give_up_gone_nodes(self) -> None:
        for row in self._book.open_rows():
            if row.worker_id and self._nodes.is_gone(row.worker_id):
                unknown = "what became of it there" if row.accepted else "whether it ran there"
                message = f"node {row.worker_id} was silent for too long and is given up; {unknown} is not known"
                await self._book.lose(row.key, row.worker_id, message)

    async def _give_up_unanswered(self, now: float) -> None:
        """A task that is cancelled, or has room elsewhere, waits no longer for a node that is heard of and does not answer
        than for a silent one. One in each pass, since the next might find that room taken.

        Had the node taken the task, and only its answer was lost, its heartbeats would list it.
        """
        for key, since in self.delivery.unanswered().items():
            row = self._book.get_open(key)
            if row is None or row.accepted or now - since <= self._nodes.gone_after_seconds:
                continue
            target, excluded = row.task.target_worker_id, (row.worker_id,)
            elsewhere = place(self._book.request(key), self._offers(), target=target, excluded=excluded)
            if row.cancel_requested or isinstance(elsewhere, Choice):
                message = f"node {row.worker_id} did not say whether it takes the task, for too long; {row.message}"
                await self._book.lose(key, row.worker_id, message)
                return
