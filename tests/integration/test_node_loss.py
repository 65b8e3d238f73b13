"""A node that is frozen past its time: its task runs elsewhere, and when it thaws, it changes nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import docker
import pytest

from nodeservice.wire import master_worker_pb2 as pb
from tests.integration.master_process import MasterProcess
from tests.integration.node_process import NodeProcess
from tests.integration.scripted_node import eventually
from tests.integration.test_master_service import Client

pytestmark = [pytest.mark.engine, pytest.mark.crash, pytest.mark.timeout(180)]


@pytest.fixture
async def master(tmp_path: Path) -> AsyncIterator[MasterProcess]:
    running = await MasterProcess(tmp_path, "--heartbeat-timeout", "1.5s", "--gone-after", "3s").start()
    yield running
    assert await running.end() == 0


@pytest.fixture
async def client(master: MasterProcess) -> AsyncIterator[Client]:
    connected = Client(master.address)
    yield connected
    await connected.channel.close(None)


@contextlib.asynccontextmanager
async def serving(path: Path, worker_id: str, master: MasterProcess, results: Path) -> AsyncIterator[NodeProcess]:
    node = NodeProcess(path, worker_id, ("--master", master.address, "--results-dir", str(results)))
    node.env = {"NODESERVICE_REPORT_BACKOFF_MAX_SECONDS": "1", "NODESERVICE_CONNECT_BACKOFF_MAX_SECONDS": "1"}
    await node.start()
    try:
        yield node
    finally:
        node.thaw()
        await node.stop()


async def test_a_node_frozen_past_its_time_neither_ends_the_task_nor_touches_its_results(
    master: MasterProcess,
    client: Client,
    tmp_path: Path,
    node_id: str,
    demo_image: str,
    docker_client: docker.APIClient,
) -> None:
    results = tmp_path / "results"
    async with serving(tmp_path / "a", node_id, master, results) as frozen:
        # The first attempt runs on for as long as it may, the second ends.
        task = pb.Task(
            task_id="t1", docker_image=demo_image, req_cpu=0.1, req_memory=0.05, req_storage=0.01,
            command="echo attempt $NODESERVICE_ATTEMPT > /results/who; [ $NODESERVICE_ATTEMPT = 2 ] || exec sleep 600",
        )  # fmt: skip
        ack = await client.stub.SubmitTask(task, timeout=10)
        assert ack.success, ack.message
        await client.until("t1", "RUNNING")
        await eventually(lambda: _is_up(docker_client, node_id))
        frozen.freeze()
        await eventually(lambda: _is_lost(client), seconds=60)
        async with serving(tmp_path / "b", f"{node_id}-b", master, results):
            ended = await client.until("t1", "SUCCEEDED")
            assert (ended.task.attempt, ended.worker_id) == (2, f"{node_id}-b")
            frozen.thaw()
            await eventually(lambda: _told_late(client), seconds=60)
    view = await client.get("t1")
    assert [(one.state, one.late_outcome) for one in view.attempts] == [("LOST", "CANCELLED"), ("SUCCEEDED", "")]
    assert (view.state, view.task.attempt, view.result) == ("SUCCEEDED", 2, ended.result)
    assert (results / "t1" / "2" / "who").read_text() == "attempt 2\n"
    assert (results / "t1" / "1" / "who").read_text() == "attempt 1\n"
    manifest = json.loads((results / "t1" / "2" / "manifest.json").read_text())
    assert manifest["attempt"] == 2


def _is_up(docker_client: docker.APIClient, node_id: str) -> bool:
    return bool(docker_client.containers(filters={"label": [f"nodeservice.node={node_id}"], "status": "running"}))


async def _is_lost(client: Client) -> bool:
    return [one.state for one in (await client.get("t1")).attempts] == ["LOST", "QUEUED"]


async def _told_late(client: Client) -> bool:
    return bool((await client.get("t1")).attempts[0].late_outcome)
