"""A node's parts, put together: which adapter stands behind which port, and what is given back in which order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from nodeservice.capacity.source import HostCapacity
from nodeservice.clock import SystemClock
from nodeservice.config import NodeConfig
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId
from nodeservice.core.retry import Backoff
from nodeservice.daemon.fault_points import armed
from nodeservice.daemon.host_policy import check_reserve, doubts, reserve, sharing_policy
from nodeservice.daemon.host_stops import HostStops
from nodeservice.daemon.settings import open_results_dir, results_mount
from nodeservice.errors import TransientError
from nodeservice.gpu.health import HealthBoard
from nodeservice.gpu.locks import GpuLocks
from nodeservice.gpu.nvml import NvmlGpuProvider
from nodeservice.journal.codec import decode_record, encode_record
from nodeservice.journal.lock import StateDirLock, not_writable
from nodeservice.journal.sqlite import JOURNAL_NAME, SqliteJournal
from nodeservice.lifecycle.allocatable_disk import AllocatableDisk
from nodeservice.lifecycle.context import Context, Settings
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.gpu_keeper import GpuKeeper
from nodeservice.lifecycle.image_keeper import ImageKeeper
from nodeservice.lifecycle.logs import LogBook
from nodeservice.lifecycle.node_mode import ModeKeeper
from nodeservice.lifecycle.work import at_work
from nodeservice.lifecycle.workdir import WorkDirs
from nodeservice.limits.cgroup import task_cgroups
from nodeservice.limits.device_nodes import gpu_nodes_of
from nodeservice.limits.disk import open_task_disk
from nodeservice.limits.free_space import DirectoriesFreeSpace
from nodeservice.limits.owners import ProcOwners
from nodeservice.limits.process import ProcReader
from nodeservice.ports import EngineFacts, PullProgress, ResultStore, Uplink
from nodeservice.results.folder import ResultsFolder
from nodeservice.results.hand_over import Bundles
from nodeservice.runtime.docker import DockerRuntime
from nodeservice.telemetry.tally import Tally
from nodeservice.telemetry.tracing import open_trace_sink

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Node:
    """The parts of a node that is not yet running."""

    config: NodeConfig
    clock: SystemClock
    runtime: DockerRuntime
    capacity: HostCapacity
    disk: AllocatableDisk
    gpus: NvmlGpuProvider
    keeper: GpuKeeper
    mode: ModeKeeper
    journal: SqliteJournal
    tally: Tally
    driver: Driver
    logs: LogBook
    dirs: WorkDirs
    host_stops: HostStops
    in_doubt: frozenset[AttemptId]
    lock: StateDirLock

    async def close(self) -> None:
        """Give back everything that `build` took, in reverse order."""
        await self.runtime.close()
        await self.capacity.close()
        await self.gpus.close()
        self.keeper.close()
        await self.journal.close()
        await self.tally.close()
        self.lock.release()


async def build(config: NodeConfig) -> Node:
    """Lock the state directory, open the journal, look at the host. Raises ConfigError and NodeServiceError."""
    _make("state_dir", config.state_dir, 0o755)
    try:
        results_mount(config).check()
    except TransientError as error:
        # Nothing is to be made in its place; it is waited for as any store that is away.
        log.error("results_dir.away", error=str(error))
    else:
        _make("results_dir", config.results_dir, 0o750)
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
    dirs = WorkDirs(config.state_dir)
    gpus = NvmlGpuProvider(poll_seconds=config.gpu_poll_seconds)
    keeper = GpuKeeper(
        gpus,
        clock=clock,
        owners=ProcOwners(),
        dirs=dirs,
        locks=GpuLocks(config.gpu_lock_dir, worker_id=config.worker_id),
        policy=sharing_policy(config),
        board=HealthBoard(quarantine_seconds=config.gpu_quarantine_seconds),
        look_seconds=config.gpu_poll_seconds,
    )
    capacity = HostCapacity(
        state_dir=config.state_dir, engine=runtime.facts, gpus=gpus, units=keeper.units, reserve=reserve(config)
    )
    journal = armed(SqliteJournal(config.state_dir / JOURNAL_NAME), "journal")
    tally = Tally(open_trace_sink(config.otlp_endpoint, worker_id=config.worker_id, insecure=config.otlp_insecure))
    seen = await capacity.read()
    check_reserve(config, seen.capacity)
    driver = Driver(
        journal=journal,
        ledger=Ledger(seen.allocatable, seen.gpu_units, seen.cpus, gpu_sharing_allowed=config.gpu_sharing == "watched"),
        clock=clock,
        traces=tally,
        finished_retention_count=config.finished_retention_count,
        finished_retention_seconds=config.finished_retention_seconds,
    )
    driver.warnings.update(doubts(config))
    for name, words in driver.warnings.items():
        log.warning("config.doubtful", name=name, words=words)
    logs = LogBook(runtime, max_bytes=config.log_max_bytes, tail_bytes=config.log_tail_bytes)
    driver.on_change(lambda record: logs.wake(record.id))
    driver.on_forget(dirs.remove_log)
    driver.on_forget(logs.forget)
    mode = ModeKeeper(driver, journal, clock)
    await driver.open()
    await mode.open()
    disk = AllocatableDisk(driver, capacity, journal)
    await disk.open()
    host_stops = HostStops(journal)
    runtime.ended_with_the_host(await host_stops.ended())
    in_doubt = await host_stops.in_doubt(driver.live())
    return Node(
        config=config, clock=clock, runtime=runtime, capacity=capacity, gpus=gpus, journal=journal, tally=tally,
        driver=driver, logs=logs, dirs=dirs, host_stops=host_stops, lock=lock, keeper=keeper, mode=mode,
        disk=disk, in_doubt=in_doubt,
    )  # fmt: skip


def _make(field: str, directory: Path, rights: int) -> None:
    try:
        directory.mkdir(mode=rights, parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(field, directory, error) from error


@contextlib.asynccontextmanager
async def working(
    node: Node,
    *,
    uplink: Uplink,
    store: ResultStore,
    facts: EngineFacts,
    on_pull_progress: Callable[[AttemptId], PullProgress | None] = lambda _id: None,
    on_capacity_change: Callable[[], None] = lambda: None,
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
    fallback = open_results_dir(config)
    context = Context(
        runtime=armed(node.runtime, "runtime"),
        cgroups=armed(cgroups, "cgroups"),
        disk=armed(disk, "disk"),
        free_space=free_space,
        store=armed(store, "store"),
        fallback=None if config.result_store == "file" else armed(fallback, "fallback"),
        folder=ResultsFolder(config.results_dir),
        uplink=armed(uplink, "uplink"),
        clock=node.clock,
        logs=node.logs,
        dirs=node.dirs,
        bundles=armed(
            Bundles(worker_id=config.worker_id, results_dir=config.results_dir, mount=results_mount(config)), "bundles"
        ),
        settings=Settings(
            worker_id=config.worker_id,
            log_max_bytes=config.log_max_bytes,
            pull_timeout_seconds=config.pull_timeout_seconds,
            upload_give_up_seconds=config.upload_give_up_seconds,
            retries_kept_results=retries_kept_results,
            keep_free_disk_bytes=config.keep_free_disk_bytes,
            gpu_mps_pipe_dir=config.gpu_mps_pipe_dir,
            sweep_seconds=config.sweep_seconds,
            orphan_grace_seconds=config.orphan_grace_seconds,
            results_retention_seconds=config.results_retention_seconds,
            salvage_retention_seconds=config.salvage_retention_seconds,
            janitor_dry_run=config.janitor_dry_run,
            report_backoff=Backoff(
                first_seconds=config.report_backoff_min_seconds, max_seconds=config.report_backoff_max_seconds
            ),
        ),
        encode_record=encode_record,
        in_doubt=node.in_doubt,
        processes=ProcReader(),
        gpus=node.keeper,
        images=ImageKeeper(
            runtime=node.runtime,
            journal=node.journal,
            clock=node.clock,
            free_space=free_space,
            engine_root=facts.root_dir,
            high_percent=config.image_high_percent,
            low_percent=config.image_low_percent,
            dry_run=config.janitor_dry_run,
            on_removed=node.tally.note_removed_image,
        ),
        on_pull_progress=on_pull_progress,
        on_capacity_change=on_capacity_change,
        on_stored=node.tally.note_stored,
        gpu_nodes=lambda: gpu_nodes_of(node.keeper.inventory),
    )
    try:
        async with at_work(context, node.driver, decode_record, node.journal) as tasks:
            yield tasks
    finally:
        await store.close()
        await fallback.close()
        await cgroups.close()
        await disk.close()
        await free_space.close()
