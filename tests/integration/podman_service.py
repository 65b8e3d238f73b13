"""A Podman service of the test's own, in namespaces of its own: its network, mounts and locks go when it goes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest

START_SECONDS = 60
CGROUPS = Path("/sys/fs/cgroup")
SETTINGS = """
[containers]
default_ulimits = []
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
exit_command_delay = 1
init_path = "{init}"
"""
IN_NAMESPACES = """
set -e
ip link set lo up
mount -t tmpfs none /run
mkdir -p /run/cdi
mount --bind "$1/cdi" /run/cdi
for shared in /var/lib/cni /dev/shm; do [ ! -d "$shared" ] || mount -t tmpfs none "$shared"; done
exec podman --root "$1/root" --runroot "$1/run" --tmpdir "$1/tmp" system service --time=0 "unix://$1/podman.sock"
"""


@dataclass(frozen=True, slots=True)
class PodmanService:
    """`cdi` is its folder of CDI specifications, and the only one."""

    url: str
    cdi: Path


@contextlib.contextmanager
def podman_service(*, init: str) -> Iterator[PodmanService]:
    """Ends by pid whatever it started. `init` is the program that containers run as PID 1."""
    before = _own_cgroups()
    home = Path(tempfile.mkdtemp(prefix="podman-", dir="/tmp"))  # short: a socket's path has 107 bytes at most
    (home / "cdi").mkdir()
    settings = home / "containers.conf"
    settings.write_text(SETTINGS.format(init=init))
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--net", "sh", "-c", IN_NAMESPACES, "sh", str(home)],
            cwd=home,  # the containers' monitors write there
            env=os.environ | {"CONTAINERS_CONF": str(settings)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    url = f"unix://{home}/podman.sock"
    try:
        _await_answer(process, url, home / "log")
        yield PodmanService(url, home / "cdi")
    finally:
        with contextlib.suppress(docker.errors.DockerException, OSError):
            _remove_containers(url)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _remove_home(home)
        _remove_own_cgroups(before)


def require_podman() -> None:
    """A skip that says what is missing."""
    if shutil.which("podman") is None:
        pytest.skip(
            "NO PODMAN here, its tests do not run: install the package podman (make test-deps, as root on Debian)"
        )
    if os.geteuid() != 0:
        pytest.skip("PODMAN's tests need root, for namespaces of their own")
    tried = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"PODMAN's tests need namespaces of their own: {tried.stderr.strip()}")


def _await_answer(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            docker.APIClient(url, version="auto", timeout=10).close()
        except (docker.errors.DockerException, OSError) as error:
            if process.poll() is not None or time.monotonic() > give_up:
                raise AssertionError(f"podman does not serve:\n{log.read_text(errors='replace')}") from error
            time.sleep(0.05)
        else:
            return


def _remove_home(home: Path) -> None:
    """What monitors start when a container ends (`podman container cleanup`) may write there a moment longer."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            shutil.rmtree(home)
            return
        time.sleep(0.1)
    shutil.rmtree(home)


def _remove_containers(url: str) -> None:
    client = docker.APIClient(url, version="auto", timeout=60)
    try:
        for entry in client.containers(all=True):
            client.remove_container(entry["Id"], force=True, v=True)
    finally:
        client.close()


def _own_cgroups() -> set[Path]:
    """Where Podman puts its containers when nobody names a parent."""
    return {*CGROUPS.glob("libpod_parent"), *CGROUPS.glob("*/libpod_parent")}


def _remove_own_cgroups(before: set[Path]) -> None:
    """The monitors of containers and of programs run in them are in there, and end a second after these."""
    give_up = time.monotonic() + 10
    while found := _own_cgroups() - before:
        for cgroup in found:
            _remove_empty(cgroup)
        if time.monotonic() > give_up:
            return
        time.sleep(0.05)


def _remove_empty(cgroup: Path) -> None:
    with contextlib.suppress(OSError):
        for child in cgroup.iterdir():
            if child.is_dir():
                _remove_empty(child)
        cgroup.rmdir()
