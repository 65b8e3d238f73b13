"""Fixtures that find the real parts: the container engine and the demo image. And the false NVIDIA driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
from hypothesis import HealthCheck, settings

from nodeservice.runtime.endpoint import resolve_endpoint
from nodeservice.testing.false_driver import FalseDriver, Machine
from nodeservice.testing.false_driver.build import compiler

# No example has a time limit: how fast a machine is, is not what these tests are about.
settings.register_profile("fast", max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("whole", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("whole")

pytest.register_assert_rewrite("tests.integration.attack_bench")

# A shell starts what runs in the background with SIGINT ignored, and nohup with SIGHUP; programs that the tests start and
# then interrupt would inherit that. A signal that is caught here is as deadly to them as one in a terminal.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

ROOT = Path(__file__).resolve().parents[1]
DEMO_IMAGE = "nodeservice/demo:latest"


@pytest.fixture(scope="session")
def engine() -> str:
    """The URL of the engine that answers; a skip that says so where none does."""
    endpoint = resolve_endpoint(None)
    try:
        docker.APIClient(endpoint.url, version="auto", timeout=10).close()
    except (docker.errors.DockerException, OSError) as error:
        pytest.skip(f"NO CONTAINER ENGINE answers at {endpoint.url}, its tests do not run: {error}")
    return endpoint.url


@pytest.fixture(scope="session")
def docker_client(engine: str) -> Iterator[docker.APIClient]:
    """A plain client of the engine, to look at it from outside of what is tested."""
    # An engine in an emulated machine holds a container's lock for as long as its start takes.
    client = docker.APIClient(
        engine, version="auto", timeout=max(120, int(os.environ.get("TEST_PATIENCE_SECONDS", "0")))
    )
    yield client
    client.close()


@pytest.fixture(scope="session")
def demo_image(engine: str) -> str:
    """A busybox with all its applets, built on this host."""
    subprocess.run(
        [sys.executable, ROOT / "tools" / "build_image.py"],
        check=True,
        timeout=120,
        env={**os.environ, "DOCKER_HOST": engine},
    )
    return DEMO_IMAGE


@pytest.fixture
def node_id(docker_client: docker.APIClient) -> Iterator[str]:
    """A node of this test's own. Whatever containers bear its label at the end are removed."""
    with own_node_id(docker_client) as node:
        yield node


@contextlib.contextmanager
def own_node_id(docker_client: docker.APIClient) -> Iterator[str]:
    node = f"test-{uuid.uuid4().hex[:12]}"
    yield node
    give_up = time.monotonic() + 60
    while left := docker_client.containers(all=True, filters={"label": [f"nodeservice.node={node}"]}):
        for entry in left:
            with contextlib.suppress(docker.errors.APIError):  # it is just being removed
                docker_client.remove_container(entry["Id"], force=True, v=True)
        assert time.monotonic() < give_up, f"these stay: {left}"
        time.sleep(0.05)
    for cgroup in Path("/sys/fs/cgroup").glob(f"*/nodeservice/{node}.node"):
        with contextlib.suppress(FileNotFoundError):  # the engine is just removing the last of it
            remove_cgroup(cgroup)


@pytest.fixture(scope="session")
def false_driver_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each library of the false driver is compiled to, once."""
    if compiler() is None:
        pytest.skip("NO C COMPILER on this host: the false NVIDIA driver cannot be built; install gcc")
    return tmp_path_factory.mktemp("false-driver-cache")


@pytest.fixture
def false_driver(tmp_path: Path, false_driver_cache: Path) -> Callable[[str | Machine], FalseDriver]:
    """Builds the machine of that name, once in a test."""
    return lambda machine: FalseDriver.build(tmp_path / "driver", machine, cache=false_driver_cache)


def remove_cgroup(directory: Path) -> None:
    """Remove an empty cgroup and those below it."""
    for child in directory.iterdir():
        if child.is_dir():
            remove_cgroup(child)
    directory.rmdir()
