"""One task on this machine, without a master, through the same lifecycle as on a node."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from nodeservice import daemon
from nodeservice.config import NodeConfig
from nodeservice.core.model import Manifest, Phase, StopCause, StopRequest, TaskRecord, TaskSpec
from nodeservice.errors import ConfigError, NodeServiceError, TransientError
from nodeservice.journal.lock import StateDirLock
from nodeservice.lifecycle.removal import remove_tree
from nodeservice.results.manifest import read_local
from nodeservice.runtime.docker import DockerRuntime
from nodeservice.telemetry.tracing import new_trace_ids

log = structlog.get_logger(__name__)
T = TypeVar("T")

_ENGINE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    record: TaskRecord
    manifest: Manifest | None


class _LocalUplink:
    """The outcome is read from the record by the caller, so there is nobody to report to."""

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
) -> Finished:
    """Run to the end. The first SIGINT or SIGTERM cancels the task and still collects; then the outcome is CANCELLED.

    `config.state_dir` must be this run's own. Raises RequestError or CapacityError when refused, TransientError
    (ENGINE_UNAVAILABLE) when no engine answers.
    """
    node = await daemon.build(config)
    manifest: list[Manifest] = []

    def note(record: TaskRecord) -> None:
        if record.collected is not None and not manifest:
            found = read_local(node.dirs.root(record.id))
            if found is not None:
                manifest.append(found[0])
        on_change(record)

    node.driver.on_change(note)
    try:
        facts = await asyncio.wait_for(node.runtime.facts(), _ENGINE_SECONDS)
        async with daemon.working(
            node,
            uplink=_LocalUplink(),
            store=daemon.open_store(config),
            facts=facts,
            on_pull_progress=lambda _id: on_pull,
            retries_kept_results=False,
        ) as parts:
            received_at = node.clock.now()
            trace = new_trace_ids(traceparent)
            record = await _while_all_work(parts, node.driver.assign(spec, trace=trace, received_at=received_at))
            with _cancelled_by_signals(lambda: _cancel(node, record, "Cancelled by a signal.")):
                await _while_all_work(parts, _follow(node, record, on_log))
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


async def _while_all_work(parts: Sequence[asyncio.Task[None]], work: Coroutine[None, None, T]) -> T:
    """The result of `work`. Raises the error of a part of the node that failed meanwhile: nothing would move any more."""
    task = asyncio.create_task(work)
    waiting: set[asyncio.Task[Any]] = {task, *parts}
    try:
        while not task.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for part in done - {task}:
                part.result()
        return task.result()
    finally:
        task.cancel()


async def _cancel(node: daemon.Node, record: TaskRecord, why: str) -> None:
    stop = StopRequest(cause=StopCause.CANCELLED, requested_at=node.clock.now(), message=why)
    await node.driver.request_stop(record.id, stop)


@contextlib.contextmanager
def _cancelled_by_signals(cancel: Callable[[], Awaitable[None]]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []  # a task that nobody holds may be collected before it is done
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, lambda: tasks.append(asyncio.create_task(_awaited(cancel))))
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _awaited(call: Callable[[], Awaitable[None]]) -> None:
    await call()


async def _follow(node: daemon.Node, record: TaskRecord, on_log: Callable[[bytes], None]) -> None:
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
                    await _cancel(node, record, f"Cancelled, since nobody takes its log any more: {error.strerror}.")
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


async def sweep_dead_runs(runs_dir: Path, *, docker_host: str | None) -> None:
    """Remove what runs that were killed left behind: their containers and directories. A run that lives holds its lock."""
    if not runs_dir.is_dir():
        return
    for directory in sorted(runs_dir.iterdir()):
        lock = StateDirLock(directory)
        try:
            lock.acquire()
        except ConfigError:
            continue
        try:
            runtime = DockerRuntime(base_url=docker_host, node_id=directory.name)
            try:
                for container in await runtime.list_owned(directory.name):
                    await runtime.remove(container.id)
                await asyncio.to_thread(remove_tree, directory)
                log.info("run.swept", directory=str(directory))
            except (NodeServiceError, OSError) as error:
                log.warning("run.not_swept", directory=str(directory), error=str(error))
            finally:
                await runtime.close()
        finally:
            lock.release()
