"""Why an address cannot be listened on, and what the worker then does."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from nodeservice.cli.exit_codes import ExitCode, code_of_error
from nodeservice.errors import TransientError
from nodeservice.rpc.server import bind_server


@pytest.fixture
def taken() -> Iterator[int]:
    """The local port of an outgoing connection, such as any program gets."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        yield client.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:{}", "Address already in use"),
        ("0.0.0.0:{}", "Address already in use"),
        ("192.0.2.1:{}", "Cannot assign requested address"),
    ],
)
async def test_an_address_that_cannot_be_had_now_is_told_with_the_reason_and_tried_again_by_systemd(
    taken: int, address: str, why: str
) -> None:
    address = address.format(taken)
    with pytest.raises(TransientError) as caught:
        bind_server(address, None)
    assert str(caught.value).startswith(f"listen {address} cannot be bound: {why} (")
    assert (caught.value.field, code_of_error(caught.value)) == ("listen", ExitCode.UNAVAILABLE)
