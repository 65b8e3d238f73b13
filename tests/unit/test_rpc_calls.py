"""A call that is cut off below us is an error to handle; one of a cancelled task ends that task."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from nodeservice.errors import TransientError
from nodeservice.rpc.calls import answered
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc


class _Silent(pb_grpc.MasterWorkerServicer):
    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def ReportTaskCompletion(  # noqa: N802
        self, request: pb.TaskResult, context: grpc.aio.ServicerContext[pb.TaskResult, pb.Ack]
    ) -> pb.Ack:
        self.asked.set()
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("cut_off", [True, False])
async def test_a_closed_channel_is_told_apart_from_a_cancelled_task(cut_off: bool) -> None:
    server, silent = grpc.aio.server(), _Silent()
    pb_grpc.add_MasterWorkerServicer_to_server(silent, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    stub = pb_grpc.MasterWorkerStub(channel)  # type: ignore[no-untyped-call]
    try:
        call = asyncio.create_task(answered(stub.ReportTaskCompletion(pb.TaskResult()), name="report"))
        await asyncio.wait_for(silent.asked.wait(), 10)
        if cut_off:
            await channel.close(None)
            with pytest.raises(TransientError) as caught:
                await call
            assert caught.value.reason == "MASTER_UNREACHABLE"
        else:
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
    finally:
        await channel.close(None)
        await server.stop(None)
