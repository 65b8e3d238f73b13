"""Tasks that try to break out of what they were given. None harms the node, and each ends for the reason that is true."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import grpc
import pytest
import pytest_asyncio

from nodeservice.limits.hierarchy import host_cgroup_version
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldMaster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
MIB = 1024**2
PATIENCE_SECONDS = float(os.environ.get("TEST_PATIENCE_SECONDS", "120"))
"""For one task to end; an emulated machine needs more."""
DEAF = 'trap "" TERM INT HUP; while :; do sleep 1; done'


@dataclass
class Bench:
    """A real node, and the master that hears of it."""

    node: NodeProcess
    master: OldMaster
    stub: pb_grpc.MasterWorkerStub

    async def assign(self, command: str, **fields: Any) -> str:
        task_id = f"attack-{uuid.uuid4().hex[:8]}"
        wanted: dict[str, Any] = {
            "docker_image": "nodeservice/demo",
            "cpu_milli": 100,
            "memory_bytes": 32 * MIB,
            "disk_bytes": 8 * MIB,
            "pids_limit": 64,
            "grace_seconds": 0.5,
        }
        ack = await self.stub.AssignTask(pb.Task(task_id=task_id, command=command, **(wanted | fields)), timeout=30)
        assert ack.success, ack.message
        return task_id

    async def end_of(self, task_id: str) -> pb.TaskResult:
        report = await self.master.report_of(task_id, PATIENCE_SECONDS)
        # The old master parsed it; what it does not know came along.
        return pb.TaskResult.FromString(report.SerializeToString())

    async def run(self, command: str, **fields: Any) -> pb.TaskResult:
        return await self.end_of(await self.assign(command, **fields))

    async def running(self, task_id: str) -> None:
        await self.master.until(
            lambda: any(
                task.task_id == task_id and task.status == "running"
                for beat in self.master.heartbeats[-1:]
                for task in beat.running_tasks
            ),
            PATIENCE_SECONDS,
        )


@pytest.fixture
def options() -> tuple[str, ...]:
    return ()


@pytest_asyncio.fixture
async def bench(
    tmp_path: Path, node_id: str, demo_image: str, options: tuple[str, ...], request: pytest.FixtureRequest
) -> AsyncIterator[Bench]:
    settings = request.node.get_closest_marker("settings")
    env = dict(settings.kwargs) if settings else {}
    master = await OldMaster().start()
    node = NodeProcess(
        path=tmp_path, worker_id=node_id, options=("--master", f"127.0.0.1:{master.port}", *options), env=env
    )
    try:
        await node.start()
        async with grpc.aio.insecure_channel(node.address) as channel:
            yield Bench(node, master, pb_grpc.MasterWorkerStub(channel))  # type: ignore[no-untyped-call]
    finally:
        await node.stop()
        await master.stop()


def receipt(result: pb.TaskResult) -> dict[str, Any]:
    return dict(json.loads(result.limits_json))


def left_behind(docker_client: docker.APIClient, node: NodeProcess) -> list[str]:
    containers = docker_client.containers(all=True, filters={"label": [f"nodeservice.node={node.worker_id}"]})
    cgroups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/*{node.worker_id}*/*attack-*")]
    return [entry["Id"] for entry in containers] + cgroups


async def nothing_left(docker_client: docker.APIClient, node: NodeProcess) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while left := left_behind(docker_client, node):
            await asyncio.sleep(0.2)
    assert left == []


async def test_a_fork_bomb_meets_its_limit_and_nobody_else_notices(
    bench: Bench, docker_client: docker.APIClient
) -> None:
    bomb = await bench.assign("b() { b | b & }; b; sleep 600", pids_limit=50, timeout_seconds=4.0)
    neighbour = await bench.run("for i in 1 2 3; do sleep 0.5; echo $i; done")
    assert (neighbour.reason, neighbour.logs) == ("COMPLETED", "1\n2\n3\n")
    result = await bench.end_of(bomb)
    assert result.reason == "DEADLINE"
    assert receipt(result)["effective"]["pids_limit"] == 50
    if result.usage.HasField("pids_peak_count"):
        assert 40 <= result.usage.pids_peak_count <= 50 + 8
    await nothing_left(docker_client, bench.node)


async def test_a_memory_hog_is_killed_and_told_as_such(bench: Bench) -> None:
    result = await bench.run("dd if=/dev/zero of=/dev/null bs=300M count=1")
    assert (result.outcome, result.reason) == ("FAILED", "MEMORY_LIMIT")
    assert not result.retryable
    assert result.usage.oom_kill_count >= 1
    assert 16 * MIB < result.usage.memory_peak_bytes <= 32 * MIB


async def test_a_hog_in_a_child_is_told_whether_or_not_the_parent_goes_on(bench: Bench) -> None:
    result = await bench.run("(dd if=/dev/zero of=/dev/null bs=300M count=1); sleep 0.2; exit 0")
    if host_cgroup_version() == 2:
        # The kernel ends the whole container there (memory.oom.group).
        assert (result.outcome, result.reason) == ("FAILED", "MEMORY_LIMIT")
    else:
        assert (result.outcome, result.reason, result.exit_code) == ("SUCCEEDED", "COMPLETED", 0)
        assert any("killed at the memory limit" in remark for remark in result.remarks)


async def test_exit_137_of_its_own_is_no_lack_of_memory(bench: Bench) -> None:
    result = await bench.run("kill -9 $$")
    assert (result.reason, result.usage.oom_kill_count) == ("EXIT_NONZERO", 0)
    result = await bench.run("exit 137")
    assert (result.reason, result.exit_code) == ("EXIT_NONZERO", 137)


async def test_twenty_that_run_out_of_memory_at_once_are_all_told_as_such(
    bench: Bench, docker_client: docker.APIClient
) -> None:
    hogs = [
        await bench.assign("dd if=/dev/zero of=/dev/null bs=300M count=1", cpu_milli=50, memory_bytes=16 * MIB)
        for _ in range(20)
    ]
    reasons = [(await bench.end_of(task_id)).reason for task_id in hogs]
    assert reasons == ["MEMORY_LIMIT"] * 20
    await nothing_left(docker_client, bench.node)


async def test_a_daemon_that_left_its_family_and_ignores_sigterm_is_gone_with_the_task(
    bench: Bench, docker_client: docker.APIClient
) -> None:
    mark = f"mark-{uuid.uuid4().hex[:8]}"
    command = f"setsid sh -c '{DEAF} # {mark}' & setsid sh -c '{DEAF} # {mark}' & sleep 0.5; exit 0"
    result = await bench.run(command)
    assert result.reason == "COMPLETED"
    assert processes_with(mark) == []
    await nothing_left(docker_client, bench.node)


async def test_one_that_ignores_its_deadline_is_gone_with_all_its_children(
    bench: Bench, docker_client: docker.APIClient
) -> None:
    mark = f"mark-{uuid.uuid4().hex[:8]}"
    command = f"setsid sh -c '{DEAF} # {mark}' & {DEAF} # {mark}"
    result = await bench.run(command, timeout_seconds=1.0)
    assert (result.outcome, result.reason) == ("FAILED", "DEADLINE")
    assert processes_with(mark) == []
    await nothing_left(docker_client, bench.node)


def processes_with(mark: str) -> list[int]:
    """Processes on this host whose command line shows the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


async def test_eight_busy_loops_get_no_more_than_half_a_core(bench: Bench) -> None:
    loops = "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait"
    result = await bench.run(loops, cpu_milli=500, timeout_seconds=4.0)
    assert result.reason == "DEADLINE"
    (ran,) = [phase.duration_ns / 1e9 for phase in result.phases if phase.name == "run"]
    assert 0 < result.usage.cpu_seconds <= 0.5 * ran * 1.05 + 0.1  # a period's quota at the start and at the end
    assert result.usage.cpu_throttled_seconds > 0


FILLERS = {
    "results": "dd if=/dev/zero of=/results/big bs=1M count=200; sleep 600",
    "layer": "dd if=/dev/zero of=/big bs=1M count=200; sleep 600",
    "tmp": "dd if=/dev/zero of=/tmp/big bs=1M count=200; sleep 600",
    "log": "yes 0123456789012345678901234567890123456789 | head -c 60000000; sleep 600",
    "spread": "for d in /results /tmp /var; do dd if=/dev/zero of=$d/big bs=1M count=4; done; sleep 600",
    "hosts": "dd if=/dev/zero of=/etc/hosts bs=1M count=200; sleep 600",
    "deleted": "exec 3>/results/f; rm /results/f; dd if=/dev/zero bs=1M count=200 >&3; sleep 600",
    "deleted in layer": "exec 3>/f; rm /f; dd if=/dev/zero bs=1M count=200 >&3; sleep 600",
    "deep": f"d={'x' * 200}; cd /results; for i in $(seq 60); do mkdir $d; cd $d; done; "
    "dd if=/dev/zero of=f bs=1M count=200; sleep 600",
    "tiny files": "i=0; while [ $i -lt 1000000 ]; do : > /results/$i; i=$((i+1)); done; sleep 600",
}


@pytest.mark.parametrize("where", FILLERS)
async def test_a_disk_filler_is_ended_for_it(bench: Bench, where: str) -> None:
    quiet = await bench.assign("dd if=/dev/zero of=/results/mine bs=1M count=2; sleep 3", memory_bytes=64 * MIB)
    result = await bench.run(FILLERS[where], cpu_milli=800, memory_bytes=64 * MIB, disk_bytes=8 * MIB)
    assert (result.outcome, result.reason) == ("FAILED", "DISK_LIMIT"), result.message
    assert result.usage.disk_peak_bytes > 8 * MIB
    assert receipt(result)["enforcement"]["disk_bytes"] == "watched"
    assert (await bench.end_of(quiet)).reason == "COMPLETED"


async def test_shared_memory_is_part_of_the_memory_and_has_a_size(bench: Bench) -> None:
    hog = await bench.run("dd if=/dev/zero of=/dev/shm/big bs=1M count=500", memory_bytes=32 * MIB)
    assert hog.reason == "MEMORY_LIMIT"
    full = await bench.run("dd if=/dev/zero of=/dev/shm/big bs=1M count=500", memory_bytes=256 * MIB)
    assert (full.reason, full.exit_code) == ("EXIT_NONZERO", 1)
    assert "No space left" in full.logs
    assert receipt(full)["effective"]["shm_bytes"] == 128 * MIB


async def test_one_that_ends_at_its_deadline_is_told_as_it_was(bench: Bench) -> None:
    tasks = [await bench.assign("sleep 1; echo end", timeout_seconds=0.9 + 0.05 * n, cpu_milli=50) for n in range(8)]
    for task_id in tasks:
        result = await bench.end_of(task_id)
        assert result.reason in ("COMPLETED", "DEADLINE")
        assert (result.reason == "COMPLETED") == (result.exit_code == 0 and result.outcome == "SUCCEEDED")
        assert (result.logs == "end\n") or result.reason == "DEADLINE"


async def test_a_stop_signal_of_its_choice_lets_a_task_end_in_its_own_way(bench: Bench) -> None:
    command = 'trap "echo saved; exit 3" USR1; while :; do sleep 0.1; done'
    result = await bench.run(command, stop_signal="SIGUSR1", grace_seconds=20.0, timeout_seconds=1.0)
    assert (result.reason, result.exit_code, result.logs) == ("DEADLINE", 3, "saved\n")


async def test_an_absolute_deadline_holds_across_a_crash(bench: Bench, docker_client: docker.APIClient) -> None:
    task_id = await bench.assign("sleep 600", total_timeout_seconds=3.0)
    await bench.running(task_id)
    await bench.node.kill()
    await asyncio.sleep(3.0)
    await bench.node.start()
    result = await bench.end_of(task_id)
    assert (result.reason, bench.master.count(task_id)) == ("DEADLINE", 1)
    await nothing_left(docker_client, bench.node)


async def test_the_receipt_is_what_an_independent_look_at_the_kernel_shows(
    bench: Bench, docker_client: docker.APIClient
) -> None:
    task_id = await bench.assign(
        "sleep 600", cpu_milli=300, memory_bytes=48 * MIB, pids_limit=33, open_files_limit=777, timeout_seconds=6.0
    )
    await bench.running(task_id)
    pid = docker_client.inspect_container(f"nodeservice.{task_id}.1")["State"]["Pid"]
    seen = look(pid)
    result = await bench.end_of(task_id)
    effective = receipt(result)["effective"]
    assert {name: effective[name] for name in seen} == seen
    assert receipt(result)["mismatches"] == []


def look(pid: int) -> dict[str, object]:
    """The limits of a process, read here from the kernel without any of the service's code."""
    own = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    rows = {line[:25].strip(): line[26:].split()[0] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    facts: dict[str, object] = {"open_files_limit": int(rows["Max open files"])}
    if "memory" in own:
        memory, cpu, pids = (Path(f"/sys/fs/cgroup/{name}{own[name]}") for name in ("memory", "cpu", "pids"))
        quota, period = (int((cpu / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        facts |= {
            "memory_bytes": int((memory / "memory.limit_in_bytes").read_text()),
            "memory_swap_bytes": int((memory / "memory.memsw.limit_in_bytes").read_text()),
            "pids_limit": int((pids / "pids.max").read_text()),
        }
    else:
        place = Path(f"/sys/fs/cgroup{own['']}")
        quota, period = (int(word) for word in (place / "cpu.max").read_text().split())
        memory_bytes, swap_bytes = (int((place / f"memory.{name}").read_text()) for name in ("max", "swap.max"))
        facts |= {
            "memory_bytes": memory_bytes,
            "memory_swap_bytes": memory_bytes + swap_bytes,
            "pids_limit": int((place / "pids.max").read_text()),
        }
    return facts | {"cpu_milli": round(quota * 1000 / period)}


@pytest.mark.settings(NODESERVICE_RESERVE_MEMORY_BYTES=str(2**60))
async def test_a_node_that_reserves_everything_gives_nothing(bench: Bench) -> None:
    ack = await bench.stub.AssignTask(pb.Task(task_id="any", docker_image="nodeservice/demo"), timeout=30)
    assert (ack.success, ack.reason) == (False, "INSUFFICIENT_MEMORY")


async def test_tasks_that_fill_all_there_is_do_not_make_the_heartbeat_late(bench: Bench) -> None:
    """Busy loops, a hog of its whole memory and a fork bomb at once: what is reserved for the host stays the host's."""
    await bench.master.until(lambda: bool(bench.master.registrations), PATIENCE_SECONDS)
    registered = bench.master.registrations[-1]
    node = pb.WorkerInfo.FromString(registered.SerializeToString()).allocatable
    share = {"cpu_milli": node.cpu_milli // 4, "memory_bytes": 256 * MIB, "timeout_seconds": 6.0}
    loops = "for i in 1 2 3 4; do while :; do :; done & done; wait"
    hog = "while :; do dd if=/dev/zero of=/dev/shm/x bs=1M count=120; rm /dev/shm/x; done"
    bomb = "b() { b | b & }; b; sleep 600"
    attackers = [await bench.assign(command, **share) for command in (loops, hog, bomb, loops)]
    await bench.running(attackers[-1])
    before = len(bench.master.heartbeats)
    gaps = []
    for _ in range(6):
        count, waited = len(bench.master.heartbeats), 0.0
        while len(bench.master.heartbeats) == count:
            await asyncio.sleep(0.05)
            waited += 0.05
        gaps.append(waited)
    assert len(bench.master.heartbeats) >= before + 6
    assert max(gaps) < 10.0  # one is due each 0.5 s; a master gives up after 30 s
    for task_id in attackers:
        assert (await bench.end_of(task_id)).reason == "DEADLINE"
