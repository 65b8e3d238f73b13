"""Many nodes in one process, as a master sees them over gRPC: they beat, and report every task as done at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import grpc
import grpc.aio

from nodeservice.master.rows import NodeRow
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

AT_A_TIME = 32
SERVING_COUNT = 10
"""So many have room and a server of their own; all others have too little, as most have in a cluster that is busy."""
_ROOM = pb.Resources(cpu_milli=64_000, memory_bytes=2**38, disk_bytes=2**40)
_FULL = pb.Resources(cpu_milli=1, memory_bytes=2**38, disk_bytes=2**40)


class SimulatedNodes:
    """Ten or more, which a master knows from `rows`: to register 10,000 takes a while, and is not measured."""

    def __init__(self, count: int) -> None:
        self.count = count
        beats = (
            pb.Heartbeat(worker_id=_name(n), allocatable=_room(n, count), free=_room(n, count)) for n in range(count)
        )
        self._next = cycle([*beats])
        self._channel: grpc.aio.Channel | None = None
        self._done: set[str] = set()
        self._changed = asyncio.Condition()
        self._serving = [_ServingNode(_name(number), self) for number in range(count - SERVING_COUNT, count)]

    async def __aenter__(self) -> SimulatedNodes:
        for node in self._serving:
            await node.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in self._serving:
            await node.stop()
        if self._channel is not None:
            await self._channel.close(None)

    def rows(self) -> Iterator[NodeRow]:
        """As the master's database has them after they have registered."""
        for number in range(self.count):
            address = f"127.0.0.1:{self._serving[(number - self.count) % SERVING_COUNT].port}"
            room = _room(number, self.count)
            info = pb.WorkerInfo(worker_id=_name(number), listen_address=address, allocatable=room, capacity=room)
            yield NodeRow(worker_id=info.worker_id, address=address, info=info, registered_at_ms=1, heard_at_ms=1)

    async def join(self, master: str) -> None:
        """Each tells the master for the first time what it holds: nothing."""
        self._channel = grpc.aio.insecure_channel(master)
        self.stub: Any = pb_grpc.MasterWorkerStub(self._channel)
        await self.beat(self.count)

    async def beat(self, count: int) -> None:
        """So many heartbeats, of one node after the other."""
        beats = islice(self._next, count)

        async def work() -> None:
            for beat in beats:
                ack = await self.stub.SendHeartbeat(beat, timeout=120)
                if not ack.success:
                    raise RuntimeError(f"the master does not know {beat.worker_id}")

        await asyncio.gather(*(work() for _ in range(AT_A_TIME)))

    async def reported(self, names: list[str]) -> None:
        """Until all of them were reported and acknowledged."""
        wanted = set(names)
        async with asyncio.timeout(300), self._changed:
            await self._changed.wait_for(lambda: wanted <= self._done)

    async def note_done(self, task_id: str) -> None:
        async with self._changed:
            self._done.add(task_id)
            self._changed.notify_all()


class _ServingNode(pb_grpc.MasterWorkerServicer):
    def __init__(self, worker_id: str, nodes: SimulatedNodes) -> None:
        self._worker_id = worker_id
        self._nodes = nodes
        self._reports: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        pb_grpc.add_MasterWorkerServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def AssignTask(self, request: pb.Task, context: Any) -> pb.TaskAck:  # noqa: N802
        report = asyncio.create_task(self._report(request))
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)
        return pb.TaskAck(success=True)

    async def _report(self, task: pb.Task) -> None:
        result = pb.TaskResult(
            task_id=task.task_id, worker_id=self._worker_id, status="success", attempt=task.attempt or 1
        )
        while not (await self._nodes.stub.ReportTaskCompletion(result, timeout=120)).success:
            await asyncio.sleep(0.01)
        await self._nodes.note_done(task.task_id)


def _room(number: int, count: int) -> pb.Resources:
    """Those with room come last, so that whoever looks at the nodes in turn passes all others first."""
    return _ROOM if number >= count - SERVING_COUNT else _FULL


def _name(number: int) -> str:
    return f"simulated-{number:05d}"
