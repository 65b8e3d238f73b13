"""Says why an address cannot be listened on, which gRPC tells to stderr alone."""

from __future__ import annotations

import socket

from nodeservice.errors import TransientError


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
