"""What a task computed with is free for the next one while its results are stored, and a master that asks is told soon."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nodeservice.master.daemon import Master
from nodeservice.master.settings import MasterSettings
from nodeservice.wire import master_worker_pb2 as pb
from tests.integration.fault_proxy import FaultProxy
from tests.integration.listening_master import AskingMaster, ListeningMaster, assign
from tests.integration.minio_server import MinioServer, minio
from tests.integration.node_process import NodeProcess
from tests.integration.scripted_node import eventually
from tests.integration.test_master_service import Client

__all__ = ["minio"]

pytestmark = [pytest.mark.engine, pytest.mark.minio, pytest.mark.timeout(300)]

NEVER_SECONDS = 3600.0
"""Between two heartbeats that come by themselves: longer than any of these tests."""
PATIENCE_SECONDS = 60.0


@pytest.fixture
def store(minio: MinioServer) -> Iterator[FaultProxy]:
    """Takes no results until it is `up`."""
    proxy = FaultProxy(minio.endpoint)
    yield proxy
    proxy.close()


def a_node(path: Path, node_id: str, master_port: int, minio: MinioServer, store: FaultProxy) -> NodeProcess:
    return NodeProcess(
        path,
        node_id,
        ("--master", f"127.0.0.1:{master_port}", "--minio", store.endpoint, "--bucket", f"b-{secrets.token_hex(4)}"),
        {
            "MINIO_ACCESS_KEY": minio.access_key, "MINIO_SECRET_KEY": minio.secret_key,
            "NODESERVICE_HEARTBEAT_SECONDS": f"{NEVER_SECONDS:g}", "NODESERVICE_UPLOAD_GIVE_UP_SECONDS": "120",
        },
    )  # fmt: skip


@pytest_asyncio.fixture
async def master(tmp_path: Path) -> AsyncIterator[Master]:
    running = Master(
        MasterSettings(
            listen="127.0.0.1:0",
            state_dir=tmp_path / "master",
            heartbeat_timeout_seconds=2 * NEVER_SECONDS,
            gone_after_seconds=3 * NEVER_SECONDS,
        )
    )
    await running.start()
    yield running
    await running.stop()


async def test_the_next_task_runs_on_the_cpus_of_one_whose_results_wait_for_the_store(
    tmp_path: Path, node_id: str, demo_image: str, master: Master, minio: MinioServer, store: FaultProxy
) -> None:
    node = a_node(tmp_path / "node", node_id, int(master.address.rpartition(":")[2]), minio, store)
    await node.start()
    client = Client(master.address)
    try:
        await eventually(lambda: _knows_a_node(client), seconds=PATIENCE_SECONDS)
        whole = (await client.nodes())[0].allocatable.cpu_milli
        store.down()
        task: dict[str, Any] = {
            "docker_image": "nodeservice/demo", "command": "echo x > /results/x", "cpu_milli": whole,
            "memory_bytes": 32 * 1024**2, "disk_bytes": 8 * 1024**2,
        }  # fmt: skip
        for name in ("first", "second"):
            assert (await client.stub.SubmitTask(pb.Task(task_id=name, **task), timeout=10)).success

        async def both_wait_for_the_store() -> bool:
            views = [await client.get(name) for name in ("first", "second")]
            return all(view.state == "RUNNING" and view.running.compute_released for view in views)

        await eventually(both_wait_for_the_store, seconds=PATIENCE_SECONDS)
        assert (await client.nodes())[0].assigned.cpu_milli == 0
        store.up()
        for name in ("first", "second"):

            async def succeeded(name: str = name) -> bool:
                return (await client.get(name)).state == "SUCCEEDED"

            await eventually(succeeded, seconds=PATIENCE_SECONDS)
    finally:
        await client.channel.close(None)
        await node.stop()


async def _knows_a_node(client: Client) -> bool:
    return bool(await client.nodes())


@pytest.mark.parametrize("asks", [True, False])
async def test_only_a_master_that_asks_hears_of_a_release_before_the_next_heartbeat(
    tmp_path: Path, node_id: str, demo_image: str, minio: MinioServer, store: FaultProxy, asks: bool
) -> None:
    async with AskingMaster() if asks else ListeningMaster() as master:
        node = await a_node(tmp_path / "node", node_id, master.port, minio, store).start()
        try:
            store.down()
            assert (await assign(node.address, "t", "true")).success
            if asks:
                await eventually(lambda: bool(master.beats), seconds=PATIENCE_SECONDS)
                _, beat = master.beats[0]
                assert [(task.task_id, task.compute_released) for task in beat.running_tasks] == [("t", True)]
                assert beat.free.cpu_milli == beat.allocatable.cpu_milli
            else:
                # Well after the moment at which it would have been told.
                await eventually(lambda: _not_stored_count(node) >= 2, seconds=PATIENCE_SECONDS)
            store.up()
            assert (await master.reported("t")).status == "success"
            assert len(master.beats) == asks
        finally:
            await node.stop()


def _not_stored_count(node: NodeProcess) -> int:
    return sum(event.get("event") == "results.not_stored" for event in node.events())
