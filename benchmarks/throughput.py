"""Tasks per second of the whole service, beside the bare engine, its command line and an agent of the simple design."""

from __future__ import annotations

import asyncio
import secrets

from benchmarks.rig.bare_engine import BareEngine, seconds_for
from benchmarks.rig.cpu import CpuMeter
from benchmarks.rig.finding import Finding, Target, median, paired
from benchmarks.rig.scale import Scale
from benchmarks.rig.service import Service, minio_server, need_image, running_service, sweep
from benchmarks.rig.simple_agent import SimpleAgent

COMMAND = "echo done; echo result > /results/out.txt"
ABOUT = (
    "Short tasks (`echo` to the log and to a result file), so many at a time. service: a node process, AssignTask over "
    "gRPC, limits, receipt, journal, log, upload to MinIO, traces to an OTLP receiver, report, clean-up. engine: "
    "docker-py with the very same container options: create, start, wait, logs, remove. cli: `docker run --rm` with the "
    "same options. simple_agent: polls every 5 s, starts containers one by one by the command line, uploads nothing. "
    "All in turn in each round."
)


async def measure(scale: Scale) -> Finding:
    need_image()
    found = Finding(about=ABOUT)
    home = scale.directory("throughput")
    node_id = f"bench-{secrets.token_hex(4)}"
    engine = BareEngine(node_id, home / "bare")
    try:
        with minio_server(home / "minio") as minio:
            async with running_service(home / "node", minio=minio) as service:
                await _all_counts(found, scale, service, engine)
    finally:
        engine.close()
        sweep(node_id)
    return found


async def _all_counts(found: Finding, scale: Scale, service: Service, engine: BareEngine) -> None:
    cpu_ms: list[float] = []
    by_engine: dict[int, float] = {}
    by_cli: dict[int, float] = {}
    by_agent: dict[int, float] = {}
    counts: tuple[int, ...] = scale.pick((1, 8), (1, 2, 4, 8, 16))
    for at_a_time in counts:
        cpu_milli = min(1000, 1000 * _cpu_count() // at_a_time)
        task_count = scale.pick(max(7, 2 * at_a_time), max(16, 3 * at_a_time))
        arms = _Arms(service, engine, cpu_milli, at_a_time)
        await arms.service_rate(at_a_time)  # warms up: threads, connections, caches
        await arms.engine_rate(at_a_time)
        rates: dict[str, list[float]] = {"service": [], "engine": [], "cli": []}
        for number in range(scale.pick(3, 7)):
            order = [*rates][number % 3 :] + [*rates][: number % 3]
            for arm in order:
                rates[arm].append(await getattr(arms, f"{arm}_rate")(task_count))
        rates["simple_agent"] = [await arms.agent_rate(at_a_time) for _ in range(scale.pick(1, 2))]
        for arm, samples in rates.items():
            found.add("throughput", "tasks/s", f"{at_a_time} at a time", arm, samples, x=at_a_time, more_is_better=True)
        found.add("service CPU per task", "ms", f"{at_a_time} at a time", "service", arms.cpu_ms, x=at_a_time)
        cpu_ms += arms.cpu_ms
        by_engine[at_a_time] = median(paired(rates["service"], rates["engine"]))
        by_cli[at_a_time] = median(paired(rates["service"], rates["cli"]))
        by_agent[at_a_time] = median(rates["service"]) / median(rates["simple_agent"])
    for name, ratios in (("engine", by_engine), ("cli", by_cli), ("simple_agent", by_agent)):
        found.ratios[f"throughput_vs_{name}"] = median([*ratios.values()])
        found.ratios |= {f"throughput_vs_{name}_at_{count}": ratio for count, ratio in ratios.items()}
    found.ratios["service_cpu_ms_per_task"] = median(cpu_ms)
    found.targets += [
        _least("throughput_vs_engine", by_engine, 0.95),
        _least("throughput_vs_cli", by_cli, 1.0),
        Target(name="service_cpu_ms_per_task", measured=median(cpu_ms), bound=15.0, kind="at most"),
    ]
    found.notes.append(
        "throughput_vs_… is the median over all counts; its target is judged at the worst count. The benchmark's own "
        "process is the master and the OTLP receiver of the service, and the client of the engine: its CPU is on top."
    )


def _least(name: str, ratios: dict[int, float], bound: float) -> Target:
    worst = min(ratios, key=ratios.__getitem__)
    return Target(name=name, measured=ratios[worst], bound=bound, kind="at least", case=f"{worst} at a time")


class _Arms:
    """Each runs so many tasks and gives tasks per second."""

    def __init__(self, service: Service, engine: BareEngine, cpu_milli: int, at_a_time: int) -> None:
        self._service = service
        self._engine = engine
        self._cpu_milli = cpu_milli
        self._at_a_time = at_a_time
        self.cpu_ms: list[float] = []

    async def service_rate(self, task_count: int) -> float:
        names = iter([f"t-{secrets.token_hex(6)}" for _ in range(task_count)])
        meter = CpuMeter([self._service.pid])

        async def work() -> None:
            for name in names:
                result = await self._service.run(name, COMMAND, cpu_milli=self._cpu_milli)
                if result.status != "success":
                    raise RuntimeError(f"{name} ended as {result.reason}: {result.message}")

        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(work() for _ in range(self._at_a_time)))
        await self._service.cleaned_up()
        seconds = loop.time() - began
        self.cpu_ms.append(1000 * meter.lap() / task_count)
        return task_count / seconds

    async def engine_rate(self, task_count: int) -> float:
        return await self._rate(lambda: self._engine.run(COMMAND, self._cpu_milli), task_count)

    async def cli_rate(self, task_count: int) -> float:
        return await self._rate(lambda: self._engine.run_by_command_line(COMMAND, self._cpu_milli), task_count)

    async def agent_rate(self, task_count: int) -> float:
        agent = SimpleAgent(self._engine)
        seconds = await asyncio.to_thread(
            agent.seconds_for, COMMAND, self._cpu_milli, task_count=task_count, at_a_time=self._at_a_time
        )
        return task_count / seconds

    async def _rate(self, run: object, task_count: int) -> float:
        seconds = await asyncio.to_thread(seconds_for, run, task_count=task_count, at_a_time=self._at_a_time)  # type: ignore[arg-type]
        return task_count / seconds


def _cpu_count() -> int:
    import os

    return len(os.sched_getaffinity(0))
