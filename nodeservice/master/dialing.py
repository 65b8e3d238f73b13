"""Channels to nodes: one per address, kept open, closed when the address is no longer used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
import grpc.aio

from nodeservice.errors import TransientError
from nodeservice.master.checks import check_address
from nodeservice.master.fault_points import armed
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

T = TypeVar("T")

NODE_PORT = 50052
"""Where a node listens that doesn't say so."""

_OPTIONS = (
    # Else of each log that a client follows and does not read, 4 MiB lie here and not 64 KiB.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


class NodeDialer:
    """`credentials` None means plain text."""

    def __init__(self, credentials: grpc.ChannelCredentials | None) -> None:
        self._credentials = credentials
        self._channels: dict[str, grpc.aio.Channel] = {}

    def stub(self, address: str) -> Any:
        """The generated stub (`MasterWorkerStub`, which has no types) for the node at `host:port`."""
        channel = self._channels.get(address)
        if channel is None:
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
            else:
                channel = grpc.aio.secure_channel(address, self._credentials, options=_OPTIONS)
            self._channels[address] = channel
        return armed(pb_grpc.MasterWorkerStub(channel), "node")

    async def drop(self, address: str) -> None:
        """Calls under way there end: see `answered`."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close(None)

    async def close(self) -> None:
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close(None) for channel in channels))


async def answered(call: Awaitable[T]) -> T:
    """What a node answers. Raises TransientError where its channel was dropped under the call.

    grpc.aio tells that with a CancelledError, which would end the waiting task as if it had been cancelled itself.
    """
    try:
        return await call
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise TransientError("the node has another address now", reason="NODE_UNANSWERED") from error


def node_address(info: pb.WorkerInfo, peer: str) -> str:
    """What to dial: the advertised address if the node gives one, else the peer's host with the node's listening port.

    `peer` is gRPC's text, such as `ipv4:10.0.0.7:41234` or `ipv6:%5B::1%5D:41234`. Raises RequestError.
    """
    port = NODE_PORT
    if info.listen_address:
        # Only its port counts: the host may be empty, a wildcard, or a name that means nothing here.
        listening = f"node:{info.listen_address.rpartition(':')[2]}"
        port = int(check_address("listen_address", listening, default_port=NODE_PORT).rpartition(":")[2])
    if info.worker_ip:
        return check_address("worker_ip", _bracketed(info.worker_ip), default_port=port)
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else "127.0.0.1"
    return check_address("peer", f"{host}:{port}", default_port=port)


def _bracketed(host: str) -> str:
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host
