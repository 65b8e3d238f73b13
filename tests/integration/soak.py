"""A small cluster under fire: a master, nodes, a real MinIO and an engine of its own, each killed and frozen at random.

The seed decides what happens when. What has to hold at the end is checked on the store and the engine themselves, not on
what anybody says of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import hashlib
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import grpc
from minio import Minio
from minio.error import S3Error

from nodeservice.doctor.busybox import base_files, find_busybox, image_archive, layer_tar
from nodeservice.limits.hierarchy import read_mounts
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.conftest import remove_cgroup
from tests.integration.minio_server import free_port
from tests.integration.own_engine import end_all_that_name
from tests.integration.restartable import Restartable

BUCKET = "soak"
IMAGE = "nodeservice/soak:latest"
LINES = 60
QUIET_SECONDS = (2.0, 7.0)
"""From one fault of a part to its next."""
FINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "REJECTED"})
QUICK = {
    "NODESERVICE_LOG_FORMAT": "json",
    "NODESERVICE_HEARTBEAT_SECONDS": "0.5",
    "NODESERVICE_REPORT_BACKOFF_MAX_SECONDS": "1",
    "NODESERVICE_CONNECT_BACKOFF_MAX_SECONDS": "1",
    "NODESERVICE_RELIST_SECONDS": "2",
}
MARK = "echo ran >> /results/ran; "
COUNTED = f'i=0; while [ $i -lt {LINES} ]; do echo "line $i"; i=$((i+1)); '
KINDS: dict[str, tuple[str, str]] = {
    "quick": (MARK + "echo done", "SUCCEEDED"),
    "counts": (MARK + COUNTED + "done", "SUCCEEDED"),
    "slow": (MARK + COUNTED + "sleep 0.05; done", "SUCCEEDED"),
    "writes": (MARK + "head -c 3000000 /dev/urandom > /results/data; echo done", "SUCCEEDED"),
    "fails": (MARK + "echo done; exit 3", "FAILED"),
    "cancelled": (MARK + "exec sleep 600", "CANCELLED"),
}
"""By kind: the command, and how it ends where nothing but the node's own parts fail."""


@dataclass
class Story:
    """What came of it."""

    seed: int
    tasks: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    elsewhere: Counter[str] = field(default_factory=Counter)
    """Reasons of tasks that failed for a fault of the infrastructure, which they were told as."""
    lacking_logs: int = 0
    """Of tasks that ended well, and whose reports say that the engine was restarted under them."""
    broken: list[str] = field(default_factory=list)


class Cluster:
    """All processes of it. Use as a context manager: nothing of it is left."""

    def __init__(self, node_count: int, minio: Path, gone_after: str = "10m") -> None:
        self.home = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))  # short: a socket's path has 107 bytes at most
        self._anchor = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL)
        self.engine_url = f"unix://{self.home}/d.sock"
        self.keys = secrets.token_hex(8), secrets.token_hex(16)
        self.store_address, self.master_address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self.containerd, self.engine = self._containerd(), self._engine()
        self.store = self._store(minio)
        silence = ("--heartbeat-timeout", "5s", "--gone-after", gone_after)
        self.master = self._service("master", "--listen", self.master_address, *silence)
        self.nodes = [self._node(number) for number in range(node_count)]

    def __enter__(self) -> Cluster:
        try:
            for part in (self.containerd, self.engine, self.store, self.master):
                part.start()
            self._load_image()
            self.objects.make_bucket(BUCKET)
            for node in self.nodes:
                node.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.end()
        with contextlib.suppress(docker.errors.DockerException, OSError):
            client = docker.APIClient(self.engine_url, version="auto", timeout=30)
            for entry in client.containers(all=True):
                client.remove_container(entry["Id"], force=True, v=True)
            client.close()
        for part in (self.master, self.store, self.engine, self.containerd):
            part.end()
        end_all_that_name(self.home / "c.sock")  # shims that a killed engine left
        self._anchor.kill()
        self._anchor.wait()
        # A killed engine leaves layers and network namespaces mounted; nodes keep their cgroup while they are stopped.
        for mount in reversed(read_mounts()):
            if Path(mount.point).is_relative_to(self.home):
                subprocess.run(["umount", "-l", mount.point], check=True)
        for cgroup in Path("/sys/fs/cgroup").glob(f"*/nodeservice/soak-{self.home.name}-*.node"):
            remove_cgroup(cgroup)
        shutil.rmtree(self.home)

    @property
    def objects(self) -> Minio:
        return Minio(self.store_address, access_key=self.keys[0], secret_key=self.keys[1], secure=False)

    def _engine(self) -> Restartable:
        def ready() -> bool:
            client = docker.APIClient(self.engine_url, version="auto", timeout=5)
            client.close()
            return True

        def answers() -> bool:
            with contextlib.suppress(docker.errors.DockerException):
                return ready()
            return False

        argv = [
            "nsenter", f"--net=/proc/{self._anchor.pid}/ns/net", "dockerd", "--live-restore",
            "--data-root", self.home / "data", "--exec-root", self.home / "exec", "--pidfile", self.home / "pid",
            "--containerd", self.home / "c.sock", "--host", self.engine_url, "--bridge", "none",
            "--iptables=false", "--ip6tables=false",
        ]  # fmt: skip
        return Restartable(argv, self.home / "dockerd.log", answers)

    def _containerd(self) -> Restartable:
        """Beside the engine, as distributions run it: it outlives an engine that is killed."""
        argv = [
            "containerd", "--root", self.home / "data/containerd", "--state", self.home / "exec/containerd",
            "--address", self.home / "c.sock",
        ]  # fmt: skip
        return Restartable(argv, self.home / "containerd.log", (self.home / "c.sock").exists)

    def _store(self, binary: Path) -> Restartable:
        def ready() -> bool:
            with urllib.request.urlopen(f"http://{self.store_address}/minio/health/ready", timeout=1):
                return True

        env = {
            "PATH": os.defpath, "HOME": str(self.home), "MINIO_BROWSER": "off", "MINIO_UPDATE": "off",
            "MINIO_ROOT_USER": self.keys[0], "MINIO_ROOT_PASSWORD": self.keys[1],
        }  # fmt: skip
        argv = [binary, "server", "--quiet", "--address", self.store_address, self.home / "objects"]
        return Restartable(argv, self.home / "minio.log", ready, env)

    def _node(self, number: int) -> Restartable:
        options = (
            "--worker-id", f"soak-{self.home.name}-{number}", "--listen", f"127.0.0.1:{free_port()}",
            "--master", self.master_address, "--minio", self.store_address, "--bucket", BUCKET,
        )  # fmt: skip
        return self._service("serve", *options, name=f"node-{number}")

    def _service(self, command: str, *options: str, name: str = "") -> Restartable:
        log = self.home / f"{name or command}.log"
        listen = options[options.index("--listen") + 1]

        def ready() -> bool:
            channel = grpc.insecure_channel(listen)
            try:
                grpc.channel_ready_future(channel).result(timeout=0.5)
            except grpc.FutureTimeoutError:
                return False
            finally:
                channel.close()
            return True

        env = {key: value for key, value in os.environ.items() if not key.startswith("NODESERVICE_")} | QUICK
        env |= {"MINIO_ACCESS_KEY": self.keys[0], "MINIO_SECRET_KEY": self.keys[1], "DOCKER_HOST": self.engine_url}
        argv = [
            sys.executable,
            "-m",
            "nodeservice",
            command,
            "--insecure",
            "--state-dir",
            self.home / (name or command),
        ]
        return Restartable([*argv, *options], log, ready, env)

    def _load_image(self) -> None:
        busybox = find_busybox()
        assert busybox is not None
        client = docker.APIClient(self.engine_url, version="auto", timeout=60)
        tar = layer_tar([*base_files(busybox)])
        for _ in client.load_image(image_archive(IMAGE, [tar], labels={}, created_by="test")):
            pass
        client.close()


async def soak(
    minio: Path,
    *,
    seed: int,
    task_count: int,
    node_count: int = 3,
    patience_seconds: float = 900.0,
    gone_after: str = "10m",
) -> Story:
    """`gone_after` is the master's: of a few seconds, and nodes that are only slow to come back lose their tasks."""
    story = Story(seed=seed, tasks=task_count)
    began = time.monotonic()
    with Cluster(node_count, minio, gone_after) as cluster:
        kinds = _draw(random.Random(seed), task_count)
        over = asyncio.Event()
        fire = asyncio.create_task(_fire(cluster, story, over))
        try:
            async with asyncio.timeout(patience_seconds):
                await _submit_all(cluster, kinds)
                await _cancel_some(cluster, kinds)
                # Fire as long as there is work; then all parts are well, and what is left has to come to its end.
                await _until_final(cluster, kinds, at_most_left=task_count // 10)
                over.set()
                await fire
                await _until_final(cluster, kinds, at_most_left=0)
                await _until_clean(cluster, story)
                views = [await _whole(cluster, view.task.task_id) for view in await _views(cluster)]
        except TimeoutError:
            story.broken.append("not all came to an end in time")
            views = await _views(cluster)
        over.set()
        await fire
        _check(cluster, kinds, views, story)
        if story.broken:
            shutil.copytree(
                cluster.home,
                f"{cluster.home}-broken",
                ignore=shutil.ignore_patterns("data", "exec", "objects", "*.sock*"),
            )
    story.seconds = round(time.monotonic() - began, 1)
    return story


def _draw(chance: random.Random, count: int) -> dict[str, str]:
    """By task id, its kind."""
    names = [*KINDS]
    return {f"t{number:04d}-{(kind := chance.choice(names))}": kind for number in range(count)}


# ---- fire --------------------------------------------------------------------------------------------------------------


async def _fire(cluster: Cluster, story: Story, over: asyncio.Event) -> None:
    """At each part by itself, so that several are hit at once."""
    parts = {
        **{f"node {number}": node for number, node in enumerate(cluster.nodes)},
        "master": cluster.master,
        "store": cluster.store,
        "engine": cluster.engine,
        "containerd": cluster.containerd,
    }
    async with asyncio.TaskGroup() as fires:
        for name, part in parts.items():
            fires.create_task(_fire_at(name, part, random.Random(f"{story.seed} {name}"), story, over))


async def _fire_at(name: str, part: Restartable, chance: random.Random, story: Story, over: asyncio.Event) -> None:
    while True:
        await _pause(over, chance.uniform(*QUIET_SECONDS))
        if over.is_set():
            return
        how, seconds = chance.choice(("killed", "frozen")), chance.uniform(0.1, 2.0)
        story.faults[f"{name.split(maxsplit=1)[0]} {how}"] += 1
        if how == "killed":
            part.kill()
            await _pause(over, seconds)
            await asyncio.to_thread(part.start)
        else:
            part.freeze()
            await _pause(over, seconds)
            part.thaw()


async def _pause(over: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await over.wait()


# ---- the client --------------------------------------------------------------------------------------------------------


async def _insist(cluster: Cluster, call: Callable[[Any], Any]) -> Any:
    """Ask the master until it answers."""
    while True:
        async with grpc.aio.insecure_channel(cluster.master_address) as channel:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return await call(pb_grpc.MasterWorkerStub(channel))  # type: ignore[no-untyped-call]
        await asyncio.sleep(0.2)


async def _submit_all(cluster: Cluster, kinds: dict[str, str]) -> None:
    for task_id, kind in kinds.items():
        task = pb.Task(
            task_id=task_id, docker_image=IMAGE, command=KINDS[kind][0], cpu_milli=100, memory_bytes=32 * 1024**2,
            disk_bytes=16 * 1024**2, grace_seconds=0.5,
        )  # fmt: skip
        # One that was taken without our hearing of it is known already, and refused as a repetition.
        await _insist(cluster, lambda stub, task=task: stub.SubmitTask(task, timeout=10))


async def _cancel_some(cluster: Cluster, kinds: dict[str, str]) -> None:
    left = [task_id for task_id, kind in kinds.items() if kind == "cancelled"]
    while left:
        views = {view.task.task_id: view.state for view in await _views(cluster)}
        for task_id in [task_id for task_id in left if views.get(task_id) in FINAL | {"RUNNING"}]:
            if views[task_id] not in FINAL:
                answer = await _insist(
                    cluster, lambda stub, id_=task_id: stub.CancelTask(pb.TaskID(task_id=id_), timeout=10)
                )
                if not answer.success:
                    continue
            left.remove(task_id)
        await asyncio.sleep(0.3)


async def _views(cluster: Cluster) -> list[pb.TaskView]:
    found = await _insist(cluster, lambda stub: stub.ListTasks(pb.ListTasksRequest(limit=10_000), timeout=10))
    return list(found.tasks)


async def _whole(cluster: Cluster, task_id: str) -> pb.TaskView:
    """A list leaves out what is large."""
    view: pb.TaskView = await _insist(cluster, lambda stub: stub.GetTask(pb.TaskID(task_id=task_id), timeout=10))
    return view


async def _until_final(cluster: Cluster, kinds: dict[str, str], *, at_most_left: int) -> None:
    while True:
        ended = sum(1 for view in await _views(cluster) if view.state in FINAL)
        if len(kinds) - ended <= at_most_left:
            return
        await asyncio.sleep(0.5)


# ---- the checks --------------------------------------------------------------------------------------------------------


def _left(cluster: Cluster) -> list[str]:
    client = docker.APIClient(cluster.engine_url, version="auto", timeout=30)
    containers = [entry["Names"][0] for entry in client.containers(all=True)]
    client.close()
    # Not pathlib's: that one raises for a directory which goes while it looks.
    works = glob.glob(f"{cluster.home}/node-*/tasks/*")
    kept = glob.glob(f"{cluster.home}/node-*/results/*/*/manifest.json")
    cgroups = glob.glob(f"/sys/fs/cgroup/*/nodeservice/soak-{cluster.home.name}-*.node/*.*")
    half = [f"upload of {upload.object_name}" for upload in _incomplete(cluster.objects)]
    return [*containers, *works, *kept, *filter(os.path.isdir, cgroups), *half]


def _incomplete(objects: Minio) -> Iterator[Any]:
    listed = objects._list_multipart_uploads(BUCKET)  # the client has no public way to ask
    yield from listed.uploads


async def _until_clean(cluster: Cluster, story: Story) -> None:
    try:
        async with asyncio.timeout(120):
            while await asyncio.to_thread(_left, cluster):
                await asyncio.sleep(0.5)
    except TimeoutError:
        story.broken += [f"left behind: {what}" for what in _left(cluster)[:20]]


def _check(cluster: Cluster, kinds: dict[str, str], views: list[pb.TaskView], story: Story) -> None:
    by_id = {view.task.task_id: view for view in views}
    if len(by_id) != len(views):
        story.broken.append("a task is listed twice")
    for task_id, kind in kinds.items():
        view = by_id.get(task_id)
        if view is None:
            story.broken.append(f"{task_id} is lost")
            continue
        story.ends[view.state] += 1
        wanted = KINDS[kind][1]
        if view.state != wanted:
            if view.result.retryable:
                story.elsewhere[view.result.reason] += 1
            else:
                story.broken.append(
                    f"{task_id} is {view.state} ({view.reason} {view.result.reason}: {view.result.message})"
                )
        if view.result.result_location:
            story.broken += _wrong_results(cluster.objects, task_id, kind, view, story)


def _wrong_results(objects: Minio, task_id: str, kind: str, view: pb.TaskView, story: Story) -> list[str]:
    location = view.result.result_location
    if location.startswith("file://"):  # kept on the node, and uploaded since
        location = f"s3://{BUCKET}/{task_id}/{view.task.attempt}"
    prefix = location.removeprefix(f"s3://{BUCKET}/")
    try:
        manifest = json.loads(_read(objects, f"{prefix}/manifest.json"))
        files = {entry["path"]: _read(objects, f"{prefix}/{entry['path']}") for entry in manifest["files"]}
    except (S3Error, ValueError, KeyError) as error:
        return [f"{task_id}: its results can't be read: {error}"]
    wrong = [
        f"{task_id}: {entry['path']} is not what the manifest says"
        for entry in manifest["files"]
        if hashlib.sha256(files[entry["path"]]).hexdigest() != entry["sha256"]
    ]
    if view.state == "SUCCEEDED":
        if files.get("ran") != b"ran\n":
            wrong.append(f"{task_id}: ran {files.get('ran')!r}")
        lines = files.get("stdout.log", b"").decode().splitlines()
        if kind in ("counts", "slow"):
            printed = [f"line {number}" for number in range(LINES)]
            if lines != printed and any("log may lack" in remark for remark in view.result.remarks):
                story.lacking_logs += 1
                printed = [line for line in printed if line in lines]
            if lines != printed:
                wrong.append(f"{task_id}: its log has {len(lines)} lines: {lines[:3]} … {lines[-3:]}")
    return wrong


def _read(objects: Minio, key: str) -> bytes:
    answer = objects.get_object(BUCKET, key)
    try:
        return bytes(answer.read())
    finally:
        answer.close()
        answer.release_conn()
