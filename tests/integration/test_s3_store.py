"""The S3 store against a real MinIO server, through a proxy that breaks things."""

from __future__ import annotations

import asyncio
import io
import os
import re
import secrets
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from minio import Minio

from nodeservice.core.model import AttemptId, Resources, TaskSpec
from nodeservice.errors import NodeFaultError, NodeServiceError, RequestError, TransientError
from nodeservice.ports import ResultBundle
from nodeservice.results import manifest, s3_archive, s3_client
from nodeservice.results.access import MIB, S3Access
from nodeservice.results.s3 import S3ResultStore
from nodeservice.results.s3_object import AlreadyThere
from tests.busy_threads import busy_threads
from tests.integration.fault_proxy import FaultProxy
from tests.integration.minio_server import MinioServer, find_minio, free_port, minio, running_minio

__all__ = ["minio"]

pytestmark = pytest.mark.minio

SPEC = TaskSpec(id=AttemptId("task-1", 1), image="i", request=Resources(), pids_limit=1, fingerprint="f")
PREFIX = "task-1/1"
PART = 5 * MIB


@pytest.fixture
def proxy(minio: MinioServer) -> Iterator[FaultProxy]:
    running = FaultProxy(minio.endpoint)
    yield running
    running.close()


@pytest.fixture
def bucket() -> str:
    return f"results-{secrets.token_hex(4)}"


@pytest.fixture
def client(minio: MinioServer) -> Minio:
    """Past the proxy: what is really there."""
    return Minio(minio.endpoint, minio.access_key, minio.secret_key, secure=False)


OpenStore = Callable[..., S3ResultStore]


@pytest.fixture
async def open_store(minio: MinioServer, proxy: FaultProxy, bucket: str) -> AsyncIterator[OpenStore]:
    stores: list[S3ResultStore] = []

    def open_one(**changes: object) -> S3ResultStore:
        defaults: dict[str, object] = {"endpoint": proxy.endpoint, "part_bytes": PART, "timeout_seconds": 10.0}
        stores.append(S3ResultStore(minio.access(bucket, **(defaults | changes))))
        return stores[-1]

    yield open_one
    proxy.heal()
    for store in stores:
        await store.close()


def bundle_of(work_dir: Path, files: dict[str, bytes]) -> ResultBundle:
    results = work_dir / "results"
    results.mkdir(parents=True)
    for path, data in files.items():
        (results / path).write_bytes(data)
    (work_dir / "stdout.log").write_bytes(b"log\n")
    collected, _ = manifest.collect(results, work_dir / "stdout.log", task_id="task-1", attempt=1)
    manifest.write_local(work_dir, collected)
    return manifest.bundle_from(work_dir, SPEC, "worker-1")


def keys(client: Minio, bucket: str) -> set[str]:
    found = {str(item.object_name).removeprefix(f"{PREFIX}/") for item in client.list_objects(bucket, recursive=True)}
    return {name for name in found if not name.startswith("another-task/")}


def assert_complete(client: Minio, bucket: str, bundle: ResultBundle) -> None:
    """Everything that the stored manifest names lies there with the right bytes, and nothing else."""
    stored = client.get_object(bucket, f"{PREFIX}/manifest.json").data
    assert stored == bundle.manifest_bytes
    named = manifest.decode(stored)
    assert keys(client, bucket) == {entry.path for entry in named.files} | {"manifest.json"}
    for entry in named.files:
        assert sha256(client.get_object(bucket, f"{PREFIX}/{entry.path}").data).hexdigest() == entry.sha256


def interrupted_uploads(client: Minio, bucket: str, path: str) -> int:
    return len(client._list_multipart_uploads(bucket, prefix=f"{PREFIX}/{path}").uploads)


def puts(proxy: FaultProxy) -> list[str]:
    return [path for method, path in proxy.requests if method == "PUT"]


async def test_the_manifest_is_sent_last_of_300_files_and_repetition_sends_nothing(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {f"f{number}": b"%d" % number for number in range(300)})
    location = await open_store().put(bundle)
    assert location == f"s3://{bucket}/{PREFIX}"
    assert_complete(client, bucket, bundle)
    sent = puts(proxy)
    assert sent[0] == f"/{bucket}"
    assert sent[-1].endswith("/manifest.json")
    assert set(sent[1:-1]) == {f"/{bucket}/{PREFIX}.tar"}, "MinIO takes small files together"
    assert len(sent) - 2 == 4, "as many turns as may send at a time"

    proxy.requests.clear()
    assert await open_store().put(bundle) == location
    assert puts(proxy) == []
    assert len(proxy.requests) < 5


async def test_a_store_that_is_not_minio_gets_each_file_by_itself(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {f"f{number}": b"%d" % number for number in range(300)})
    proxy.rename()
    await open_store().put(bundle)
    assert_complete(client, bucket, bundle)
    assert len(puts(proxy)) == 303


async def test_a_store_that_does_not_unpack_is_noticed_and_keeps_no_archive(
    open_store: OpenStore,
    proxy: FaultProxy,
    client: Minio,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one would that calls itself MinIO and knows no archives: it stores what it got."""
    monkeypatch.setattr(s3_archive, "UNPACK_HEADER", "X-Amz-Meta-Of-No-Meaning")
    store = open_store(parallel_count=1)
    bundle = bundle_of(tmp_path, {f"f{number}": b"%d" % number for number in range(20)})
    await store.put(bundle)
    assert_complete(client, bucket, bundle)
    assert len([path for path in puts(proxy) if path.endswith(".tar")]) == 1
    client.remove_object(bucket, f"{PREFIX}/manifest.json")
    for number in range(20):
        client.remove_object(bucket, f"{PREFIX}/f{number}")
    proxy.requests.clear()
    await store.put(bundle)
    assert_complete(client, bucket, bundle)
    assert not [path for path in puts(proxy) if path.endswith(".tar")], "once is enough"


async def test_a_bit_that_flips_in_an_archive_is_never_left_in_the_store(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    """MinIO stores what it unpacks before it has seen all of the request, and so before it can check its digest."""
    client.make_bucket(bucket)
    bundle = bundle_of(tmp_path, {f"f{number}": secrets.token_bytes(60_000) for number in range(10)})
    proxy.corrupt_at(100_000)
    store = open_store(parallel_count=1)
    try:
        await store.put(bundle)
    except TransientError:
        assert "manifest.json" not in keys(client, bucket)
        await store.put(bundle)
    assert proxy.corrupted_count == 1
    assert_complete(client, bucket, bundle)


async def test_a_few_small_files_are_stored_without_a_question_and_replace_nothing(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    store = open_store()
    await _store_another_attempt(store, tmp_path)
    proxy.requests.clear()
    bundle = bundle_of(tmp_path / "one", {"a": b"1", "b": b"22"})
    await store.put(bundle)
    asked = [(method, path.rpartition("/")[2]) for method, path in proxy.requests]
    assert asked == [("PUT", "stdout.log"), ("PUT", "a"), ("PUT", "b"), ("PUT", "manifest.json")]
    assert_complete(client, bucket, bundle)

    proxy.requests.clear()
    await store.put(bundle)
    assert puts(proxy) == [f"/{bucket}/{PREFIX}/stdout.log"], "refused, then found to be there"
    assert_complete(client, bucket, bundle)

    with pytest.raises(NodeFaultError) as refused:
        await store.put(bundle_of(tmp_path / "two", {"0": b"before all others", "a": b"of somebody else"}))
    assert refused.value.reason == "RESULT_CONFLICT"
    assert_complete(client, bucket, bundle)


async def test_small_files_of_an_upload_that_broke_off_are_completed(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    store = open_store()
    await _store_another_attempt(store, tmp_path)
    bundle = bundle_of(tmp_path / "one", {"a": b"1", "b": b"22"})
    await store.put(bundle)
    for lost in ("manifest.json", "b"):
        client.remove_object(bucket, f"{PREFIX}/{lost}")
    await store.put(bundle)
    assert_complete(client, bucket, bundle)
    client.remove_object(bucket, f"{PREFIX}/stdout.log")
    await store.put(bundle)
    assert_complete(client, bucket, bundle)


async def test_a_store_that_overlooks_the_condition_is_noticed_and_asked_each_time(
    open_store: OpenStore, proxy: FaultProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_ONLY_NEW", {"X-Amz-Meta-Of-No-Meaning": "*"})
    store = open_store()
    await _store_another_attempt(store, tmp_path)
    proxy.requests.clear()
    await store.put(bundle_of(tmp_path / "one", {"a": b"1"}))
    assert [method for method, _ in proxy.requests] == ["HEAD", "PUT", "PUT", "PUT"], "nor is it tried again"
    with pytest.raises(NodeFaultError) as refused:
        await store.put(bundle_of(tmp_path / "two", {"a": b"of somebody else"}))
    assert refused.value.reason == "RESULT_CONFLICT"


@pytest.mark.parametrize(
    "refused",
    [{"X-Amz-Storage-Class": "NO_SUCH_CLASS"}, {"X-Amz-Server-Side-Encryption": "AES256"}],
    ids=["400", "501, as a store says that does not know the condition"],
)
async def test_a_store_that_refuses_the_condition_is_asked_each_time(
    open_store: OpenStore,
    client: Minio,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: dict[str, str],
) -> None:
    monkeypatch.setattr(s3_client, "_ONLY_NEW", refused)
    store = open_store()
    await _store_another_attempt(store, tmp_path)
    bundle = bundle_of(tmp_path / "one", {"a": b"1"})
    await store.put(bundle)
    assert client.get_object(bucket, f"{PREFIX}/manifest.json").data == bundle.manifest_bytes


async def test_a_store_that_breaks_off_while_it_is_tried_has_the_results_all_the_same(
    open_store: OpenStore,
    proxy: FaultProxy,
    client: Minio,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = s3_client.BucketClient.try_to_overwrite

    def cut_off(*arguments: Any) -> None:
        proxy.down()
        tried(*arguments)

    monkeypatch.setattr(s3_client.BucketClient, "try_to_overwrite", cut_off)
    bundle = bundle_of(tmp_path, {"a": b"1"})
    await open_store().put(bundle)
    proxy.up()
    assert_complete(client, bucket, bundle)


async def test_results_that_another_node_marks_at_the_same_moment_are_a_conflict(
    open_store: OpenStore, client: Minio, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one found the log of the other, and no manifest yet."""
    store, other = open_store(), open_store()
    await _store_another_attempt(store, tmp_path)
    theirs, ours = bundle_of(tmp_path / "theirs", {"a": b"1"}), bundle_of(tmp_path / "ours", {"a": b"2"})
    has, marked = s3_client.BucketClient.has, threading.Event()

    def has_not_yet(self: s3_client.BucketClient, key: str) -> bool:
        found = has(self, key)
        if not marked.is_set():
            marked.set()
            asyncio.run(other.put(theirs))
        return found

    client.put_object(bucket, f"{PREFIX}/stdout.log", io.BytesIO(b"log\n"), 4)
    monkeypatch.setattr(s3_client.BucketClient, "has", has_not_yet)
    with pytest.raises(NodeFaultError) as refused:
        await store.put(ours)
    assert refused.value.reason == "RESULT_CONFLICT"
    assert client.get_object(bucket, f"{PREFIX}/manifest.json").data == theirs.manifest_bytes


async def test_results_whose_mark_is_gone_when_it_is_looked_for_are_not_stored(
    open_store: OpenStore, client: Minio, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store had another one when ours came, and somebody removed it."""
    bundle, store = bundle_of(tmp_path, {"a": b"1"}), open_store()
    with monkeypatch.context() as patched:
        patched.setattr(s3_client.BucketClient, "upload_json", Mock(side_effect=AlreadyThere))
        with pytest.raises(TransientError):
            await store.put(bundle)
    await store.put(bundle)
    assert_complete(client, bucket, bundle)


@pytest.mark.parametrize("lost", ["a", "manifest.json"])
async def test_what_the_store_took_and_has_no_more_is_not_stored(
    open_store: OpenStore, client: Minio, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    bundle, store = bundle_of(tmp_path, {"a": secrets.token_bytes(MIB)}), open_store()
    send = s3_client.BucketClient._send

    def send_and_lose(self: s3_client.BucketClient, key: str, *arguments: Any, **more: Any) -> Any:
        taken = send(self, key, *arguments, **more)
        if key == f"{PREFIX}/{lost}":
            client.remove_object(bucket, key)
        return taken

    with monkeypatch.context() as patched:
        patched.setattr(s3_archive, "MAX_FILE_BYTES", 0)  # no answer proves anything
        patched.setattr(s3_client.BucketClient, "_send", send_and_lose)
        with pytest.raises(TransientError, match="is not there as it was sent"):
            await store.put(bundle)
    assert "manifest.json" not in keys(client, bucket)
    await store.put(bundle)
    assert_complete(client, bucket, bundle)


async def _store_another_attempt(store: S3ResultStore, tmp_path: Path) -> None:
    """It makes the bucket, and shows what the store makes of conditions."""
    spec = replace(SPEC, id=AttemptId("another-task", 1))
    await store.put(replace(bundle_of(tmp_path / "another", {}), spec=spec))


async def test_a_large_file_travels_in_parts(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    block = secrets.token_bytes(MIB)
    bundle = bundle_of(tmp_path, {"large": block * 70, "small": b"x"})
    await open_store().put(bundle)
    assert_complete(client, bucket, bundle)
    assert len([path for path in puts(proxy) if "partNumber" in path]) == 14
    assert client.stat_object(bucket, f"{PREFIX}/large").metadata["x-amz-meta-sha256"] == sha256(block * 70).hexdigest()


async def test_a_store_that_fails_at_first_takes_the_results_later(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {f"f{number}": b"x" * 1000 for number in range(20)})
    proxy.reject_first(3)
    store = open_store()
    failures = []
    for _ in range(10):
        try:
            await store.put(bundle)
            break
        except TransientError as error:
            failures.append(error.reason)
            assert not client.bucket_exists(bucket) or "manifest.json" not in keys(client, bucket)
    assert proxy.rejected_count == 3
    assert 1 <= len(failures) <= 3
    assert set(failures) == {"STORE_UNREACHABLE"}
    assert_complete(client, bucket, bundle)


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        ((412, "PreconditionFailed"), NodeFaultError, "STORE_REFUSED"),
        ((301, "PermanentRedirect"), NodeFaultError, "STORE_REFUSED"),
        ((307, "TemporaryRedirect"), TransientError, "STORE_UNREACHABLE"),
        ((403, "AccessDenied"), NodeFaultError, "STORE_REFUSED"),
        ((403, "RequestTimeTooSkewed"), NodeFaultError, "STORE_CREDENTIALS"),
        ((400, "XMinioAdminBucketQuotaExceeded"), TransientError, "STORE_FULL"),
        ((507, "XMinioStorageFull"), TransientError, "STORE_FULL"),
        ((400, "EntityTooLarge"), RequestError, "RESULT_TOO_LARGE"),
    ],
)
@pytest.mark.parametrize("count", [1, 9])
async def test_each_answer_of_a_store_says_whose_move_is_next(
    open_store: OpenStore,
    proxy: FaultProxy,
    client: Minio,
    bucket: str,
    tmp_path: Path,
    answer: tuple[int, str],
    error: type[NodeServiceError],
    reason: str,
    count: int,
) -> None:
    """No condition was asked for, so that it isn't kept is an answer like any other."""
    client.make_bucket(bucket)
    store, bundle = open_store(), bundle_of(tmp_path, {f"{n}": b"1" for n in range(count)})
    proxy.reject_puts(answer)
    with pytest.raises(error) as told:
        await store.put(bundle)
    assert told.value.reason == reason
    proxy.heal()
    await store.put(bundle)
    assert_complete(client, bucket, bundle)


async def test_a_connection_that_breaks_in_a_part_costs_a_retry_and_leaves_no_parts(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {"large": secrets.token_bytes(12 * MIB), "small": b"x"})
    proxy.reset_at(3 * MIB)
    with pytest.raises(TransientError):
        await open_store().put(bundle)
    assert proxy.reset_count == 1
    assert "manifest.json" not in keys(client, bucket)
    assert "large" not in keys(client, bucket)
    await open_store().put(bundle)
    assert_complete(client, bucket, bundle)
    assert interrupted_uploads(client, bucket, "large") == 0


async def test_an_empty_answer_to_the_last_part_is_no_success_and_leaves_no_parts(
    open_store: OpenStore, client: Minio, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(tmp_path, {"large": secrets.token_bytes(6 * MIB)})
    answers = Mock(side_effect=AttributeError("'NoneType' object has no attribute 'decode'"))  # of minio's, then
    with monkeypatch.context() as patched:
        patched.setattr(Minio, "_complete_multipart_upload", answers)
        with pytest.raises(TransientError) as caught:
            await open_store().put(bundle)
    assert "its answer is no XML" in str(caught.value)
    assert not {"large", "manifest.json"} & keys(client, bucket)
    assert interrupted_uploads(client, bucket, "large") == 0


async def test_parts_that_a_killed_process_left_behind_are_dropped(
    open_store: OpenStore, client: Minio, bucket: str, tmp_path: Path
) -> None:
    client.make_bucket(bucket)
    upload_id = client._create_multipart_upload(bucket, f"{PREFIX}/large", {})
    client._upload_part(bucket, f"{PREFIX}/large", b"x" * PART, None, upload_id, 1)
    assert interrupted_uploads(client, bucket, "large") == 1
    bundle = bundle_of(tmp_path, {"large": secrets.token_bytes(6 * MIB)})
    await open_store().put(bundle)
    assert_complete(client, bucket, bundle)
    assert interrupted_uploads(client, bucket, "large") == 0


async def test_parts_of_an_attempt_that_nobody_stores_any_more_can_be_dropped(
    open_store: OpenStore, client: Minio, bucket: str
) -> None:
    store = open_store()
    task_id, _, attempt = PREFIX.partition("/")
    id_ = AttemptId(task_id, int(attempt))
    assert await store.drop_leftovers(id_, ["large"]) == 0, "not even a bucket"
    client.make_bucket(bucket)
    for path in ("large", "another"):
        upload_id = client._create_multipart_upload(bucket, f"{PREFIX}/{path}", {})
        client._upload_part(bucket, f"{PREFIX}/{path}", b"x" * PART, None, upload_id, 1)
    assert await store.drop_leftovers(id_, ["small", "large"]) == 1
    assert [interrupted_uploads(client, bucket, path) for path in ("large", "another")] == [0, 1]


async def test_a_bit_that_flips_on_the_way_is_never_stored(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {"a": secrets.token_bytes(3 * MIB)})
    proxy.corrupt_at(MIB)
    with pytest.raises(TransientError):
        await open_store(parallel_count=1).put(bundle)
    assert proxy.corrupted_count == 1
    assert "a" not in keys(client, bucket)
    await open_store().put(bundle)
    assert_complete(client, bucket, bundle)


async def test_a_slow_store_is_waited_for_longer_than_any_one_silence_may_last(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    """14 MiB in one part take 3.5 s at least, the limit is 2.5 s; the kernel holds back up to 4 MiB (1 s) at the end."""
    bundle = bundle_of(tmp_path, {"a": secrets.token_bytes(14 * MIB)})
    client.make_bucket(bucket)
    proxy.be_slow(4 * MIB)
    await open_store(timeout_seconds=2.5, part_bytes=16 * MIB).put(bundle)
    assert_complete(client, bucket, bundle)


async def test_a_store_that_never_answers_does_not_hang_us(
    open_store: OpenStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.be_silent()
    with pytest.raises(TransientError):
        await asyncio.wait_for(open_store(timeout_seconds=0.5).put(bundle_of(tmp_path, {"a": b"1"})), 10)


async def test_a_store_that_is_down_takes_the_results_when_it_is_back(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {"a": b"1"})
    proxy.down()
    store = open_store()
    with pytest.raises(TransientError) as caught:
        await store.put(bundle)
    assert caught.value.reason == "STORE_UNREACHABLE"
    assert "(see whether the server " in str(caught.value)
    assert "Error" not in str(caught.value)
    proxy.up()
    await store.put(bundle)
    assert_complete(client, bucket, bundle)


@pytest.mark.parametrize("wrong", ["access_key", "secret_key"])
async def test_wrong_credentials_are_a_refusal_that_never_shows_them(
    open_store: OpenStore, tmp_path: Path, wrong: str
) -> None:
    store = open_store(**{wrong: "not-the-right-one"})
    with pytest.raises(NodeFaultError) as caught:
        await store.put(bundle_of(tmp_path, {"a": b"1"}))
    assert caught.value.reason == "STORE_CREDENTIALS"
    assert "not-the-right-one" not in str(caught.value)
    with pytest.raises(NodeFaultError) as asked:
        await store.check()
    assert asked.value.reason == "STORE_CREDENTIALS"
    assert "not-the-right-one" not in str(asked.value)


async def test_a_store_that_refuses_a_question_about_an_object_is_asked_why(
    open_store: OpenStore, client: Minio, bucket: str, tmp_path: Path
) -> None:
    """The answer to a HEAD has no body, and says no more than that it is no."""
    client.make_bucket(bucket)
    with pytest.raises(NodeFaultError, match=r"SignatureDoesNotMatch \(check the secret key\)"):
        await open_store(secret_key="wrong").put(bundle_of(tmp_path, {"a": b"1"}))


@pytest.mark.parametrize("prefix", ["", "team/a"])
async def test_a_store_that_takes_results_says_so_before_there_is_a_bucket(
    open_store: OpenStore, client: Minio, bucket: str, prefix: str
) -> None:
    store = open_store(prefix=prefix)
    await store.check()
    assert client.bucket_exists(bucket)
    await store.check()
    assert not list(client.list_objects(bucket, recursive=True))


async def test_a_store_that_is_away_is_told_to_be_unreachable(open_store: OpenStore, proxy: FaultProxy) -> None:
    proxy.down()
    with pytest.raises(TransientError) as caught:
        await open_store().check()
    assert caught.value.reason == "STORE_UNREACHABLE"


def test_a_refusal_is_heard_before_a_large_body_has_gone_out(
    minio: MinioServer, client: Minio, bucket: str, tmp_path: Path
) -> None:
    """MinIO answers at once, reads no further, and hangs up with a reset."""
    client.make_bucket(bucket)
    bundle = bundle_of(tmp_path, {"a": bytes(64 * MIB)})
    large = next(file for file in bundle.files if file.entry.path == "a")
    impostor = s3_client.BucketClient(minio.access(bucket, secret_key="wrong", part_bytes=100 * MIB))
    with pytest.raises(NodeFaultError, match="SignatureDoesNotMatch"):
        impostor.upload("key", large, threading.Event())
    impostor.close()


async def test_a_user_who_may_not_write_is_refused(
    open_store: OpenStore, client: Minio, minio: MinioServer, bucket: str, tmp_path: Path
) -> None:
    client.make_bucket(bucket)
    admin = minio.admin()
    name, secret = f"reader-{secrets.token_hex(3)}", secrets.token_hex(16)
    admin.user_add(name, secret)
    admin.attach_policy(["readonly"], user=name)
    with pytest.raises(NodeFaultError, match="AccessDenied"):
        await open_store(access_key=name, secret_key=secret).put(bundle_of(tmp_path, {"a": b"1"}))


async def test_a_user_bound_to_its_prefix_stores_there_and_nowhere_else(
    open_store: OpenStore, client: Minio, minio: MinioServer, bucket: str, tmp_path: Path
) -> None:
    client.make_bucket(bucket)
    admin = minio.admin()
    name, secret = f"node-{secrets.token_hex(3)}", secrets.token_hex(16)
    below = "node-a/*"
    allowed = [
        {
            "Action": ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"],
            "Resource": f"arn:aws:s3:::{bucket}/{below}",
        },
        {
            "Action": ["s3:ListBucket"],
            "Resource": f"arn:aws:s3:::{bucket}",
            "Condition": {"StringLike": {"s3:prefix": [below]}},
        },
        {"Action": ["s3:ListBucketMultipartUploads"], "Resource": f"arn:aws:s3:::{bucket}"},
    ]
    statements = [{"Effect": "Allow", **one} for one in allowed]
    admin.policy_add(name, policy={"Version": "2012-10-17", "Statement": statements})
    admin.user_add(name, secret)
    admin.attach_policy([name], user=name)
    files = {f"f{number}": b"x" * number for number in range(40)} | {"large": bytes(2 * PART + 1)}
    bound = {"access_key": name, "secret_key": secret, "part_bytes": PART}
    own = open_store(prefix="node-a", **bound)
    await own.check()
    bundle = bundle_of(tmp_path, files)
    assert await own.put(bundle) == f"s3://{bucket}/node-a/{PREFIX}"
    assert await own.put(bundle) == f"s3://{bucket}/node-a/{PREFIX}"
    for prefix in ("node-b", ""):
        with pytest.raises(NodeFaultError, match="AccessDenied"):
            await open_store(prefix=prefix, **bound).put(bundle)
    assert {str(item.object_name).partition("/")[0] for item in client.list_objects(bucket, recursive=True)} == {
        "node-a"
    }


async def test_a_bucket_that_is_removed_is_made_again(
    open_store: OpenStore, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {"a": b"1"})
    store = open_store()
    await store.put(bundle)
    for item in client.list_objects(bucket, recursive=True):
        client.remove_object(bucket, str(item.object_name))
    client.remove_bucket(bucket)
    await store.put(bundle)
    assert_complete(client, bucket, bundle)


async def test_an_object_that_was_lost_or_replaced_is_sent_again(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {"a": b"1", "b": b"22", "c": b"333"})
    store = open_store()
    await store.put(bundle)
    client.remove_object(bucket, f"{PREFIX}/b")
    client.put_object(bucket, f"{PREFIX}/c", io.BytesIO(b"33"), 2)
    proxy.requests.clear()
    await store.put(bundle)
    sent = [path.rpartition("/")[2] for path in puts(proxy)]
    assert sent == ["stdout.log", "b", "c"], "the first one was refused"
    assert_complete(client, bucket, bundle)


async def test_objects_of_an_upload_that_broke_off_are_not_sent_again(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {"a": b"1", "b": b"22", "c": b"333", "d": b"4", "stale": b"new"})
    store = open_store()
    await store.put(bundle)
    client.remove_object(bucket, f"{PREFIX}/manifest.json")
    client.remove_object(bucket, f"{PREFIX}/a")
    client.put_object(bucket, f"{PREFIX}/stale", io.BytesIO(b"old"), 3)
    proxy.requests.clear()
    proxy.rename()
    await store.put(bundle)
    assert sorted(path.rpartition("/")[2] for path in puts(proxy)) == ["a", "manifest.json", "stale"]
    assert_complete(client, bucket, bundle)


async def test_a_cancelled_put_stops_sending_and_commits_nothing(
    open_store: OpenStore, proxy: FaultProxy, client: Minio, bucket: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, {"large": secrets.token_bytes(30 * MIB), "b": b"x"})
    client.make_bucket(bucket)
    proxy.be_slow(4 * MIB)
    store = open_store()
    put = asyncio.create_task(store.put(bundle))
    while proxy.bytes_sent < MIB:
        await asyncio.sleep(0.01)
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    proxy.heal()
    await store.close()
    assert proxy.bytes_sent < 25 * MIB
    assert keys(client, bucket) <= {"b", "stdout.log"}
    assert interrupted_uploads(client, bucket, "large") == 0
    await no_threads_left()


async def test_a_store_that_is_frozen_in_an_upload_holds_up_no_end(
    open_store: OpenStore, proxy: FaultProxy, minio: MinioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeservice.threads._END_SECONDS", 0.01)
    bundle = bundle_of(tmp_path, {"large": secrets.token_bytes(30 * MIB), "b": b"x"})
    store = open_store(timeout_seconds=3600.0)
    put = asyncio.create_task(store.put(bundle))
    while proxy.bytes_sent < MIB:
        await asyncio.sleep(0.01)
    os.kill(minio.pid, signal.SIGSTOP)
    try:
        put.cancel()
        await store.close()
        assert busy_threads("results-s3")
    finally:
        os.kill(minio.pid, signal.SIGCONT)
    with pytest.raises(asyncio.CancelledError):
        await put
    await no_threads_left()


async def no_threads_left() -> None:
    async with asyncio.timeout(30):
        while [thread for thread in threading.enumerate() if thread.name.startswith("results-s3")]:
            await asyncio.sleep(0.01)


async def test_many_attempts_share_one_store(open_store: OpenStore, client: Minio, bucket: str, tmp_path: Path) -> None:
    store = open_store(prefix="cluster/a")
    bundles = [bundle_of(tmp_path / str(number), {"a": b"1"}) for number in range(2)]
    first, second = await asyncio.gather(*(store.put(bundle) for bundle in bundles))
    assert first == second == f"s3://{bucket}/cluster/a/{PREFIX}"
    assert client.stat_object(bucket, f"cluster/a/{PREFIX}/manifest.json").content_type == "application/json"


async def test_over_tls_the_servers_certificate_is_checked_and_parts_arrive(tmp_path: Path) -> None:
    binary = find_minio()
    if binary is None:
        pytest.skip("no MinIO server binary")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=minio"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    arguments = ["openssl", "req", "-x509", *curve, *names, "-keyout", key, "-out", cert]
    await asyncio.to_thread(subprocess.run, arguments, check=True, capture_output=True, timeout=30)
    bundle = bundle_of(tmp_path / "work", {"large": secrets.token_bytes(6 * MIB), "empty": b"", "a": b"1"})
    (tmp_path / "minio").mkdir()
    with running_minio(binary, tmp_path / "minio", certificate=(cert, key)) as server:
        stranger = S3ResultStore(server.access("tls", secure=True))
        with pytest.raises(NodeFaultError, match="certificate"):
            await stranger.put(bundle)
        await stranger.close()
        store = S3ResultStore(server.access("tls", secure=True, ca_file=cert, part_bytes=PART))
        assert await store.put(bundle) == f"s3://tls/{PREFIX}"
        assert await store.put(bundle) == f"s3://tls/{PREFIX}"
        await store.close()


async def test_something_that_is_not_s3_is_refused(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if found := re.search(r"content-length: (\d+)", head, re.IGNORECASE):
            await reader.readexactly(int(found[1]))
        body = "" if head.startswith("HEAD") else "no!"
        writer.write(
            b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: 3\r\n\r\n"
            + body.encode()
        )
        await writer.drain()
        writer.close()

    port = free_port()
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    access = S3Access(endpoint=f"127.0.0.1:{port}", bucket="abc", access_key="a", secret_key="b" * 8, secure=False)
    store = S3ResultStore(access)
    with pytest.raises(NodeFaultError, match="not from S3"):
        await store.put(bundle_of(tmp_path, {"a": b"1"}))
    await store.close()
    server.close()
    await server.wait_closed()
