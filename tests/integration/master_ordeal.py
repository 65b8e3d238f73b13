"""A master goes through a fault at a named point, with tasks in every state, and is started again as often as it dies.

Two nodes run, fail, lose and report tasks as real ones do. What has to hold afterwards is the same whatever happened,
whenever: what was acknowledged is there, each task ended once and as it should, and no attempt was given to two nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from nodeservice.fault_points import VARIABLE
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.master_process import MasterProcess
from tests.integration.minio_server import free_port
from tests.integration.ordeal import is_frozen
from tests.integration.scripted_node import ScriptedNode

FROZEN_SECONDS = 0.5
SILENT_SECONDS = 3.0
DONE_SECONDS = 60.0
FINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "REJECTED"})
WANTED = {"ends-a": "SUCCEEDED", "ends-b": "SUCCEEDED", "fails": "FAILED", "drained": "SUCCEEDED", "lost": "SUCCEEDED",
          "unwanted": "CANCELLED"}  # fmt: skip
FAULT = {"status": "failed", "outcome": "FAILED", "reason": "NODE_DRAINED", "retryable": True}
OWN = {"status": "failed", "outcome": "FAILED", "reason": "EXIT_NONZERO", "retryable": False, "exit_code": 3}
WELL = {"status": "success", "outcome": "SUCCEEDED", "reason": "COMPLETED"}
CANCELLED = {"status": "cancelled", "outcome": "CANCELLED", "reason": "CANCELLED"}
Key = tuple[str, int]


@dataclass
class MasterOrdeal:
    """What came of it. `reached`: the fault happened."""

    point: str
    action: str
    reached: bool = False
    broken: list[str] = field(default_factory=list)


class DutifulNode(ScriptedNode):
    """Keeps a journal, beats, and reports until it is acknowledged. One of them falls silent once, with the task `lost`."""

    def __init__(self, master: str, worker_id: str, alone_silent: list[str]) -> None:
        super().__init__(master, worker_id)
        self.started: list[Key] = []
        self.running: set[Key] = set()
        self.outbox: dict[Key, dict[str, Any]] = {("never-heard-of", 1): WELL} if worker_id == "w1" else {}
        self.silent = asyncio.Event()
        self._was_silent = alone_silent
        self._work: set[asyncio.Task[None]] = set()

    async def live(self) -> None:
        """Beat and report until cancelled."""
        while True:
            if self.silent.is_set():
                await asyncio.sleep(SILENT_SECONDS)
                self.silent.clear()
            with contextlib.suppress(grpc.aio.AioRpcError):
                listed = [pb.RunningTask(task_id=id_, attempt=n, phase="RUNNING") for id_, n in self.running]
                listed += [pb.RunningTask(task_id=id_, attempt=n, phase="REPORTING") for id_, n in self.outbox]
                if not await self.beat(*listed):
                    await self.register()
                for key in [*self.outbox]:
                    await self._deliver(key)
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        for work in self._work:
            work.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)

    async def AssignTask(self, request: pb.Task, context: Any) -> pb.TaskAck:  # noqa: N802
        if self.silent.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "silent")
        key = (request.task_id, request.attempt)
        if key not in self.started:
            self.started.append(key)
            self.running.add(key)
            work = asyncio.create_task(self._run(key))
            self._work.add(work)
        return pb.TaskAck(success=True)

    async def CancelTask(self, request: pb.TaskID, context: Any) -> pb.TaskAck:  # noqa: N802
        if self.silent.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "silent")
        key = (request.task_id, request.attempt)
        if key in self.running:
            self._end(key, CANCELLED)
        return pb.TaskAck(success=True)

    async def _run(self, key: Key) -> None:
        task_id, attempt = key
        await asyncio.sleep(0.3)
        if task_id == "lost" and not self._was_silent:
            self._was_silent.append(self.worker_id)
            self.silent.set()
            await asyncio.sleep(SILENT_SECONDS + 2.0)
        if task_id == "unwanted":
            return
        if key in self.running:
            how = OWN if task_id == "fails" else FAULT if task_id == "drained" and attempt == 1 else WELL
            self._end(key, how)

    def _end(self, key: Key, how: dict[str, Any]) -> None:
        self.running.discard(key)
        self.outbox[key] = how

    async def _deliver(self, key: Key) -> None:
        task_id, attempt = key
        how = self.outbox[key]
        if how is WELL and task_id in WANTED and not await self._store(key):
            return
        if (await self.report(task_id, attempt=attempt, **how)).success:
            self.outbox.pop(key, None)

    async def _store(self, key: Key) -> bool:
        data = f"{key[0]}.{key[1]}".encode()
        chunk = pb.FileChunk(
            task_id=key[0], attempt=key[1], worker_id=self.worker_id, file_path="out", data=data, is_last_chunk=True,
            is_last_file=True,
        )  # fmt: skip

        async def chunks() -> AsyncIterator[pb.FileChunk]:
            yield chunk

        return bool((await self.stub.UploadTaskFiles(chunks(), timeout=10)).success)


async def go_through(path: Path, point: str, action: str, count: int = 1) -> MasterOrdeal:
    ordeal = MasterOrdeal(point=point, action=action)
    async with contextlib.AsyncExitStack() as stack:
        port, silent = free_port(), []
        nodes = [
            await stack.enter_async_context(DutifulNode(f"127.0.0.1:{port}", name, silent)) for name in ("w1", "w2")
        ]
        master = MasterProcess(
            path, "--heartbeat-timeout", "1s", "--gone-after", "2s", "--node-loss-retries", "20",
            "--node", f"127.0.0.1:{nodes[0].port}", "--advertise", f"127.0.0.1:{port}",
        )  # fmt: skip
        master.port = port
        master.env[VARIABLE] = f"{point}:{action}:{count}"
        stack.push_async_callback(_end, master)
        keeper = await stack.enter_async_context(_doing(_kept_alive(master, ordeal)))
        for node in nodes:
            await stack.enter_async_context(_doing(node.live()))
            stack.push_async_callback(node.stop)
        first: dict[str, pb.TaskView] = {}
        try:
            async with asyncio.timeout(DONE_SECONDS):
                await _use(master.address, first)
                await _quiet(nodes)
        except TimeoutError:
            ordeal.broken.append(f"not done in time; ended {sorted(first)}, {[node.outbox for node in nodes]}")
        if keeper.done():
            ordeal.broken.append(f"the master could not be kept alive: {keeper.exception()!r}")
        elif not ordeal.broken:
            await _check(ordeal, master, nodes, first)
        logs = "".join(log.read_text() for log in path.glob("master-*.log"))
        ordeal.reached |= action == "fail" and "fails on request" in logs
    return ordeal


@contextlib.asynccontextmanager
async def _doing(work: Any) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _kept_alive(master: MasterProcess, ordeal: MasterOrdeal) -> None:
    """Started, started again without the fault when it has died, and thawed when it was frozen."""
    while True:
        process = master.process
        if process is None or process.poll() is not None:
            if process is not None:
                ordeal.reached |= process.returncode == -signal.SIGKILL
                master.env.pop(VARIABLE, None)
            with contextlib.suppress(AssertionError):  # it may die at once: then it is started again
                await master.start()
        elif not ordeal.reached and is_frozen(process.pid):
            ordeal.reached = True
            await asyncio.sleep(FROZEN_SECONDS)
            process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.02)


async def _end(master: MasterProcess) -> None:
    if master.process is not None and master.process.poll() is None:
        master.process.send_signal(signal.SIGCONT)
        await master.end()


async def _insist(address: str, call: Any) -> Any:
    while True:
        async with grpc.aio.insecure_channel(address) as channel:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return await call(pb_grpc.MasterWorkerStub(channel))  # type: ignore[no-untyped-call]
        await asyncio.sleep(0.1)


async def _use(address: str, first: dict[str, pb.TaskView]) -> None:
    """Submit, cancel, and wait; `first` gets each task as it was when it was first seen to have ended."""
    for task_id in WANTED:
        task = pb.Task(task_id=task_id, docker_image="i", req_cpu=0.5, req_memory=0.5)
        ack = await _insist(address, lambda stub, task=task: stub.SubmitTask(task, timeout=5))
        assert ack.success, ack.message
    while len(first) < len(WANTED):
        for task_id in WANTED:
            view = await _view(address, task_id)
            if view.state in FINAL:
                first.setdefault(task_id, view)
            elif task_id == "unwanted" and view.state == "RUNNING":
                await _insist(address, lambda stub: stub.CancelTask(pb.TaskID(task_id="unwanted"), timeout=5))
        await asyncio.sleep(0.1)


async def _view(address: str, task_id: str) -> pb.TaskView:
    view: pb.TaskView = await _insist(address, lambda stub: stub.GetTask(pb.TaskID(task_id=task_id), timeout=5))
    return view


async def _quiet(nodes: list[DutifulNode]) -> None:
    """Nobody holds or owes anything any more."""
    while any(node.running or node.outbox or node.silent.is_set() for node in nodes):
        await asyncio.sleep(0.1)


async def _check(
    ordeal: MasterOrdeal, master: MasterProcess, nodes: list[DutifulNode], first: dict[str, pb.TaskView]
) -> None:
    for task_id, wanted in WANTED.items():
        view = await _view(master.address, task_id)
        then = first[task_id]
        if (view.state, view.task.attempt, view.result) != (then.state, then.task.attempt, then.result):
            ordeal.broken.append(f"{task_id}: ended twice, {then.state}.{then.task.attempt} and {view.state}")
        if view.state != wanted:
            ordeal.broken.append(f"{task_id}: is {view.state} ({view.reason} {view.message}), not {wanted}")
        # Of a node that was silent while the master was down, nothing is lost.
        if task_id == "drained" and len(view.attempts) < 2:
            ordeal.broken.append(f"{task_id}: was never tried again")
        if wanted == "SUCCEEDED":
            stored = master.path / "state" / "results" / task_id / str(view.task.attempt) / "out"
            if not stored.is_file() or stored.read_text() != f"{task_id}.{view.task.attempt}":
                ordeal.broken.append(f"{task_id}: its results are not at {stored}")
    twice = set(nodes[0].started) & set(nodes[1].started)
    if twice:
        ordeal.broken.append(f"given to both nodes: {twice}")
