"""Results that nodes push to the master, by gRPC and by HTTP: complete, verified and in place, or nothing at all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest

from nodeservice.core.model import AttemptId, Manifest, ManifestEntry, Resources, TaskSpec
from nodeservice.errors import NodeFaultError
from nodeservice.master import incoming as incoming_module
from nodeservice.master.daemon import Master
from nodeservice.master.incoming import Incoming
from nodeservice.master.settings import MasterSettings
from nodeservice.master.uploads import AT_ONCE
from nodeservice.ports import ResultBundle, ResultFile
from nodeservice.results.http import HttpResultStore
from nodeservice.results.manifest import encode
from nodeservice.rpc.result_push import MasterPushResultStore
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.scripted_node import ScriptedNode
from tests.synced import Renames

FILES = {"stdout.log": b"hi\n", "empty": b"", 'deep/er/\u00e4 %"\\.bin': bytes(range(256)) * 20_000}


@pytest.fixture
def settings(tmp_path: Path) -> MasterSettings:
    return MasterSettings(listen="127.0.0.1:0", http_listen="127.0.0.1:0", state_dir=tmp_path / "master")


@pytest.fixture
async def master(settings: MasterSettings) -> AsyncIterator[Master]:
    running = Master(settings)
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def stub(master: Master) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(master.address) as channel:
        yield pb_grpc.MasterWorkerStub(channel)


@pytest.fixture
def results(master: Master) -> Path:
    return master._results_dir


def manifest_of(files: dict[str, bytes], task_id: str = "t1", attempt: int = 1) -> bytes:
    entries = [ManifestEntry(path=p, size_bytes=len(d), sha256=hashlib.sha256(d).hexdigest()) for p, d in files.items()]
    return encode(Manifest(task_id=task_id, attempt=attempt, files=tuple(entries)))


def bundle(tmp_path: Path, files: dict[str, bytes], task_id: str = "t1") -> ResultBundle:
    sources = []
    for number, (path, data) in enumerate(sorted(files.items())):
        source = tmp_path / f"source-{number}"
        source.write_bytes(data)
        entry = ManifestEntry(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        sources.append(ResultFile(entry=entry, source=source))
    manifest = Manifest(task_id=task_id, attempt=1, files=tuple(file.entry for file in sources))
    spec = TaskSpec(id=AttemptId(task_id), image="busybox", request=Resources(), pids_limit=1, fingerprint="f")
    return ResultBundle(
        spec=spec, worker_id="w1", files=tuple(sources), manifest=manifest, manifest_bytes=encode(manifest)
    )


def stored(results: Path, task_id: str = "t1", attempt: int = 1) -> dict[str, bytes]:
    root = results / task_id / str(attempt)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def nothing_left(results: Path) -> bool:
    """Neither results nor any rest of an upload."""
    return [path for path in results.rglob("*") if path.name != ".incoming"] == []


# ---- the node's own senders -------------------------------------------------------------------------------------------


async def test_what_a_node_pushes_by_grpc_is_stored_byte_for_byte(stub: Any, results: Path, tmp_path: Path) -> None:
    store = MasterPushResultStore(lambda: stub)
    sent = bundle(tmp_path, FILES)
    for _ in range(2):
        assert await store.put(sent) == "master://t1/1"
    assert stored(results) == FILES | {"manifest.json": sent.manifest_bytes}
    await store.close()


async def test_what_a_node_posts_by_http_is_stored_byte_for_byte(master: Master, results: Path, tmp_path: Path) -> None:
    store = HttpResultStore(f"http://{master.http_address}/upload")
    sent = bundle(tmp_path, FILES)
    for _ in range(2):
        assert await store.put(sent) == (results / "t1" / "1").as_uri()
    assert stored(results) == FILES | {"manifest.json": sent.manifest_bytes}
    await store.close()


async def test_other_results_of_a_stored_attempt_are_refused_by_both_ways(
    master: Master, stub: Any, results: Path, tmp_path: Path
) -> None:
    by_http = HttpResultStore(f"http://{master.http_address}/upload")
    by_grpc = MasterPushResultStore(lambda: stub)
    await by_grpc.put(bundle(tmp_path, {"a": b"first"}))
    before = stored(results)
    with pytest.raises(NodeFaultError) as http:
        await by_http.put(bundle(tmp_path, {"a": b"other"}))
    assert http.value.reason == "RESULT_CONFLICT"
    with pytest.raises(NodeFaultError) as refused:
        await by_grpc.put(bundle(tmp_path, {"a": b"other"}))
    assert refused.value.reason == "STORE_REFUSED"
    assert stored(results) == before
    await by_http.close()
    await by_grpc.close()


async def test_an_attempt_that_another_node_holds_takes_no_results(
    master: Master, stub: Any, results: Path, tmp_path: Path
) -> None:
    async with ScriptedNode(master.address, "w2") as node:
        await node.register()
        task = pb.Task(task_id="t1", docker_image="busybox", req_cpu=1, req_memory=1)
        assert (await stub.SubmitTask(task, timeout=10)).success
        await node.got("t1")
        by_http = HttpResultStore(f"http://{master.http_address}/upload")
        with pytest.raises(NodeFaultError):
            await by_http.put(bundle(tmp_path, {"a": b"zombie"}))
        with pytest.raises(NodeFaultError):
            await MasterPushResultStore(lambda: stub).put(bundle(tmp_path, {"a": b"zombie"}))
        await by_http.close()
    assert nothing_left(results)


# ---- chunks -----------------------------------------------------------------------------------------------------------


def chunk(path: str, data: bytes = b"", *, last: bool = True, end: bool = False, **fields: Any) -> pb.FileChunk:
    return pb.FileChunk(
        **{"task_id": "t1", "file_path": path, "data": data, "is_last_chunk": last, "is_last_file": end, **fields}
    )


async def push(stub: Any, chunks: Iterable[pb.FileChunk]) -> pb.FileUploadAck:
    return await stub.UploadTaskFiles(iter(list(chunks)), timeout=20)


async def test_a_sender_of_the_old_protocol_needs_no_manifest_and_no_attempt(stub: Any, results: Path) -> None:
    ack = await push(stub, [chunk("a", b"1", last=False), chunk("a", b"2"), chunk("b/c"), chunk("d", b"x", end=True)])
    assert (ack.success, ack.files_received) == (True, 3)
    assert stored(results) == {"a": b"12", "b/c": b"", "d": b"x"}


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [chunk("../../escape", b"x", end=True)],
        [chunk("/etc/escape", b"x", end=True)],
        [chunk("a\0b", b"x", end=True)],
        [chunk("", b"x", end=True)],
        [chunk("a", b"x", end=True, task_id="../t1")],
        [chunk("a", b"x", end=True, attempt=-1)],
        [chunk("a", b"x", end=True, worker_id="../w")],
        [chunk("a", b"x"), chunk("a", b"y", end=True)],
        [chunk("a", b"x"), chunk("a/b", b"y", end=True)],
        [chunk("a/b", b"x"), chunk("a", b"y", end=True)],
        [chunk("a", b"x", last=False), chunk("b", b"y", end=True)],
        [chunk("a", b"x"), chunk("b", b"y", end=True, task_id="t2")],
        [chunk("a", b"x", end=True), chunk("b", b"y", end=True)],
        [chunk("a", b"x")],
        [chunk("a", b"x", last=False, end=True)],
        [chunk("a", b"x"), chunk("manifest.json", b"{", end=True)],
        [chunk("a", b"x"), chunk("manifest.json", manifest_of({"a": b"y"}), end=True)],
        [chunk("a", b"x"), chunk("manifest.json", manifest_of({}), end=True)],
        [chunk("manifest.json", manifest_of({"a": b"x"}), end=True)],
        [chunk("a", b"x"), chunk("manifest.json", manifest_of({"a": b"x"}, attempt=2), end=True)],
    ],
)
async def test_a_hostile_or_broken_stream_is_refused_and_leaves_nothing(
    stub: Any, results: Path, chunks: list[pb.FileChunk]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await push(stub, chunks)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert nothing_left(results)
    assert not list(results.parent.parent.rglob("escape"))


async def test_a_sender_that_breaks_off_leaves_nothing(stub: Any, results: Path) -> None:
    call = stub.UploadTaskFiles(timeout=20)
    await call.write(chunk("a", b"x" * 100_000, last=False))
    async with asyncio.timeout(20):
        while nothing_left(results):
            await asyncio.sleep(0.01)
        call.cancel()
        while not nothing_left(results):
            await asyncio.sleep(0.01)


def test_an_upload_is_nowhere_before_its_first_file_since_its_sender_may_be_gone_by_then(tmp_path: Path) -> None:
    Incoming(tmp_path, "t1", 1, limit_bytes=1000)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_master_had_put_in_place_is_on_the_disk_before_its_sender_hears_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def upload() -> None:
        incoming = Incoming(tmp_path, "t1", 1, limit_bytes=1000)
        incoming.begin_file("a")
        incoming.write(b"x")
        incoming.end_file()
        incoming.commit()

    upload()  # and nobody knows whether the directories came to the disk
    monkeypatch.setattr(incoming_module, "sync_directory", synced.append)
    upload()
    assert synced[-2:] == [tmp_path / "t1", tmp_path]


def test_all_of_an_upload_is_on_the_disk_before_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renames = Renames(monkeypatch)
    incoming = Incoming(tmp_path, "t1", 1, limit_bytes=2)
    for path in ("a", "b/c/d"):
        incoming.begin_file(path)
        incoming.write(b"x")
        incoming.end_file()
    incoming.commit()
    assert len(renames.sources) == 1
    assert renames.unsynced == []


async def test_the_rest_of_an_upload_is_swept_at_the_next_start(settings: MasterSettings) -> None:
    rest = settings.state_dir / "results" / ".incoming" / "x"
    rest.mkdir(parents=True)
    (rest / "part").write_bytes(b"x")
    master = Master(settings)
    await master.start()
    await master.stop()
    assert not rest.exists()


# ---- forms ------------------------------------------------------------------------------------------------------------


def form(
    files: dict[str, bytes], manifest: bytes | None = None, drop: str = "", **texts: str
) -> aiohttp.MultipartWriter:
    writer = aiohttp.MultipartWriter("form-data")

    def add(name: str, data: bytes, **parameters: str) -> None:
        if name != drop:
            part = writer.append(data, {"Content-Type": "application/octet-stream"})  # type: ignore[arg-type]
            part.set_content_disposition("form-data", name=name, **parameters)

    defaults = {"task_id": "t1", "attempt": "1", "worker_id": "w1", "user_id": "", "task_name": "", "submitted_at": "0"}
    for name, value in (defaults | texts).items():
        add(name, value.encode())
    add("manifest", manifest_of(files) if manifest is None else manifest)
    for path, data in files.items():
        add("file", data, filename=path)
    return writer


async def post(master: Master, data: Any, **options: Any) -> tuple[int, dict[str, Any]]:
    url = f"http://{master.http_address}/upload"
    async with aiohttp.ClientSession() as session, session.post(url, data=data, **options) as response:
        return response.status, json.loads(await response.text())


async def test_a_well_formed_form_is_stored(master: Master, results: Path) -> None:
    status, answer = await post(master, form({"a": b"x"}))
    assert (status, answer["success"]) == (200, True)
    assert stored(results)["a"] == b"x"
    assert results.stat().st_mode & 0o007 == 0, "other users of this host don't read what tasks wrote"


@pytest.mark.parametrize(
    "data",
    [
        {"files": {"a": b"x"}, "task_id": "../t1"},
        {"files": {"a": b"x"}, "worker_id": "../w"},
        {"files": {"a": b"x"}, "attempt": "1e3"},
        {"files": {"a": b"x"}, "attempt": "-1"},
        {"files": {"a": b"x"}, "attempt": "9" * 5000},
        {"files": {"a": b"x"}, "user_id": "x" * 5000},
        {"files": {"a": b"x"}, "drop": "worker_id"},
        {"files": {"a": b"x"}, "drop": "manifest"},
        {"files": {"a": b"x"}, "drop": "file"},
        {"files": {"a": b"x"}, "manifest": b"[]"},
        {"files": {"a": b"x"}, "manifest": manifest_of({"a": b"y"})},
        {"files": {"a": b"xx"}, "manifest": manifest_of({"a": b"x"})},
        {"files": {"a": b"x"}, "manifest": manifest_of({})},
        {"files": {"../escape": b"x"}},
        {"files": {"/tmp/escape": b"x"}},
        {"files": {"a": b"x", "a/b": b"y"}},
        {"files": {"a": b"x"}, "manifest": manifest_of({"a": b"x"}, task_id="t2")},
    ],
)
async def test_a_hostile_or_broken_form_is_refused_with_400_and_leaves_nothing(
    master: Master, results: Path, data: dict[str, Any]
) -> None:
    status, answer = await post(master, form(**data))
    assert (status, answer["success"]) == (400, False)
    assert answer["message"]
    assert nothing_left(results)
    assert not list(results.parent.parent.rglob("escape"))


async def test_a_body_that_is_no_form_is_refused(master: Master, results: Path) -> None:
    assert (await post(master, b"x"))[0] == 400
    headers = {"Content-Type": "multipart/form-data"}
    assert (await post(master, b"x", headers=headers))[0] == 400
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert (await post(master, b"--b\r\nbroken", headers=headers))[0] == 400
    assert nothing_left(results)


async def test_a_post_that_breaks_off_leaves_nothing(master: Master, results: Path) -> None:
    host, _, port = str(master.http_address).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = form({"a": b"x" * 500_000})
    head = (
        f"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: {body.size}\r\nContent-Type: {body.content_type}\r\n\r\n"
    )

    class Pipe:
        async def write(self, data: bytes) -> None:
            writer.write(data[: len(data) - 100_000] if len(data) > 100_000 else data)
            if len(data) > 100_000:
                await writer.drain()
                raise EOFError

    writer.write(head.encode())
    with pytest.raises(EOFError):
        await body.write(Pipe())  # type: ignore[arg-type]
    async with asyncio.timeout(20):
        while nothing_left(results):
            await asyncio.sleep(0.01)
        writer.close()
        while not nothing_left(results):
            await asyncio.sleep(0.01)
    reader.feed_eof()


async def test_more_than_the_limit_is_refused_with_413_and_leaves_nothing(settings: MasterSettings) -> None:
    master = Master(replace(settings, http_limit_bytes=1000))
    await master.start()
    try:
        assert (await post(master, form({"a": b"x" * 2000})))[0] == 413
        lying = form({"a": b"x" * 2000}, manifest=manifest_of({"a": b"x"}))
        assert (await post(master, lying))[0] == 400
        assert (await post(master, form({}, manifest=b"x" * 2000)))[0] == 413
        whole = json.loads(manifest_of({"a": b"x" * 2000, "b": b""}))
        whole["files"][1]["size_bytes"] = -2000
        assert (await post(master, form({"a": b"x" * 2000, "b": b""}, json.dumps(whole).encode())))[0] == 400
        assert nothing_left(master._results_dir)
        assert (await post(master, form({"a": b"x"})))[0] == 200
    finally:
        await master.stop()


async def test_a_push_beyond_its_limit_is_refused_by_name_and_again_before_all_of_it_is_sent(
    settings: MasterSettings, tmp_path: Path
) -> None:
    master = Master(replace(settings, push_limit_bytes=3_000_000))
    await master.start()
    try:
        async with grpc.aio.insecure_channel(master.address) as channel:
            stub: Any = pb_grpc.MasterWorkerStub(channel)
            store = MasterPushResultStore(lambda: stub)
            with pytest.raises(NodeFaultError, match="more than the 3000000 bytes that this master takes"):
                await store.put(bundle(tmp_path, {"a": bytes(8_000_000)}))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await push(stub, [chunk("a", b"x", end=True)])
            assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
            assert nothing_left(master._results_dir)
            other = bundle(tmp_path, {"a": bytes(2_900_000)}, task_id="t2")
            assert await store.put(other) == "master://t2/1"
            await store.close()
    finally:
        await master.stop()


async def test_a_push_of_files_without_end_is_refused_by_name(stub: Any, results: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(incoming_module, "MOST_FILES", 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await push(stub, [chunk("a"), chunk("b"), chunk("c", end=True)])
    assert "more than 2 files" in str(caught.value.details())
    assert nothing_left(results)


async def test_a_sender_that_falls_silent_gives_up_his_place_and_leaves_nothing(
    master: Master, stub: Any, results: Path
) -> None:
    master._uploads.silence_seconds = 0.05
    call = stub.UploadTaskFiles()
    await call.write(chunk("a", b"x", last=False))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert (caught.value.code(), "nothing came" in str(caught.value.details())) == (grpc.StatusCode.UNAVAILABLE, True)
    assert nothing_left(results)
    host, _, port = str(master.http_address).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    kind = "multipart/form-data; boundary=x"
    writer.write(
        f"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\nContent-Type: {kind}\r\n\r\n--x\r\n".encode()
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 503")
    writer.close()


async def test_no_more_uploads_are_under_way_than_the_master_has_room_for(
    master: Master, stub: Any, results: Path
) -> None:
    uploads = master._uploads
    uploads.turn_seconds = 0.01
    async with contextlib.AsyncExitStack() as others:
        for _ in range(AT_ONCE):
            await others.enter_async_context(uploads.place())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await push(stub, [chunk("a", b"x", end=True)])
        assert f"{AT_ONCE} uploads are under way" in str(caught.value.details())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await post(master, form({"a": b"x"})))[0] == 503
    assert nothing_left(results)
    uploads.turn_seconds = 60
    assert (await push(stub, [chunk("a", b"x", end=True)])).success
