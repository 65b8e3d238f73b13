"""A master in the benchmark itself: it assigns over gRPC and notes when each report came."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio

from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

REPORT_SECONDS = 300.0


class BenchMaster(pb_grpc.MasterWorkerServicer):
    """It acknowledges everything at once. Instants are Unix nanoseconds."""

    def __init__(self) -> None:
        self.reports: dict[str, tuple[pb.TaskResult, int]] = {}
        self.running_count = 0
        """Of the last heartbeat."""
        self.registered = asyncio.Event()
        self.port = 0
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> BenchMaster:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        pb_grpc.add_MasterWorkerServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self._server.stop(None)

    async def reported(self, task_id: str) -> tuple[pb.TaskResult, int]:
        """The first report of that task and when it came."""
        if task_id not in self.reports:
            waiting = self._waiting.setdefault(task_id, asyncio.get_running_loop().create_future())
            async with asyncio.timeout(REPORT_SECONDS):
                await asyncio.shield(waiting)
        return self.reports[task_id]

    # ---- node -> master ----

    async def RegisterWorker(self, request: pb.WorkerInfo, context: Any) -> pb.RegisterAck:  # noqa: N802
        self.registered.set()
        return pb.RegisterAck(success=True)

    async def SendHeartbeat(self, request: pb.Heartbeat, context: Any) -> pb.HeartbeatAck:  # noqa: N802
        self.running_count = sum(task.phase == "RUNNING" for task in request.running_tasks)
        return pb.HeartbeatAck(success=True)

    async def ReportTaskCompletion(self, request: pb.TaskResult, context: Any) -> pb.Ack:  # noqa: N802
        self.reports.setdefault(request.task_id, (request, time.time_ns()))
        waiting = self._waiting.pop(request.task_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
        return pb.Ack(success=True)
