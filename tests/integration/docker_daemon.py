"""A Docker daemon of the test's own, in a network of its own, with programs of the test's choice first on its PATH."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest

from nodeservice.doctor.busybox import base_files, find_busybox, image_archive, layer_tar
from tests.conftest import ROOT

START_SECONDS = 60
IMAGE = "nodeservice/demo:latest"
GREEDY_IMAGE = "nodeservice/greedy:latest"
"""As every image of CUDA does, it asks for all GPUs."""


@dataclass(frozen=True, slots=True)
class DockerDaemon:
    url: str
    home: Path

    @contextlib.contextmanager
    def client(self) -> Iterator[docker.APIClient]:
        client = docker.APIClient(self.url, version="auto", timeout=60)
        try:
            yield client
        finally:
            client.close()


@contextlib.contextmanager
def docker_daemon(
    *,
    programs: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    engine: Path | None = None,
) -> Iterator[DockerDaemon]:
    """`programs` are shell scripts by name; `engine` a folder with another dockerd than the host's.

    In scripts and in `config`, `HOME` stands for the daemon's folder. Ends by pid whatever it started.
    """
    home = Path(tempfile.mkdtemp(prefix="dockerd-", dir="/tmp"))  # short: a socket's path has 107 bytes at most
    (home / "bin").mkdir()
    (home / "seen").mkdir()
    (home / "cdi").mkdir()
    for name, script in (programs or {}).items():
        (home / "bin" / name).write_text(script.replace("HOME", str(home)))
        (home / "bin" / name).chmod(0o755)
    (home / "daemon.json").write_text(json.dumps(config or {}).replace("HOME", str(home)))
    folders = [home / "bin", *([engine / "usr/sbin", engine / "usr/bin"] if engine else [])]
    url = f"unix://{home}/d.sock"
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--net", "--mount", "dockerd",
             "--config-file", home / "daemon.json", "--data-root", home / "data", "--exec-root", home / "exec",
             "--pidfile", home / "pid", "--host", url, "--bridge", "none", "--iptables=false", "--ip6tables=false"],
            env={**os.environ, "PATH": ":".join([*map(str, folders), os.environ["PATH"]])},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    daemon = DockerDaemon(url, home)
    try:
        _await_answer(process, daemon)
        load_images(daemon)
        yield daemon
    finally:
        with contextlib.suppress(docker.errors.DockerException, OSError), daemon.client() as client:
            for entry in client.containers(all=True):
                client.remove_container(entry["Id"], force=True, v=True)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(home)


def require_docker_daemon() -> None:
    """A skip that says what is missing."""
    missing = [name for name in ("dockerd", "containerd", "runc", "unshare") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"NO DOCKER DAEMON OF THE TEST'S OWN: {', '.join(missing)} is not on PATH (make engine)")
    if os.geteuid() != 0:
        pytest.skip("A DOCKER DAEMON OF THE TEST'S OWN needs root")
    if find_busybox() is None:
        pytest.skip("no static busybox here, so no image can be built (make engine)")


def newer_docker() -> Path:
    """A folder with a Docker that knows CDI; a skip that says why there is none."""
    suite = os.environ.get("NEWER_DOCKER_SUITE", "trixie")
    found = subprocess.run([ROOT / "tools/newer_docker.sh", suite], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"NO DOCKER WITH CDI: {found.stderr.strip()[-300:]}")
    return Path(found.stdout.strip())


def _await_answer(process: subprocess.Popen[bytes], daemon: DockerDaemon) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            with daemon.client():
                return
        except (docker.errors.DockerException, OSError) as error:
            if process.poll() is not None or time.monotonic() > give_up:
                said = (daemon.home / "log").read_text(errors="replace")[-3000:]
                raise AssertionError(f"dockerd does not serve:\n{said}") from error
            time.sleep(0.05)


def load_images(daemon: DockerDaemon) -> None:
    busybox = find_busybox()
    assert busybox is not None
    tar = layer_tar([*base_files(busybox)])
    with daemon.client() as client:
        for name, env in ((IMAGE, {}), (GREEDY_IMAGE, {"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_VERSION": "12"})):
            for _ in client.load_image(image_archive(name, [tar], labels={}, created_by="test", env=env)):
                pass
