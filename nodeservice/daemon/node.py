"""A node's parts, put together: which adapter stands behind which port, and what is given back in which order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from nodeservice.capacity.source import HostCapacity
from nodeservice.capacity.topology import read_cpus
from nodeservice.clock import SystemClock
from nodeservice.config import NodeConfig
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId
from nodeservice.core.retry import Backoff
from nodeservice.daemon.settings import reserve
from nodeservice.errors import ConfigError
from nodeservice.gpu.nvml import NvmlGpuProvider
from nodeservice.journal.codec import decode_record, encode_record
from nodeservice.journal.lock import StateDirLock
from nodeservice.journal.sqlite import SqliteJournal
from nodeservice.lifecycle.context import Context, Settings
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.logs import LogBook
from nodeservice.lifecycle.work import at_work
from nodeservice.lifecycle.workdir import WorkDirs
from nodeservice.limits.cgroup import task_cgroups
from nodeservice.limits.disk import open_task_disk
from nodeservice.limits.free_space import DirectoriesFreeSpace
from nodeservice.limits.process import ProcReader
from nodeservice.limits.receipt import receipt
from nodeservice.ports import EngineFacts, PullProgress, ResultStore, TraceSink, Uplink
from nodeservice.results.choose import open_result_store
from nodeservice.results.hand_over import Bundles
from nodeservice.runtime.docker import DockerRuntime
from nodeservice.telemetry.tracing import open_trace_sink

JOURNAL_NAME = "journal.sqlite"


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
        await self.capacity.close()
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
    capacity = HostCapacity(state_dir=config.state_dir, engine=runtime.facts, gpus=gpus, reserve=reserve(config))
    journal = SqliteJournal(config.state_dir / JOURNAL_NAME)
    traces = open_trace_sink(config.otlp_endpoint, worker_id=config.worker_id, insecure=config.otlp_insecure)
    seen = await capacity.read()
    driver = Driver(
        journal=journal,
        ledger=Ledger(seen.allocatable, [gpu.uuid for gpu in seen.host.gpus.gpus], read_cpus()),
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
    directories = [config.state_dir, config.results_dir]
    cgroups = task_cgroups(node_id=config.worker_id, facts=facts, directories=directories)
    disk = open_task_disk(
        config.state_dir,
        facts.root_dir,
        engine_passes_ext4=facts.has_sys_resource is not False,
        processes=cgroups.processes,
    )
    free_space = DirectoriesFreeSpace([*directories, facts.root_dir])
    fallback = open_result_store(config.results_dir.absolute().as_uri())
    context = Context(
        runtime=node.runtime,
        cgroups=cgroups,
        disk=disk,
        free_space=free_space,
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
            pull_timeout_seconds=config.pull_timeout_seconds,
            upload_give_up_seconds=config.upload_give_up_seconds,
            retries_kept_results=retries_kept_results,
            keep_free_disk_bytes=config.keep_free_disk_bytes,
            report_backoff=Backoff(
                first_seconds=config.report_backoff_min_seconds, max_seconds=config.report_backoff_max_seconds
            ),
        ),
        encode_record=encode_record,
        receipt=receipt,
        processes=ProcReader(),
        on_pull_progress=on_pull_progress,
    )
    try:
        async with at_work(context, node.driver, decode_record) as tasks:
            yield tasks
    finally:
        await store.close()
        await fallback.close()
        await cgroups.close()
        await disk.close()
        await free_space.close()
