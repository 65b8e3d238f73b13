"""The node's side of the wire: AssignTask, CancelTask, StreamTaskLogs, MasterRegister, SetNodeMode.

Every handler answers fast: durable first, then the answer; pulls, stops and reports happen elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc
import structlog

from nodeservice.clock import SystemClock
from nodeservice.core.admission import check_task_id
from nodeservice.core.model import AttemptId, Outcome, Phase, StopCause, StopRequest, TaskRecord, TraceIds
from nodeservice.errors import NodeServiceError, RequestError, invalid_request
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.logs import LogBook
from nodeservice.lifecycle.node_mode import Mode, ModeKeeper
from nodeservice.lifecycle.workdir import WorkDirs
from nodeservice.listening import not_bound
from nodeservice.rpc import convert
from nodeservice.rpc.log_stream import stream_log
from nodeservice.task_bounds import MAX_SECONDS
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)

RpcContext = grpc.aio.ServicerContext[object, object]

_SERVER_OPTIONS = (
    # Masters may ping as often as they like: without these a busy one is sent away with "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)


def bind_server(listen: str, credentials: grpc.ServerCredentials | None) -> tuple[grpc.aio.Server, int]:
    """A server that is not yet started, and its port. Without credentials it speaks plain text.

    Raises TransientError (NOT_LISTENING).
    """
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    try:
        if credentials is None:
            return server, int(server.add_insecure_port(listen))
        return server, int(server.add_secure_port(listen, credentials))
    except RuntimeError as error:
        raise not_bound("listen", listen) from error


class NodeServicer(pb_grpc.MasterWorkerServicer):
    """RPCs that a master serves answer UNIMPLEMENTED here."""

    def __init__(
        self,
        *,
        driver: Driver,
        logs: LogBook,
        dirs: WorkDirs,
        clock: SystemClock,
        defaults: convert.TaskDefaults,
        new_trace: Callable[[str | None], TraceIds],
        on_master: Callable[[str], None],
        report_again: Callable[[TaskRecord], None],
        on_refusal: Callable[[str], None],
        mode: ModeKeeper,
    ) -> None:
        self._mode = mode
        self._driver = driver
        self._logs = logs
        self._dirs = dirs
        self._clock = clock
        self._defaults = defaults
        self._new_trace = new_trace
        self._on_master = on_master
        self._report_again = report_again
        self._on_refusal = on_refusal

    async def MasterRegister(self, request: pb.MasterInfo, context: RpcContext) -> pb.RegisterAck:  # noqa: N802
        """Answers at once; the registration itself goes out from the link's own task."""
        address = request.master_address
        if not _is_address(address):
            return pb.RegisterAck(success=False, message=f"master_address is {address[:80]!r} (give it as HOST:PORT)")
        self._on_master(address)
        return pb.RegisterAck(success=True, message="registering")

    async def AssignTask(self, request: pb.Task, context: RpcContext) -> pb.TaskAck:  # noqa: N802
        received_at = self._clock.now()
        try:
            spec = convert.spec_from_task(request, self._defaults)
            trace = self._new_trace(_told(context, "traceparent"))
            record = await self._driver.assign(spec, trace=trace, received_at=received_at)
        except NodeServiceError as error:
            log.info("task.refused", task_id=request.task_id[:128], reason=error.reason, message=str(error))
            self._on_refusal(error.reason)
            return _refusal(error)
        if record.phase > Phase.REPORTING and _told(context, "nodeservice-report-again"):
            self._report_again(record)
        return pb.TaskAck(success=True, message=f"accepted, {record.phase.name}")

    async def CancelTask(self, request: pb.TaskID, context: RpcContext) -> pb.TaskAck:  # noqa: N802
        """Durable, then answered; the cancelled result is reported once the container is gone."""
        try:
            record = self._find(request.task_id, request.attempt if request.HasField("attempt") else 0)
            if record.phase < Phase.COLLECTING:
                stop = StopRequest(cause=StopCause.CANCELLED, requested_at=self._clock.now())
                record = await self._driver.request_stop(record.id, stop)
        except NodeServiceError as error:
            return _refusal(error)
        if record.verdict is not None and record.verdict.outcome is Outcome.CANCELLED:
            return pb.TaskAck(success=True, message="cancelled")
        if record.verdict is None and record.stop is not None and record.stop.cause is StopCause.CANCELLED:
            return pb.TaskAck(success=True, message="cancelling")
        how = f"as {record.verdict.reason.value}" if record.verdict else "at its deadline"
        return pb.TaskAck(success=False, message=f"the task already ended {how}", reason="ALREADY_ENDED")

    async def SetNodeMode(self, request: pb.NodeMode, context: RpcContext) -> pb.NodeModeAck:  # noqa: N802
        """Durable, then answered."""
        try:
            if request.mode:
                await self._mode.set(_mode(request.mode), deadline_seconds=_deadline(request))
        except NodeServiceError as error:
            return pb.NodeModeAck(success=False, message=str(error)[:2000], reason=error.reason)
        return pb.NodeModeAck(
            success=True, mode=self._mode.current.mode.value, unfinished_tasks=self._mode.unfinished_count
        )

    async def StreamTaskLogs(  # noqa: N802
        self, request: pb.TaskLogRequest, context: RpcContext
    ) -> AsyncIterator[pb.LogChunk]:
        try:
            record = self._find(request.task_id, request.attempt)
        except RequestError as error:
            code = grpc.StatusCode.NOT_FOUND if error.reason == "NOT_FOUND" else grpc.StatusCode.INVALID_ARGUMENT
            await context.abort(code, str(error))
        path = self._dirs.log(record.id)
        async for chunk in stream_log(self._driver, self._logs, record.id, path, follow=request.follow):
            yield chunk

    def serve_on(self, server: grpc.aio.Server) -> None:
        """Answer the calls that come to this server."""
        pb_grpc.add_MasterWorkerServicer_to_server(self, server)

    def _find(self, task_id: str, attempt: int) -> TaskRecord:
        check_task_id(task_id)
        record = self._driver.get(AttemptId(task_id, attempt)) if attempt else self._driver.newest(task_id)
        if record is None:
            which = f"attempt {attempt} of task {task_id}" if attempt else f"task {task_id}"
            raise RequestError(f"{which} is not known here", reason="NOT_FOUND", field="task_id")
        return record


def _refusal(error: NodeServiceError) -> pb.TaskAck:
    return pb.TaskAck(success=False, message=str(error)[:2000], reason=error.reason, field=error.field)


def _mode(text: str) -> Mode:
    try:
        return Mode(text)
    except ValueError as error:
        raise invalid_request("mode", f"is {text[:40]!r}", f"use one of {', '.join(Mode)}") from error


def _deadline(request: pb.NodeMode) -> float | None:
    if not request.HasField("deadline_seconds"):
        return None
    seconds = request.deadline_seconds
    if not 0 <= seconds <= MAX_SECONDS:
        raise invalid_request("deadline_seconds", f"is {seconds!r}", "use seconds from 0 to a year")
    return seconds


def _told(context: RpcContext, name: str) -> str | None:
    """What the caller's metadata says under that name."""
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return None


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    printable = text.isprintable() and not any(character.isspace() for character in text)
    return bool(host) and printable and len(text) <= 300 and port.isdecimal() and 0 < int(port) < 65_536
