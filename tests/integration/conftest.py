"""The node that hostile tasks are tried on, and an engine that can fail."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import docker
import grpc
import pytest
import pytest_asyncio

from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.attack_bench import Bench
from tests.integration.engine_proxy import EngineProxy
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldMaster
from tests.integration.podman_service import CGROUPS


@pytest_asyncio.fixture
async def bench(
    tmp_path: Path,
    node_id: str,
    demo_image: str,
    docker_client: docker.APIClient,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Bench]:
    settings = request.node.get_closest_marker("settings")
    env = dict(settings.kwargs) if settings else {}
    master = await OldMaster().start()
    node = NodeProcess(path=tmp_path, worker_id=node_id, options=("--master", f"127.0.0.1:{master.port}"), env=env)
    try:
        await node.start()
        async with grpc.aio.insecure_channel(node.address) as channel:
            bench = Bench(node, master, pb_grpc.MasterWorkerStub(channel), docker_client)  # type: ignore[no-untyped-call]
            yield bench
        if request.node.get_closest_marker("unseen") is None:
            assert bench.compared, "no receipt was compared with the kernel's files"
    finally:
        await node.stop()
        await master.stop()


@pytest_asyncio.fixture
async def master() -> AsyncIterator[OldMaster]:
    """Where a test file has no other."""
    server = await OldMaster().start()
    yield server
    await server.stop()


@pytest_asyncio.fixture
async def proxy(engine: str, tmp_path: Path) -> AsyncIterator[EngineProxy]:
    if not engine.startswith("unix://"):
        pytest.skip(f"the engine at {engine} has no Unix socket to put a proxy before")
    made = EngineProxy(tmp_path / "e.sock", engine)
    await made.up()
    yield made
    await made.down()


@pytest.fixture(scope="module")
def podman_alone() -> Iterator[None]:
    """One file's Podman at a time on this host: all put containers into the same cgroup, which the last one removes."""
    held = os.open(CGROUPS, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    yield
    os.close(held)
