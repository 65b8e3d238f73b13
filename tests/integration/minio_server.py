"""A real MinIO server for tests: own port, own data, random credentials, ended by its pid.

Looked for in this order: `MINIO_BIN`, `minio` on PATH, `$XDG_CACHE_HOME/nodeservice/bin/minio` (default `~/.cache`).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from minio import MinioAdmin
from minio.credentials.providers import StaticProvider

from nodeservice.results.access import S3Access

START_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class MinioServer:
    endpoint: str
    access_key: str
    secret_key: str
    pid: int

    def access(self, bucket: str, **changes: object) -> S3Access:
        """What a store needs to reach a bucket here; any field of S3Access can be changed."""
        values: dict[str, object] = {
            "endpoint": self.endpoint,
            "bucket": bucket,
            "access_key": self.access_key,
            "secret_key": self.secret_key,
            "secure": False,
        }
        return S3Access(**(values | changes))  # type: ignore[arg-type]

    def admin(self) -> MinioAdmin:
        credentials = StaticProvider(self.access_key, self.secret_key)
        return MinioAdmin(endpoint=self.endpoint, credentials=credentials, secure=False)


def find_minio() -> Path | None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for candidate in (os.environ.get("MINIO_BIN"), shutil.which("minio"), cache / "nodeservice" / "bin" / "minio"):
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    return None


def require_minio() -> Path:
    """A skip that says what is missing."""
    binary = find_minio()
    if binary is None:
        pytest.skip(
            "NO MINIO SERVER: set MINIO_BIN, or put `minio` on PATH or into ~/.cache/nodeservice/bin; S3 IS UNTESTED"
        )
    return binary


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    with running_minio(require_minio(), tmp_path_factory.mktemp("minio")) as server:
        yield server


@contextmanager
def running_minio(
    binary: Path, directory: Path, *, certificate: tuple[Path, Path] | None = None
) -> Iterator[MinioServer]:
    """Start, wait until it answers, and end it with everything it wrote. `certificate` and its key mean TLS."""
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    environment = {
        "PATH": os.defpath,
        "HOME": str(directory),
        "MINIO_ROOT_USER": access_key,
        "MINIO_ROOT_PASSWORD": secret_key,
        "MINIO_BROWSER": "off",
        "MINIO_UPDATE": "off",
    }
    port = free_port()
    endpoint = f"127.0.0.1:{port}"
    log_path = directory / "minio.log"
    (directory / "data").mkdir()
    (directory / "certs").mkdir()
    if certificate is not None:
        shutil.copy(certificate[0], directory / "certs" / "public.crt")
        shutil.copy(certificate[1], directory / "certs" / "private.key")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                "server",
                "--quiet",
                "--address",
                endpoint,
                "--certs-dir",
                directory / "certs",
                directory / "data",
            ],
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        _wait_ready(process, ("https" if certificate else "http") + f"://{endpoint}", log_path)
        yield MinioServer(endpoint=endpoint, access_key=access_key, secret_key=secret_key, pid=process.pid)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(directory / "data", ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/minio/health/ready", timeout=1, context=context):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"MinIO does not answer: {log_path.read_text(errors='replace')[-2000:]}")
