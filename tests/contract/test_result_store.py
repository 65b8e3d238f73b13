"""What every result store keeps to: memory, directory, S3 (real MinIO), HTTP push and gRPC push (real servers)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import grpc.aio
import pytest
from aiohttp import web

from nodeservice.core.model import AttemptId, Resources, TaskSpec
from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.ports import ResultBundle, ResultStore
from nodeservice.results import manifest
from nodeservice.results.file import FileResultStore
from nodeservice.results.http import HttpResultStore
from nodeservice.results.s3 import S3ResultStore
from nodeservice.rpc.result_push import MasterPushResultStore
from nodeservice.testing.memory_store import MemoryResultStore
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.minio_server import MinioServer, minio

__all__ = ["minio"]

SPEC = TaskSpec(
    id=AttemptId("task-1", 2),
    image="i",
    request=Resources(),
    pids_limit=1,
    user_id="ünal",
    task_name="../my task ☃",
    submitted_at_unix=1_764_000_000,
    fingerprint="f",
)
AWKWARD_NAMES = (
    "a b.txt",
    "sub/é ☃.txt",
    'quote".txt',
    "back\\slash",
    "semi;colon=x&y",
    "per%20cent",
    "plus+",
    "#hash?",
    "sub/-dash",
    " leading",
    "trailing ",
    "sub/...",
    "~",
    "'*<>|:",
)


@dataclass(kw_only=True)
class Harness:
    """A store under test, and a way to read back what it stored below `task-1/2`: path to bytes, manifest included."""

    store: ResultStore
    read: Callable[[], Awaitable[dict[str, bytes]]]
    detects_conflict: bool = True
    remembers: bool = True
    """Whether a repeated `put` needs no sources any more, since all is known to be there."""


class UploadServer:
    """A receiver of the format that `nodeservice.results.http` documents, as simple as can be."""

    def __init__(self) -> None:
        self.stored: dict[str, dict[str, bytes]] = {}
        self.fields: dict[str, str] = {}
        self.status = 0
        self.cut_body = False

    async def handle(self, request: web.Request) -> web.Response:
        if self.status:
            return web.json_response({"success": False, "message": "told to fail"}, status=self.status)
        fields: dict[str, str] = {}
        order: list[str] = []
        files: dict[str, bytes] = {}
        expected = iter(())
        async for part in await request.multipart():
            order.append(str(part.name))
            if part.name != "file":
                fields[str(part.name)] = await part.text(encoding="utf-8")
                if part.name == "manifest":
                    assert part.headers["Content-Type"] == "application/json"
                    expected = iter(json.loads(fields["manifest"])["files"])
                continue
            entry = next(expected)
            data = await part.read()
            raw_name = part.headers["Content-Disposition"].rpartition('filename="')[2][:-1]
            assert unquote(raw_name) == entry["path"]
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size_bytes"], entry["sha256"])
            files[entry["path"]] = data
        assert next(expected, None) is None
        assert order[:7] == ["task_id", "attempt", "worker_id", "user_id", "task_name", "submitted_at", "manifest"]
        self.fields = fields
        prefix = f"{fields['task_id']}/{fields['attempt']}"
        files["manifest.json"] = fields["manifest"].encode()
        if self.stored.setdefault(prefix, files)["manifest.json"] != files["manifest.json"]:
            return web.json_response({"success": False, "message": "another manifest"}, status=409)
        return web.json_response({"success": True, "location": f"file:///somewhere/{prefix}"})


class PushServer(pb_grpc.MasterWorkerServicer):
    """Takes `UploadTaskFiles` and checks every rule of the stream."""

    def __init__(self) -> None:
        self.stored: dict[str, dict[str, bytes]] = {}
        self.chunks: list[pb.FileChunk] = []
        self.refuse: grpc.StatusCode | None = None
        self.answer = pb.FileUploadAck(success=True)
        self.answers_early = False

    async def UploadTaskFiles(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.FileChunk], context: grpc.aio.ServicerContext
    ) -> pb.FileUploadAck:
        if self.refuse is not None:
            await context.abort(self.refuse, "told to refuse")
        if self.answers_early:
            return self.answer
        self.chunks = []
        files: dict[str, bytes] = {}
        current = None
        is_ended = False
        async for chunk in request_iterator:
            assert not is_ended
            assert len(chunk.data) <= 1024 * 1024
            if current is None:
                assert chunk.file_path not in files
                files[chunk.file_path] = b""
            else:
                assert chunk.file_path == current
            files[chunk.file_path] += chunk.data
            current = None if chunk.is_last_chunk else chunk.file_path
            is_ended = chunk.is_last_file
            self.chunks.append(chunk)
        if is_ended and current is None:
            self.stored[f"{chunk.task_id}/{chunk.attempt}"] = files
        answer = pb.FileUploadAck()
        answer.CopyFrom(self.answer)
        answer.files_received = answer.files_received or len(files)
        return answer


@pytest.fixture
async def upload_server() -> AsyncIterator[tuple[UploadServer, str]]:
    server = UploadServer()
    app = web.Application(client_max_size=2**30)
    app.router.add_post("/upload", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield server, f"http://127.0.0.1:{runner.addresses[0][1]}/upload"
    finally:
        await runner.cleanup()


@pytest.fixture
async def push_server() -> AsyncIterator[tuple[PushServer, pb_grpc.MasterWorkerStub]]:
    servicer = PushServer()
    server = grpc.aio.server()
    pb_grpc.add_MasterWorkerServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, pb_grpc.MasterWorkerStub(channel)
    await server.stop(None)


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.minio), "http", "push"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Harness:
    match request.param:
        case "memory":
            return memory_harness()
        case "file":
            return file_harness(tmp_path / "stored")
        case "s3":
            return s3_harness(request.getfixturevalue("minio"))
        case "http":
            server, url = request.getfixturevalue("upload_server")
            return Harness(
                store=HttpResultStore(url), read=lambda: as_awaitable(server.stored["task-1/2"]), remembers=False
            )
        case _:
            servicer, stub = request.getfixturevalue("push_server")
            return Harness(
                store=MasterPushResultStore(lambda: stub),
                read=lambda: as_awaitable(servicer.stored["task-1/2"]),
                detects_conflict=False,
                remembers=False,
            )


@pytest.fixture
async def harness(made: Harness) -> AsyncIterator[Harness]:
    try:
        yield made
    finally:
        await made.store.close()


async def as_awaitable(files: dict[str, bytes]) -> dict[str, bytes]:
    return files


def memory_harness() -> Harness:
    store = MemoryResultStore()
    return Harness(store=store, read=lambda: as_awaitable(store.stored["task-1/2"]), remembers=False)


def file_harness(root: Path) -> Harness:
    async def read() -> dict[str, bytes]:
        top = root / "task-1" / "2"
        assert not list(top.parent.glob(".*"))
        return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}

    return Harness(store=FileResultStore(root), read=read)


def s3_harness(server: MinioServer) -> Harness:
    from minio import Minio

    bucket = f"contract-{secrets.token_hex(4)}"
    client = Minio(server.endpoint, server.access_key, server.secret_key, secure=False)

    def read_all() -> dict[str, bytes]:
        keys = [item.object_name for item in client.list_objects(bucket, "pre/fix/task-1/2/", recursive=True)]
        return {key.removeprefix("pre/fix/task-1/2/"): client.get_object(bucket, key).data for key in keys}

    async def read() -> dict[str, bytes]:
        return await asyncio.to_thread(read_all)

    return Harness(store=S3ResultStore(server.access(bucket, prefix="pre/fix")), read=read)


def bundle_of(
    work_dir: Path, files: dict[str, bytes], *, log: bytes | None = b"log\n", attempt: int = 2
) -> ResultBundle:
    results = work_dir / "results"
    results.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        (results / path).parent.mkdir(parents=True, exist_ok=True)
        (results / path).write_bytes(data)
    if log is not None:
        (work_dir / "stdout.log").write_bytes(log)
    collected, _ = manifest.collect(results, work_dir / "stdout.log", task_id="task-1", attempt=attempt)
    manifest.write_local(work_dir, collected)
    return manifest.bundle_from(work_dir, replace(SPEC, id=AttemptId("task-1", attempt)), "worker-1")


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "task-1.2"
    (directory / "results").mkdir(parents=True)
    return directory


async def test_everything_can_be_read_when_put_returns(harness: Harness, work_dir: Path) -> None:
    files = {"a.txt": b"hi\n", "deep/er/b.bin": b"\x00\xff" * 1_300_000, "empty": b"", "exact": b"x" * 1024 * 1024}
    bundle = bundle_of(work_dir, files)
    location = await harness.store.put(bundle)
    assert urlsplit(location).scheme
    assert location.endswith("task-1/2")
    assert await harness.read() == {**files, "stdout.log": b"log\n", "manifest.json": bundle.manifest_bytes}


async def test_awkward_names_are_stored_as_they_are(harness: Harness, work_dir: Path) -> None:
    files = {name: name.encode() for name in AWKWARD_NAMES}
    bundle = bundle_of(work_dir, files, log=None)
    assert bundle.manifest.skipped == ()
    await harness.store.put(bundle)
    assert await harness.read() == {**files, "manifest.json": bundle.manifest_bytes}


async def test_names_that_a_store_refuses_keep_it_from_no_other_file(harness: Harness, work_dir: Path) -> None:
    bundle = bundle_of(work_dir, {" .": b"1", ". /a": b"2", "a\\..": b"3", "..\\": b"4", "good": b"5"}, log=None)
    await harness.store.put(bundle)
    assert await harness.read() == {"good": b"5", "manifest.json": bundle.manifest_bytes}


async def test_a_result_without_files_is_its_manifest(harness: Harness, work_dir: Path) -> None:
    bundle = bundle_of(work_dir, {}, log=None)
    await harness.store.put(bundle)
    assert await harness.read() == {"manifest.json": bundle.manifest_bytes}


async def test_repeating_gives_the_same_answer(harness: Harness, work_dir: Path) -> None:
    bundle = bundle_of(work_dir, {"a": b"1", "b/c": b"2"})
    location = await harness.store.put(bundle)
    before = await harness.read()
    if harness.remembers:
        for file in bundle.files:
            file.source.unlink()
    assert await harness.store.put(bundle) == location
    assert await harness.read() == before


async def test_other_results_of_the_same_attempt_never_overwrite(harness: Harness, work_dir: Path) -> None:
    if not harness.detects_conflict:
        pytest.skip("the protocol has no way to say so: it is the master's to decide")
    await harness.store.put(bundle_of(work_dir, {"a": b"1"}))
    before = await harness.read()
    with pytest.raises(NodeFaultError) as caught:
        await harness.store.put(bundle_of(work_dir, {"a": b"2"}))
    assert caught.value.reason == "RESULT_CONFLICT"
    assert await harness.read() == before


async def test_a_file_that_changed_after_collection_is_never_committed(harness: Harness, work_dir: Path) -> None:
    bundle = bundle_of(work_dir, {"a": b"1" * 2_000_000, "b": b"2"})
    (work_dir / "results" / "a").write_bytes(b"1" * 1_999_999 + b"x")
    with pytest.raises(NodeFaultError) as caught:
        await harness.store.put(bundle)
    assert caught.value.reason == "RESULT_CHANGED"
    (work_dir / "results" / "a").write_bytes(b"1" * 2_000_000)
    await harness.store.put(bundle)
    assert (await harness.read())["a"] == b"1" * 2_000_000


async def test_many_results_are_stored_at_a_time(harness: Harness, work_dir: Path) -> None:
    bundles = [bundle_of(work_dir / str(attempt), {"a": b"%d" % attempt}, attempt=attempt) for attempt in range(2, 8)]
    locations = await asyncio.gather(*(harness.store.put(bundle) for bundle in bundles))
    assert len(set(locations)) == 6
    assert (await harness.read())["a"] == b"2"


# ---- a directory ------------------------------------------------------------------------------------------------------


async def test_leftovers_of_a_crash_are_removed_and_never_seen_as_results(tmp_path: Path, work_dir: Path) -> None:
    leftover = tmp_path / "stored" / "task-1" / ".2.dead.partial"
    leftover.mkdir(parents=True)
    (leftover / "a").write_text("half")
    harness = file_harness(tmp_path / "stored")
    await harness.store.put(bundle_of(work_dir, {"a": b"whole"}))
    assert (await harness.read())["a"] == b"whole"
    await harness.store.close()


async def test_results_kept_in_a_directory_can_be_stored_elsewhere_later(tmp_path: Path, work_dir: Path) -> None:
    bundle = bundle_of(work_dir, {"a": b"1", "stdout.log": b"task's own"})
    kept = FileResultStore(tmp_path / "kept")
    await kept.put(bundle)
    later = manifest.bundle_from_stored(tmp_path / "kept" / "task-1" / "2", SPEC, "worker-1")
    memory = memory_harness()
    await memory.store.put(later)
    assert await memory.read() == {
        "a": b"1",
        "stdout.log": b"log\n",
        "_task/stdout.log": b"task's own",
        "manifest.json": bundle.manifest_bytes,
    }
    await kept.close()


async def test_a_directory_that_was_not_there_is_closed_to_other_users(tmp_path: Path, work_dir: Path) -> None:
    store = FileResultStore(tmp_path / "results")
    await store.put(bundle_of(work_dir, {}))
    await store.close()
    assert (tmp_path / "results").stat().st_mode & 0o007 == 0


async def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path, work_dir: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = FileResultStore(tmp_path / "file" / "below")
    with pytest.raises(NodeFaultError) as caught:
        await store.put(bundle_of(work_dir, {"a": b"1"}))
    assert caught.value.reason == "STORE_REFUSED"
    with pytest.raises(NodeFaultError) as asked:
        await store.check()
    assert asked.value.reason == "STORE_REFUSED"
    await store.close()


async def test_a_store_that_takes_results_has_nothing_to_say(harness: Harness) -> None:
    await harness.store.check()


# ---- HTTP -------------------------------------------------------------------------------------------------------------


async def test_the_fields_tell_whose_results_they_are(upload_server: tuple[UploadServer, str], work_dir: Path) -> None:
    server, url = upload_server
    store = HttpResultStore(url)
    bundle = bundle_of(work_dir, {"a": b"1"})
    assert await store.put(bundle) == "file:///somewhere/task-1/2"
    assert server.fields == {
        "task_id": "task-1",
        "attempt": "2",
        "worker_id": "worker-1",
        "user_id": "ünal",
        "task_name": "../my task ☃",
        "submitted_at": "1764000000",
        "manifest": bundle.manifest_bytes.decode(),
    }
    await store.close()


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (400, NodeFaultError, "STORE_REFUSED"),
        (403, NodeFaultError, "STORE_REFUSED"),
        (302, NodeFaultError, "STORE_REFUSED"),
        (408, TransientError, "STORE_UNREACHABLE"),
        (409, NodeFaultError, "RESULT_CONFLICT"),
        (413, RequestError, "RESULT_TOO_LARGE"),
        (429, TransientError, "STORE_UNREACHABLE"),
        (500, TransientError, "STORE_UNREACHABLE"),
        (503, TransientError, "STORE_UNREACHABLE"),
        (201, TransientError, "STORE_UNREACHABLE"),
        (200, TransientError, "STORE_UNREACHABLE"),
    ],
)
async def test_each_answer_of_an_upload_server_says_whose_move_is_next(
    upload_server: tuple[UploadServer, str], work_dir: Path, status: int, kind: type[Exception], reason: str
) -> None:
    server, url = upload_server
    server.status = status
    store = HttpResultStore(url)
    with pytest.raises(kind) as caught:
        await store.put(bundle_of(work_dir, {"a": b"1"}))
    assert caught.value.reason == reason  # type: ignore[attr-defined]
    await store.close()


async def test_results_over_the_limit_are_refused_before_anything_is_sent(work_dir: Path) -> None:
    store = HttpResultStore("http://127.0.0.1:1/upload", limit_bytes=1000)
    with pytest.raises(RequestError, match=r"more than 1000.*s3://") as caught:
        await store.put(bundle_of(work_dir, {"a": b"x" * 1000}))
    assert caught.value.reason == "RESULT_TOO_LARGE"
    await store.close()


async def test_an_upload_server_that_is_down_is_tried_again(work_dir: Path) -> None:
    store = HttpResultStore("http://127.0.0.1:1/upload")
    with pytest.raises(TransientError):
        await store.put(bundle_of(work_dir, {"a": b"1"}))
    await store.close()


async def test_an_upload_server_tells_before_any_upload_whether_it_can_be_reached(
    upload_server: tuple[UploadServer, str], tmp_path: Path
) -> None:
    server, url = upload_server
    server.status = 500  # to a HEAD, which is no upload
    up, down = HttpResultStore(url), HttpResultStore("http://127.0.0.1:1/upload")
    await up.check()
    with pytest.raises(TransientError) as caught:
        await down.check()
    assert caught.value.reason == "STORE_UNREACHABLE"
    for store in (up, down):
        await store.close()


async def test_more_files_than_descriptors_can_be_sent(upload_server: tuple[UploadServer, str], work_dir: Path) -> None:
    import resource

    server, url = upload_server
    bundle = bundle_of(work_dir, {f"f{number}": b"x" for number in range(300)})
    store = HttpResultStore(url)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        await store.put(bundle)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(server.stored["task-1/2"]) == 302
    await store.close()


# ---- gRPC push --------------------------------------------------------------------------------------------------------


async def test_every_chunk_tells_whose_it_is_in_words_that_are_safe_in_a_path(
    push_server: tuple[PushServer, pb_grpc.MasterWorkerStub], work_dir: Path
) -> None:
    servicer, stub = push_server
    store = MasterPushResultStore(lambda: stub)
    assert await store.put(bundle_of(work_dir, {"a": b"1", "empty": b""})) == "master://task-1/2"
    assert [(c.file_path, c.data[:3], c.is_last_chunk, c.is_last_file) for c in servicer.chunks] == [
        ("a", b"1", True, False),
        ("empty", b"", True, False),
        ("stdout.log", b"log", True, False),
        ("manifest.json", b'{"a', True, True),
    ]
    assert {(c.task_id, c.attempt, c.user_id, c.task_name, c.timestamp, c.worker_id) for c in servicer.chunks} == {
        ("task-1", 2, "ünal", "my_task", 1_764_000_000, "worker-1")
    }
    await store.close()


@pytest.mark.parametrize("name", ["", "..", "☃", "///"])
async def test_a_name_of_which_nothing_is_left_becomes_the_tasks_id(
    push_server: tuple[PushServer, pb_grpc.MasterWorkerStub], work_dir: Path, name: str
) -> None:
    servicer, stub = push_server
    store = MasterPushResultStore(lambda: stub)
    bundle = bundle_of(work_dir, {"a": b"1"})
    await store.put(replace(bundle, spec=replace(SPEC, task_name=name)))
    assert {chunk.task_name for chunk in servicer.chunks} == {"task-1"}
    await store.close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, TransientError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, TransientError),
        (grpc.StatusCode.UNKNOWN, TransientError),
        (grpc.StatusCode.UNIMPLEMENTED, NodeFaultError),
        (grpc.StatusCode.PERMISSION_DENIED, NodeFaultError),
        (grpc.StatusCode.INVALID_ARGUMENT, NodeFaultError),
    ],
)
@pytest.mark.parametrize("size", [1, 10_000_000])
async def test_each_status_of_a_master_says_whose_move_is_next(
    push_server: tuple[PushServer, pb_grpc.MasterWorkerStub],
    work_dir: Path,
    code: grpc.StatusCode,
    kind: type[Exception],
    size: int,
) -> None:
    servicer, stub = push_server
    servicer.refuse = code
    store = MasterPushResultStore(lambda: stub)
    bundle = bundle_of(work_dir, {"a": b"1" * size})
    with pytest.raises(kind) as caught:
        await store.put(bundle)
    assert "told to refuse" in str(caught.value)
    await store.close()


@pytest.mark.parametrize(
    "answer",
    [
        pb.FileUploadAck(success=False, message="disk full"),
        pb.FileUploadAck(success=True, message="disk full", files_received=1),
    ],
)
async def test_a_master_that_did_not_take_everything_is_tried_again(
    push_server: tuple[PushServer, pb_grpc.MasterWorkerStub], work_dir: Path, answer: pb.FileUploadAck
) -> None:
    servicer, stub = push_server
    servicer.answer = answer
    store = MasterPushResultStore(lambda: stub)
    with pytest.raises(TransientError, match="disk full"):
        await store.put(bundle_of(work_dir, {"a": b"1" * 3_000_000}))
    await store.close()


@pytest.mark.parametrize("answer", [pb.FileUploadAck(success=False), pb.FileUploadAck(success=True, files_received=1)])
async def test_a_master_that_answers_before_the_end_is_tried_again(
    push_server: tuple[PushServer, pb_grpc.MasterWorkerStub], work_dir: Path, answer: pb.FileUploadAck
) -> None:
    servicer, stub = push_server
    servicer.answer, servicer.answers_early = answer, True
    store = MasterPushResultStore(lambda: stub)
    with pytest.raises(TransientError):
        await store.put(bundle_of(work_dir, {"a": b"1" * 10_000_000}))
    await store.close()


async def test_a_cancelled_push_never_looks_complete(
    push_server: tuple[PushServer, pb_grpc.MasterWorkerStub], work_dir: Path
) -> None:
    servicer, stub = push_server
    store = MasterPushResultStore(lambda: stub)
    put = asyncio.create_task(store.put(bundle_of(work_dir, {"a": b"1" * 50_000_000})))
    while not servicer.chunks:
        await asyncio.sleep(0.001)
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    assert servicer.stored == {}
    await store.close()


async def test_without_a_master_results_wait(work_dir: Path) -> None:
    store = MasterPushResultStore(lambda: None)
    with pytest.raises(TransientError, match="no master is known"):
        await store.put(bundle_of(work_dir, {"a": b"1"}))
    await store.close()


# ---- the fake ---------------------------------------------------------------------------------------------------------


async def test_the_fake_fails_as_often_as_it_was_told(work_dir: Path) -> None:
    store = MemoryResultStore()
    store.fail_next(2, TransientError("down", reason="STORE_UNREACHABLE"))
    bundle = bundle_of(work_dir, {"a": b"1"})
    for _ in range(2):
        with pytest.raises(TransientError):
            await store.put(bundle)
    assert await store.put(bundle) == "memory://task-1/2"
    assert store.put_count == 3


async def test_the_fake_waits_while_it_is_blocked(work_dir: Path) -> None:
    store = MemoryResultStore()
    store.block()
    put = asyncio.create_task(store.put(bundle_of(work_dir, {"a": b"1"})))
    await asyncio.sleep(0)
    assert not put.done()
    assert store.stored == {}
    store.unblock()
    assert await put == "memory://task-1/2"
