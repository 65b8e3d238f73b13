"""What work costs, in counts that do not depend on the speed of the machine: engine calls, syncs, spans, bytes, wake-ups.

Whoever makes one of them larger says why, here. How long it all takes is measured by benchmarks/.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
import tarfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, ValuesView
from pathlib import Path
from types import FrameType, FunctionType, ModuleType

import docker
import pytest
from minio import Minio

from nodeservice.core.model import AttemptId
from nodeservice.results.file import FileResultStore
from nodeservice.results.s3 import S3ResultStore
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from nodeservice.testing.otlp import OtlpReceiver
from tests.integration.engine_proxy import EngineProxy
from tests.integration.fault_proxy import FaultProxy
from tests.integration.minio_server import MinioServer, minio
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldClient, OldMaster
from tests.integration.test_s3_store import MIB, bundle_of
from tests.unit.node_harness import World, living, spec

__all__ = ["minio"]

TASK_COUNT = 4


@pytest.fixture
async def proxy(tmp_path: Path, engine: str) -> AsyncIterator[EngineProxy]:
    proxy = EngineProxy(tmp_path / "engine.sock", engine)
    await proxy.up()
    yield proxy
    await proxy.down()


@pytest.fixture
def traces() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.mark.engine
async def test_engine_calls_and_spans_of_a_task(
    tmp_path: Path,
    node_id: str,
    demo_image: str,
    docker_client: docker.APIClient,
    proxy: EngineProxy,
    traces: OtlpReceiver,
) -> None:
    def left() -> list[object]:
        return list(docker_client.containers(all=True, filters={"label": [f"nodeservice.node={node_id}"]}))

    async def run(client: OldClient, task_id: str) -> None:
        await client.assign(task_id=task_id, command="sleep 0.5; echo done", req_cpu=0.5)
        assert (await master.report_of(task_id)).status == "success"
        await master.until(lambda: not left())

    master = await OldMaster().start()
    env = {
        "DOCKER_HOST": proxy.url, "NODESERVICE_OTLP_ENDPOINT": traces.endpoint, "NODESERVICE_RELIST_SECONDS": "3600",
        "OTEL_METRIC_EXPORT_INTERVAL": "100",
    }  # fmt: skip
    node = NodeProcess(tmp_path / "node", node_id, ("--master", f"127.0.0.1:{master.port}"), env)
    await node.start()
    try:
        async with OldClient(node.address) as client:
            first = asyncio.create_task(run(client, "first"))  # the event stream is opened, and the engine described
            during = await asyncio.to_thread(
                traces.wait_for_metrics, lambda told: told.value("nodeservice.task.unfinished", "run") == 1
            )
            await first
            assert not (await client.assign(task_id="first", command="another")).success
            proxy.requests.clear()
            for number in range(TASK_COUNT):
                await run(client, f"t{number}")
            calls = dict(proxy.requests)
        spans = Counter(span.name for span in await traces.wait_for_async((TASK_COUNT + 1) * 10))
    finally:
        await node.stop()
        await master.stop()
    # After the start, and at the exit. One more looks for the process, of a task that lives for a quarter of a second.
    assert calls.pop("GET containers/json") <= 3 * TASK_COUNT
    assert calls == {
        "GET images/json": TASK_COUNT,
        "POST containers/create": TASK_COUNT,
        "POST containers/start": TASK_COUNT,
        "GET containers/logs": 2 * TASK_COUNT,  # followed, and read once more at its end
        "DELETE containers": TASK_COUNT,
    }
    phases = ("admit", "pull", "create", "start", "run", "collect", "upload", "report", "clean_up")
    assert spans == dict.fromkeys(("task", *(f"task.{phase}" for phase in phases)), TASK_COUNT + 1)
    # One series a phase, an outcome and a reason, however many tasks there were.
    standing = {
        name: during.value(f"nodeservice.{name}") for name in ("cpu.granted", "node.accepting", "master.registered")
    }
    assert standing == {"cpu.granted": 0.5, "node.accepting": 1, "master.registered": 1}
    at_the_end = traces.exports[-1]
    durations = at_the_end.of("nodeservice.task.phase.duration")
    assert {point.attributes["nodeservice.phase"]: point.count for point in durations} == dict.fromkeys(
        phases, TASK_COUNT + 1
    )
    assert at_the_end.value("nodeservice.task.finished", "COMPLETED") == TASK_COUNT + 1
    assert at_the_end.value("nodeservice.task.refused", "TASK_CONFLICT") == 1
    assert at_the_end.value("nodeservice.result.stored") == len("done\n") * (TASK_COUNT + 1)
    assert not any(point.value for point in at_the_end.of("nodeservice.task.unfinished"))
    assert len(at_the_end) < 200


async def test_synced_journal_writes_of_a_task(tmp_path: Path) -> None:
    """For what a crash must not forget: accepted, started, exited, stored, acknowledged. The rest comes along, or later."""
    world = World(tmp_path, runtime=FakeRuntime(images={"demo": FakeImage(output=b"done\n")}))
    async with living(world) as node:
        await node.assign(spec("warm"))
        await node.until_finished(spec("warm").id)
        before = node.journal.write_count
        await node.assign(spec("t"))
        await node.until_finished(spec("t").id)
        assert node.journal.write_count - before == 5


async def test_nothing_of_a_task_is_kept_once_it_is_forgotten(tmp_path: Path) -> None:
    """A node runs for months: what it keeps of each task, were it a few bytes, would fill it."""
    runtime = FakeRuntime(images={"demo": FakeImage(output=b"done\n")})
    world = World(tmp_path, runtime=runtime, finished_retention_count=3)
    async with living(world) as node:
        for number in range(10):
            await node.assign(spec(f"task-{number}"))
            await node.until_finished(spec(f"task-{number}").id)
        remembered = {record.id.task_id for record in node.driver.finished()}
        assert remembered == {"task-7", "task-8", "task-9"}
        # What stands for the world around the node may remember what it likes.
        fakes = [vars(world).values(), world.journal, node.journal]
        kept = {id_.task_id for id_ in _reachable(node, AttemptId, without=fakes)}
    assert kept - remembered == set()


def _reachable(root: object, kind: type[AttemptId], *, without: list[object]) -> list[AttemptId]:
    seen = {id(one) for some in without for one in (some if isinstance(some, ValuesView) else (some,))}
    waiting, found = [root], []
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FrameType):
            continue
        seen.add(id(one))
        if isinstance(one, kind):
            found.append(one)
        # Of a function only what it closes over: its globals are those of a module.
        waiting += one.__closure__ or () if isinstance(one, FunctionType) else gc.get_referents(one)
    return found


@pytest.mark.minio
async def test_bytes_and_requests_of_an_upload(tmp_path: Path, minio: MinioServer) -> None:
    large, small_count = 12 * MIB, 50
    files = {f"small-{number}": b"x" * 1000 for number in range(small_count)} | {"large": secrets.token_bytes(large)}
    bundle = bundle_of(tmp_path, files)
    payload = large + small_count * 1000 + len(bundle.manifest_bytes)
    proxy = FaultProxy(minio.endpoint)
    access = minio.access(f"cost-{secrets.token_hex(4)}", endpoint=proxy.endpoint, part_bytes=5 * MIB)
    store = S3ResultStore(access)
    Minio(minio.endpoint, minio.access_key, minio.secret_key, secure=False).make_bucket(access.bucket)
    try:
        read_before = _read_bytes()
        await store.put(bundle)
        read, sent = _read_bytes() - read_before, proxy.bytes_sent
    finally:
        await store.close()
        proxy.close()
    assert read <= 1.1 * payload, "each file is read once"
    # A member of an archive has three blocks of 512 bytes as its head, and up to one after its end.
    framing = 2_000 * (len(proxy.requests) + small_count) + 4 * tarfile.RECORDSIZE
    assert sent <= payload + framing, "each byte is sent once, beside the headers"
    # The log and the small files in as many archives as are sent at a time, the parts of the large one and the manifest.
    counts = Counter(method for method, _ in proxy.requests)
    assert 1 <= counts.pop("HEAD") <= 4  # whether the store unpacks, asked with the first archives of a process
    assert counts == {
        "PUT": 4 + 3 + 1,
        "GET": 3,  # what is there before, what leftovers there are of the large one, what is there afterwards
        "POST": 2,  # the large one begins and ends
    }


async def test_bytes_of_a_copy_to_a_directory(tmp_path: Path) -> None:
    payload = 8 * MIB
    bundle = bundle_of(tmp_path / "work", {"large": secrets.token_bytes(payload)})
    store = FileResultStore(tmp_path / "stored")
    read_before, written_before = _read_bytes(), _written_bytes()
    await store.put(bundle)
    read, written = _read_bytes() - read_before, _written_bytes() - written_before
    await store.close()
    assert payload <= read <= 1.1 * payload
    assert payload <= written <= 1.1 * payload


@pytest.mark.engine
@pytest.mark.slow
async def test_wake_ups_of_an_idle_node(tmp_path: Path, node_id: str) -> None:
    """Without a task, with a heartbeat every 5 s. A slow machine turns the loop less often, never more."""
    master = await OldMaster().start()
    env = {"NODESERVICE_HEARTBEAT_SECONDS": "5"}
    module = "tests.integration.turning_node"
    node = NodeProcess(tmp_path / "node", node_id, ("--master", f"127.0.0.1:{master.port}"), env, module=module)
    await node.start()
    try:
        await asyncio.sleep(3)
        first = _turns(node)
        await asyncio.sleep(12)
        last = _turns(node)
    finally:
        await node.stop()
        await master.stop()
    per_minute = 60 * (last[0] - first[0]) / (last[1] - first[1])
    assert 60 <= per_minute <= 300


def _turns(node: NodeProcess) -> tuple[int, float]:
    told = [event for event in node.events() if event.get("event") == "loop.turns"][-1]
    return int(str(told["turns"])), float(str(told["at"]))


def _read_bytes() -> int:
    """Of this process, by read(2) and its like (proc(5)): files, not sockets, which Python reads by recv(2)."""
    return _io("rchar")


def _written_bytes() -> int:
    return _io("wchar")


def _io(name: str) -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines[name])
