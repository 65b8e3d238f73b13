"""A real node with a real MinIO: when the master hears of completion, everything can already be read."""

from __future__ import annotations

import hashlib
import json
import secrets
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from minio import Minio
from minio.error import S3Error

from tests.integration.fault_proxy import FaultProxy
from tests.integration.minio_server import MinioServer, minio
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldClient, OldMaster

__all__ = ["minio"]

pytestmark = [pytest.mark.engine, pytest.mark.minio, pytest.mark.timeout(300)]
COMMAND = "echo hello; echo data > /results/a.txt; mkdir /results/d; head -c 200000 /dev/urandom > /results/d/b.bin"


class ReadingMaster(OldMaster):
    """Reads the whole result at the very moment of the report."""

    def __init__(self, client: Minio, bucket: str) -> None:
        super().__init__()
        self._client = client
        self._bucket = bucket
        self.read: dict[str, dict[str, bytes]] = {}

    async def _report(self, request: Any, context: Any) -> Any:
        if request.result_location.startswith("s3://"):
            prefix = request.result_location.removeprefix(f"s3://{self._bucket}/")
            names = [entry["path"] for entry in json.loads(self._get(f"{prefix}/manifest.json"))["files"]]
            self.read[request.task_id] = {name: self._get(f"{prefix}/{name}") for name in [*names, "manifest.json"]}
        return await super()._report(request, context)

    def _get(self, key: str) -> bytes:
        response = self._client.get_object(self._bucket, key)
        try:
            return response.read()
        finally:
            response.close()
            response.release_conn()


@pytest.fixture
def proxy(minio: MinioServer) -> Iterator[FaultProxy]:
    running = FaultProxy(minio.endpoint)
    yield running
    running.close()


@pytest.fixture
def bucket() -> str:
    return f"results-{secrets.token_hex(4)}"


@pytest.fixture
def give_up_seconds() -> str:
    return "120"


@pytest.fixture
def client(minio: MinioServer) -> Minio:
    return Minio(minio.endpoint, minio.access_key, minio.secret_key, secure=False)


@pytest_asyncio.fixture
async def master(client: Minio, bucket: str) -> AsyncIterator[ReadingMaster]:
    server = ReadingMaster(client, bucket)
    await server.start()
    yield server
    await server.stop()


@pytest_asyncio.fixture
async def node(
    tmp_path: Path,
    node_id: str,
    demo_image: str,
    master: ReadingMaster,
    minio: MinioServer,
    proxy: FaultProxy,
    bucket: str,
    give_up_seconds: str,
) -> AsyncIterator[NodeProcess]:
    process = NodeProcess(
        tmp_path / "node",
        node_id,
        ("--master", f"127.0.0.1:{master.port}", "--minio", proxy.endpoint, "--bucket", bucket),
        {
            "MINIO_ACCESS_KEY": minio.access_key, "MINIO_SECRET_KEY": minio.secret_key,
            "NODESERVICE_UPLOAD_GIVE_UP_SECONDS": give_up_seconds,
        },
    )  # fmt: skip
    await process.start()
    yield process
    await process.stop()


def verify(master: ReadingMaster, task_id: str) -> None:
    """Every object of the manifest was readable, whole, when the report came."""
    files = master.read[task_id]
    entries = json.loads(files["manifest.json"])["files"]
    assert {entry["path"] for entry in entries} == {"a.txt", "d/b.bin", "stdout.log"}
    for entry in entries:
        assert hashlib.sha256(files[entry["path"]]).hexdigest() == entry["sha256"]
    assert files["stdout.log"] == b"hello\n"


@pytest.mark.parametrize("fault", ["none", "slow", "failing at first", "reset in mid-body", "down at first"])
async def test_all_can_be_read_when_completion_is_reported(
    node: NodeProcess, master: ReadingMaster, proxy: FaultProxy, fault: str
) -> None:
    match fault:
        case "slow":
            proxy.be_slow(100_000)
        case "failing at first":
            proxy.reject_first(5)
        case "reset in mid-body":
            proxy.reset_at(20_000, times=2)
        case "down at first":
            proxy.down()
    task_id = f"task-{uuid.uuid4().hex[:8]}"
    async with OldClient(node.address) as caller:
        assert (await caller.assign(task_id=task_id, command=COMMAND)).success
        if fault == "down at first":
            await master.until(lambda: any(e.get("event") == "results.not_stored" for e in node.events()))
            proxy.up()
        report = await master.report_of(task_id)
    assert report.status == "success"
    verify(master, task_id)
    assert master.count(task_id) == 1


@pytest.mark.parametrize("give_up_seconds", ["1"])
async def test_results_stay_here_when_the_store_stays_down_and_go_there_when_it_is_back(
    node: NodeProcess, master: ReadingMaster, proxy: FaultProxy, client: Minio, bucket: str
) -> None:
    proxy.down()
    task_id = f"task-{uuid.uuid4().hex[:8]}"
    async with OldClient(node.address) as caller:
        assert (await caller.assign(task_id=task_id, command=COMMAND)).success
        report = await master.report_of(task_id, 120)
        assert report.status == "failed", "a success whose results are not in the store is none"
        assert report.result_location.startswith("file://")
        kept = Path(report.result_location.removeprefix("file://"))
        entries = json.loads((kept / "manifest.json").read_text())["files"]
        assert all(
            hashlib.sha256((kept / entry["path"]).read_bytes()).hexdigest() == entry["sha256"] for entry in entries
        )
        await node.kill()
        await node.start()
        proxy.up()

        def arrived() -> bool:
            try:
                client.stat_object(bucket, f"{task_id}/1/manifest.json")
            except S3Error:
                return False
            return (kept / "MOVED").exists() and not (kept / "a.txt").exists()

        await master.until(arrived, 120)
    assert (kept / "MOVED").read_text() == f"s3://{bucket}/{task_id}/1\n"
    # The node may have been killed before it knew that its report was heard.
    assert {one.status for one in master.reports} == {"failed"}


async def test_a_node_with_a_wrong_secret_key_says_so_and_runs_nothing_for_nothing(
    tmp_path: Path, node_id: str, master: ReadingMaster, minio: MinioServer, bucket: str
) -> None:
    options = ("--master", f"127.0.0.1:{master.port}", "--minio", minio.endpoint, "--bucket", bucket)
    keys = {"MINIO_ACCESS_KEY": minio.access_key, "MINIO_SECRET_KEY": "not-the-right-one"}
    node = NodeProcess(tmp_path / "node", node_id, options, keys)
    await node.start()
    try:
        await master.until(lambda: any(event.get("event") == "store.takes_no_results" for event in node.events()))
        async with OldClient(node.address) as caller:
            refused = await caller.assign(task_id=f"task-{uuid.uuid4().hex[:8]}", command=COMMAND)
        assert not refused.success
        assert "check the secret key" in refused.message
        assert "not-the-right-one" not in node.log.read_text()
    finally:
        await node.stop()


@pytest.mark.crash
async def test_a_node_killed_in_the_middle_of_an_upload_stores_all_and_reports_once(
    node: NodeProcess, master: ReadingMaster, proxy: FaultProxy
) -> None:
    proxy.be_slow(40_000)
    task_id = f"task-{uuid.uuid4().hex[:8]}"
    async with OldClient(node.address) as caller:
        assert (await caller.assign(task_id=task_id, command=COMMAND)).success
        for _ in range(3):
            await master.until(
                lambda: any(
                    task.status == "uploading" for beat in master.heartbeats[-1:] for task in beat.running_tasks
                )
            )
            await node.kill()
            master.heartbeats.clear()
            await node.start()
        proxy.heal()
        report = await master.report_of(task_id)
    assert report.status == "success"
    verify(master, task_id)
    assert master.count(task_id) == 1


async def test_while_the_store_is_down_the_node_takes_work_as_far_as_its_disk_goes_and_stores_all_later(
    node: NodeProcess, master: ReadingMaster, proxy: FaultProxy
) -> None:
    proxy.down()
    await master.until(lambda: bool(master.registrations))
    # CPU and memory are given back when a task has ended; its disk only when its results are stored.
    part = {"req_storage": 0.3 * master.registrations[-1].total_storage}
    ids = [f"task-{uuid.uuid4().hex[:8]}" for _ in range(3)]
    async with OldClient(node.address) as caller:
        for task_id in ids:
            assert (await caller.assign(task_id=task_id, command=COMMAND, **part)).success
        await master.until(
            lambda: [task.status for beat in master.heartbeats[-1:] for task in beat.running_tasks] == ["uploading"] * 3
        )
        refused = await caller.assign(task_id=f"task-{uuid.uuid4().hex[:8]}", command=COMMAND, **part)
        assert not refused.success
        assert "storage" in refused.message
        small = f"task-{uuid.uuid4().hex[:8]}"
        assert (await caller.assign(task_id=small, command=COMMAND)).success
        await node.kill()
        await node.start()
        proxy.up()
        for task_id in (*ids, small):
            assert (await master.report_of(task_id, 120)).status == "success"
            verify(master, task_id)
            assert master.count(task_id) == 1
        later = f"task-{uuid.uuid4().hex[:8]}"
        await master.until(lambda: not any(beat.running_tasks for beat in master.heartbeats[-1:]))
        assert (await caller.assign(task_id=later, command=COMMAND, **part)).success
        assert (await master.report_of(later)).status == "success"
