"""A real node under a master that knows the old fields only: registration, work, logs, cancel, results, and kills."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import docker
import grpc
import pytest
import pytest_asyncio

from nodeservice.wire import master_worker_pb2 as pb
from tests.integration.listening_master import assign
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldClient, OldMaster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

RESTARTS = int(os.environ.get("TEST_RESTARTS", "5"))


@pytest_asyncio.fixture
async def node(tmp_path: Path, node_id: str, demo_image: str, master: OldMaster) -> AsyncIterator[NodeProcess]:
    process = NodeProcess(tmp_path / "node", node_id, ("--master", f"127.0.0.1:{master.port}"))
    await process.start()
    yield process
    with contextlib.suppress(AssertionError):
        await process.stop()


@pytest_asyncio.fixture
async def client(node: NodeProcess) -> AsyncIterator[OldClient]:
    async with OldClient(node.address) as caller:
        yield caller


def fresh(prefix: str = "task") -> str:
    return f"{prefix}-{uuid.uuid4().hex[:10]}"


async def lines_of(call: Any) -> tuple[list[str], str]:
    lines: list[str] = []
    while (chunk := await call.read()) is not grpc.aio.EOF:
        if chunk.is_complete:
            return lines, chunk.status
        lines.append(chunk.content)
    return lines, ""


async def test_a_node_registers_beats_and_registers_again_when_forgotten(node: NodeProcess, master: OldMaster) -> None:
    await master.until(lambda: len(master.heartbeats) >= 1)
    (info, *_) = master.registrations
    assert info.worker_ip == ""
    assert info.total_cpu > 0
    assert info.total_memory > 0
    assert info.total_storage > 0
    beat = master.heartbeats[0]
    assert 0 <= beat.memory_usage <= 100
    master.forget()
    seen = len(master.registrations)
    await master.until(lambda: len(master.registrations) > seen)


async def test_a_node_without_a_master_waits_to_be_called(
    tmp_path: Path, node_id: str, demo_image: str, master: OldMaster
) -> None:
    process = await NodeProcess(tmp_path / "waiting", node_id).start()
    try:
        async with OldClient(process.address) as caller:
            for _ in range(3):
                assert (await caller.register(f"127.0.0.1:{master.port}")).success
            assert not (await caller.register("no address")).success
        await master.until(lambda: len(master.heartbeats) >= 1)
    finally:
        await process.stop()


async def test_a_task_is_assigned_followed_and_reported_once(client: OldClient, master: OldMaster) -> None:
    task_id = fresh()
    command = (
        "echo first; echo err >&2; printf 'bad \\377 byte\\n'; "
        "echo 123 > /results/out.txt; test /output/out.txt; printf end"
    )
    assert (await client.assign(task_id=task_id, command=command, task_name="../x")).success
    lines, status = await lines_of(client.logs(task_id, follow=True))
    # The engine reads two pipes: the order between them is its own, that within each is the task's.
    assert [line for line in lines if line != "err"] == ["first", "bad \ufffd byte", "end"]
    assert ("err" in lines, status) == (True, "completed")
    report = await master.report_of(task_id)
    assert report.status == "success"
    assert report.result_location.startswith("file://")
    assert list(report.output_files) == ["out.txt", "stdout.log"]
    assert "end" in report.logs
    stored = Path(report.result_location.removeprefix("file://"))
    assert (stored / "out.txt").read_text() == "123\n"
    assert b"bad \xff byte" in (stored / "stdout.log").read_bytes()
    assert (await client.assign(task_id=task_id, command=command, task_name="../x")).success
    again, _ = await lines_of(client.logs(task_id, follow=False))
    assert again == lines
    await asyncio.sleep(1.0)
    assert master.count(task_id) == 1


async def test_a_master_that_has_forgotten_an_end_hears_it_again_and_the_task_runs_once(
    node: NodeProcess, client: OldClient, master: OldMaster
) -> None:
    task_id = fresh()
    first = await assign(node.address, task_id, "echo once")
    assert first.success, first.message
    report = await master.report_of(task_id)
    # The note of the acknowledgement is written after it.
    forgotten = (("nodeservice-report-again", "1"),)
    while master.count(task_id) == 1:
        assert (await assign(node.address, task_id, "echo once", metadata=forgotten)).success
        await asyncio.sleep(0.1)
    again = [one for one in master.reports if one.task_id == task_id][1]
    assert (again.status, again.logs, again.result_location) == (report.status, "once\n", report.result_location)


async def test_a_running_task_is_cancelled_and_reported_cancelled_once(client: OldClient, master: OldMaster) -> None:
    task_id = fresh()
    assert (
        await client.assign(task_id=task_id, command="trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done")
    ).success
    stream = client.logs(task_id, follow=True)
    assert (await stream.read()).content == "up"
    assert (await client.cancel(task_id)).success
    assert (await client.cancel(task_id)).success
    _, status = await lines_of(stream)
    assert status == "cancelled"
    assert (await master.report_of(task_id)).status == "cancelled"
    assert not (await client.cancel("never-heard-of")).success
    await asyncio.sleep(1.0)
    assert master.count(task_id) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"task_id": ""},
        {"task_id": "../../etc"},
        {"task_id": "t", "docker_image": ""},
        {"task_id": "t", "req_cpu": float("nan")},
        {"task_id": "t", "req_memory": -1.0},
        {"task_id": "t", "req_memory": 1e300},
        {"task_id": "t", "req_cpu": float("inf")},
        {"task_id": "t", "req_gpu": 0.5},
        {"task_id": "t", "req_cpu": 10_000.0},
    ],
    ids=str,
)
async def test_a_hostile_task_is_refused_with_a_reason(client: OldClient, fields: dict[str, Any]) -> None:
    ack = await client.assign(**fields)
    assert not ack.success
    assert ack.message


async def test_a_message_over_the_size_limit_is_refused_and_the_node_goes_on(
    client: OldClient, master: OldMaster
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.assign(task_id="x" * 10_000_000)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await lines_of(client.logs("never-heard-of", follow=True))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    task_id = fresh()
    assert (await client.assign(task_id=task_id, command="exit 3")).success
    assert (await master.report_of(task_id)).status == "failed"


async def test_the_same_assignment_a_hundred_times_in_parallel_runs_once(client: OldClient, master: OldMaster) -> None:
    task_id = fresh()
    acks = await asyncio.gather(*(client.assign(task_id=task_id, command="echo once") for _ in range(100)))
    assert all(ack.success for ack in acks)
    assert not (await client.assign(task_id=task_id, command="echo other")).success
    report = await master.report_of(task_id)
    assert report.logs == "once\n"
    await asyncio.sleep(1.0)
    assert master.count(task_id) == 1


async def test_a_thousand_assignments_at_once_on_a_full_node_are_refused_and_the_running_task_goes_on(
    client: OldClient, master: OldMaster
) -> None:
    await master.until(lambda: bool(master.heartbeats))
    whole, running = master.registrations[0].total_cpu, fresh("full")
    assert (await client.assign(task_id=running, command="sleep 600", req_cpu=whole)).success
    acks = await asyncio.gather(*(client.assign(task_id=fresh(), command="true", req_cpu=1.0) for _ in range(1000)))
    assert not any(ack.success for ack in acks)
    assert all("CPU" in ack.message for ack in acks)
    beats = len(master.heartbeats)
    await master.until(lambda: len(master.heartbeats) > beats)
    assert [task.task_id for task in master.heartbeats[-1].running_tasks] == [running]
    assert (await client.cancel(running)).success
    assert (await master.report_of(running)).status == "cancelled"


async def test_an_image_that_is_nowhere_and_one_without_a_shell_fail_with_their_reason(
    client: OldClient, master: OldMaster
) -> None:
    gone, bare = fresh("gone"), fresh("bare")
    assert (await client.assign(task_id=gone, docker_image="127.0.0.1:1/no/such", command="true")).success
    assert (await client.assign(task_id=bare, command="/no/such/program")).success
    assert (await master.report_of(bare)).status == "failed"
    assert (await master.report_of(gone, 120)).status == "failed"


async def test_results_are_pushed_to_the_master_before_the_report(
    tmp_path: Path, node_id: str, demo_image: str, master: OldMaster
) -> None:
    options = ("--master", f"127.0.0.1:{master.port}", "--result-store", "master")
    process = await NodeProcess(tmp_path / "pushing", node_id, options).start()
    try:
        async with OldClient(process.address) as caller:
            task_id = fresh()
            command = "echo hi > /results/a.txt; : > /results/empty; head -c 3000000 /dev/zero > /results/big"
            assert (await caller.assign(task_id=task_id, command=command, submitted_at=1764000000)).success
            report = await master.report_of(task_id)
            assert report.status == "success", pb.TaskResult.FromString(report.SerializeToString())
            files = master.files[task_id]
            assert files["a.txt"] == b"hi\n"
            assert files["empty"] == b""
            assert len(files["big"]) == 3_000_000
            assert all(len(chunk.data) <= 1024 * 1024 for chunk in master.chunks)
            assert master.chunks[-1].is_last_file
            assert {chunk.timestamp for chunk in master.chunks} == {1764000000}
    finally:
        await process.stop()


async def test_a_report_that_the_master_refuses_at_first_is_delivered_once(
    client: OldClient, master: OldMaster
) -> None:
    master.refuse_reports = 3
    task_id = fresh()
    assert (await client.assign(task_id=task_id, command="true")).success
    await master.report_of(task_id)
    await asyncio.sleep(1.0)
    assert master.count(task_id) == 1


@pytest.mark.crash
async def test_a_node_ended_again_and_again_while_its_task_runs_finishes_it_with_a_whole_log(
    node: NodeProcess, client: OldClient, master: OldMaster, docker_client: docker.APIClient
) -> None:
    task_id = fresh()
    count = 'i=0; until [ -e /results/stop ]; do echo "line $i"; i=$((i+1)); sleep 0.02; done; echo $i > /results/count'
    assert (await client.assign(task_id=task_id, command=f"{count}; exit 5")).success
    stream = client.logs(task_id, follow=True)
    await stream.read()
    before = docker_client.inspect_container(f"nodeservice.{task_id}.1")["State"]["Pid"]
    for number in range(RESTARTS):
        await (node.stop() if number % 5 == 4 else node.kill())
        await node.start()
    assert docker_client.inspect_container(f"nodeservice.{task_id}.1")["State"]["Pid"] == before
    (node.path / f"state/tasks/{task_id}.1/results/stop").touch()
    report = await master.report_of(task_id)
    assert report.status == "failed"
    stored = Path(report.result_location.removeprefix("file://"))
    printed = int((stored / "count").read_text())
    assert printed > RESTARTS
    assert (stored / "stdout.log").read_text().splitlines() == [f"line {number}" for number in range(printed)]
    await asyncio.sleep(1.0)
    assert master.count(task_id) == 1


@pytest.mark.crash
async def test_a_stopped_node_leaves_its_task_running_and_the_next_takes_it_up(
    node: NodeProcess, client: OldClient, master: OldMaster, docker_client: docker.APIClient
) -> None:
    task_id = fresh()
    assert (await client.assign(task_id=task_id, command="echo up; sleep 8; echo down")).success
    await client.logs(task_id, follow=True).read()
    assert await node.stop() == 0
    assert docker_client.inspect_container(f"nodeservice.{task_id}.1")["State"]["Running"]
    await node.start()
    report = await master.report_of(task_id)
    assert (report.status, report.logs) == ("success", "up\ndown\n")


@pytest.mark.crash
@pytest.mark.parametrize("seed", range(6))
async def test_a_node_killed_at_any_moment_reports_every_task_once(
    node: NodeProcess, client: OldClient, master: OldMaster, docker_client: docker.APIClient, seed: int
) -> None:
    ids = [fresh(f"s{seed}") for _ in range(4)]
    for task_id in ids:
        assert (await client.assign(task_id=task_id, command=f"echo {task_id}; echo x > /results/x")).success
    for round_ in range(3):
        await asyncio.sleep(0.05 + 0.13 * seed + 0.21 * round_)
        await node.kill()
        await node.start()
    for task_id in ids:
        report = await master.report_of(task_id)
        assert (report.status, report.logs) == ("success", f"{task_id}\n")
    await asyncio.sleep(1.0)
    # Killed between the master's answer and the note of it, a node must report again: that is the only doubt there is.
    assert all(1 <= master.count(task_id) <= 2 for task_id in ids)
    assert sum(master.count(task_id) for task_id in ids) <= len(ids) + 1
    left = docker_client.containers(all=True, filters={"label": [f"nodeservice.node={node.worker_id}"]})
    assert left == []


@pytest.mark.crash
async def test_a_node_killed_while_it_pulls_goes_on_pulling_and_can_be_cancelled(
    node: NodeProcess, client: OldClient, master: OldMaster
) -> None:
    async def silence(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        writer.close()

    registry = await asyncio.start_server(silence, "127.0.0.1", 0)
    port = registry.sockets[0].getsockname()[1]
    task_id = fresh("pulling")
    assert (await client.assign(task_id=task_id, docker_image=f"127.0.0.1:{port}/never")).success
    for _ in range(2):
        await node.kill()
        await node.start()
    await master.until(
        lambda: any(
            task.task_id == task_id and task.status == "pulling"
            for beat in master.heartbeats[-1:]
            for task in beat.running_tasks
        )
    )
    assert (await client.cancel(task_id)).success
    assert (await master.report_of(task_id)).status == "cancelled"
    registry.close()
    await asyncio.sleep(1.0)
    assert master.count(task_id) == 1


@pytest.mark.crash
async def test_a_node_killed_while_the_master_is_away_reports_once_when_it_is_back(
    node: NodeProcess, client: OldClient, master: OldMaster
) -> None:
    task_id = fresh("late")
    await master.until(lambda: bool(master.heartbeats))
    await master.stop()
    assert (await client.assign(task_id=task_id, command="echo done")).success
    _, status = await lines_of(client.logs(task_id, follow=True))
    assert status == "completed"
    for _ in range(2):
        await node.kill()
        await node.start()
    await master.start(master.port)
    report = await master.report_of(task_id)
    assert (report.status, report.logs) == ("success", "done\n")
    await asyncio.sleep(1.0)
    assert master.count(task_id) == 1
