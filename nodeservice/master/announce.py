"""Calls MasterRegister on nodes that were started without a master's address."""

from __future__ import annotations

import asyncio

import grpc.aio
import structlog

from nodeservice.errors import TransientError
from nodeservice.master.dialing import NodeDialer, answered
from nodeservice.wire import master_worker_pb2 as pb

log = structlog.get_logger(__name__)

_DEADLINE_SECONDS = 5.0


async def announce(
    addresses: tuple[str, ...], dialer: NodeDialer, *, master_id: str, master_address: str, every_seconds: float
) -> None:
    """Until cancelled. Repeating is what the protocol expects: a node answers at once, and registers by itself."""
    async with asyncio.TaskGroup() as group:
        for address in addresses:
            group.create_task(_announce_to(address, dialer, master_id, master_address, every_seconds))


async def _announce_to(
    address: str, dialer: NodeDialer, master_id: str, master_address: str, every_seconds: float
) -> None:
    last = ""
    while True:
        try:
            info = pb.MasterInfo(master_id=master_id, master_address=master_address)
            stub = dialer.stub(address)
            ack: pb.RegisterAck = await answered(stub.MasterRegister(info, timeout=_DEADLINE_SECONDS))
            story = "accepted" if ack.success else f"refused: {ack.message[:200]}"
        except grpc.aio.AioRpcError as error:
            story = f"no answer: {error.code().name}"
        except TransientError as error:
            story = f"no answer: {error}"
        if story != last:
            log.info("node.announced", address=address, answer=story)
            last = story
        await asyncio.sleep(every_seconds)
