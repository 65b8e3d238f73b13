"""Finds the engine's socket, and opens connections to it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from nodeservice.errors import ConfigError

DOCKER_SOCKET = "/var/run/docker.sock"
PODMAN_SOCKET = "/run/podman/podman.sock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the engine listens: a Unix socket, or a TCP port without TLS (`socket_path` None)."""

    url: str
    socket_path: str | None
    host: str = ""
    port: int = 0

    def connect(self, *, timeout_seconds: float) -> socket.socket:
        """A fresh connection, left without a timeout. Raises OSError."""
        if self.socket_path is None:
            connection = socket.create_connection((self.host, self.port), timeout=timeout_seconds)
        else:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(timeout_seconds)
                connection.connect(self.socket_path)
            except OSError:
                connection.close()
                raise
        connection.settimeout(None)
        return connection


def resolve_endpoint(base_url: str | None, *, environment: Mapping[str, str] = os.environ) -> Endpoint:
    """The given URL, else DOCKER_HOST, else the first socket that exists of Docker's and Podman's, else Docker's.

    Raises ConfigError for a URL that cannot be used. The engine must be on this host (bind mounts and cgroups are local), so
    neither ssh nor TLS is spoken.
    """
    url = base_url or environment.get("DOCKER_HOST") or f"unix://{_first_socket(environment)}"
    parts = urlsplit(url)
    if parts.scheme == "unix":
        path = f"{parts.netloc}{parts.path}"
        return Endpoint(url=f"unix://{path}", socket_path=path if path.startswith("/") else f"/{path}")
    if parts.scheme in {"tcp", "http"} and not environment.get("DOCKER_TLS_VERIFY"):
        try:
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise _unusable(url) from error
        if host and port:
            return Endpoint(url=f"tcp://{host}:{port}", socket_path=None, host=host, port=port)
    raise _unusable(url)


def _unusable(url: str) -> ConfigError:
    return ConfigError(
        f"cannot use the engine at {url!r}",
        field="engine",
        hint="give unix:///path/of/the.sock of an engine on this host, or tcp://HOST:PORT without TLS",
    )


def _first_socket(environment: Mapping[str, str]) -> str:
    candidates = [DOCKER_SOCKET, PODMAN_SOCKET]
    if runtime_dir := environment.get("XDG_RUNTIME_DIR"):
        candidates.append(f"{runtime_dir}/podman/podman.sock")
    for candidate in candidates:
        if Path(candidate).is_socket():
            return candidate
    return DOCKER_SOCKET
