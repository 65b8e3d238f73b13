"""A master in the test itself, which keeps what a node tells it, and when; and a node of its own to give tasks to."""

from __future__ import annotations

import time
from typing import Any

import grpc
import grpc.aio

from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.scripted_node import eventually

MIB = 1024 * 1024
PATIENCE_SECONDS = 60.0


class ListeningMaster(pb_grpc.MasterWorkerServicer):
    """`beats` have the time of a clock that nobody sets."""

    def __init__(self) -> None:
        self.beats: list[tuple[float, pb.Heartbeat]] = []
        self.reports: list[pb.TaskResult] = []
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def __aenter__(self) -> ListeningMaster:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        pb_grpc.add_MasterWorkerServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self._server.stop(None)

    # ---- what was heard ----

    def report(self, task_id: str) -> pb.TaskResult | None:
        return next((report for report in self.reports if report.task_id == task_id), None)

    async def reported(self, task_id: str) -> pb.TaskResult:
        await eventually(lambda: self.report(task_id) is not None, seconds=PATIENCE_SECONDS)
        report = self.report(task_id)
        assert report is not None
        return report

    def leases(self) -> dict[str, tuple[str, ...]]:
        """The GPUs of each task that runs, as the last heartbeat tells."""
        if not self.beats:
            return {}
        _, beat = self.beats[-1]
        return {task.task_id: tuple(task.gpu_uuids) for task in beat.running_tasks if task.phase == "RUNNING"}

    async def running(self, *task_ids: str) -> dict[str, tuple[str, ...]]:
        """Their GPUs, once all of them run."""
        await eventually(lambda: set(task_ids) <= set(self.leases()), seconds=PATIENCE_SECONDS)
        leases = self.leases()
        return {task_id: leases[task_id] for task_id in task_ids}

    async def out_of_service_and_back(self, gpu: str) -> None:
        def states() -> list[str]:
            return [one.state for _, beat in self.beats for one in beat.gpus if one.uuid == gpu]

        await eventually(lambda: "FAULTY" in states() and states()[-1] == "WELL", seconds=PATIENCE_SECONDS)

    # ---- node -> master ----

    async def RegisterWorker(self, request: pb.WorkerInfo, context: Any) -> pb.RegisterAck:  # noqa: N802
        return pb.RegisterAck(success=True)

    async def SendHeartbeat(self, request: pb.Heartbeat, context: Any) -> pb.HeartbeatAck:  # noqa: N802
        self.beats.append((time.monotonic(), request))
        return pb.HeartbeatAck(success=True)

    async def ReportTaskCompletion(self, request: pb.TaskResult, context: Any) -> pb.Ack:  # noqa: N802
        self.reports.append(request)
        return pb.Ack(success=True)


class AskingMaster(ListeningMaster):
    """Asks to hear of releases, and counts registrations."""

    registrations = 0

    async def RegisterWorker(self, request: pb.WorkerInfo, context: Any) -> pb.RegisterAck:  # noqa: N802
        self.registrations += 1
        return pb.RegisterAck(success=True, wants_releases=True)

    async def SendHeartbeat(self, request: pb.Heartbeat, context: Any) -> pb.HeartbeatAck:  # noqa: N802
        await super().SendHeartbeat(request, context)
        return pb.HeartbeatAck(success=True, wants_releases=True)


async def assign(
    address: str, task_id: str, command: str, *, gpus: float = 0, metadata: Any = None, **fields: Any
) -> pb.TaskAck:
    """A small task for the node at that address."""
    task = pb.Task(
        task_id=task_id, docker_image="nodeservice/demo", command=command, req_gpu=gpus,
        cpu_milli=50, memory_bytes=32 * MIB, disk_bytes=8 * MIB, grace_seconds=0.5, **fields,
    )  # fmt: skip
    async with grpc.aio.insecure_channel(address) as channel:
        return await pb_grpc.MasterWorkerStub(channel).AssignTask(task, timeout=20, metadata=metadata)
