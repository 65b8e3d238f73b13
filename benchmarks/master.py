"""The reference master: assignments per second, and what a heartbeat and a queued task cost it as the cluster grows."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil

from benchmarks.rig.cpu import CpuMeter
from benchmarks.rig.finding import Finding, Target, median
from benchmarks.rig.scale import Scale
from benchmarks.rig.simulated_nodes import SimulatedNodes
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.minio_server import free_port

ABOUT = (
    "A real `nodeservice master` process with its database; the nodes are simulated by the benchmark: they register, beat, "
    "accept and report at once over gRPC. CPU is that of the master's process. heartbeat: so many nodes, one beat after "
    "the other with 32 under way. assignment: tasks from SubmitTask to the end of the last report, with so many nodes. "
    "The baseline of each is its first row."
)
NODES = (10, 100, 1_000, 10_000)


async def measure(scale: Scale) -> Finding:
    found = Finding(about=ABOUT)
    await _heartbeats(found, scale)
    await _assignments(found, scale)
    return found


async def _heartbeats(found: Finding, scale: Scale) -> None:
    cpu: dict[int, list[float]] = {count: [] for count in NODES}
    async with _master(scale.directory("master-beats")) as (address, pid), SimulatedNodes(address) as nodes:
        for count in NODES:
            await nodes.register(count)
            beats = scale.pick(600, 5_000)
            await nodes.beat(200)
            meter = CpuMeter([pid])
            rates = []
            for _ in range(scale.pick(3, 7)):
                began = time.perf_counter()
                await nodes.beat(beats)
                rates.append(beats / (time.perf_counter() - began))
                cpu[count].append(1e6 * meter.lap() / beats)
            found.add("heartbeats", "1/s", f"{count:,} nodes", "master", rates, x=count, more_is_better=True)
            found.add("CPU per heartbeat", "µs", f"{count:,} nodes", "master", cpu[count], x=count)
            await asyncio.sleep(scale.pick(1.0, 3.0))
            meter.lap()
            await asyncio.sleep(scale.pick(2.0, 10.0))
            idle = 100 * meter.lap() / scale.pick(2.0, 10.0)
            found.add("CPU at rest", "% of a core", f"{count:,} nodes", "master", [idle], x=count)
            rss = psutil.Process(pid).memory_info().rss / 2**20
            found.add("resident memory", "MiB", f"{count:,} nodes", "master", [rss], x=count)
    growth = median(cpu[10_000]) / median(cpu[100])
    found.ratios["heartbeat_cost_10000_vs_100_nodes"] = growth
    found.targets.append(
        Target(name="cost of a heartbeat, 10,000 nodes vs 100", measured=growth, bound=1.25, kind="at most")
    )


async def _assignments(found: Finding, scale: Scale) -> None:
    for node_count in scale.pick((10, 1_000), (10, 100, 1_000)):
        home = scale.directory(f"master-{node_count}")
        async with _master(home) as (address, pid), SimulatedNodes(address) as nodes:
            await nodes.register(node_count)
            task_count = scale.pick(200, 2_000)
            rates, cpu = [], []
            for _ in range(scale.pick(2, 5)):
                meter = CpuMeter([pid])
                began = time.perf_counter()
                names = [f"m-{secrets.token_hex(6)}" for _ in range(task_count)]
                await _submit(address, names)
                await nodes.reported(names)
                rates.append(task_count / (time.perf_counter() - began))
                cpu.append(1000 * meter.lap() / task_count)
            case = f"{node_count:,} nodes"
            found.add("assignments", "tasks/s", case, "master", rates, x=node_count, more_is_better=True)
            found.add("CPU per task", "ms", case, "master", cpu, x=node_count)


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


@asynccontextmanager
async def _master(home: Path) -> AsyncIterator[tuple[str, int]]:
    """Address and pid of a master of our own."""
    address = f"127.0.0.1:{free_port()}"
    argv = [
        sys.executable, "-m", "nodeservice", "master", "--insecure", "--listen", address, "--state-dir", str(home / "m"),
        "--heartbeat-timeout", "1h", "--log-level", "warning",
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
