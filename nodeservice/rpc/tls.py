"""Reads certificates and keys, and makes gRPC credentials of them.

Files are checked with the standard library first: gRPC itself accepts garbage here and only fails each handshake later.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from nodeservice.errors import ConfigError


def server_credentials(cert: Path, key: Path, ca: Path | None) -> grpc.ServerCredentials:
    """For listening. With `ca`, clients must show a certificate that it signed; without, any client may connect.

    `cert` is PEM, the leaf first, then its chain; `key` is PEM without a passphrase. Raises ConfigError.
    """
    cert_pem, key_pem = _read_pair(cert, key)
    ca_pem = None if ca is None else _read_ca(ca)
    return grpc.ssl_server_credentials(
        [(key_pem, cert_pem)], root_certificates=ca_pem, require_client_auth=ca_pem is not None
    )


def channel_credentials(ca: Path | None, cert: Path | None, key: Path | None) -> grpc.ChannelCredentials:
    """For dialling. `ca` is whom to trust (None: gRPC's own list of public roots); `cert` and `key` show who we are.

    The name that is dialled must stand in the peer's certificate. Raises ConfigError.
    """
    ca_pem = None if ca is None else _read_ca(ca)
    if cert is None and key is None:
        return grpc.ssl_channel_credentials(root_certificates=ca_pem)
    if cert is None or key is None:
        missing, given = ("tls_cert", "tls_key") if cert is None else ("tls_key", "tls_cert")
        raise ConfigError(
            f"{missing} is missing beside {given}", field=missing, hint="give both or neither: they are one pair"
        )
    cert_pem, key_pem = _read_pair(cert, key)
    return grpc.ssl_channel_credentials(root_certificates=ca_pem, private_key=key_pem, certificate_chain=cert_pem)


def _read_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    cert_pem, key_pem = _read(cert, "tls_cert"), _read(key, "tls_key")
    _load_ca(cert, "tls_cert")
    if b"PRIVATE KEY-----" not in key_pem:
        raise ConfigError(f"tls_key {key} holds no PEM private key", field="tls_key", hint="give the key's PEM file")
    try:
        # A passphrase would otherwise be asked for on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"tls_key {key} does not belong to tls_cert {cert}",
                field="tls_key",
                hint="give the key that this certificate was made for",
            ) from error
        raise ConfigError(
            f"tls_key {key} cannot be used with tls_cert {cert}: {error.reason or error}",
            field="tls_key",
            hint="the key must be PEM without a passphrase, the certificate PEM with the leaf first",
        ) from error
    return cert_pem, key_pem


def _read_ca(ca: Path) -> bytes:
    pem = _read(ca, "tls_ca")
    _load_ca(ca, "tls_ca")
    return pem


def _load_ca(path: Path, field: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{field} {path} holds no PEM certificate: {error.reason or error}",
            field=field,
            hint="give a file that starts with -----BEGIN CERTIFICATE-----",
        ) from error


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{field} {path} cannot be read: {error.strerror}", field=field, hint="check the path and its permissions"
        ) from error
