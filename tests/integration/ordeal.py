"""A node goes through a fault at a named point, with tasks in every state, and is started again as often as it dies.

A master of the old kind assigns, repeats what was not answered, and counts reports. What has to hold afterwards is the same
whatever happened, whenever: each task ended once, ran once, and its results can be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import hashlib
import json
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import docker
import grpc
import psutil

from nodeservice.fault_points import VARIABLE
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldClient, OldMaster

FROZEN_SECONDS = 0.5
DONE_SECONDS = 90.0
QUICK_BACKOFF = {
    "NODESERVICE_REPORT_BACKOFF_MAX_SECONDS": "1",
    "NODESERVICE_CONNECT_BACKOFF_MAX_SECONDS": "1",
    "NODESERVICE_RELIST_SECONDS": "1",
    "NODESERVICE_UPLOAD_GIVE_UP_SECONDS": "0.5",
    "NODESERVICE_FINISHED_RETENTION_COUNT": "1",
}
COMMANDS = {
    "ends-well": ("echo ran >> /results/ran; echo $NODESERVICE_TASK_ID", "success"),
    "ends-badly": ("echo ran >> /results/ran; echo $NODESERVICE_TASK_ID; sleep 0.4; exit 3", "failed"),
    "is-cancelled": ("echo ran >> /results/ran; echo $NODESERVICE_TASK_ID; exec sleep 600", "cancelled"),
}


@dataclass
class Ordeal:
    """What came of it. `reached`: the fault happened."""

    point: str
    action: str
    reached: bool = False
    broken: list[str] = field(default_factory=list)
    reported_before: int | None = None
    """How many reports the master had got when the node died."""
    double_reports: int = 0
    """Of a task by one process of the node. One killed between the master's answer and the note of it reports once more."""


class Upload:
    """An endpoint for results by HTTP that takes none until it is told to."""

    def __init__(self) -> None:
        self.open = False
        self.port = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Upload:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = next(
                (int(line.partition(":")[2]) for line in head.splitlines() if line.startswith("content-length")), 0
            )
            body = await reader.readexactly(length)
            answer = "200 OK" if self.open else "503 Service Unavailable"
            digest = json.dumps({"success": self.open, "sha256": hashlib.sha256(body).hexdigest()})
            writer.write(
                f"HTTP/1.1 {answer}\r\nContent-Length: {len(digest)}\r\nConnection: close\r\n\r\n{digest}".encode()
            )
            await writer.drain()
        writer.close()


async def go_through(path: Path, worker_id: str, point: str, action: str, docker_client: docker.APIClient) -> Ordeal:
    """One ordeal, from a fresh node to the end of all tasks. Points of kept results have a store that is away at first."""
    ordeal = Ordeal(point=point, action=action)
    kept = point.startswith(("fallback", "bundles.discard"))
    async with contextlib.AsyncExitStack() as stack:
        upload = await stack.enter_async_context(Upload())
        master = await OldMaster().start()
        stack.push_async_callback(master.stop)
        env = dict(QUICK_BACKOFF)
        if kept:
            url = f"http://127.0.0.1:{upload.port}/upload"
            env |= {"NODESERVICE_RESULT_STORE": "http", "NODESERVICE_HTTP_UPLOAD_URL": url}
        node = NodeProcess(path, worker_id, ("--master", f"127.0.0.1:{master.port}"), env)
        node.env[VARIABLE] = f"{point}:{action}"
        stack.push_async_callback(_end, node)
        await _started(node)
        keeper = await stack.enter_async_context(_kept_alive(node, master, ordeal))
        ids = {f"{name}-{uuid.uuid4().hex[:8]}": what for name, what in COMMANDS.items()}
        try:
            async with asyncio.timeout(DONE_SECONDS):
                for task_id, (command, _) in ids.items():
                    await _insist(node, task_id, command=command)
                cancelled = next(task_id for task_id in ids if task_id.startswith("is-cancelled"))
                # So that there is something to stop; however the node fares, it comes to that.
                await master.until(lambda: _runs(master, cancelled) or master.count(cancelled) > 0, DONE_SECONDS)
                await _insist(node, cancelled, command=None)
                for task_id in ids:
                    await master.report_of(task_id, DONE_SECONDS)
                upload.open = True
                await _nothing_left(docker_client, node, kept=kept)
        except TimeoutError:
            missing = [task_id for task_id in ids if not master.count(task_id)]
            ordeal.broken.append(
                f"not done in time; no report of {missing}, left {_left(docker_client, node, kept=kept)}"
            )
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await _end(node)
        ordeal.reached |= action.startswith("fail") and "fails on request" in "".join(
            log.read_text() for log in path.glob("serve-*.log")
        )
        _check(ordeal, master, ids, kept=kept)
    return ordeal


async def _end(node: NodeProcess) -> None:
    if node.process is not None and node.process.returncode is None:
        await node.stop()


async def _started(node: NodeProcess) -> None:
    with contextlib.suppress(AssertionError):  # it may die at once: then it is started again
        await node.start()


@contextlib.asynccontextmanager
async def _kept_alive(node: NodeProcess, master: OldMaster, ordeal: Ordeal) -> AsyncIterator[asyncio.Task[None]]:
    """Starts it again without the fault when it has died, and thaws it when it was frozen, as its host would."""

    async def keep() -> None:
        while True:
            process = node.process
            if process is not None and process.returncode is not None:
                if process.returncode == -signal.SIGKILL:
                    ordeal.reached, ordeal.reported_before = True, len(master.reports)
                node.env.pop(VARIABLE, None)
                await _started(node)
            elif process is not None and not ordeal.reached and is_frozen(process.pid):
                ordeal.reached = True
                await asyncio.sleep(FROZEN_SECONDS)
                process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(keep())
    try:
        yield task
    finally:
        task.cancel()


def is_frozen(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


async def _insist(node: NodeProcess, task_id: str, *, command: str | None) -> None:
    """Assign, or cancel, again and again until the node says yes, as masters do."""
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async with OldClient(node.address) as client:
                if command is None:
                    answer = await client.cancel(task_id)
                else:
                    answer = await client.assign(task_id=task_id, command=command, req_storage=0.001)
                if answer.success or command is None:
                    return
        await asyncio.sleep(0.1)


def _runs(master: OldMaster, task_id: str) -> bool:
    return any(
        task.task_id == task_id and task.status == "running"
        for beat in master.heartbeats[-1:]
        for task in beat.running_tasks
    )


def _left(docker_client: docker.APIClient, node: NodeProcess, *, kept: bool) -> list[str]:
    """`kept`: results that the store did not take at first are to be gone from here too."""
    containers = docker_client.containers(all=True, filters={"label": [f"nodeservice.node={node.worker_id}"]})
    # Not pathlib's: that one raises for a directory which goes while it looks.
    return [
        *(entry["Names"][0] for entry in containers),
        *glob.glob(f"{node.path}/state/tasks/*"),
        *glob.glob(f"/sys/fs/cgroup/*/nodeservice/{node.worker_id}.node/*.1"),
        *(glob.glob(f"{node.path}/results/*/*/manifest.json") if kept else ()),
    ]


async def _nothing_left(docker_client: docker.APIClient, node: NodeProcess, *, kept: bool) -> None:
    while _left(docker_client, node, kept=kept):
        await asyncio.sleep(0.1)


def _check(ordeal: Ordeal, master: OldMaster, ids: dict[str, Any], *, kept: bool) -> None:
    for task_id, (_, status) in ids.items():
        reports = [report for report in master.reports if report.task_id == task_id]
        if not reports:
            continue
        if any(report.SerializeToString() != reports[0].SerializeToString() for report in reports):
            ordeal.broken.append(f"{task_id}: reports differ")
        before = [report for report in master.reports[: ordeal.reported_before or 0] if report.task_id == task_id]
        ordeal.double_reports += max(len(before) - 1, 0) + max(len(reports) - len(before) - 1, 0)
        told = reports[0]
        wanted = "failed" if kept and status == "success" else status
        if told.status != wanted:
            ordeal.broken.append(f"{task_id}: is {told.status}, not {wanted}")
        if not kept:
            ordeal.broken += _wrong_in(task_id, told.result_location)


def _wrong_in(task_id: str, location: str) -> list[str]:
    """Of the results: each file is what the manifest says, the log whole, and the task ran once."""
    folder = Path(unquote(urlsplit(location).path))
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        wrong = [
            f"{task_id}: {entry['path']} is not what the manifest says"
            for entry in manifest["files"]
            if hashlib.sha256((folder / entry["path"]).read_bytes()).hexdigest() != entry["sha256"]
        ]
        ran, log = ((folder / name).read_text() if (folder / name).exists() else "" for name in ("ran", "stdout.log"))
    except (OSError, ValueError, KeyError) as error:
        return [f"{task_id}: its results can't be read: {error!r}"]
    never = task_id.startswith("is-cancelled") and not ran and not log
    if not never and (ran, log) != ("ran\n", f"{task_id}\n"):
        wrong.append(f"{task_id}: ran {ran!r}, said {log!r}")
    return wrong
