"""The reference master: assignments per second, and what a heartbeat and a queued task cost it as the cluster grows."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import sqlalchemy as sa

from benchmarks.rig.cpu import CpuMeter
from benchmarks.rig.finding import Finding, Target, median, paired
from benchmarks.rig.scale import Scale
from benchmarks.rig.simulated_nodes import SimulatedNodes
from nodeservice.master import schema
from nodeservice.master.store import MasterStore, sqlite_url
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.minio_server import free_port

ABOUT = (
    "A real `nodeservice master` process with its database for each number of nodes, by turns; the nodes are simulated by "
    "the benchmark: the database knows them, they beat, accept and report at once over gRPC. CPU is that of the master's "
    "process. heartbeat: one beat after the other with 32 under way. assignment: tasks of one kind from SubmitTask to the "
    "end of the last report, without beats meanwhile; the last ten nodes have room for them. The baseline of each is its "
    "first row."
)
WARM_BEATS = 500


async def measure(scale: Scale) -> Finding:
    found = Finding(about=ABOUT)
    await _heartbeats(found, scale)
    await _assignments(found, scale)
    return found


async def _heartbeats(found: Finding, scale: Scale) -> None:
    counts = scale.pick((100, 10_000), (10, 100, 1_000, 10_000))
    cpu: dict[int, list[float]] = {count: [] for count in counts}
    rates: dict[int, list[float]] = {count: [] for count in counts}
    beats = scale.pick(800, 5_000)
    async with AsyncExitStack() as stack:
        clusters = [
            await stack.enter_async_context(_cluster(scale.directory(f"beats-{count}"), count)) for count in counts
        ]
        for cluster in clusters:
            await cluster.nodes.beat(WARM_BEATS)
        for number in range(scale.pick(3, 5)):
            for cluster in clusters[:: -1 if number % 2 else 1]:
                cluster.meter.lap()
                began = time.perf_counter()
                await cluster.nodes.beat(beats)
                rates[cluster.nodes.count].append(beats / (time.perf_counter() - began))
                cpu[cluster.nodes.count].append(1e6 * cluster.meter.lap() / beats)
        await asyncio.sleep(scale.pick(0.5, 3.0))
        for cluster in clusters:
            cluster.meter.lap()
        rest_seconds = scale.pick(2.0, 10.0)
        await asyncio.sleep(rest_seconds)
        for cluster in clusters:
            count = cluster.nodes.count
            case = f"{count:,} nodes"
            rest = 100 * cluster.meter.lap() / rest_seconds
            rss = psutil.Process(cluster.pid).memory_info().rss / 2**20
            found.add("heartbeats", "1/s", case, "master", rates[count], x=count, more_is_better=True)
            found.add("CPU per heartbeat", "µs", case, "master", cpu[count], x=count)
            found.add("CPU at rest", "% of a core", case, "master", [rest], x=count)
            found.add("resident memory", "MiB", case, "master", [rss], x=count)
    growth = median(paired(cpu[10_000], cpu[100]))
    found.ratios["heartbeat_cost_10000_vs_100_nodes"] = growth
    found.targets.append(
        Target(name="cost of a heartbeat, 10,000 nodes vs 100", measured=growth, bound=1.25, kind="at most")
    )


async def _assignments(found: Finding, scale: Scale) -> None:
    counts = scale.pick((10, 1_000), (10, 100, 1_000, 10_000))
    task_count = scale.pick(100, 300)
    rates: dict[int, list[float]] = {count: [] for count in counts}
    cpu: dict[int, list[float]] = {count: [] for count in counts}
    async with AsyncExitStack() as stack:
        clusters = [
            await stack.enter_async_context(_cluster(scale.directory(f"tasks-{count}"), count)) for count in counts
        ]
        for number in range(-1, scale.pick(2, 5)):
            for cluster in clusters[:: -1 if number % 2 else 1]:
                cluster.meter.lap()
                began = time.perf_counter()
                names = [f"m-{secrets.token_hex(6)}" for _ in range(task_count)]
                await _submit(cluster.address, names)
                await cluster.nodes.reported(names)
                if number >= 0:  # the first is for warming up
                    rates[cluster.nodes.count].append(task_count / (time.perf_counter() - began))
                    cpu[cluster.nodes.count].append(1000 * cluster.meter.lap() / task_count)
    for count in counts:
        found.add("assignments", "tasks/s", f"{count:,} nodes", "master", rates[count], x=count, more_is_better=True)
        found.add("CPU per task", "ms", f"{count:,} nodes", "master", cpu[count], x=count)
    most, least = counts[-1], counts[0]
    found.ratios[f"master_task_cost_{most}_vs_{least}_nodes"] = median(paired(cpu[most], cpu[least]))


async def _submit(address: str, names: list[str]) -> None:
    waiting = iter(names)
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = pb_grpc.MasterWorkerStub(channel)

        async def work() -> None:
            for name in waiting:
                task = pb.Task(
                    task_id=name, docker_image="x", command="x", cpu_milli=10, memory_bytes=2**24, disk_bytes=2**20
                )
                ack = await stub.SubmitTask(task, timeout=60)
                if not ack.success:
                    raise RuntimeError(f"the master refused {name}: {ack.message}")

        await asyncio.gather(*(work() for _ in range(16)))


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    nodes: SimulatedNodes
    address: str
    pid: int
    meter: CpuMeter


@asynccontextmanager
async def _cluster(home: Path, count: int) -> AsyncIterator[_Cluster]:
    """A master that has known so many nodes for long, all of which it has heard since its start."""
    async with SimulatedNodes(count) as nodes:
        await _write(home / "m", nodes)
        async with _master(home) as (address, pid):
            await nodes.join(address)
            yield _Cluster(nodes=nodes, address=address, pid=pid, meter=CpuMeter([pid]))


async def _write(state_dir: Path, nodes: SimulatedNodes) -> None:
    """As many in one transaction as a master, which takes them one by one, has in many."""
    state_dir.mkdir()
    store = MasterStore(sqlite_url(state_dir))
    await store.open()  # makes the tables
    await store.close()
    engine = sa.create_engine(sqlite_url(state_dir))
    with engine.begin() as connection:
        connection.execute(schema.nodes.insert(), [dict(schema.node_values(row)) for row in nodes.rows()])
    engine.dispose()


@asynccontextmanager
async def _master(home: Path) -> AsyncIterator[tuple[str, int]]:
    """Address and pid of a master of our own."""
    address = f"127.0.0.1:{free_port()}"
    argv = [
        sys.executable, "-m", "nodeservice", "master", "--insecure", "--listen", address, "--state-dir", str(home / "m"),
        "--heartbeat-timeout", "1h", "--gone-after", "1h", "--log-level", "warning",
    ]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if not key.startswith("NODESERVICE_")}
    with (home / "master.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            async with asyncio.timeout(60):
                await channel.channel_ready()
        yield address, process.pid
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)
