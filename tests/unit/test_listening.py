"""Why an address cannot be listened on, and what the worker then does."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator

import pytest

from nodeservice import listening
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


GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client of HTTP/2 begins: with the preface and settings (RFC 9113, 3.4)."""


@pytest.mark.parametrize("said", [b"", GREETING[:9], GREETING], ids=["nothing", "half", "all"])
async def test_who_connects_and_makes_no_call_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(listening, "_HANDSHAKE_MS", 50)
    monkeypatch.setattr(listening, "_IDLE_MS", 50)
    server, port = bind_server("127.0.0.1:0", None)
    await server.start()
    await _until_hung_up(await _connected(port, said))
    await server.stop(None)


async def test_connections_leave_this_process_files_for_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    server, port = bind_server("127.0.0.1:0", None)
    await server.start()
    first, second = await _connected(port, GREETING), await _connected(port, GREETING)
    for kept in (first, second):
        assert await kept[0].read(9), "its settings"
    await _until_hung_up(await _connected(port, GREETING))
    await server.stop(None)


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connected(port: int, said: bytes) -> _Streams:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    return reader, writer


async def _until_hung_up(streams: _Streams) -> None:
    reader, writer = streams
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
    writer.close()
