"""What holds for every gRPC server of ours: its bounds, and why it cannot listen, which gRPC tells to stderr alone."""

from __future__ import annotations

import resource
import socket

from nodeservice.errors import TransientError

_HANDSHAKE_MS = 20_000
_IDLE_MS = 600_000
_STREAMS = 1_000
_CONNECTIONS = 32_768


def server_options() -> tuple[tuple[str, int], ...]:
    """Bounds of connections, by gRPC's own means (grpc/impl/channel_arg_names.h).

    Who does not finish the handshake in 20 s, or makes no call for ten minutes, is hung up on, and may come again. So is who
    is gone in the middle of a call, such as cut off from the network, after five to six minutes. Connections take at most
    half of the files that this process may open: it needs the others for its own work.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = _CONNECTIONS if files == resource.RLIM_INFINITY else min(_CONNECTIONS, files // 2)
    return (
        # Else two processes could listen on one port, and each would get some of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.keepalive_time_ms", 300_000),
        ("grpc.keepalive_timeout_ms", 60_000),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", _STREAMS),
    )


def not_bound(field: str, address: str) -> TransientError:
    """NOT_LISTENING. The configuration may well be right: ports become free, and at a boot addresses and names come late.

    50052 is one of those that Linux gives to outgoing connections (ip_local_port_range), so that any program can have it.
    """
    return TransientError(
        f"{field} {address} cannot be bound: {_why(address)}",
        reason="NOT_LISTENING",
        field=field,
        hint="end who listens there, or give an address of this host and a free port",
    )


def _why(address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                probe.listen()
    except OSError as error:
        return error.strerror or str(error)
    return "somebody had it just now"
