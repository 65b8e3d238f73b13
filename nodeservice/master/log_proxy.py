"""Streams a task's log to a client: from the node while it answers, else the tail that its report carried."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import structlog

from nodeservice.errors import TransientError
from nodeservice.master.dialing import answered
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.rows import State, TaskRow
from nodeservice.master.tasks import TaskBook
from nodeservice.wire import master_worker_pb2 as pb

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 1.0
_FIRST_LINE_SECONDS = 5.0
"""How long a node may take to answer for a task that has ended, before the stored tail is shown instead."""
_LOOK_SECONDS = 1.0
"""How often it is looked, while a log that is followed gives nothing, whether its node is there at all."""
_REPORT_SECONDS = 5.0
"""How long the report of a node may stay behind the end of its log."""
_STATUS = {State.SUCCEEDED: "completed", State.CANCELLED: "cancelled"}


@dataclass(slots=True)
class _Heard:
    """Of an attempt's log. `sent` lines were given to the client, who was told if the node `is_away`."""

    sent: int = 0
    is_away: bool = False
    end: pb.LogChunk | None = None
    unanswered: TransientError | None = None


class LogProxy:
    def __init__(self, book: TaskBook, nodes: NodeRegistry) -> None:
        self._book = book
        self._nodes = nodes

    async def stream(self, row: TaskRow, *, follow: bool, only_this: bool) -> AsyncIterator[pb.LogChunk]:
        """Lines, then one chunk with `is_complete` once the task has ended.

        Without `follow`, a task that has not ended gives what is there and no such chunk. While following, a node that
        does not answer is waited for, which a notice says once, and lines already given are not given again; where an
        attempt is followed by another, a notice says so and the log of that one begins, unless it is `only_this` that is
        wanted. Raises TransientError where a node that does not answer has more than was given.
        """
        heard = _Heard()
        goes_on = follow and not only_this
        while True:
            event = self._book.changed()
            row = await self._book.find(*row.key) or row
            if goes_on and row.state.is_final and (following := await self._following(row)) is not None:
                yield _notice(row, f"attempt {row.attempt} is over: {row.reason}; attempt {following.attempt} follows")
                row, heard = following, _Heard()
                continue
            if row.worker_id and row.state is not State.REJECTED:
                async for chunk in self._from_node(row, heard, follow=follow):
                    yield chunk
                row = await self._settled(row, heard, follow=goes_on)
                if goes_on and row.state.is_final and await self._following(row) is not None:
                    continue
                # A node that has cleaned up gives an empty log; the report remembers the end of it.
                if heard.end is not None and (heard.sent or not _tail(row)):
                    yield heard.end
                    return
                if heard.unanswered is not None:
                    words = _instead(row, heard.unanswered, sent=heard.sent, follow=follow)
                    if not heard.is_away:
                        yield _notice(row, words)
                    heard.is_away = True
            if row.state.is_final:
                for last in self._from_report(row, heard.sent):
                    yield last
                return
            if not follow:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_SECONDS):
                    await event.wait()
            if row.worker_id:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _from_node(self, row: TaskRow, heard: _Heard, *, follow: bool) -> AsyncIterator[pb.LogChunk]:
        """The lines that the node has beyond those heard before; none where it does not know the task."""
        heard.end = heard.unanswered = None
        stub = self._nodes.stub(row.worker_id)
        if stub is None or (row.state.is_final and not self._nodes.is_active(row.worker_id)):
            heard.unanswered = _unanswered(row, "does not answer")
            return
        skip = heard.sent
        request = pb.TaskLogRequest(task_id=row.task_id, user_id=row.task.user_id, follow=follow, attempt=row.attempt)
        call = stub.StreamTaskLogs(request)
        try:
            while True:
                chunk = await self._read(call, row, follow=follow)
                if not isinstance(chunk, pb.LogChunk):  # The end of the stream.
                    return
                if chunk.is_complete:
                    heard.end = chunk
                    return
                if skip:
                    skip -= 1
                    continue
                heard.sent += 1
                heard.is_away = False
                yield chunk
        except (grpc.aio.AioRpcError, TimeoutError, TransientError) as error:
            log.info("log.node_unanswered", task_id=row.task_id, worker_id=row.worker_id, error=type(error).__name__)
            if not isinstance(error, grpc.aio.AioRpcError) or error.code() is grpc.StatusCode.UNAVAILABLE:
                heard.unanswered = _unanswered(row, "does not answer")
            elif error.code() is not grpc.StatusCode.NOT_FOUND:
                heard.unanswered = _unanswered(row, f"can't tell its log: {error.code().name} {error.details()}")
        finally:
            call.cancel()

    async def _read(self, call: Any, row: TaskRow, *, follow: bool) -> object:
        """The next chunk, or that there is none. Raises TimeoutError for a node that is silent; a task may be, for hours."""
        if row.state.is_final or not follow:
            async with asyncio.timeout(_FIRST_LINE_SECONDS):
                return await answered(call.read())
        reading = asyncio.ensure_future(answered(call.read()))
        try:
            while not (await asyncio.wait({reading}, timeout=_LOOK_SECONDS))[0]:
                if not self._nodes.is_active(row.worker_id):
                    raise TimeoutError
            return reading.result()
        finally:
            reading.cancel()

    async def _following(self, row: TaskRow) -> TaskRow | None:
        """The task's current attempt, where it is another."""
        newest = await self._book.find(row.task_id)
        return newest if newest is not None and newest.sequence > row.sequence else None

    async def _settled(self, row: TaskRow, heard: _Heard, *, follow: bool) -> TaskRow:
        """The attempt as it is now; where its log has ended with a failure, once that is reported, or after a while.

        Only then is it known whether the task ends with it.
        """
        row = await self._book.find(*row.key) or row
        if not follow or heard.end is None or heard.end.status != "failed":
            return row
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
            raise _incomplete(row, sent)
        now = _now()
        lines = [pb.LogChunk(task_id=row.task_id, content=line, timestamp=now) for line in _tail(row)]
        end = pb.LogChunk(task_id=row.task_id, timestamp=now, is_complete=True, status=_STATUS.get(row.state, "failed"))
        return [*lines, end]


def _unanswered(row: TaskRow, what: str) -> TransientError:
    return TransientError(f"node {row.worker_id} {what}", reason="NODE_UNANSWERED", hint="ask again later")


def _instead(row: TaskRow, unanswered: TransientError, *, sent: int, follow: bool) -> str:
    """What comes where a node does not answer, in words: its report, or later its log. Raises TransientError if nothing."""
    if row.state.is_final and sent:
        raise _incomplete(row, sent)
    if row.state.is_final and row.result is not None:
        return f"{unanswered.message}; this is what its report has of the log"
    if row.state.is_final or not follow:
        raise unanswered
    return f"{unanswered.message}; its log goes on once it does"


def _incomplete(row: TaskRow, sent: int) -> TransientError:
    return TransientError(
        f"node {row.worker_id} went away after {sent} lines of the log",
        reason="LOG_INCOMPLETE",
        hint="ask again, or read stdout.log in the results",
    )


def _notice(row: TaskRow, words: str) -> pb.LogChunk:
    return pb.LogChunk(task_id=row.task_id, content=f"[{words}]", timestamp=_now(), notice=words)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _tail(row: TaskRow) -> list[str]:
    if row.result is None or not row.result.logs:
        return []
    return row.result.logs.removesuffix("\n").split("\n")
