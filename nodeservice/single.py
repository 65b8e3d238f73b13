"""One task on this machine, without a master, through the same lifecycle as on a node."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import structlog

from nodeservice.config import NodeConfig
from nodeservice.core.model import AttemptId, Manifest, Phase, StopCause, StopRequest, TaskRecord, TaskSpec
from nodeservice.daemon.node import Node, build, working
from nodeservice.daemon.settings import open_store
from nodeservice.errors import NodeServiceError, RequestError, TransientError
from nodeservice.gpu.locks import GpuLocks
from nodeservice.journal.lock import StateDirLock
from nodeservice.lifecycle.removal import remove_tree
from nodeservice.lifecycle.work import while_all_work
from nodeservice.lifecycle.workdir import SALVAGE, WorkDirs
from nodeservice.limits.cgroup import task_cgroups
from nodeservice.limits.disk import open_task_disk
from nodeservice.results.layout import MANIFEST_NAME
from nodeservice.results.manifest import read_local
from nodeservice.runtime.docker import DockerRuntime
from nodeservice.telemetry.tracing import new_trace_ids

log = structlog.get_logger(__name__)
T = TypeVar("T")

_ENGINE_SECONDS = 10.0
_TURN_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    record: TaskRecord
    manifest: Manifest | None


class LocalUplink:
    """The outcome is read from the record by the caller, so there is nobody to report to."""

    heard_at: datetime | None = None

    async def settled(self) -> None:
        return

    async def report(self, record: TaskRecord) -> None:
        return


async def run_once(
    config: NodeConfig,
    spec: TaskSpec,
    *,
    traceparent: str | None,
    on_change: Callable[[TaskRecord], None],
    on_log: Callable[[bytes], None],
    on_pull: Callable[[int, int], None],
    say: Callable[[str], None],
) -> Finished:
    """Run to the end. SIGINT, SIGTERM or SIGHUP cancels the task and still collects; then the outcome is CANCELLED.

    One more kills the task instead of waiting for its grace period. `say` gets what a person wants to know then.

    `config.state_dir` must be this run's own. Raises RequestError or CapacityError when refused, TransientError
    (ENGINE_UNAVAILABLE) when no engine answers.
    """
    _refuse_taken(config, spec)
    node = await build(config)
    interrupts = _Interrupts(node, say)
    manifest: list[Manifest] = []

    def note(record: TaskRecord) -> None:
        if record.collected is not None and not manifest:
            found = read_local(node.dirs.root(record.id))
            if found is not None:
                manifest.append(found[0])
        on_change(record)

    node.driver.on_change(note)
    with interrupts.caught():
        try:
            async with asyncio.timeout(_ENGINE_SECONDS):
                facts = await node.runtime.facts()
            async with working(
                node,
                uplink=LocalUplink(),
                store=open_store(config),
                facts=facts,
                on_pull_progress=lambda _id: on_pull,
                retries_kept_results=False,
            ) as parts:
                received_at = node.clock.now()
                trace = new_trace_ids(traceparent)
                async with _choosing_gpus(node, spec):
                    assigning = node.driver.assign(spec, trace=trace, received_at=received_at)
                    record = await while_all_work(parts, assigning)
                interrupts.accepted(record.id)
                await while_all_work(parts, _follow(node, record, on_log))
                done = node.driver.get(spec.id) or record
                return Finished(record=done, manifest=manifest[0] if manifest else None)
        except TimeoutError as error:
            raise TransientError(
                f"the engine did not answer within {_ENGINE_SECONDS:g} s",
                reason="ENGINE_UNAVAILABLE",
                hint="look at its log",
            ) from error
        finally:
            await node.close()


def _refuse_taken(config: NodeConfig, spec: TaskSpec) -> None:
    """Results are never replaced: what is there already would be found only after the task has run, and for ever."""
    taken = config.results_dir.absolute() / spec.id.task_id / str(spec.id.attempt)
    if config.result_store == "file" and taken.exists():
        raise RequestError(
            f"task_id is {spec.id.task_id}, of which there are results in {taken}",
            reason="TASK_CONFLICT",
            field="task_id",
            hint="choose another, or move them away",
        )


@contextlib.asynccontextmanager
async def _choosing_gpus(node: Node, spec: TaskSpec) -> AsyncIterator[None]:
    """One run at a time, so that those that are started together choose different ones; one that hangs is not waited for."""
    turn = GpuLocks(node.config.gpu_lock_dir, worker_id=node.config.worker_id)
    try:
        if spec.request.gpu_count or spec.gpu.share:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TURN_SECONDS):
                    while turn.take(spec.id, ["turn"]):
                        await node.clock.sleep(0.02)
            await node.keeper.look()
        yield
    finally:
        turn.close()


class _Interrupts:
    """SIGINT, SIGTERM and SIGHUP while one task runs: the first cancels it, one more kills it at once.

    One that comes before the task is accepted cancels it as soon as it is; one more then gives up altogether.
    """

    def __init__(self, node: Node, say: Callable[[str], None]) -> None:
        self._node = node
        self._say = say
        self._main = asyncio.current_task()
        self._id: AttemptId | None = None
        self._count = 0
        self._reactions: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected before it is done

    def accepted(self, id_: AttemptId) -> None:
        self._id = id_
        if self._count:
            self._react(self._cancel(id_))

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        # nohup sets SIGHUP to be ignored, and means it.
        numbers = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in numbers:
            loop.add_signal_handler(number, self._interrupted)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _interrupted(self) -> None:
        self._count += 1
        if self._id is not None:
            self._react(self._cancel(self._id) if self._count == 1 else self._kill(self._id))
        elif self._count > 1 and self._main is not None:
            self._main.cancel()

    def _react(self, reaction: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(reaction)
        self._reactions.add(task)
        task.add_done_callback(self._reactions.discard)

    async def _cancel(self, id_: AttemptId) -> None:
        record = self._node.driver.get(id_)
        if record is not None and record.phase < Phase.COLLECTING:
            self._say(f"cancelling; the task has {record.spec.grace_seconds:g} s to end. Once more kills it")
            await _cancel(self._node, id_, "Cancelled by a signal.")
        else:
            self._say("the task has ended; its results are being stored, which ends by itself")

    async def _kill(self, id_: AttemptId) -> None:
        record = self._node.driver.get(id_)
        if record is not None and record.phase < Phase.COLLECTING and record.container_id is not None:
            with contextlib.suppress(NodeServiceError):  # then the grace period decides
                await self._node.runtime.kill(record.container_id)


async def _cancel(node: Node, id_: AttemptId, why: str) -> None:
    stop = StopRequest(cause=StopCause.CANCELLED, requested_at=node.clock.now(), message=why)
    await node.driver.request_stop(id_, stop)


async def _follow(node: Node, record: TaskRecord, on_log: Callable[[bytes], None]) -> None:
    """Pass the log on as it comes, until all is cleaned up (or kept here for a store that is away).

    Where nobody takes the log any more, the task is cancelled, as a program in a pipe would end, and followed to its end.
    """
    path = node.dirs.log(record.id)
    position = 0
    listens = True
    while True:
        signal_ = node.logs.changed(record.id)
        current = node.driver.get(record.id) or record
        over = current.phase > Phase.CLEANING
        if listens:
            try:
                position = _pass_on(path, position, on_log)
            except OSError as error:
                listens = False
                if current.phase < Phase.COLLECTING:
                    await _cancel(node, record.id, f"Cancelled, since nobody takes its log any more: {error.strerror}.")
        if over:
            return
        await signal_.wait()


def _pass_on(path: Path, position: int, on_log: Callable[[bytes], None]) -> int:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
        stream.seek(position)
        while block := stream.read(256 * 1024):
            on_log(block)
            position += len(block)
    return position


async def sweep_dead_runs(
    runs_dir: Path, *, docker_host: str | None, say: Callable[[str], None] = lambda _words: None
) -> None:
    """Remove what runs that were killed left behind: containers, cgroups, directories. A run that lives holds its lock.

    `say` gets, in words for a person, of which runs a container was removed.
    """
    if not runs_dir.is_dir():
        return
    for directory in sorted(runs_dir.iterdir()):
        if not directory.is_dir() or os.listdir(directory) == [SALVAGE]:
            continue
        lock = StateDirLock(directory)
        try:
            lock.acquire()
        except NodeServiceError:
            continue
        try:
            runtime = DockerRuntime(base_url=docker_host, node_id=directory.name)
            try:
                for container in await runtime.list_owned(directory.name):
                    await runtime.remove(container.id)
                    was = "which still ran" if container.is_running else "which had ended"
                    say(f"removed the container of {directory.name}, {was}: its run was killed and left it")
                await _remove_cgroup(runtime, directory.name)
                await _lift_quotas(directory)
                kept = await asyncio.to_thread(remove_run, directory)
                log.info("run.swept", directory=str(directory))
                if kept is not None:
                    say(
                        f"what the task of {directory.name} wrote stays in {kept}: its run was killed before it was stored"
                    )
            except TransientError as error:
                log.warning("run.not_swept", directory=str(directory), error=str(error))
                return  # the engine would not answer for the others either
            except (NodeServiceError, OSError) as error:
                log.warning("run.not_swept", directory=str(directory), error=str(error))
            finally:
                await runtime.close()
        finally:
            lock.release()


def remove_run(directory: Path) -> Path | None:
    """Remove what a run that ended wrote, but never results that were not stored. Where these are, if there are any."""
    dirs = WorkDirs(directory)
    for id_ in dirs.all():
        if (dirs.root(id_) / MANIFEST_NAME).exists():  # collected, and not cleaned up since
            dirs.salvage(id_)
    salvage = directory / SALVAGE
    if not salvage.exists():
        remove_tree(directory)
        return None
    for entry in directory.iterdir():
        if entry.is_dir() and entry != salvage:
            remove_tree(entry)
        elif entry != salvage:
            entry.unlink()
    return salvage


async def _remove_cgroup(runtime: DockerRuntime, run_id: str) -> None:
    """That of the run's one task; the one above it goes with it."""
    cgroups = task_cgroups(node_id=run_id, facts=await runtime.facts())
    try:
        await cgroups.remove(AttemptId(run_id))
    finally:
        await cgroups.close()


async def _lift_quotas(state_dir: Path) -> None:
    """They would stay where the directories that they bound are gone."""
    dirs, disk = WorkDirs(state_dir), open_task_disk(state_dir, None)
    try:
        for id_ in dirs.all():
            await disk.remove(id_, work=dirs.results(id_))
    finally:
        await disk.close()
