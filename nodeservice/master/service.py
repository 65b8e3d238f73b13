"""The master's side of the wire: translates calls into the book, the registry and the scheduler."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NoReturn

import grpc
import grpc.aio
import structlog

from nodeservice.errors import NodeServiceError, RequestError, TransientError
from nodeservice.master.checks import check_id, check_traceparent, check_wanted
from nodeservice.master.identity import check_worker_id, names_of_call
from nodeservice.master.log_proxy import LogProxy
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.placement import NeverFits, place
from nodeservice.master.reconcile import Reconciler
from nodeservice.master.reports import check_report
from nodeservice.master.request import Request
from nodeservice.master.rows import TaskRow
from nodeservice.master.scheduler import Scheduler
from nodeservice.master.tasks import TaskBook
from nodeservice.master.upload_grpc import receive_chunks
from nodeservice.master.uploads import ResultUploads
from nodeservice.master.views import attempt_view, node_view, task_view
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[object, object]

_LIST_LIMIT = 1_000
_CANCEL_WAIT_SECONDS = 5.0
REASON_KEY = "nodeservice-reason"
"""Trailing metadata of every call that ends with an error of ours."""
_CODES = {
    "NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "ALREADY_STORED": grpc.StatusCode.ALREADY_EXISTS,
    "RESULT_TOO_LARGE": grpc.StatusCode.OUT_OF_RANGE,
    "WORKER_ID_NOT_CERTIFIED": grpc.StatusCode.PERMISSION_DENIED,
    "STALE_ATTEMPT": grpc.StatusCode.FAILED_PRECONDITION,
}


class MasterServicer(pb_grpc.MasterWorkerServicer):
    """RPCs that a node serves answer UNIMPLEMENTED here. `certified`: a node has to be in its certificate by name."""

    def __init__(
        self,
        *,
        book: TaskBook,
        nodes: NodeRegistry,
        scheduler: Scheduler,
        uploads: ResultUploads,
        certified: bool = False,
    ) -> None:
        self._certified = certified
        self._book = book
        self._nodes = nodes
        self._scheduler = scheduler
        self._uploads = uploads
        self._logs = LogProxy(book, nodes)
        self._reconciler = Reconciler(book, scheduler.delivery.recall)

    # ---- nodes --------------------------------------------------------------------------------------------------------

    async def RegisterWorker(self, request: pb.WorkerInfo, context: Context) -> pb.RegisterAck:  # noqa: N802
        try:
            self._check_caller(request.worker_id, context)
            node = await self._nodes.register(request, context.peer())
        except NodeServiceError as error:
            log.warning("node.refused", message=str(error))
            return pb.RegisterAck(success=False, message=str(error))
        self._scheduler.wake()
        message = f"registered; dialled at {node.address}"
        return pb.RegisterAck(success=True, message=message, wants_releases=True)

    async def SendHeartbeat(self, request: pb.Heartbeat, context: Context) -> pb.HeartbeatAck:  # noqa: N802
        try:
            self._check_caller(request.worker_id, context)
        except RequestError as error:
            log.warning("heartbeat.refused", message=str(error))
            return pb.HeartbeatAck(success=False)
        node = self._nodes.heartbeat(request)
        if node is None:
            return pb.HeartbeatAck(success=False)
        try:
            await self._reconciler.compare(node.worker_id, request.running_tasks)
            self._nodes.settled(node.worker_id)
        except TransientError as error:
            # The node is well, it is our database that isn't: making the node register again would not help.
            log.error("heartbeat.not_stored", error=str(error))
        if node.has_news:
            self._scheduler.wake()
        return pb.HeartbeatAck(success=True, wants_releases=True)

    async def ReportTaskCompletion(self, request: pb.TaskResult, context: Context) -> pb.Ack:  # noqa: N802
        """Acknowledged once durable. What belongs to no open attempt is kept aside and acknowledged too: the node must
        not hold it for ever."""
        try:
            check_report(request)
            self._check_caller(request.worker_id, context)
            taken = await self._book.complete(request)
        except NodeServiceError as error:
            log.warning("report.refused", reason=error.reason, message=str(error))
            return pb.Ack(success=False, message=str(error))
        self._nodes.note_end(request.worker_id, (request.task_id, request.attempt or 1))
        self._scheduler.wake()
        return pb.Ack(success=True, message=taken.value)

    async def UploadTaskFiles(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.FileChunk], context: Context
    ) -> pb.FileUploadAck:
        try:
            return await receive_chunks(
                request_iterator, self._uploads, lambda worker_id: self._check_caller(worker_id, context)
            )
        except NodeServiceError as error:
            log.warning("upload.refused", reason=error.reason, message=str(error))
            await _abort(context, error)

    def _check_caller(self, worker_id: str, context: Context) -> None:
        if self._certified:
            check_worker_id(worker_id, names_of_call(context))

    # ---- clients ------------------------------------------------------------------------------------------------------

    async def SubmitTask(self, request: pb.Task, context: Context) -> pb.SubmitAck:  # noqa: N802
        traceparent = check_traceparent(_metadata(context, "traceparent"))
        target = request.target_worker_id

        def refuse(asked: Request) -> RequestError | None:
            if self._nodes.could_hold(asked, target):  # most are, by one of the first nodes that are looked at
                return None
            answer = place(asked, self._nodes.empty_offers(), target=target)
            return RequestError(answer.message, reason=answer.reason) if isinstance(answer, NeverFits) else None

        try:
            row = await self._book.submit(request, traceparent=traceparent, refuse=refuse)
        except RequestError as error:
            return pb.SubmitAck(success=False, message=str(error), reason=error.reason, task_id=request.task_id[:128])
        except NodeServiceError as error:
            await _abort(context, error)
        self._scheduler.wake()
        return pb.SubmitAck(success=True, message=row.state.value, task_id=row.task_id)

    async def ListTasks(self, request: pb.ListTasksRequest, context: Context) -> pb.TaskList:  # noqa: N802
        limit = min(request.limit, _LIST_LIMIT) if request.limit > 0 else _LIST_LIMIT
        try:
            rows = await self._book.newest(limit, check_wanted(request))
        except NodeServiceError as error:
            await _abort(context, error)
        return pb.TaskList(tasks=[self._view(row, brief=True) for row in rows])

    async def GetTask(self, request: pb.TaskID, context: Context) -> pb.TaskView:  # noqa: N802
        row = await self._find(request.task_id, request.attempt, context)
        view = self._view(row)
        try:
            view.attempts.extend(attempt_view(one) for one in await self._book.attempts(row.task_id))
        except NodeServiceError as error:
            await _abort(context, error)
        return view

    def _view(self, row: TaskRow, *, brief: bool = False) -> pb.TaskView:
        running = None if row.state.is_final else self._nodes.running(row.worker_id, row.key)
        return task_view(row, running=running, brief=brief)

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.NodeList:  # noqa: N802
        views = self._nodes.views(self._book.assigned())
        return pb.NodeList(nodes=[node_view(node, active, assigned) for node, active, assigned in views])

    async def CancelTask(self, request: pb.TaskID, context: Context) -> pb.TaskAck:  # noqa: N802
        """Durable, then passed on. success=false for what has ended or never was."""
        row = await self._find(request.task_id, request.attempt, context)
        if row.state.is_final:
            return pb.TaskAck(success=False, message=f"the task has ended: {row.state.value}", reason="ALREADY_ENDED")
        try:
            row = await self._book.request_cancel(row)
        except NodeServiceError as error:
            await _abort(context, error)
        self._scheduler.wake()
        if row.state.is_final:
            was_ours = row.state.value == "CANCELLED"
            message = row.message if was_ours else f"the task has ended: {row.state.value}"
            return pb.TaskAck(success=was_ours, message=message, reason="" if was_ours else "ALREADY_ENDED")
        if await self._scheduler.delivery.pass_on_cancel(row, wait_seconds=_CANCEL_WAIT_SECONDS):
            return pb.TaskAck(success=True, message=f"passed on to node {row.worker_id}")
        return pb.TaskAck(
            success=True, message=f"noted; node {row.worker_id} has not answered yet and gets it as soon as it does"
        )

    async def StreamTaskLogs(  # noqa: N802
        self, request: pb.TaskLogRequest, context: Context
    ) -> AsyncIterator[pb.LogChunk]:
        row = await self._find(request.task_id, request.attempt, context)
        try:
            async for chunk in self._logs.stream(row, follow=request.follow, only_this=request.attempt != 0):
                yield chunk
        except NodeServiceError as error:
            await _abort(context, error)

    async def _find(self, task_id: str, attempt: int, context: Context) -> TaskRow:
        try:
            check_id("task_id", task_id)
            row = await self._book.find(task_id, attempt or None)
            if row is None:
                which = f"attempt {attempt} of task {task_id}" if attempt else f"task {task_id}"
                raise RequestError(f"there is no {which}", reason="NOT_FOUND", field="task_id")
        except NodeServiceError as error:
            await _abort(context, error)
        return row


async def _abort(context: Context, error: NodeServiceError) -> NoReturn:
    if not isinstance(error, RequestError):
        log.warning("call.failed", reason=error.reason, error=str(error))
    fallback = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, RequestError) else grpc.StatusCode.UNAVAILABLE
    # A client can't tell UNAVAILABLE that we say from that of its own gRPC, which doesn't reach us.
    said = ((REASON_KEY, error.reason),)
    await context.abort(_CODES.get(error.reason, fallback), str(error)[:2000], trailing_metadata=said)


def _metadata(context: Context, key: str) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return ""
