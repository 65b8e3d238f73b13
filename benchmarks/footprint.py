"""What a node holds and uses: idle, with tasks that run, and after many that finished."""

from __future__ import annotations

import asyncio
import secrets
import time

import psutil

from benchmarks.rig.finding import Finding
from benchmarks.rig.scale import Scale
from benchmarks.rig.service import MIB, Service, need_image, running_service

ABOUT = (
    "Of the node's process alone, heartbeat every 5 s, traces on. The row with 0 running tasks is the baseline. Running "
    "tasks are real containers that sleep. Finished ones ran on the fake engine (benchmarks/rig/node_on_fake_engine.py): "
    "everything but the containers is real, at a few hundred tasks per second; the node remembers 2,000 of them."
)


async def measure(scale: Scale) -> Finding:
    found = Finding(about=ABOUT)
    need_image()
    async with running_service(scale.directory("footprint"), minio=None) as service:
        await _running(found, service, scale)
    home = scale.directory("footprint-finished")
    async with running_service(home, minio=None, module="benchmarks.rig.node_on_fake_engine") as service:
        await _finished(found, service, scale)
    return found


async def _running(found: Finding, service: Service, scale: Scale) -> None:
    process = psutil.Process(service.pid)
    names: list[str] = []
    for count in scale.pick((0, 1, 20), (0, 1, 50, 200)):
        while len(names) < count:
            batch = [f"f-{secrets.token_hex(6)}" for _ in range(min(8, count - len(names)))]
            sleeping = [service.assign(name, "exec sleep 3600", cpu_milli=10, memory_bytes=16 * MIB) for name in batch]
            await asyncio.gather(*sleeping)
            names += batch
        await _until_started(service, count)
        await asyncio.sleep(scale.pick(2, 10))
        await _look(found, process, "tasks running", f"{count} running", count, scale.pick(5.0, 30.0))
    from nodeservice.wire import master_worker_pb2 as pb

    for name in names:
        await service.stub.CancelTask(pb.TaskID(task_id=name), timeout=60)
    await asyncio.gather(*(service.master.reported(name) for name in names))


async def _until_started(service: Service, count: int) -> None:
    while service.master.running_count < count:
        await asyncio.sleep(0.2)


async def _look(found: Finding, process: psutil.Process, kind: str, case: str, x: int, seconds: float) -> None:
    before, began = process.cpu_times(), time.monotonic()
    await asyncio.sleep(seconds)
    after, took = process.cpu_times(), time.monotonic() - began
    cpu = after.user + after.system - before.user - before.system
    for what, unit, value in (
        ("resident memory", "MiB", process.memory_info().rss / MIB),
        ("CPU", "% of a core", 100 * cpu / took),
        ("threads", "", process.num_threads()),
        ("descriptors", "", process.num_fds()),
    ):
        found.add(f"{what}, {kind}", unit, case, "service", [value], x=x)


async def _finished(found: Finding, service: Service, scale: Scale) -> None:
    process = psutil.Process(service.pid)
    step = scale.pick(500, 1000)
    counts = [step * number for number in range(scale.pick(3, 11))]
    rss: list[float] = []
    done = 0
    for count in counts:
        began, cpu_before = time.monotonic(), sum(process.cpu_times()[:2])
        names = iter([f"g-{number}" for number in range(done, count)])

        async def work(names: object = names) -> None:
            for name in names:  # type: ignore[attr-defined]
                await service.run(name, "x", cpu_milli=10, memory_bytes=16 * MIB)
                service.master.reports.pop(name)

        await asyncio.gather(*(work() for _ in range(16)))
        took = time.monotonic() - began
        if count > done:
            found.add("tasks on the fake engine", "tasks/s", f"{count:,} finished", "service", [(count - done) / took],
                      x=count, more_is_better=True)  # fmt: skip
            spent = sum(process.cpu_times()[:2]) - cpu_before
            found.add("CPU per task on the fake engine", "ms", f"{count:,} finished", "service",
                      [1000 * spent / (count - done)], x=count)  # fmt: skip
        done = count
        await _look(found, process, "tasks finished", f"{count:,} finished", count, 3.0)
        rss.append(process.memory_info().rss / MIB)
    found.ratios["rss_growth_mib_per_1000_finished"] = (rss[-1] - rss[1]) / (counts[-1] - counts[1]) * 1000
    found.ratios["rss_growth_mib_first_1000_finished"] = (rss[1] - rss[0]) / (counts[1] - counts[0]) * 1000
