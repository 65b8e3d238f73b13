"""A node as a master sees it, on a real loopback server: it registers, accepts or refuses, and reports when told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

GIB = 1024**3


async def eventually(condition: Callable[[], Awaitable[bool] | bool], *, seconds: float = 20.0) -> None:
    """Wait until it holds; the limit is there for what never comes."""
    async with asyncio.timeout(seconds):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.01)


class ScriptedNode(pb_grpc.MasterWorkerServicer):
    """What to answer is set by the test: `refuse_with` (reason) or `hang`; what came is in `assigned` and `cancelled`."""

    def __init__(
        self, master: str, worker_id: str = "w1", *, cpu: float = 4, memory: float = 8, gpus: float = 0
    ) -> None:
        self.worker_id = worker_id
        self.master = master
        self.totals = {"total_cpu": cpu, "total_memory": memory, "total_storage": 100.0, "total_gpu": gpus}
        self.assigned: list[pb.Task] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled: list[pb.TaskID] = []
        self.announced: list[str] = []
        self.refuse_with: str | None = None
        self.cancel_answer = pb.TaskAck(success=True, message="cancelling")
        self.hang = False
        self.lines: dict[str, list[str]] = {}
        self.log_ended: dict[str, str] = {}
        self.log_calls = 0
        self.logs_told = 0
        """To their end."""
        self.port = 0
        self._server: grpc.aio.Server | None = None
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> ScriptedNode:
        await self.listen()
        self._channel = grpc.aio.insecure_channel(self.master)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.deaf()
        assert self._channel is not None
        await self._channel.close(None)

    async def listen(self) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        pb_grpc.add_MasterWorkerServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def deaf(self) -> None:
        """Answer nothing any more, as a node that crashed."""
        assert self._server is not None
        await self._server.stop(None)

    # ---- node -> master -----------------------------------------------------------------------------------------------

    @property
    def stub(self) -> Any:
        return pb_grpc.MasterWorkerStub(self._channel)

    async def register(self, **fields: Any) -> pb.RegisterAck:
        info = pb.WorkerInfo(worker_id=self.worker_id, listen_address=f":{self.port}", **self.totals, **fields)
        return await self.stub.RegisterWorker(info, timeout=10, wait_for_ready=True)

    async def beat(self, *running: pb.RunningTask, **fields: Any) -> bool:
        beat = pb.Heartbeat(worker_id=self.worker_id, running_tasks=running, **fields)
        return (await self.stub.SendHeartbeat(beat, timeout=10)).success

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """It is heard of all the time, with what was assigned to it."""

        async def beat_on() -> None:
            while await self.beat(*(pb.RunningTask(task_id=t.task_id, attempt=t.attempt) for t in self.assigned)):
                await asyncio.sleep(0.05)

        beats = asyncio.create_task(beat_on())
        try:
            yield
        finally:
            beats.cancel()
            await asyncio.wait({beats})

    async def report(self, task_id: str, *, attempt: int = 1, status: str = "success", **fields: Any) -> pb.Ack:
        result = pb.TaskResult(task_id=task_id, worker_id=self.worker_id, status=status, attempt=attempt, **fields)
        return await self.stub.ReportTaskCompletion(result, timeout=10)

    def ids(self) -> list[str]:
        return [task.task_id for task in self.assigned]

    async def got(self, *task_ids: str) -> None:
        await eventually(lambda: set(task_ids) <= set(self.ids()))

    # ---- master -> node -----------------------------------------------------------------------------------------------

    async def MasterRegister(self, request: pb.MasterInfo, context: Any) -> pb.RegisterAck:  # noqa: N802
        self.announced.append(request.master_address)
        if self.hang:
            await asyncio.Event().wait()
        return pb.RegisterAck(success=True)

    async def AssignTask(self, request: pb.Task, context: Any) -> pb.TaskAck:  # noqa: N802
        self.assigned.append(request)
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata()})
        if self.hang:
            await asyncio.Event().wait()
        if self.refuse_with is not None:
            return pb.TaskAck(success=False, message="not here", reason=self.refuse_with)
        return pb.TaskAck(success=True)

    async def CancelTask(self, request: pb.TaskID, context: Any) -> pb.TaskAck:  # noqa: N802
        self.cancelled.append(request)
        return self.cancel_answer

    async def StreamTaskLogs(  # noqa: N802
        self, request: pb.TaskLogRequest, context: Any
    ) -> AsyncIterator[pb.LogChunk]:
        self.log_calls += 1
        lines = self.lines.get(f"{request.task_id}.{request.attempt}", self.lines.get(request.task_id))
        if lines is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown task")
            return
        sent = 0
        while True:
            # Asked before the lines: one that is added while they go out is not the last any more.
            status = self.log_ended.get(request.task_id)
            for line in lines[sent:]:
                sent += 1
                yield pb.LogChunk(task_id=request.task_id, content=line)
            if status:
                self.logs_told += 1
                yield pb.LogChunk(task_id=request.task_id, is_complete=True, status=status)
                return
            if not request.follow:
                return
            await asyncio.sleep(0.01)
