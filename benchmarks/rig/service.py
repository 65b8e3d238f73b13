"""The whole service as users run it: a node process under a master, with limits, journal, store and traces."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import grpc

from benchmarks.rig.master import BenchMaster
from nodeservice.ports import labels
from nodeservice.runtime.endpoint import resolve_endpoint
from nodeservice.testing.otlp import OtlpReceiver
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.conftest import remove_cgroup
from tests.integration.minio_server import MinioServer, find_minio, running_minio
from tests.integration.node_process import NodeProcess

IMAGE = "nodeservice/demo:latest"
MIB = 1024**2
BUCKET = "benchmark"
MEMORY_BYTES = 32 * MIB
DISK_BYTES = 16 * MIB
PIDS_LIMIT = 64
GRACE_SECONDS = 1.0


class Unavailable(Exception):  # noqa: N818 (told as a reason, not as an error)
    """Why a benchmark cannot run on this machine."""


@dataclass
class Service:
    """A node at work. `pid` is its process."""

    node: NodeProcess
    master: BenchMaster
    stub: Any
    traces: OtlpReceiver
    engine: docker.APIClient
    ready_after_seconds: float
    """From the start of the process to `node.ready`."""

    @property
    def pid(self) -> int:
        assert self.node.process is not None
        return self.node.process.pid

    async def assign(self, task_id: str, command: str, *, cpu_milli: int, **fields: Any) -> None:
        """Returns with the node's answer, which is durable."""
        wanted = {
            "memory_bytes": MEMORY_BYTES, "disk_bytes": DISK_BYTES, "pids_limit": PIDS_LIMIT,
            "grace_seconds": GRACE_SECONDS,
        } | fields  # fmt: skip
        task = pb.Task(task_id=task_id, docker_image=IMAGE, command=command, cpu_milli=cpu_milli, **wanted)
        ack = await self.stub.AssignTask(task, timeout=60)
        if not ack.success:
            raise RuntimeError(f"the node refused {task_id}: {ack.message}")

    async def run(self, task_id: str, command: str, *, cpu_milli: int, **fields: Any) -> pb.TaskResult:
        await self.assign(task_id, command, cpu_milli=cpu_milli, **fields)
        result, _ = await self.master.reported(task_id)
        return result

    async def cleaned_up(self) -> None:
        """Wait until the node holds no container any more: what comes after the report counts too."""
        wanted = {"label": [f"{labels.NODE}={self.node.worker_id}"]}
        while await asyncio.to_thread(self.engine.containers, all=True, filters=wanted):
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running_service(
    home: Path, *, minio: MinioServer | None, env: dict[str, str] | None = None, module: str = "nodeservice"
) -> AsyncIterator[Service]:
    """Everything of it is gone at the end. Without `minio` results go to a directory."""
    worker_id = f"bench-{secrets.token_hex(4)}"
    settings = {
        "NODESERVICE_HEARTBEAT_SECONDS": "5", "NODESERVICE_RESERVE_CPU_MILLI": "0", "NODESERVICE_LOG_LEVEL": "info",
    } | (env or {})  # fmt: skip
    with OtlpReceiver() as traces:
        async with BenchMaster() as master:
            options: tuple[str, ...] = ("--master", f"127.0.0.1:{master.port}")
            settings["NODESERVICE_OTLP_ENDPOINT"] = traces.endpoint
            if minio is not None:
                options += ("--minio", minio.endpoint, "--bucket", BUCKET)
                settings |= {"MINIO_ACCESS_KEY": minio.access_key, "MINIO_SECRET_KEY": minio.secret_key}
            node = NodeProcess(path=home, worker_id=worker_id, options=options, env=settings, module=module)
            began = time.monotonic()
            await node.start()
            ready_after_seconds = time.monotonic() - began
            try:
                async with asyncio.timeout(60):
                    await master.registered.wait()
                async with grpc.aio.insecure_channel(node.address) as channel:
                    stub = pb_grpc.MasterWorkerStub(channel)
                    with engine_client() as engine:
                        yield Service(node, master, stub, traces, engine, ready_after_seconds)
            finally:
                await node.stop()
                await asyncio.to_thread(sweep, worker_id)


@contextlib.contextmanager
def engine_client() -> Iterator[docker.APIClient]:
    """Raises Unavailable where no engine answers."""
    endpoint = resolve_endpoint(None)
    try:
        client = docker.APIClient(endpoint.url, version="auto", timeout=300)
    except (docker.errors.DockerException, OSError) as error:
        raise Unavailable(f"no container engine answers at {endpoint.url}: {error}") from error
    client.trust_env = False
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def minio_server(home: Path) -> Iterator[MinioServer]:
    """Raises Unavailable where there is no MinIO server."""
    binary = find_minio()
    if binary is None:
        raise Unavailable("no MinIO server: set MINIO_BIN, or put `minio` on PATH")
    home.mkdir(exist_ok=True)
    with running_minio(binary, home) as server:
        yield server
    shutil.rmtree(home, ignore_errors=True)


def need_image() -> None:
    """Raises Unavailable where the engine lacks the image of the measured tasks."""
    with engine_client() as client:
        try:
            client.inspect_image(IMAGE)
        except docker.errors.ImageNotFound as error:
            raise Unavailable(f"the engine has no image {IMAGE}: run `make image`") from error


def sweep(node_id: str) -> None:
    """Remove the containers and cgroups of a node of ours."""
    with engine_client() as client:
        for entry in client.containers(all=True, filters={"label": [f"{labels.NODE}={node_id}"]}):
            client.remove_container(entry["Id"], force=True, v=True)
    for cgroup in Path("/sys/fs/cgroup").glob(f"*/nodeservice/{node_id}.node"):
        with contextlib.suppress(OSError):
            remove_cgroup(cgroup)
