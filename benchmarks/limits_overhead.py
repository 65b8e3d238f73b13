"""What limits cost a task: setting and reading them back, and the bill, beside the same container without them.

    .venv/bin/python benchmarks/limits_overhead.py [ROUNDS] [--json FILE] [--markdown FILE]

Needs root, an engine (DOCKER_HOST) and the image nodeservice/demo. Each round runs one container bare and one limited, in
turn. The parts are timed apart, since a container's own start varies by more than they take together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import statistics
import tempfile
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nodeservice.core.model import MIB, AttemptId, Lease, PullPolicy, Resources, TaskSpec
from nodeservice.limits.cgroup import task_cgroups
from nodeservice.limits.disk import open_task_disk
from nodeservice.limits.process import ProcReader
from nodeservice.limits.receipt import receipt
from nodeservice.ports import ContainerSpec, Mount, TaskCgroups, TaskDisk
from nodeservice.runtime.docker import DockerRuntime

T = TypeVar("T")
BOUNDS_MS = {"enforce": 5.0, "bill": 2.0}
REQUEST = Resources(cpu_milli=500, memory_bytes=64 * MIB, disk_bytes=64 * MIB)
COMMAND = "dd if=/dev/zero of=/results/f bs=64k count=16 2>/dev/null; sleep 0.1"


class Stopwatch:
    """Milliseconds by part."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + (time.perf_counter() - began) * 1000

    async def timed(self, name: str, work: Awaitable[T]) -> T:
        with self.part(name):
            return await work


class Bench:
    def __init__(self, runtime: DockerRuntime, cgroups: TaskCgroups, disk: TaskDisk, home: Path, image: str) -> None:
        self.runtime, self.cgroups, self.disk, self.home, self.image = runtime, cgroups, disk, home, image

    def spec(self, id_: AttemptId, parent: str | None) -> ContainerSpec:
        results = self.home / str(id_)
        results.mkdir(exist_ok=True)
        results.chmod(0o777)
        return ContainerSpec(
            name=f"nodeservice.{id_}", image=self.image, argv=None, shell=COMMAND, env=(), labels={},
            cpu_milli=REQUEST.cpu_milli, memory_bytes=REQUEST.memory_bytes, pids_limit=64,
            mounts=(Mount(source=results, target="/results"),), gpu_uuids=(), log_max_bytes=MIB, grace_seconds=1.0,
            cgroup_parent=parent,
        )  # fmt: skip

    async def bare(self, id_: AttemptId) -> float:
        began = time.perf_counter()
        container = await self.runtime.create(self.spec(id_, None))
        await self.runtime.start(container)
        await self.runtime.wait_exited(container)
        await self.runtime.remove(container)
        return (time.perf_counter() - began) * 1000

    async def limited(self, id_: AttemptId, watch: Stopwatch) -> float:
        """The calls of lifecycle/steps/create.py, run.py and collect.py, in their order."""
        task = TaskSpec(id=id_, image=self.image, request=REQUEST, pids_limit=64, fingerprint="")
        began = time.perf_counter()
        work = self.home / str(id_)
        work.mkdir()
        await watch.timed("enforce", self.disk.prepare(id_, REQUEST.disk_bytes, work=work, log=self.home / "log"))
        parent = await watch.timed("enforce", self.cgroups.prepare(task))
        container = await self.runtime.create(self.spec(id_, parent))
        state = await self.runtime.start(container)
        with watch.part("enforce"):
            await self.disk.add_layer(id_, state.layer, state.beside)
            readings = [*await self.cgroups.readings(id_), *ProcReader().readings(state.pid or 0)]
            made = receipt(
                task, Lease(granted=REQUEST), readings=readings, disk=await self.disk.bound(id_), engine=state.limits
            )
            made.as_dict()
        assert not made.mismatches, made.mismatches
        await self.runtime.wait_exited(container)
        with watch.part("bill"):
            _kills, usage = await self.cgroups.at_end(id_)
            written = await self.disk.use(id_)
        assert usage is not None
        assert usage.memory_peak_bytes, "nothing was billed"
        assert written is not None
        assert written.peak_bytes >= MIB
        await self.runtime.remove(container)
        await watch.timed("remove", self.cgroups.remove(id_))
        await watch.timed("remove", self.disk.remove(id_, work=work))
        return (time.perf_counter() - began) * 1000


async def measure(rounds: int) -> dict[str, Any]:
    node = f"bench-{secrets.token_hex(4)}"
    runtime = DockerRuntime(node_id=node)
    with tempfile.TemporaryDirectory(prefix="nodeservice-bench-") as home:
        facts = await runtime.facts()
        cgroups = task_cgroups(node_id=node, facts=facts, directories=[Path(home)])
        disk = open_task_disk(Path(home), facts.root_dir, processes=cgroups.processes)
        image = (await runtime.pull("nodeservice/demo", policy=PullPolicy.NEVER)).digest
        bench = Bench(runtime, cgroups, disk, Path(home), image)
        rows: list[dict[str, float]] = []
        try:
            assert cgroups.describe() is None, cgroups.describe()
            for number in range(-2, rounds):
                bare = await bench.bare(AttemptId(f"{node}-bare-{number + 2}"))
                watch = Stopwatch()
                limited = await bench.limited(AttemptId(f"{node}-limited-{number + 2}"), watch)
                if number >= 0:  # the first are for warming up
                    rows.append({"bare": bare, "limited": limited, "ratio": limited / bare, **watch.parts})
        finally:
            for state in await runtime.list_owned(node):
                await runtime.remove(state.id)
            await cgroups.close()
            await disk.close()
            await runtime.close()
    return {
        "machine": {
            "cpu_count": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "engine": f"{facts.name} {facts.version}, {facts.storage_driver}",
            "cgroup": f"v{facts.cgroup_version}, {facts.cgroup_driver}",
        },
        "rounds": rounds,
        "milliseconds": {name: spread([row[name] for row in rows]) for name in rows[0]},
        "bounds_milliseconds": BOUNDS_MS,
    }


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {
        "median": round(statistics.median(values), 3),
        "quartile_low": round(low, 3),
        "quartile_high": round(high, 3),
        "most": round(max(values), 3),
    }


def markdown(told: dict[str, Any]) -> str:
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in told["machine"].items())
    lines = [
        f"{told['rounds']} rounds; {machine}.",
        "",
        "| part | median | quartiles | most | bound |",
        "|---|---|---|---|---|",
    ]
    for name, row in told["milliseconds"].items():
        unit = "" if name == "ratio" else " ms"
        bound = f"{BOUNDS_MS[name]:g} ms" if name in BOUNDS_MS else ""
        quartiles = f"{row['quartile_low']:.2f} – {row['quartile_high']:.2f}{unit}"
        lines.append(f"| {name} | {row['median']:.2f}{unit} | {quartiles} | {row['most']:.2f}{unit} | {bound} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    told = asyncio.run(measure(options.rounds))
    print(json.dumps(told, indent=2))
    if options.json:
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(told))


if __name__ == "__main__":
    main()
