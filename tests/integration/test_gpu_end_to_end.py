"""A real node with pretended GPUs: a false driver below it, and a Docker daemon of the test's own with a stand-in hook."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest

from nodeservice.testing.false_driver import FalseDriver
from nodeservice.testing.false_driver.hook import PROGRAM, HookCall, calls, hook_script
from nodeservice.testing.otlp import OtlpReceiver
from tests.conftest import remove_cgroup
from tests.integration.docker_daemon import DockerDaemon, docker_daemon, require_docker_daemon
from tests.integration.listening_master import ListeningMaster, assign
from tests.integration.node_process import NodeProcess
from tests.integration.scripted_node import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

GIB = 1024**3
HEARTBEAT_SECONDS = 0.5
UNTIL_TOLD = "until [ -e /results/go ]; do sleep 0.05; done"
"""Ends when `Bench.tell` makes that file."""


@dataclass
class Bench:
    """One node with eight pretended H200, and what there is to look at it from outside."""

    node: NodeProcess
    master: ListeningMaster
    driver: FalseDriver
    daemon: DockerDaemon
    since: float

    async def assign(self, task_id: str, command: str = UNTIL_TOLD, **fields: Any) -> bool:
        """Whether the node took it."""
        return (await assign(self.node.address, task_id, command, **fields)).success

    async def run(self, task_id: str, command: str = UNTIL_TOLD, **fields: Any) -> tuple[str, ...]:
        """Have it run; its GPUs."""
        answer = await assign(self.node.address, task_id, command, **fields)
        assert answer.success, answer.message
        return (await self.master.running(task_id))[task_id]

    def tell(self, task_id: str) -> None:
        """Let a task end that waits for it."""
        results = self.node.path / "state" / "tasks" / f"{task_id}.1" / "results"
        if results.exists():
            (results / "go").touch()

    def container(self, task_id: str) -> dict[str, Any]:
        with self.daemon.client() as client:
            return client.inspect_container(f"nodeservice.{task_id}.1")

    def pid(self, task_id: str) -> int:
        return int(self.container(task_id)["State"]["Pid"])

    def hook_calls(self) -> dict[str, HookCall]:
        """By task: those of this test's node."""
        with self.daemon.client() as client:
            told = client.events(
                since=int(self.since), until=int(time.time()) + 1, filters={"event": "create"}, decode=True
            )
            labels = {event["Actor"]["ID"]: event["Actor"]["Attributes"] for event in told}
        mine = {id_: own for id_, own in labels.items() if own.get("nodeservice.node") == self.node.worker_id}
        made = {call.container_id: call for call in calls(self.daemon.home / "seen")}
        return {own["nodeservice.task_id"]: made[id_] for id_, own in mine.items() if id_ in made}


Benches = Callable[..., AbstractAsyncContextManager[Bench]]


@pytest.fixture(scope="module")
def daemon(false_driver_cache: Path) -> Iterator[DockerDaemon]:
    require_docker_daemon()
    hook = hook_script(Path("HOME/drivers"), Path("HOME/seen"))
    with docker_daemon(programs={PROGRAM: hook}) as running:
        (running.home / "drivers").mkdir()
        yield running


@pytest.fixture
def bench(tmp_path: Path, daemon: DockerDaemon, false_driver_cache: Path) -> Benches:
    @asynccontextmanager
    async def made(**settings: str) -> AsyncIterator[Bench]:
        name = f"gpu-{uuid.uuid4().hex[:8]}"
        driver = FalseDriver.build(daemon.home / "drivers" / name, "h200x8", cache=false_driver_cache)
        env = driver.environment | {
            "DOCKER_HOST": daemon.url,
            "NODESERVICE_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
            "NODESERVICE_GPU_POLL_SECONDS": "0.2",
            "NODESERVICE_GPU_QUARANTINE_SECONDS": "2",
        }
        since = time.time()
        async with ListeningMaster() as master:
            node = NodeProcess(tmp_path / "node", name, ("--master", f"127.0.0.1:{master.port}"), env | settings)
            await node.start()
            try:
                await eventually(lambda: bool(master.beats) and len(master.beats[-1][1].gpus) == 8)
                yield Bench(node, master, driver, daemon, since)
            finally:
                driver.unhang()
                await node.stop()
                await _remove_containers(daemon, name)
                for cgroup in Path("/sys/fs/cgroup").glob(f"*/nodeservice/{name}.node"):
                    remove_cgroup(cgroup)

    return made


async def _remove_containers(daemon: DockerDaemon, node: str) -> None:
    """All of the node's; the engine may be about to remove one itself, as the node asked."""
    with daemon.client() as client:
        async with asyncio.timeout(30):
            while left := client.containers(all=True, filters={"label": [f"nodeservice.node={node}"]}):
                for entry in left:
                    with contextlib.suppress(docker.errors.APIError):
                        client.remove_container(entry["Id"], force=True, v=True)
                await asyncio.sleep(0.05)


# ---- leases -----------------------------------------------------------------------------------------------------------


async def test_sixteen_tasks_for_one_to_eight_gpus_each_get_exactly_theirs(bench: Benches) -> None:
    async with bench() as b:
        minors = {uuid: int(b.driver.facts(uuid)["minor"]) for uuid in b.driver.gpus}
        counts = {f"t{number}": number % 8 + 1 for number in range(16)}
        waiting = dict(counts)
        assert await b.assign("none", env=[{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}])
        async with asyncio.timeout(90):
            while len(b.master.reports) < len(counts) + 1:
                for task_id, count in sorted(waiting.items(), key=lambda item: -item[1]):
                    if await b.assign(task_id, gpus=count):
                        del waiting[task_id]
                for task_id in b.master.leases():
                    b.tell(task_id)
                await asyncio.sleep(0.05)
        reports = {report.task_id: report for report in b.master.reports}
        hook_calls = b.hook_calls()
    assert {report.reason for report in reports.values()} == {"COMPLETED"}
    leases = {task_id: sorted(report.gpu_uuids) for task_id, report in reports.items()}
    assert {task_id: len(lease) for task_id, lease in leases.items()} == {**counts, "none": 0}
    assert {task_id: sorted(call.uuids) for task_id, call in hook_calls.items()} == {
        task_id: lease for task_id, lease in leases.items() if lease
    }
    for task_id, lease in leases.items():
        limits = json.loads(reports[task_id].limits_json)
        nodes = {word for word in limits["effective"]["devices"].split() if word.startswith("nvidia")}
        nodes = {word for word in nodes if not word.startswith(("nvidiactl=", "nvidia-uvm="))}
        assert nodes == {f"nvidia{minors[uuid]}=195:{minors[uuid]}" for uuid in lease}
        rules = {rule for rule in limits["effective"]["device_rules"].split(", ") if "195:" in rule}
        if lease and not hook_calls[task_id].not_allowed:
            assert rules == {f"c 195:{minor} rw" for minor in (255, *(minors[uuid] for uuid in lease))}
        assert sorted(limits["effective"].get("gpu_uuids", "").split()) == lease
        assert limits["mismatches"] == []
    _assert_held_once(reports.values())


def _assert_held_once(reports: Iterable[Any]) -> None:
    """From the times of their runs: no GPU by two at a time."""
    runs = []
    for report in reports:
        phases = {phase.name: phase for phase in report.phases}
        began, run = phases["create"].started_at_unix_ns, phases["run"]
        runs += [(gpu, began, run.started_at_unix_ns + run.duration_ns) for gpu in report.gpu_uuids]
    runs.sort()
    for (gpu, _, end), (next_gpu, begin, _) in pairwise(runs):
        assert gpu != next_gpu or end <= begin


async def test_runs_that_are_started_together_get_different_gpus(bench: Benches, tmp_path: Path) -> None:
    async with bench() as b:
        names = [f"{b.node.worker_id}-{number}" for number in range(3)]
        env = {**os.environ, **b.node.env, "XDG_STATE_HOME": str(tmp_path)}
        small = ("--cpus", "0.1", "--memory", "32m", "--disk", "10m", "nodeservice/demo:latest", "--", "sleep", "600")
        runs = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "nodeservice", "run", "--json", "--gpus", "1", "--task-id", name,
                "--results", str(tmp_path / name), *small, env=env, stdout=asyncio.subprocess.PIPE,
            )
            for name in names
        ]  # fmt: skip

        def all_run() -> bool:
            with b.daemon.client() as client:
                return len(client.containers(filters={"name": [b.node.worker_id], "status": ["running"]})) == 3

        try:
            await eventually(all_run, seconds=60)
        finally:
            for one in runs:
                one.terminate()
            told = [json.loads((await one.communicate())[0]) for one in runs]
        assert len({uuid for result in told for uuid in result["gpu_uuids"]}) == 3


async def test_what_a_node_holds_neither_inspect_nor_run_has_beside_it_and_a_dead_node_holds_nothing(
    bench: Benches, tmp_path: Path
) -> None:
    async with bench() as b:
        held = await b.run("t", gpus=1)
        words = f"in use by worker {b.node.worker_id} (pid {b.node.process.pid}) on this host"  # type: ignore[union-attr]
        alone = {**os.environ, **b.node.env, "NODESERVICE_STATE_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}

        async def told(*arguments: str, **env: str) -> tuple[int | None, str]:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "nodeservice", *arguments, env=alone | env,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, err = await process.communicate()
            return process.returncode, (out + err).decode()

        async def shown(**env: str) -> dict[str, str]:
            code, text = await told("inspect", "--json", **env)
            assert code == 0, text
            return {gpu["uuid"]: gpu["state_reason"] for gpu in json.loads(text)["gpus"] if gpu["state"] != "WELL"}

        assert await shown(NODESERVICE_WORKER_ID="other") == {held[0]: words}
        assert await shown(NODESERVICE_WORKER_ID=b.node.worker_id) == {}
        code, text = await told("run", "--gpus", "8", "nodeservice/demo:latest", "true")
        assert code != 0
        assert words in text
        await b.node.kill()
        assert await shown(NODESERVICE_WORKER_ID="other") == {}
        await b.node.start()
        words = f"in use by worker {b.node.worker_id} (pid {b.node.process.pid}) on this host"  # type: ignore[union-attr]

        async def again() -> bool:
            return await shown(NODESERVICE_WORKER_ID="other") == {held[0]: words}

        await eventually(again)


# ---- faults -----------------------------------------------------------------------------------------------------------


async def test_a_gpu_that_falls_off_the_bus_ends_its_task_alone_and_comes_back_after_its_quarantine(
    bench: Benches,
) -> None:
    with OtlpReceiver() as metrics:
        settings = {"NODESERVICE_OTLP_METRICS_ENDPOINT": metrics.endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "100"}
        async with bench(**settings) as b:
            (ill,) = await b.run("ill", gpus=1)
            (well,) = await b.run("well", gpus=1)
            b.driver.xid(ill, 79)
            report = await b.master.reported("ill")
            assert (report.outcome, report.reason, report.retryable) == ("FAILED", "GPU_FAULT", True)
            assert ill in report.message
            assert [list(usage.xids) for usage in report.usage.gpus] == [[79]]
            assert b.master.report("well") is None
            await b.master.out_of_service_and_back(ill)
            assert (await b.run("again", gpus=7)).count(ill) == 1
            b.tell("again")
            b.tell("well")
            assert [(await b.master.reported(name)).reason for name in ("again", "well")] == ["COMPLETED", "COMPLETED"]
    ended = next(told for told in metrics.exports if told.value("nodeservice.task.finished", "GPU_FAULT"))
    assert (ended.value("hw.status", ill, "failed"), ended.value("hw.status", well, "ok")) == (1, 1)
    assert ended.value("hw.errors", ill, "xid_79") == 1
    assert (ended.value("nodeservice.gpu.tasks", well), ended.value("nodeservice.gpu.granted")) == (1, 1)
    assert ended.value("nodeservice.gpu.allocatable") == 7
    assert metrics.exports[-1].value("hw.status", ill, "ok") == 1


async def test_a_lost_gpu_takes_its_task_along_and_is_offered_to_nobody_until_it_is_back(bench: Benches) -> None:
    async with bench() as b:
        (lost,) = await b.run("lost", gpus=1)
        await b.run("well", gpus=1)
        b.driver.lose(lost)
        report = await b.master.reported("lost")
        assert (report.reason, report.retryable, lost in report.message) == ("GPU_FAULT", True, True)
        await eventually(lambda: b.master.beats[-1][1].allocatable.gpu_count == 7)
        assert not await b.assign("too-many", gpus=7)
        assert not await b.assign("that-one", gpus=1, gpu={"uuids": [lost]})
        b.driver.restore(lost)
        await eventually(lambda: b.master.beats[-1][1].allocatable.gpu_count == 8)
        assert await b.run("that-one", gpus=1, gpu={"uuids": [lost]}) == (lost,)
        for name in ("that-one", "well"):
            b.tell(name)
            assert (await b.master.reported(name)).reason == "COMPLETED"


async def test_a_driver_that_hangs_delays_neither_heartbeats_nor_tasks_without_gpus(bench: Benches) -> None:
    async with bench() as b:
        await b.run("on-gpu", gpus=1)
        first = len(b.master.beats)
        b.driver.hang(600)
        await b.run("on-cpu")
        b.tell("on-cpu")
        assert (await b.master.reported("on-cpu")).reason == "COMPLETED"
        # After some seconds the node says so; once the driver answers again, it takes that back.
        await eventually(lambda: any("GPU_DRIVER" in words for words in b.master.beats[-1][1].warnings))
        assert not await b.assign("more", gpus=1)
        await eventually(lambda: b.master.beats[-1][0] - b.master.beats[first][0] >= 10)
        b.driver.unhang()
        await eventually(lambda: not b.master.beats[-1][1].warnings)
        b.tell("on-gpu")
        assert (await b.master.reported("on-gpu")).reason == "COMPLETED"
        gaps = [later - earlier for (earlier, _), (later, _) in pairwise(b.master.beats[first:])]
    assert max(gaps) < 6 * HEARTBEAT_SECONDS


# ---- a crash ----------------------------------------------------------------------------------------------------------


@pytest.mark.crash
async def test_after_a_crash_of_the_node_each_task_has_its_gpus_still_and_its_bill_goes_on(bench: Benches) -> None:
    async with bench() as b:
        leases = {"two": await b.run("two", gpus=2), "one": await b.run("one", gpus=1)}
        (counted,) = leases["one"]
        energy = int(b.driver.facts(counted)["energy_millijoules"])
        bill = b.node.path / "state" / "tasks" / "one.1" / "gpu.json"
        await eventually(lambda: bill.exists() and counted in json.loads(bill.read_text()))
        b.driver.set(counted, energy_millijoules=energy + 100_000)
        await eventually(lambda: json.loads(bill.read_text())[counted]["energy_joules"] == 100)
        await b.node.kill()
        b.driver.set(counted, energy_millijoules=energy + 130_000)
        b.master.beats.clear()
        await b.node.start()
        assert await b.master.running("two", "one") == leases
        held = {uuid for lease in leases.values() for uuid in lease}
        assert not await b.assign("six", gpus=6)
        assert not held & set(await b.run("five", gpus=5))
        b.driver.set(counted, energy_millijoules=energy + 150_000)
        for name in ("five", "two", "one"):
            b.tell(name)
        reports = {name: await b.master.reported(name) for name in ("five", "two", "one")}
        assert {name: sorted(call.uuids) for name, call in b.hook_calls().items()} == {
            name: sorted(report.gpu_uuids) for name, report in reports.items()
        }
    assert {report.reason for report in reports.values()} == {"COMPLETED"}
    assert sorted(reports["two"].gpu_uuids) == sorted(leases["two"])
    assert [usage.energy_joules for usage in reports["one"].usage.gpus] == [150.0]


# ---- a part of a GPU --------------------------------------------------------------------------------------------------


async def two_neighbours(b: Bench) -> str:
    """Tasks `greedy` and `modest` with 4 GiB each of one GPU, which is given."""
    share = {"share": {"memory_bytes": 4 * GIB}}
    greedy = f"sleep 600 & {UNTIL_TOLD}"
    (first,), (second,) = await b.run("greedy", greedy, gpu=share), await b.run("modest", gpu=share)
    assert first == second
    b.driver.add_process(first, b.pid("modest"), 3 * GIB, while_alive=True)
    return first


async def test_a_task_that_takes_more_gpu_memory_than_its_part_is_ended_and_its_neighbour_is_not(
    bench: Benches,
) -> None:
    async with bench(NODESERVICE_GPU_SHARING="watched") as b:
        gpu = await two_neighbours(b)
        b.driver.add_process(gpu, b.pid("greedy"), 5 * GIB, while_alive=True)
        report = await b.master.reported("greedy")
        assert (report.outcome, report.reason) == ("FAILED", "GPU_MEMORY_LIMIT")
        assert str(5 * GIB) in report.message
        assert [usage.memory_peak_bytes for usage in report.usage.gpus] == [5 * GIB]
        b.tell("modest")
        spared = await b.master.reported("modest")
        assert spared.reason == "COMPLETED"
        assert [usage.memory_peak_bytes for usage in spared.usage.gpus] == [3 * GIB]


async def test_a_process_in_a_nested_cgroup_that_is_named_like_the_neighbours_container_is_still_its_own(
    bench: Benches,
) -> None:
    async with bench(NODESERVICE_GPU_SHARING="watched") as b:
        gpu = await two_neighbours(b)
        nested = _memory_cgroup(b.pid("greedy")) / b.container("modest")["Id"]
        nested.mkdir()
        inside = psutil.Process(b.pid("greedy")).children(recursive=True)
        (child,) = [one for one in inside if _command(one) == ["sleep", "600"]]
        (nested / "cgroup.procs").write_text(str(child.pid))
        b.driver.add_process(gpu, child.pid, 5 * GIB, while_alive=True)
        assert (await b.master.reported("greedy")).reason == "GPU_MEMORY_LIMIT"
        assert b.master.report("modest") is None
        b.tell("modest")
        assert (await b.master.reported("modest")).reason == "COMPLETED"


def _command(process: psutil.Process) -> list[str]:
    """Empty for one that has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _memory_cgroup(pid: int) -> Path:
    """The cgroup that counts the process's memory; a skip where it is not one of cgroup v1."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / place.lstrip("/")
    pytest.skip("cgroup v2: a cgroup with processes in it can have no others below it that are limited")
