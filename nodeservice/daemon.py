"""The composition root: the only place that names concrete adapters. Start, signals, and the order of the shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass

import grpc
import structlog

from nodeservice import __version__
from nodeservice.capacity.source import HostCapacity, Reserve
from nodeservice.clock import SystemClock
from nodeservice.config import NodeConfig
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId, Resources
from nodeservice.core.retry import Backoff
from nodeservice.errors import ConfigError, InvariantError, NodeServiceError
from nodeservice.gpu.nvml import NvmlGpuProvider
from nodeservice.journal.codec import decode_record, encode_record
from nodeservice.journal.lock import StateDirLock
from nodeservice.journal.sqlite import SqliteJournal
from nodeservice.lifecycle.context import Context, Settings
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.logs import LogBook
from nodeservice.lifecycle.recovery import recover
from nodeservice.lifecycle.runner import Runner
from nodeservice.lifecycle.workdir import WorkDirs
from nodeservice.limits.cgroup import task_cgroups
from nodeservice.limits.receipt import receipt
from nodeservice.ports import EngineFacts, NodeCapacity, PullProgress, ResultStore, TraceSink, Uplink
from nodeservice.results.access import S3Access
from nodeservice.results.choose import open_result_store
from nodeservice.results.hand_over import Bundles
from nodeservice.rpc.convert import TaskDefaults
from nodeservice.rpc.result_push import MasterPushResultStore
from nodeservice.rpc.server import NodeServicer
from nodeservice.rpc.status import NodeStatus
from nodeservice.rpc.tls import channel_credentials, server_credentials
from nodeservice.rpc.uplink import MasterLink
from nodeservice.runtime.docker import DockerRuntime
from nodeservice.telemetry.tracing import new_trace_ids, open_trace_sink
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)

DEFAULT_REGION = "us-east-1"
JOURNAL_NAME = "journal.sqlite"
MASTER_NOTE = "master_address"
_STOP_SECONDS = 1.0
"""For calls that are under way at the end; followers of logs are cut off then and ask again."""
_SERVER_OPTIONS = (
    # Masters may ping as often as they like: without these a busy one is sent away with "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)


@dataclass(slots=True, kw_only=True)
class Node:
    """The parts of a node that is not yet running."""

    config: NodeConfig
    clock: SystemClock
    runtime: DockerRuntime
    capacity: HostCapacity
    gpus: NvmlGpuProvider
    journal: SqliteJournal
    traces: TraceSink
    driver: Driver
    logs: LogBook
    dirs: WorkDirs
    lock: StateDirLock

    async def close(self) -> None:
        """Give back everything that `build` took, in reverse order."""
        await self.runtime.close()
        await self.gpus.close()
        await self.journal.close()
        await self.traces.close()
        self.lock.release()


async def build(config: NodeConfig) -> Node:
    """Lock the state directory, open the journal, look at the host. Raises ConfigError and NodeServiceError."""
    try:
        for directory in (config.state_dir, config.results_dir):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be made: {error.strerror}", field="state_dir", hint="choose a writable directory"
        ) from error
    lock = StateDirLock(config.state_dir)
    lock.acquire()
    clock = SystemClock()
    runtime = DockerRuntime(
        base_url=config.docker_host,
        pull_total_timeout_seconds=config.pull_timeout_seconds,
        pull_inactivity_timeout_seconds=config.pull_inactivity_seconds,
        relist_seconds=config.relist_seconds,
        node_id=config.worker_id,
    )
    gpus = NvmlGpuProvider()
    capacity = HostCapacity(state_dir=config.state_dir, engine=runtime.facts, gpus=gpus, reserve=_reserve(config))
    journal = SqliteJournal(config.state_dir / JOURNAL_NAME)
    traces = open_trace_sink(config.otlp_endpoint, worker_id=config.worker_id, insecure=config.otlp_insecure)
    seen = await capacity.read()
    driver = Driver(
        journal=journal,
        ledger=Ledger(seen.allocatable, [gpu.uuid for gpu in seen.host.gpus.gpus]),
        clock=clock,
        traces=traces,
        finished_retention_count=config.finished_retention_count,
        finished_retention_seconds=config.finished_retention_seconds,
    )
    dirs = WorkDirs(config.state_dir)
    logs = LogBook(runtime, max_bytes=config.log_max_bytes, tail_bytes=config.log_tail_bytes)
    driver.on_change(lambda record: logs.wake(record.id))
    driver.on_forget(dirs.remove_log)
    driver.on_forget(logs.forget)
    await driver.open()
    return Node(
        config=config, clock=clock, runtime=runtime, capacity=capacity, gpus=gpus, journal=journal, traces=traces,
        driver=driver, logs=logs, dirs=dirs, lock=lock,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def working(
    node: Node,
    *,
    uplink: Uplink,
    store: ResultStore,
    facts: EngineFacts,
    on_pull_progress: Callable[[AttemptId], PullProgress | None] = lambda _id: None,
    retries_kept_results: bool = True,
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Drive attempts while the block lasts. Containers that run at its end run on."""
    config = node.config
    cgroups = task_cgroups(node_id=config.worker_id, facts=facts)
    fallback = open_result_store(config.results_dir.absolute().as_uri())
    context = Context(
        runtime=node.runtime,
        cgroups=cgroups,
        store=store,
        fallback=None if config.result_store == "file" else fallback,
        uplink=uplink,
        clock=node.clock,
        logs=node.logs,
        dirs=node.dirs,
        bundles=Bundles(worker_id=config.worker_id, results_dir=config.results_dir),
        settings=Settings(
            worker_id=config.worker_id,
            log_max_bytes=config.log_max_bytes,
            upload_give_up_seconds=config.upload_give_up_seconds,
            retries_kept_results=retries_kept_results,
            report_backoff=Backoff(
                first_seconds=config.report_backoff_min_seconds, max_seconds=config.report_backoff_max_seconds
            ),
        ),
        encode_record=encode_record,
        receipt=lambda spec, kernel, engine: receipt(spec, kernel=kernel, engine=engine),
        on_pull_progress=on_pull_progress,
    )
    runner = Runner(context, node.driver)
    node.driver.connect(runner.start)
    tasks = [
        asyncio.create_task(node.driver.run(), name="driver"),
        asyncio.create_task(recover(context, node.driver, decode_record), name="recovery"),
    ]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await runner.close()
        await store.close()
        await fallback.close()
        await cgroups.close()


async def look(config: NodeConfig) -> tuple[NodeCapacity, Resources]:
    """What this host has, and what of it no task holds. A daemon that runs here is asked through its journal."""
    runtime = DockerRuntime(base_url=config.docker_host, node_id=config.worker_id)
    gpus = NvmlGpuProvider()
    capacity = HostCapacity(state_dir=config.state_dir, engine=runtime.facts, gpus=gpus, reserve=_reserve(config))
    try:
        seen = await capacity.read()
        ledger = Ledger(seen.allocatable, [gpu.uuid for gpu in seen.host.gpus.gpus])
        path = config.state_dir / JOURNAL_NAME
        if path.exists():
            journal = SqliteJournal(path)
            try:
                ledger.restore(await journal.load())
            finally:
                await journal.close()
        return seen, ledger.free
    finally:
        await runtime.close()
        await gpus.close()


async def serve(config: NodeConfig, *, on_ready: Callable[[int], None] | None = None) -> None:
    """Run the node until SIGTERM or SIGINT. `on_ready` gets the bound port."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    node = await build(config)
    try:
        facts = await _until(stopping, _engine(node))
        if facts is not None:
            await _serve(node, facts, stopping, on_ready)
    finally:
        await node.close()
        log.info("node.stopped", worker_id=config.worker_id)


async def _serve(
    node: Node, facts: EngineFacts, stopping: asyncio.Event, on_ready: Callable[[int], None] | None
) -> None:
    config = node.config
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    port = _bind(server, config)
    status = NodeStatus(
        worker_id=config.worker_id,
        advertise=config.advertise or "",
        listen=f"{config.listen.rpartition(':')[0]}:{port}",
        version=__version__,
        capacity=node.capacity,
        driver=node.driver,
    )
    credentials = None
    if not config.insecure:
        credentials = channel_credentials(config.tls_ca, config.tls_cert, config.tls_key)
    link = MasterLink(
        status,
        clock=node.clock,
        credentials=credentials,
        heartbeat_seconds=config.heartbeat_seconds,
        call_deadline_seconds=config.call_deadline_seconds,
        backoff=Backoff(
            first_seconds=config.connect_backoff_min_seconds, max_seconds=config.connect_backoff_max_seconds
        ),
    )
    known_master = config.master or await node.journal.get_note(MASTER_NOTE)
    if known_master:
        link.set_master(known_master)
    servicer = NodeServicer(
        driver=node.driver,
        logs=node.logs,
        dirs=node.dirs,
        clock=node.clock,
        defaults=task_defaults(config),
        new_trace=new_trace_ids,
        on_master=lambda address: _master_called(node, link, address),
    )
    pb_grpc.add_MasterWorkerServicer_to_server(servicer, server)
    async with working(node, uplink=link, store=_store(config, link), facts=facts) as tasks:
        tasks.append(asyncio.create_task(link.run(), name="master link"))
        await server.start()
        log.info("node.ready", worker_id=config.worker_id, port=port, master=known_master, version=__version__)
        if on_ready is not None:
            on_ready(port)
        try:
            await _watch_over(tasks, stopping)
        finally:
            node.driver.draining = True
            await server.stop(grace=_STOP_SECONDS if stopping.is_set() else None)


async def _watch_over(tasks: list[asyncio.Task[None]], stopping: asyncio.Event) -> None:
    """Wait for the signal; a part that fails ends the node with its error."""
    waiter = asyncio.create_task(stopping.wait(), name="signals")
    pending: set[asyncio.Task[object]] = {waiter, *tasks}
    try:
        while not waiter.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        waiter.cancel()


def _master_called(node: Node, link: MasterLink, address: str) -> None:
    """A configured master's address wins over what a caller says of itself; else the caller's is remembered."""
    if node.config.master:
        link.set_master(node.config.master)
        return
    if address != link.address:
        task = asyncio.create_task(node.journal.set_note(MASTER_NOTE, address))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
    link.set_master(address)


async def _engine(node: Node) -> EngineFacts:
    """The engine's facts, as soon as it answers."""
    told = False
    while True:
        try:
            return await node.runtime.facts()
        except NodeServiceError as error:
            if not told:
                log.warning("engine.awaited", error=str(error))
            told = True
            await node.clock.sleep(2.0)


async def _until(stopping: asyncio.Event, work: Coroutine[None, None, EngineFacts]) -> EngineFacts | None:
    """The result, or None when the node is told to stop first."""
    task = asyncio.create_task(work)
    waiter = asyncio.create_task(stopping.wait())
    await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if task.done():
        return task.result()
    task.cancel()
    return None


def _bind(server: grpc.aio.Server, config: NodeConfig) -> int:
    try:
        if config.insecure:
            port = server.add_insecure_port(config.listen)
        else:
            if config.tls_cert is None or config.tls_key is None:
                raise ConfigError("tls_cert and tls_key are needed", field="tls_cert", hint="or set insecure")
            port = server.add_secure_port(
                config.listen, server_credentials(config.tls_cert, config.tls_key, config.tls_ca)
            )
    except RuntimeError as error:
        raise ConfigError(
            f"listen is {config.listen!r}, which cannot be bound", field="listen", hint="choose a free port"
        ) from error
    return int(port)


def _store(config: NodeConfig, link: MasterLink) -> ResultStore:
    if config.result_store == "master":
        return MasterPushResultStore(link.stub)
    return open_store(config)


def open_store(config: NodeConfig) -> ResultStore:
    """The configured store, other than the push over gRPC. Raises ConfigError."""
    match config.result_store:
        case "s3":
            if config.minio is None or config.minio_access_key is None or config.minio_secret_key is None:
                raise InvariantError("a configuration with result_store s3 has endpoint and credentials")
            access = S3Access(
                endpoint=config.minio,
                bucket=config.bucket,
                access_key=config.minio_access_key.get_secret_value(),
                secret_key=config.minio_secret_key.get_secret_value(),
                secure=config.minio_secure,
                region=config.minio_region or DEFAULT_REGION,
            )
            return open_result_store(f"s3://{config.bucket}", s3=access)
        case "http":
            if config.http_upload_url is None:
                raise InvariantError("a configuration with result_store http has a URL")
            return open_result_store(
                config.http_upload_url, http_limit_bytes=config.http_upload_limit_bytes, ca_file=config.tls_ca
            )
        case _:
            return open_result_store(config.results_dir.absolute().as_uri())


def task_defaults(config: NodeConfig) -> TaskDefaults:
    return TaskDefaults(
        request=Resources(
            cpu_milli=config.default_cpu_milli,
            memory_bytes=config.default_memory_bytes,
            disk_bytes=config.default_disk_bytes,
        ),
        pids_limit=config.default_pids_limit,
        timeout_seconds=config.default_timeout_seconds,
        grace_seconds=config.default_grace_seconds,
    )


def _reserve(config: NodeConfig) -> Reserve:
    return Reserve(
        cpu_milli=config.reserve_cpu_milli,
        memory_bytes=config.reserve_memory_bytes,
        disk_bytes=config.reserve_disk_bytes,
    )
