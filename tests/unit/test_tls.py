"""TLS with real certificates and real handshakes on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from nodeservice.errors import ConfigError
from nodeservice.rpc.tls import channel_credentials, server_credentials
from tests.certificates import make_ca, make_pair, openssl

METHOD = "/test.Echo/Echo"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    ca = make_ca(folder, "ca")
    other = make_ca(folder, "other-ca")
    for name in ("node", "master"):
        make_pair(folder, name, ca)
    make_pair(folder, "stranger", other)
    return folder


@contextmanager
def echo_server(credentials: grpc.ServerCredentials) -> Iterator[str]:
    from concurrent.futures import ThreadPoolExecutor

    handler = grpc.unary_unary_rpc_method_handler(lambda request, _context: request)
    with ThreadPoolExecutor(max_workers=1) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler}),))
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def call(address: str, credentials: grpc.ChannelCredentials) -> bytes:
    with grpc.secure_channel(address, credentials) as channel:
        echo: Callable[..., bytes] = channel.unary_unary(METHOD)
        return echo(b"hello", timeout=5)


def test_both_sides_with_certificates_of_one_authority_talk(pki: Path) -> None:
    with echo_server(server_credentials(pki / "node.pem", pki / "node.key", pki / "ca.pem")) as address:
        dialling = channel_credentials(pki / "ca.pem", pki / "master.pem", pki / "master.key")
        assert call(address, dialling) == b"hello"


@pytest.mark.parametrize("client", ["nobody", "stranger"])
def test_a_client_without_a_certificate_of_our_authority_is_refused(pki: Path, client: str) -> None:
    pair = (None, None) if client == "nobody" else (pki / "stranger.pem", pki / "stranger.key")
    with echo_server(server_credentials(pki / "node.pem", pki / "node.key", pki / "ca.pem")) as address:
        with pytest.raises(grpc.RpcError) as caught:
            call(address, channel_credentials(pki / "ca.pem", *pair))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        # The server itself is well: the refusal was for the certificate.
        assert call(address, channel_credentials(pki / "ca.pem", pki / "master.pem", pki / "master.key")) == b"hello"


@pytest.mark.parametrize("trusted", ["other-ca.pem", None])
def test_a_server_of_an_authority_that_is_not_trusted_is_refused(pki: Path, trusted: str | None) -> None:
    with echo_server(server_credentials(pki / "node.pem", pki / "node.key", None)) as address:
        with pytest.raises(grpc.RpcError) as caught:
            call(address, channel_credentials(pki / trusted if trusted else None, None, None))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_without_an_authority_the_server_takes_any_client(pki: Path) -> None:
    with echo_server(server_credentials(pki / "node.pem", pki / "node.key", None)) as address:
        assert call(address, channel_credentials(pki / "ca.pem", None, None)) == b"hello"


def test_a_missing_file_is_named_with_its_option(pki: Path) -> None:
    gone = pki / "gone.pem"
    for field, make in (
        ("tls_cert", lambda: server_credentials(gone, pki / "node.key", None)),
        ("tls_key", lambda: server_credentials(pki / "node.pem", gone, None)),
        ("tls_ca", lambda: server_credentials(pki / "node.pem", pki / "node.key", gone)),
        ("tls_ca", lambda: channel_credentials(gone, None, None)),
        ("tls_cert", lambda: server_credentials(pki, pki / "node.key", None)),
    ):
        with pytest.raises(ConfigError, match=rf"{field} .*cannot be read") as caught:
            make()
        assert caught.value.field == field


def test_a_key_of_another_certificate_is_refused(pki: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls_key .*master\.key does not belong to tls_cert .*node\.pem"):
        server_credentials(pki / "node.pem", pki / "master.key", None)
    with pytest.raises(ConfigError, match="does not belong"):
        channel_credentials(None, pki / "node.pem", pki / "master.key")


def test_half_a_pair_is_refused(pki: Path) -> None:
    with pytest.raises(ConfigError, match="tls_key is missing"):
        channel_credentials(None, pki / "node.pem", None)
    with pytest.raises(ConfigError, match="tls_cert is missing"):
        channel_credentials(None, None, pki / "node.key")


def test_files_that_hold_something_else_are_refused(pki: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(b"\x00\xff not PEM")
    with pytest.raises(ConfigError, match=r"tls_cert .*no PEM certificate"):
        server_credentials(garbage, pki / "node.key", None)
    with pytest.raises(ConfigError, match=r"tls_key .*no PEM private key"):
        server_credentials(pki / "node.pem", garbage, None)
    with pytest.raises(ConfigError, match=r"tls_ca .*no PEM certificate"):
        channel_credentials(garbage, None, None)
    with pytest.raises(ConfigError, match=r"tls_cert .*no PEM certificate"):
        server_credentials(pki / "node.key", pki / "node.pem", None)


def test_a_key_with_a_passphrase_is_refused_and_never_asked_for(pki: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    openssl("pkcs8", "-topk8", "-in", pki / "node.key", "-out", locked, "-passout", "pass:hunter2")
    with pytest.raises(ConfigError, match="without a passphrase"):
        server_credentials(pki / "node.pem", locked, None)
