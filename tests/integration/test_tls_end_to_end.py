"""Master, node and client commands as processes, each with a certificate of its own: the whole way under mutual TLS."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from nodeservice.errors import NodeFaultError, TransientError
from nodeservice.results.http import HttpResultStore
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.certificates import make_ca, make_pair
from tests.integration.node_process import NodeProcess
from tests.integration.scripted_node import eventually
from tests.integration.test_master_cli import MasterProcess, run
from tests.integration.test_master_uploads import bundle

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a certificate for each part, and another authority with a stranger's."""
    folder = tmp_path_factory.mktemp("pki")
    ca, other = make_ca(folder, "ca"), make_ca(folder, "other-ca")
    for name in ("master", "node", "person"):
        make_pair(folder, name, ca)
    make_pair(folder, "stranger", other)
    make_pair(folder, "late", ca, days=-1)
    return folder


def shown(pki: Path, name: str, ca: str = "ca") -> tuple[str, ...]:
    """The options of who shows this certificate and trusts that authority."""
    return (
        "--tls-cert", str(pki / f"{name}.pem"), "--tls-key", str(pki / f"{name}.key"), "--tls-ca", str(pki / f"{ca}.pem"),
    )  # fmt: skip


@pytest_asyncio.fixture
async def master(tmp_path: Path, pki: Path) -> AsyncIterator[MasterProcess]:
    process = await MasterProcess(tmp_path, *shown(pki, "master"), insecure=False).start()
    yield process
    assert await process.end() == 0


@pytest.mark.engine
async def test_a_task_goes_from_a_person_to_the_node_and_back(
    tmp_path: Path, pki: Path, master: MasterProcess, node_id: str, demo_image: str
) -> None:
    options = ("--master", master.address, *shown(pki, "node"))
    node = await NodeProcess(tmp_path / "node", node_id, options, insecure=False).start()
    try:
        at = ("--master", master.address, *shown(pki, "person"))
        wanted = ("--task-id", "t1", "--cpus", "0.2", "--memory", "32m", "--disk", "10m", "--timeout", "30s")
        submitted = await run("submit", *at, *wanted, demo_image, "--", "echo", "hello over TLS")
        assert (submitted.code, submitted.out) == (0, "t1\n"), submitted.err
        waited = await run("wait", *at, "t1", "--timeout", "60s", "--json")
        assert [(task["outcome"], task["reason"]) for task in waited.json] == [("SUCCEEDED", "COMPLETED")], waited.err
        assert (await run("logs", *at, "t1")).out == "hello over TLS\n"
        nodes = (await run("nodes", *at, "--json")).json
        assert [(one["worker_id"], one["state"]) for one in nodes] == [(node_id, "ACTIVE")]
        # The node asks for certificates as well: a master is nobody without one.
        stranger = await run("nodes", "--master", node.address, *shown(pki, "stranger"))
        assert stranger.code == 69
    finally:
        assert await node.stop() == 0


async def test_who_is_not_known_is_refused_and_told_why(pki: Path, master: MasterProcess) -> None:
    ca = str(pki / "ca.pem")
    refused = {
        ("--tls-ca", ca): "it may want a client certificate (give --tls-cert and --tls-key)",
        shown(
            pki, "stranger"
        ): f"it may not trust the certificate {pki / 'stranger.pem'} (have its authority sign one)",
        ("--insecure",): "it may want TLS (give --tls-ca, --tls-cert and --tls-key, not --insecure)",
        shown(pki, "person", ca="other-ca"): f"is not signed by --tls-ca {pki / 'other-ca.pem'}",
        (
            "--tls-cert",
            str(pki / "person.pem"),
            "--tls-key",
            str(pki / "person.key"),
        ): "the public roots (give --tls-ca)",
    }
    for options, why in refused.items():
        done = await run("submit", "--master", master.address, *options, "--task-id", "t1", "img")
        assert (done.code, done.out) == (69, ""), options
        assert len(done.err.splitlines()) == 1, done.err
        assert why in done.err
    known = await run("ps", "--master", master.address, *shown(pki, "person"), "--json")
    assert (known.code, known.json) == (0, []), "nothing of a stranger was taken, and the master is well"


async def test_where_it_is_wanted_a_node_can_speak_for_nobody_but_itself(tmp_path: Path, pki: Path) -> None:
    options = ("--certified-worker-ids", "--http-listen", "127.0.0.1:0")
    master = await MasterProcess(tmp_path, *shown(pki, "master"), *options, insecure=False).start()
    keys = [(pki / name).read_bytes() for name in ("ca.pem", "node.key", "node.pem")]
    url, pair = f"https://{master.ready['http_address']}/upload", (pki / "node.pem", pki / "node.key")
    try:
        async with grpc.aio.secure_channel(master.address, grpc.ssl_channel_credentials(*keys)) as channel:
            stub: Any = pb_grpc.MasterWorkerStub(channel)
            for worker_id, is_taken in (("node", True), ("localhost", True), ("other", False), ("", False)):
                ack = await stub.RegisterWorker(pb.WorkerInfo(worker_id=worker_id, total_cpu=1), timeout=20)
                assert ack.success is is_taken, ack.message
            assert "the certificate is of '127.0.0.1', 'localhost', 'node', not of the node ''" in ack.message
            assert (await stub.SendHeartbeat(pb.Heartbeat(worker_id="node"), timeout=20)).success
            for worker_id, is_taken in (("node", True), ("other", False)):
                told = pb.TaskResult(task_id="t", worker_id=worker_id, attempt=1)
                assert (await stub.ReportTaskCompletion(told, timeout=20)).success is is_taken
            chunk = pb.FileChunk(task_id="t", file_path="a", is_last_chunk=True, is_last_file=True, worker_id="other")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.UploadTaskFiles(iter([chunk]), timeout=20)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            chunk.worker_id = "node"
            assert (await stub.UploadTaskFiles(iter([chunk]), timeout=20)).success
        sent = bundle(tmp_path, {"a": b"mine"}, task_id="by-post")
        store = HttpResultStore(url, ca_file=pki / "ca.pem", certificate=pair)
        with pytest.raises(NodeFaultError, match="answered 403"):
            await store.put(replace(sent, worker_id="other"))
        assert await store.put(replace(sent, worker_id="node"))
        await store.close()
    finally:
        assert await master.end() == 0
    assert "heartbeat.refused" not in master.log.read_text()


async def test_a_certificate_that_has_expired_is_named_on_each_side(
    tmp_path: Path, pki: Path, master: MasterProcess
) -> None:
    mine = await run("ps", "--master", master.address, *shown(pki, "late"))
    assert mine.code == 69
    assert f"hung up: the certificate {pki / 'late.pem'} has expired, on " in mine.err
    assert "certificate.doubtful" not in master.log.read_text(), "its own is well"
    (tmp_path / "late").mkdir()
    late = await MasterProcess(tmp_path / "late", *shown(pki, "late"), insecure=False).start()
    try:
        theirs = await run("ps", "--master", late.address, *shown(pki, "person"))
    finally:
        assert await late.end() == 0
    assert theirs.code == 69
    assert "shows a certificate that has expired" in theirs.err
    assert "not signed by" not in theirs.err
    told = [json.loads(line) for line in late.log.read_text().splitlines() if "certificate.doubtful" in line]
    assert [one["name"] for one in told] == ["CERTIFICATE_EXPIRED"]
    assert f"tls_cert {pki / 'late.pem'} has expired, on " in told[0]["words"]


@pytest.mark.engine
async def test_a_node_whose_certificate_has_expired_says_so_where_it_finds_no_master(
    tmp_path: Path, pki: Path, master: MasterProcess, node_id: str
) -> None:
    options = ("--master", master.address, *shown(pki, "late"))
    node = await NodeProcess(tmp_path / "node", node_id, options, insecure=False).start()
    try:
        await eventually(lambda: any(event.get("event") == "master.unreachable" for event in node.events()))
        (event, *_) = (event for event in node.events() if event.get("event") == "master.unreachable")
        assert f"tls_cert {pki / 'late.pem'} has expired, on " in str(event["hint"])
        seen = await run("inspect", "--state-dir", str(tmp_path / "node/state"))
        assert "CERTIFICATE_EXPIRED" in seen.out
    finally:
        assert await node.stop() == 0


async def test_results_by_http_are_taken_from_nobody_whom_the_authority_does_not_know(
    tmp_path: Path, pki: Path
) -> None:
    master = MasterProcess(tmp_path, *shown(pki, "master"), "--http-listen", "127.0.0.1:0", insecure=False)
    await master.start()
    url, sent = f"https://{master.ready['http_address']}/upload", bundle(tmp_path, {"a": b"mine"})
    known, nobody, stranger = (
        HttpResultStore(url, ca_file=pki / "ca.pem", certificate=pair)
        for pair in (
            (pki / "node.pem", pki / "node.key"),
            None,
            (pki / "stranger.pem", pki / "stranger.key"),
        )
    )
    try:
        for store in (nobody, stranger):
            with pytest.raises(TransientError):
                await store.put(sent)
            with pytest.raises(TransientError):
                await store.check()
        assert not (tmp_path / "state/results/t1").exists()
        await known.check()
        assert await known.put(sent) == (tmp_path / "state/results/t1/1").as_uri()
    finally:
        for store in (known, nobody, stranger):
            await store.close()
        assert await master.end() == 0


async def test_a_master_that_asks_nobody_for_a_certificate_says_so(tmp_path: Path, pki: Path) -> None:
    pair = shown(pki, "master")[:4]
    master = await MasterProcess(tmp_path, *pair, insecure=False).start()
    try:
        nobody = await run("nodes", "--master", master.address, "--tls-ca", str(pki / "ca.pem"))
    finally:
        assert await master.end() == 0
    assert nobody.code == 0
    assert "master.callers_unknown" in master.log.read_text()


async def test_a_master_of_plain_text_is_told_from_one_that_is_not_there(tmp_path: Path, pki: Path) -> None:
    master = await MasterProcess(tmp_path).start()
    try:
        done = await run("nodes", "--master", master.address, *shown(pki, "person"))
    finally:
        assert await master.end() == 0
    assert (done.code, "does not speak TLS" in done.err) == (69, True), done.err
    gone = await run("nodes", "--master", master.address, *shown(pki, "person"))
    assert (gone.code, "does not answer" in gone.err) == (69, True), gone.err


@pytest.mark.parametrize("part", ["serve", "master"])
async def test_a_part_without_certificates_starts_only_when_told_that_plain_text_is_meant(
    tmp_path: Path, part: str
) -> None:
    done = await run(part, "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state"))
    assert (done.code, done.out) == (78, "")
    words = done.err.replace("_", "-")
    assert all(word in words for word in ("tls-cert", "tls-key", "insecure")), done.err
    assert not (tmp_path / "state").exists()
