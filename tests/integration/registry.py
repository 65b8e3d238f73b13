"""A real image registry on loopback for the pull tests, and one that only refuses."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import docker
import pytest

START_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class Registry:
    """`address` is HOST:PORT. Engines talk to loopback registries without TLS."""

    address: str

    def push(
        self,
        client: docker.APIClient,
        image: str,
        repository: str,
        *,
        tag: str = "1",
        auth_config: dict[str, str] | None = None,
    ) -> str:
        """Store a local image here, and forget the name by which it was pushed. Returns the digest."""
        target = f"{self.address}/{repository}"
        client.tag(image, target, tag)
        try:
            digest = ""
            for line in client.push(target, tag=tag, stream=True, decode=True, auth_config=auth_config):
                assert "error" not in line, line["error"]
                digest = line.get("aux", {}).get("Digest", digest)
        finally:
            client.remove_image(f"{target}:{tag}")
        assert digest.startswith("sha256:")
        return digest


@contextmanager
def running_registry(directory: Path, *, htpasswd: str = "") -> Iterator[Registry]:
    """Start it on a free port with its data below `directory`, open to all or to those in `htpasswd`.

    Skips with the reason where no registry is installed.
    """
    program = shutil.which("docker-registry") or shutil.which("registry")
    if program is None:
        pytest.skip("NO IMAGE REGISTRY is installed, pull tests do not run: apt-get install docker-registry")
    port = _free_port()
    address = f"127.0.0.1:{port}"
    config = directory / "registry.yml"
    text = (
        "version: 0.1\n"
        f"storage:\n  filesystem:\n    rootdirectory: {directory / 'registry'}\n"
        f"http:\n  addr: {address}\n"
    )
    if htpasswd:
        (directory / "htpasswd").write_text(htpasswd)
        text += f"auth:\n  htpasswd:\n    realm: test\n    path: {directory / 'htpasswd'}\n"
    config.write_text(text)
    log_path = directory / "registry.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=subprocess.STDOUT)
    try:
        _await_answer(f"http://{address}/v2/", process, log_path)
        yield Registry(address=address)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def refusing_registry(status: int, code: str) -> Iterator[str]:
    """A server that answers every request with one HTTP status and a registry's error body; yields its address."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"errors": [{"code": code, "message": "refused for a test"}]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Not on the tests' output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="refusing-registry")
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _await_answer(url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the registry does not answer: {log_path.read_text()[-2000:]}") from None
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
