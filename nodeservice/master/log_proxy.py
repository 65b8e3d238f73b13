"""Streams a task's log to a client: from the node while it answers, else the tail that its report carried."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import grpc
import grpc.aio
import structlog

from nodeservice.errors import TransientError
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.rows import State, TaskRow
from nodeservice.master.tasks import TaskBook
from nodeservice.wire import master_worker_pb2 as pb

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 1.0
_FIRST_LINE_SECONDS = 5.0
"""How long a node may take to answer for a task that has ended, before the stored tail is shown instead."""
_REPORT_SECONDS = 5.0
"""How long the report of a node may stay behind the end of its log."""
_STATUS = {State.SUCCEEDED: "completed", State.CANCELLED: "cancelled"}


class LogProxy:
    def __init__(self, book: TaskBook, nodes: NodeRegistry) -> None:
        self._book = book
        self._nodes = nodes

    async def stream(self, row: TaskRow, *, follow: bool) -> AsyncIterator[pb.LogChunk]:
        """Lines, then one chunk with `is_complete` once the task has ended.

        Without `follow`, a task that has not ended gives what is there and no such chunk. While following, a node that
        goes away is waited for, and lines already given are not given again; where an attempt is followed by another, a line
        says so and the log of that one begins. Raises TransientError when a node went away in the middle of the log of a
        task that has ended.
        """
        sent = 0
        while True:
            event = self._book.changed()
            row = await self._book.find(*row.key) or row
            if follow and row.state.is_final and (following := await self._following(row)) is not None:
                words = f"[attempt {row.attempt} is over: {row.reason}; attempt {following.attempt} follows]"
                yield pb.LogChunk(task_id=row.task_id, content=words, timestamp=_now())
                row, sent = following, 0
                continue
            if row.worker_id:
                end: pb.LogChunk | None = None
                async for chunk in self._from_node(row, skip=sent, follow=follow):
                    if chunk.is_complete:
                        end = chunk
                        break
                    sent += 1
                    yield chunk
                row = await self._book.find(*row.key) or row
                if end is not None and end.status == "failed" and follow:
                    # Whether the task ends with that is known once it is reported.
                    row = await self._reported(row)
                    if row.state.is_final and await self._following(row) is not None:
                        continue
                # A node that has cleaned up gives an empty log; the report remembers the end of it.
                if end is not None and (sent or not _tail(row)):
                    yield end
                    return
            if row.state.is_final:
                for last in self._from_report(row, sent):
                    yield last
                return
            if not follow:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_SECONDS):
                    await event.wait()
            if row.worker_id:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _from_node(self, row: TaskRow, *, skip: int, follow: bool) -> AsyncIterator[pb.LogChunk]:
        """What the node gives, without its first `skip` lines. A node that does not answer gives nothing."""
        stub = self._nodes.stub(row.worker_id)
        if stub is None or (row.state.is_final and not self._nodes.is_active(row.worker_id)):
            return
        request = pb.TaskLogRequest(task_id=row.task_id, user_id=row.task.user_id, follow=follow)
        call = stub.StreamTaskLogs(request)
        try:
            while True:
                patience = _FIRST_LINE_SECONDS if row.state.is_final or not follow else None
                async with asyncio.timeout(patience):
                    chunk = await call.read()
                if not isinstance(chunk, pb.LogChunk):  # The end of the stream.
                    return
                if skip and not chunk.is_complete:
                    skip -= 1
                    continue
                yield chunk
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            log.info("log.node_unanswered", task_id=row.task_id, worker_id=row.worker_id, error=type(error).__name__)
        finally:
            call.cancel()

    async def _following(self, row: TaskRow) -> TaskRow | None:
        """The task's current attempt, where it is another."""
        newest = await self._book.find(row.task_id)
        return newest if newest is not None and newest.sequence > row.sequence else None

    async def _reported(self, row: TaskRow) -> TaskRow:
        """The attempt once it has ended here too, or as it is after a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPORT_SECONDS):
                while not row.state.is_final:
                    event = self._book.changed()
                    row = await self._book.find(*row.key) or row
                    if not row.state.is_final:
                        await event.wait()
        return row

    def _from_report(self, row: TaskRow, sent: int) -> list[pb.LogChunk]:
        if sent:
            raise TransientError(
                f"node {row.worker_id} went away after {sent} lines of the log",
                reason="LOG_INCOMPLETE",
                hint="ask again, or read stdout.log in the results",
            )
        now = _now()
        lines = [pb.LogChunk(task_id=row.task_id, content=line, timestamp=now) for line in _tail(row)]
        end = pb.LogChunk(task_id=row.task_id, timestamp=now, is_complete=True, status=_STATUS.get(row.state, "failed"))
        return [*lines, end]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _tail(row: TaskRow) -> list[str]:
    if row.result is None or not row.result.logs:
        return []
    return row.result.logs.removesuffix("\n").split("\n")
