"""Tasks that try to break out of what they were given. None harms the node, and each ends for the reason that is true."""

from __future__ import annotations

import asyncio
import contextlib
import io
import uuid
from pathlib import Path

import docker
import pytest

from nodeservice.capacity.memory import read_memory
from nodeservice.limits.hierarchy import host_cgroup_version
from nodeservice.wire import master_worker_pb2 as pb
from tests.integration.attack_bench import MIB, PATIENCE_SECONDS, SLOWNESS, Bench, nothing_left, receipt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(5 * PATIENCE_SECONDS)]
DEAF = 'trap "" TERM INT HUP; while :; do sleep 1; done'


def host_memory_bytes() -> int:
    return read_memory().limit_bytes


async def test_a_fork_bomb_meets_its_limit_and_nobody_else_notices(
    bench: Bench, docker_client: docker.APIClient
) -> None:
    script = "b() { b | b & }; b & exec sleep 600"
    bomb = await bench.assign(script, pids_limit=50, cpu_milli=300, timeout_seconds=4.0 * SLOWNESS)
    neighbour = await bench.run("for i in 1 2 3; do sleep 0.5; echo $i; done")
    assert (neighbour.reason, neighbour.logs) == ("COMPLETED", "1\n2\n3\n")
    result = await bench.end_of(bomb)
    assert result.reason == "DEADLINE"
    assert receipt(result)["effective"]["pids_limit"] == 50
    if result.usage.HasField("pids_peak_count"):
        assert 40 <= result.usage.pids_peak_count <= 50 + 8
    await nothing_left(docker_client, bench.node)


async def test_a_memory_hog_is_killed_and_told_as_such(bench: Bench) -> None:
    result = await bench.run("sleep 1; dd if=/dev/zero of=/dev/null bs=300M count=1")
    assert (result.outcome, result.reason) == ("FAILED", "MEMORY_LIMIT")
    assert not result.retryable
    assert result.usage.oom_kill_count >= 1
    assert 16 * MIB < result.usage.memory_peak_bytes <= 32 * MIB


async def test_a_hog_in_a_child_is_told_whether_or_not_the_parent_goes_on(bench: Bench) -> None:
    """At once and after a while alike. On cgroup v2 the kernel ends the whole task (memory.oom.group)."""
    ends_together = host_cgroup_version() == 2
    for wait in ("", "sleep 1; "):
        rest = "sleep 600" if ends_together else "sleep 0.2"
        result = await bench.run(f"{wait}(dd if=/dev/zero of=/dev/null bs=300M count=1); {rest}; exit 0")
        if ends_together:
            assert (result.outcome, result.reason, result.exit_code) == ("FAILED", "MEMORY_LIMIT", 137)
            assert receipt(result)["effective"]["oom_group"] == 1
            continue
        assert (result.outcome, result.reason, result.exit_code) == ("SUCCEEDED", "COMPLETED", 0)
        assert any("killed at the memory limit" in remark for remark in result.remarks)
        result = await bench.run(f"{wait}(dd if=/dev/zero of=/dev/null bs=300M count=1) || exit 7")
        assert (result.outcome, result.reason, result.exit_code) == ("FAILED", "MEMORY_LIMIT", 7)


async def test_exit_137_of_its_own_is_no_lack_of_memory(bench: Bench) -> None:
    result = await bench.run("sleep 1; kill -9 $$")
    assert (result.reason, result.usage.oom_kill_count) == ("EXIT_NONZERO", 0)
    result = await bench.run("exit 137")
    assert (result.reason, result.exit_code) == ("EXIT_NONZERO", 137)


async def test_twenty_that_run_out_of_memory_at_once_are_all_told_as_such(
    bench: Bench, docker_client: docker.APIClient
) -> None:
    hogs = [
        await bench.assign("sleep 1; dd if=/dev/zero of=/dev/null bs=300M count=1", cpu_milli=75, memory_bytes=16 * MIB)
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
    # The runtime begins in it while it is being started; on a slow machine that is noticed.
    ran = sum(phase.duration_ns / 1e9 for phase in result.phases if phase.name in ("start", "run"))
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


async def test_one_that_fills_the_disk_in_its_long_grace_period_has_no_more_of_it(bench: Bench) -> None:
    fill = 'trap "dd if=/dev/zero of=/results/big bs=1M count=200" TERM; while :; do sleep 1; done'
    result = await bench.run(fill, cpu_milli=800, memory_bytes=64 * MIB, timeout_seconds=1.0, grace_seconds=86_400.0)
    assert (result.outcome, result.reason, result.exit_code) == ("FAILED", "DEADLINE", 137)
    assert any("disk limit" in remark for remark in result.remarks)


async def test_a_volume_that_its_image_declares_is_bounded_too(bench: Bench, docker_client: docker.APIClient) -> None:
    image = f"nodeservice/volume-{uuid.uuid4().hex[:8]}"
    recipe = io.BytesIO(b"FROM nodeservice/demo\nVOLUME /data\n")
    for _line in docker_client.build(fileobj=recipe, tag=image, rm=True):
        pass
    try:
        result = await bench.run("dd if=/dev/zero of=/data/big bs=1M count=200; sleep 600", docker_image=image)
        assert result.reason == "DISK_LIMIT"
        await nothing_left(docker_client, bench.node)
    finally:
        docker_client.remove_image(image, force=True)


async def test_a_tree_of_any_depth_keeps_neither_the_results_nor_the_disk(
    bench: Bench, docker_client: docker.APIClient
) -> None:
    deep = "cd /results; echo mine > file; i=0; while [ $i -lt 1500 ]; do mkdir d; cd d; i=$((i+1)); done; sleep 1"
    result = await bench.run(deep, cpu_milli=800, disk_bytes=64 * MIB)
    assert (result.reason, set(result.output_files)) == ("COMPLETED", {"file", "stdout.log"})
    await nothing_left(docker_client, bench.node)


async def test_shared_memory_is_part_of_the_memory_and_has_a_size(bench: Bench) -> None:
    hog = await bench.run("sleep 1; dd if=/dev/zero of=/dev/shm/big bs=1M count=500", memory_bytes=32 * MIB)
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


@pytest.mark.unseen
@pytest.mark.settings(NODESERVICE_RESERVE_MEMORY_BYTES=str(host_memory_bytes() - MIB))
async def test_a_node_that_reserves_almost_everything_gives_no_more_than_the_rest(bench: Bench) -> None:
    ack = await bench.stub.AssignTask(pb.Task(task_id="any", docker_image="nodeservice/demo"), timeout=30)
    assert (ack.success, ack.reason) == (False, "INSUFFICIENT_MEMORY")


HELD = f"head -c {90 * MIB} /dev/zero | tail -c {90 * MIB} | (sleep 8; wc -c)"
"""Keeps 90 MiB of anonymous memory while it sleeps."""
OOM_LOOP = "while :; do dd if=/dev/zero of=/dev/null bs=300M count=1; done"


@pytest.mark.settings(NODESERVICE_RESERVE_MEMORY_BYTES=str(host_memory_bytes() - 512 * MIB))
async def test_a_share_that_is_full_of_tasks_delays_no_heartbeat_and_harms_no_neighbour(bench: Bench) -> None:
    """All memory and all CPU that tasks may have are leased, and used to the last byte by attackers."""
    await bench.master.until(lambda: bool(bench.master.registrations), PATIENCE_SECONDS)
    registered = bench.master.registrations[-1]
    share = pb.WorkerInfo.FromString(registered.SerializeToString()).allocatable
    assert share.memory_bytes == 512 * MIB
    cpu_milli = share.cpu_milli // 4
    rest = share.cpu_milli - 3 * cpu_milli
    loops = "for i in 1 2 3 4; do while :; do :; done & done; wait"
    part = {"memory_bytes": 128 * MIB, "cpu_milli": cpu_milli, "pids_limit": 64}
    quiet = await bench.assign(HELD, **(part | {"cpu_milli": rest}))
    attackers = [
        await bench.assign(command, **part, timeout_seconds=6.0)
        for command in (OOM_LOOP, "while :; do cat /dev/zero >/dev/shm/x; rm /dev/shm/x; done", loops)
    ]
    refused = await bench.stub.AssignTask(pb.Task(task_id="more", docker_image="nodeservice/demo"), timeout=30)
    assert refused.reason in ("INSUFFICIENT_CPU", "INSUFFICIENT_MEMORY")
    await bench.running(attackers[-1])
    gaps = []
    for _ in range(6):
        count, waited = len(bench.master.heartbeats), 0.0
        while len(bench.master.heartbeats) == count:
            await asyncio.sleep(0.05)
            waited += 0.05
        gaps.append(waited)
    assert max(gaps) < 10.0  # one is due each 0.5 s; a master gives up after 30 s
    hog = "MEMORY_LIMIT" if host_cgroup_version() == 2 else "DEADLINE"  # there it ends as a whole
    assert [(await bench.end_of(task_id)).reason for task_id in attackers] == [hog, "DEADLINE", "DEADLINE"]
    held = await bench.end_of(quiet)
    assert (held.reason, held.logs.strip(), held.usage.oom_kill_count) == ("COMPLETED", str(90 * MIB), 0)
