"""A whole node in memory that can be killed after any journal write and started again on what survived."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from nodeservice.clock import SystemClock
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId, Phase, Resources, TaskRecord, TaskSpec
from nodeservice.core.retry import Backoff
from nodeservice.errors import TransientError
from nodeservice.gpu.health import HealthBoard
from nodeservice.gpu.locks import GpuLocks
from nodeservice.gpu.units import SharingPolicy
from nodeservice.journal.codec import decode_record, encode_record
from nodeservice.lifecycle.context import Context, Settings
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.gpu_keeper import GpuKeeper
from nodeservice.lifecycle.image_keeper import ImageKeeper
from nodeservice.lifecycle.logs import LogBook
from nodeservice.lifecycle.work import at_work
from nodeservice.lifecycle.workdir import WorkDirs
from nodeservice.limits.cgroup import NoTaskCgroups
from nodeservice.ports import Reading, TaskCgroups
from nodeservice.results.folder import ResultsFolder
from nodeservice.results.hand_over import Bundles
from nodeservice.telemetry.tally import Tally
from nodeservice.telemetry.tracing import NoTraceSink, new_trace_ids
from nodeservice.testing.fake_disk import FakeFreeSpace, FakeTaskDisk
from nodeservice.testing.fake_gpu import FakeGpuProvider, FakeOwners
from nodeservice.testing.fake_runtime import FakeRuntime
from nodeservice.testing.memory_journal import MemoryJournal
from nodeservice.testing.memory_store import MemoryResultStore

NODE = Resources(cpu_milli=4000, memory_bytes=2**32, disk_bytes=2**40)
ENGINE_ROOT = Path("/engine")
FAST = Backoff(first_seconds=0.001, max_seconds=0.01)


def spec(task_id: str = "t", **changes: object) -> TaskSpec:
    plain = TaskSpec(
        id=AttemptId(task_id),
        image="demo",
        request=Resources(cpu_milli=1000, memory_bytes=2**26, disk_bytes=2**20),
        pids_limit=10,
        fingerprint=f"f-{task_id}",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


class NoProcesses:
    """Containers of the fake runtime have none."""

    def readings(self, pid: int) -> Sequence[Reading]:
        return ()

    def network(self, pid: int) -> tuple[int, int] | None:
        return None


class RecordingUplink:
    """The master's side: what was reported, and acknowledgements that can be lost."""

    def __init__(self) -> None:
        self.reports: list[TaskRecord] = []
        self.down = False
        self.heard_at: datetime | None = None

    async def settled(self) -> None:
        return

    async def report(self, record: TaskRecord) -> None:
        if self.down:
            raise TransientError("master away", reason="MASTER_UNREACHABLE")
        self.reports.append(record)


class StoppingJournal:
    """A journal that stops for ever after a number of writes, as a killed process does."""

    def __init__(self, journal: MemoryJournal, writes: int | None, *, lost: bool) -> None:
        self._journal = journal
        self._left = writes
        self._lost = lost
        self.stopped = asyncio.Event()
        self.write_count = 0

    async def save(self, records: Sequence[TaskRecord]) -> None:
        self.write_count += 1
        if self._left is None or self.write_count < self._left:
            await self._journal.save(records)
            return
        if self.write_count == self._left and not self._lost:
            await self._journal.save(records)  # written, but nobody acts on it any more
        self.stopped.set()
        await asyncio.Event().wait()

    def stop(self) -> None:
        """Nothing more is written from now on."""
        self._left, self._lost = self.write_count, True
        self.stopped.set()

    def __getattr__(self, name: str) -> object:
        return getattr(self._journal, name)


class HeldJournal(MemoryJournal):
    """Fails while it is `full`, and hangs while it is not `free`."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.free = asyncio.Event()
        self.free.set()
        self.from_phase = Phase.PULLING
        """Earlier ones are written."""

    async def save(self, records: Sequence[TaskRecord]) -> None:
        if any(record.phase >= self.from_phase for record in records):
            await self.free.wait()
            if self.full:
                raise TransientError("the disk is full", reason="JOURNAL_UNWRITABLE")
        await super().save(records)


@dataclass
class World:
    """What outlives a killed node: engine, journal, store, disk, master."""

    path: Path
    runtime: FakeRuntime = field(default_factory=FakeRuntime)
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    store: MemoryResultStore = field(default_factory=MemoryResultStore)
    kept: MemoryResultStore = field(default_factory=MemoryResultStore)
    uplink: RecordingUplink = field(default_factory=RecordingUplink)
    give_up_seconds: float = 3600.0
    store_backoff: Backoff = FAST
    check_store_seconds: float = 0.02
    log_max_bytes: int = 2**20
    disk: FakeTaskDisk = field(default_factory=FakeTaskDisk)
    free_space: FakeFreeSpace = field(default_factory=FakeFreeSpace)
    keep_free_disk_bytes: int = 0
    settle_reports_seconds: float = 0.0
    """None: a killed process waits for nobody."""
    cgroups: TaskCgroups = field(default_factory=NoTaskCgroups)
    kill_patience_seconds: float = 5.0
    gpus: FakeGpuProvider = field(default_factory=FakeGpuProvider)
    owners: FakeOwners = field(default_factory=FakeOwners)
    gpu_policy: SharingPolicy = field(default_factory=SharingPolicy)
    gpu_ready_seconds: float = 0.2
    gpu_quarantine_seconds: float = 0.05
    gpu_lock_dir: Path | None = None
    """None: this node is alone on its host."""
    sweep_seconds: float = 600.0
    pull_timeout_seconds: float = 3600.0
    orphan_grace_seconds: float = 0.0
    results_retention_seconds: float | None = None
    salvage_retention_seconds: float | None = None
    dry_run: bool = False
    finished_retention_count: int = 2_000
    keeps_in_the_store: bool = False
    """The results directory of this host is the store."""


class LiveNode:
    """One process's life. `kill` stops it without any farewell."""

    def __init__(self, world: World, writes: int | None = None, *, lost: bool = False) -> None:
        self.world = world
        self.clock = SystemClock()
        self.tally = Tally(NoTraceSink())
        self.journal = StoppingJournal(world.journal, writes, lost=lost)
        self.driver = Driver(
            journal=self.journal,  # type: ignore[arg-type]
            ledger=Ledger(NODE, gpu_sharing_allowed=world.gpu_policy.allowed),
            clock=self.clock,
            traces=self.tally,
            finished_retention_count=world.finished_retention_count,
        )
        self.dirs = WorkDirs(world.path / "state")
        self.logs = LogBook(world.runtime, max_bytes=world.log_max_bytes, tail_bytes=100, resume_seconds=0.01)
        self.context = Context(
            runtime=world.runtime,
            cgroups=world.cgroups,
            disk=world.disk,
            free_space=world.free_space,
            store=world.store,
            fallback=None if world.keeps_in_the_store else world.kept,
            folder=ResultsFolder(world.path / "results"),
            uplink=world.uplink,
            clock=self.clock,
            logs=self.logs,
            dirs=self.dirs,
            bundles=Bundles(worker_id="node", results_dir=world.path / "results"),
            settings=Settings(
                worker_id="node",
                log_max_bytes=world.log_max_bytes,
                upload_give_up_seconds=world.give_up_seconds,
                step_backoff=FAST,
                report_backoff=FAST,
                check_store_seconds=world.check_store_seconds,
                store_trouble_seconds=0.01,
                first_check_seconds=0.2,
                store_backoff=world.store_backoff,
                pull_attempt_count=3,
                pull_timeout_seconds=world.pull_timeout_seconds,
                kill_patience_seconds=world.kill_patience_seconds,
                keep_host_seconds=0.02,
                settle_reports_seconds=world.settle_reports_seconds,
                keep_free_disk_bytes=world.keep_free_disk_bytes,
                image_look_seconds=world.sweep_seconds,
                sweep_seconds=world.sweep_seconds,
                orphan_grace_seconds=world.orphan_grace_seconds,
                results_retention_seconds=world.results_retention_seconds,
                salvage_retention_seconds=world.salvage_retention_seconds,
                janitor_dry_run=world.dry_run,
            ),
            encode_record=encode_record,
            processes=NoProcesses(),
            gpus=GpuKeeper(
                world.gpus,
                clock=self.clock,
                owners=world.owners,
                dirs=self.dirs,
                locks=GpuLocks(world.gpu_lock_dir or world.path / "locks", worker_id="node"),
                policy=world.gpu_policy,
                board=HealthBoard(quarantine_seconds=world.gpu_quarantine_seconds),
                look_seconds=0.01,
                ready_seconds=world.gpu_ready_seconds,
            ),
            images=ImageKeeper(
                runtime=world.runtime,
                journal=world.journal,
                clock=self.clock,
                free_space=world.free_space,
                engine_root=ENGINE_ROOT,
                high_percent=85,
                low_percent=80,
                dry_run=world.dry_run,
                on_removed=self.tally.note_removed_image,
            ),
            on_pull_progress=lambda _id: None,
            on_stored=self.tally.note_stored,
        )
        self.driver.on_change(lambda record: self.logs.wake(record.id))
        self.driver.on_forget(self.logs.forget)
        self._work = contextlib.AsyncExitStack()

    async def start(self) -> LiveNode:
        await self.driver.open()
        await self._work.enter_async_context(at_work(self.context, self.driver, decode_record, self.world.journal))
        return self

    async def kill(self) -> None:
        await self._work.aclose()
        self.context.gpus.close()  # as the kernel does with a process

    async def assign(self, task: TaskSpec) -> TaskRecord:
        return await self.driver.assign(task, trace=new_trace_ids(None), received_at=self.clock.now())

    async def until(self, check: Callable[[], bool], seconds: float = 30.0) -> None:
        async with asyncio.timeout(seconds):
            while not check():
                await asyncio.sleep(0.002)

    async def until_finished(self, id_: AttemptId) -> TaskRecord:
        await self.until(lambda: self.phase(id_) is Phase.FINISHED)
        record = self.driver.get(id_)
        assert record is not None
        return record

    def phase(self, id_: AttemptId) -> Phase | None:
        record = self.driver.get(id_)
        return record.phase if record else None


@contextlib.asynccontextmanager
async def living(world: World, writes: int | None = None, *, lost: bool = False) -> AsyncIterator[LiveNode]:
    node = await LiveNode(world, writes, lost=lost).start()
    try:
        yield node
    finally:
        await node.kill()


async def running(node: LiveNode, task: TaskSpec) -> str:
    """The id of its container."""
    await node.assign(task)
    await node.until(lambda: node.phase(task.id) is Phase.RUNNING)
    record = node.driver.get(task.id)
    assert record is not None
    assert record.container_id is not None
    return record.container_id
