"""What a node holds and uses: idle, with tasks that run, and after many that finished."""

from __future__ import annotations

import asyncio
import secrets
import time

import psutil

from benchmarks.rig.cpu import seconds_on_cpu
from benchmarks.rig.finding import Finding, Target
from benchmarks.rig.scale import Scale
from benchmarks.rig.service import MIB, Service, need_image, running_service

ABOUT = (
    "Of the node's process alone, heartbeat every 5 s, traces on. The row with 0 running tasks is the baseline. Running "
    "tasks are real containers that sleep. Finished ones ran on the fake engine (benchmarks/rig/node_on_fake_engine.py): "
    "everything but the containers is real, 16 tasks at a time; the node remembers 2,000 of them."
)
REMEMBERED_COUNT = 2_000


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
    for count in scale.pick((0, 1, 10), (0, 1, 50, 200)):
        while len(names) < count:
            batch = [f"f-{secrets.token_hex(6)}" for _ in range(min(8, count - len(names)))]
            sleeping = [service.assign(name, "exec sleep 3600", cpu_milli=10, memory_bytes=16 * MIB) for name in batch]
            await asyncio.gather(*sleeping)
            names += batch
        await _until_started(service, count)
        await asyncio.sleep(scale.pick(1, 10))
        looked_seconds = scale.pick(10.0 if count == 0 else 3.0, 15.0)
        rss, cpu_percent = await _look(found, process, "tasks running", f"{count} running", count, looked_seconds)
        if count == 0:
            found.targets += [
                Target(name="idle CPU, % of a core", measured=cpu_percent, bound=0.5, kind="at most"),
                Target(name="idle resident memory, MiB", measured=rss, bound=90, kind="at most"),
            ]
    found.targets.append(
        Target(name="resident memory with tasks, MiB", measured=rss, bound=150, kind="at most", case=f"{count} running")
    )
    from nodeservice.wire import master_worker_pb2 as pb

    for name in names:
        await service.stub.CancelTask(pb.TaskID(task_id=name), timeout=60)
    await asyncio.gather(*(service.master.reported(name) for name in names))


async def _until_started(service: Service, count: int) -> None:
    while service.master.running_count < count:
        await asyncio.sleep(0.2)


async def _look(
    found: Finding, process: psutil.Process, kind: str, case: str, x: int, seconds: float
) -> tuple[float, float]:
    """Resident memory in MiB, and CPU time in per cent of a core."""
    before, began = seconds_on_cpu(process.pid), time.monotonic()
    await asyncio.sleep(seconds)
    cpu_percent = 100 * (seconds_on_cpu(process.pid) - before) / (time.monotonic() - began)
    rss = process.memory_info().rss / MIB
    for what, unit, value in (
        ("resident memory", "MiB", rss),
        ("CPU", "% of a core", cpu_percent),
        ("threads", "", process.num_threads()),
        ("descriptors", "", process.num_fds()),
    ):
        found.add(f"{what}, {kind}", unit, case, "service", [value], x=x)
    return rss, cpu_percent


async def _finished(found: Finding, service: Service, scale: Scale) -> None:
    process = psutil.Process(service.pid)
    step = 1000
    counts = [step * number for number in range(scale.pick(2, 11))]
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
        looked_seconds = scale.pick(1.0, 3.0)
        rss.append((await _look(found, process, "tasks finished", f"{count:,} finished", count, looked_seconds))[0])
    found.ratios["rss_growth_mib_first_1000_finished"] = rss[counts.index(1000)] - rss[0]
    if counts[-1] > REMEMBERED_COUNT + step:
        first = counts.index(REMEMBERED_COUNT + step)
        growth = 1000 * (rss[-1] - rss[first]) / (counts[-1] - counts[first])
        found.ratios["rss_growth_mib_per_1000_finished"] = growth
        found.targets.append(
            Target(name="growth per 1,000 finished, MiB", measured=growth, bound=0.5, kind="at most",
                   case=f"{counts[first]:,} to {counts[-1]:,}")
        )  # fmt: skip
