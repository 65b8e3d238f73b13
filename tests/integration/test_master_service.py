"""The master over a real loopback server, with scripted nodes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from nodeservice.errors import ConfigError, TransientError
from nodeservice.master.clock import MasterClock
from nodeservice.master.daemon import Master
from nodeservice.master.scheduler import SchedulerSettings
from nodeservice.master.settings import MasterSettings
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.scripted_node import GIB, ScriptedNode, eventually


class Client:
    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.stub: Any = pb_grpc.MasterWorkerStub(self.channel)

    async def submit(self, task_id: str = "", metadata: Any = (), **fields: Any) -> pb.SubmitAck:
        task = pb.Task(task_id=task_id, docker_image="busybox", **{"req_cpu": 1.0, "req_memory": 1.0, **fields})
        return await self.stub.SubmitTask(task, timeout=10, metadata=metadata, wait_for_ready=True)

    async def get(self, task_id: str, attempt: int = 0) -> pb.TaskView:
        return await self.stub.GetTask(pb.TaskID(task_id=task_id, attempt=attempt), timeout=10)

    async def cancel(self, task_id: str) -> pb.TaskAck:
        return await self.stub.CancelTask(pb.TaskID(task_id=task_id), timeout=20)

    async def nodes(self) -> list[pb.NodeView]:
        return list((await self.stub.ListNodes(pb.ListNodesRequest(), timeout=10)).nodes)

    async def until(self, task_id: str, state: str) -> pb.TaskView:
        async def reached() -> bool:
            return (await self.get(task_id)).state == state

        await eventually(reached)
        return await self.get(task_id)

    async def log(self, task_id: str, *, follow: bool, attempt: int = 0) -> list[pb.LogChunk]:
        request = pb.TaskLogRequest(task_id=task_id, follow=follow, attempt=attempt)
        return [c async for c in self.stub.StreamTaskLogs(request)]


FAST = SchedulerSettings(retry_seconds=0.1, tick_seconds=0.05, least_pause_seconds=0.001)


@pytest.fixture
def settings(tmp_path: Path) -> MasterSettings:
    return MasterSettings(listen="127.0.0.1:0", state_dir=tmp_path / "master", scheduler=FAST)


@pytest.fixture
async def master(settings: MasterSettings) -> AsyncIterator[Master]:
    running = Master(settings)
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def client(master: Master) -> AsyncIterator[Client]:
    connected = Client(master.address)
    yield connected
    await connected.channel.close(None)


@pytest.fixture
async def node(master: Master) -> AsyncIterator[ScriptedNode]:
    async with ScriptedNode(master.address) as scripted:
        await scripted.register()
        yield scripted


# ---- the main path ----------------------------------------------------------------------------------------------------


async def test_a_task_is_queued_assigned_run_and_ended_with_its_result(client: Client, node: ScriptedNode) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ack = await client.submit(
        "t1", argv=["echo", "hi"], env=[pb.EnvVar(name="SECRET", value="x")], metadata=(("traceparent", trace),)
    )
    assert (ack.success, ack.task_id) == (True, "t1")
    await node.got("t1")
    sent = node.assigned[0]
    assert (list(sent.argv), sent.env[0].value, sent.attempt) == (["echo", "hi"], "x", 1)
    assert sent.submitted_at > 0
    assert node.metadata[0]["traceparent"] == trace
    assert node.metadata[0]["nodeservice-report-again"] == "1"
    await node.beat(pb.RunningTask(task_id="t1", attempt=1, phase="RUNNING"))
    running = await client.until("t1", "RUNNING")
    assert (running.phase, running.worker_id) == ("RUNNING", "w1")
    assert (await node.report("t1", outcome="SUCCEEDED", reason="COMPLETED", logs="hi\n", exit_code=0)).success
    ended = await client.get("t1")
    assert (ended.state, ended.reason, ended.result.logs) == ("SUCCEEDED", "COMPLETED", "hi\n")
    assert ended.finished_at_unix_ms >= ended.assigned_at_unix_ms >= ended.submitted_at_unix_ms > 0
    assert ended.task.env[0].value == "", "values of the environment are not shown"


async def test_a_node_and_a_client_of_the_old_protocol_get_along(client: Client, node: ScriptedNode) -> None:
    await client.submit("old", command="echo hi")
    await node.got("old")
    await node.beat(pb.RunningTask(task_id="old", status="running"))
    assert (await client.until("old", "RUNNING")).phase == "RUNNING"
    result = pb.TaskResult(task_id="old", worker_id="w1", status="weird", logs="x")
    assert (await node.stub.ReportTaskCompletion(result, timeout=10)).success
    assert (await client.get("old")).state == "FAILED"


async def test_a_task_without_an_id_gets_one(client: Client, node: ScriptedNode) -> None:
    first, second = await client.submit(), await client.submit()
    assert first.task_id.startswith("task-")
    assert first.task_id != second.task_id
    await node.got(first.task_id, second.task_id)


async def test_the_same_submission_again_is_the_same_task_and_another_spec_is_refused(client: Client) -> None:
    assert (await client.submit("t1")).success
    assert (await client.submit("t1")).success
    other = await client.submit("t1", req_cpu=2.0)
    assert (other.success, other.reason) == (False, "TASK_CONFLICT")
    tasks = await client.stub.ListTasks(pb.ListTasksRequest(), timeout=10)
    assert [view.task.task_id for view in tasks.tasks] == ["t1"]


async def test_a_retry_is_a_new_attempt_once_the_first_has_ended(client: Client, node: ScriptedNode) -> None:
    await client.submit("t1")
    await node.got("t1")
    assert (await client.submit("t1", attempt=2)).reason == "TASK_CONFLICT"
    await node.report("t1", status="failed")
    assert (await client.submit("t1", attempt=2)).success
    await eventually(lambda: [t.attempt for t in node.assigned] == [1, 2])
    await node.report("t1", attempt=2)
    assert [(await client.get("t1", n)).state for n in (0, 1, 2)] == ["SUCCEEDED", "FAILED", "SUCCEEDED"]


# ---- placement --------------------------------------------------------------------------------------------------------


async def test_a_task_waits_with_the_reason_and_starts_when_room_is_given_back(
    client: Client, node: ScriptedNode
) -> None:
    await client.submit("a", req_cpu=3.0)
    await node.got("a")
    await client.submit("b", req_cpu=3.0)
    await eventually(lambda: _reason(client, "b", "INSUFFICIENT_CPU"))
    assert "b" not in node.ids()
    await node.report("a")
    await node.got("b")


async def test_what_a_task_has_released_goes_to_the_next_while_its_results_are_stored_and_its_disk_does_not(
    client: Client, node: ScriptedNode
) -> None:
    assert (await node.register()).wants_releases
    await client.submit("a", req_cpu=3.0, req_storage=60.0)
    await node.got("a")
    await client.submit("large", req_cpu=0.5, req_storage=60.0)
    await client.submit("b", req_cpu=3.0, req_storage=1.0)
    await eventually(lambda: _reason(client, "b", "INSUFFICIENT_CPU"))
    uploading = pb.RunningTask(task_id="a", attempt=1, phase="UPLOADING", cpu_allocated=0.0, compute_released=True)
    ack = await node.stub.SendHeartbeat(pb.Heartbeat(worker_id="w1", running_tasks=[uploading]), timeout=10)
    assert ack.wants_releases
    await node.got("b")
    assert ((await client.get("a")).state, (await client.get("a")).running.compute_released) == ("RUNNING", True)
    assigned = (await client.nodes())[0].assigned
    assert (assigned.cpu_milli, assigned.disk_bytes) == (3000, 61 * GIB)
    assert (await client.get("large")).reason == "INSUFFICIENT_STORAGE"
    await node.report("a")
    await node.got("large")
    assert node.ids() == ["a", "b", "large"]


async def _reason(client: Client, task_id: str, reason: str) -> bool:
    return (await client.get(task_id)).reason == reason


async def test_a_second_report_gives_no_room_back_a_second_time(client: Client, node: ScriptedNode) -> None:
    for name in ("a", "b"):
        await client.submit(name, req_cpu=2.0)
    await node.got("a", "b")
    for _ in range(3):
        assert (await node.report("a")).success
    await client.submit("c", req_cpu=2.0)
    await node.got("c")
    await client.submit("d", req_cpu=2.0)
    await eventually(lambda: _reason(client, "d", "INSUFFICIENT_CPU"))
    assert "d" not in node.ids()
    assert (await client.nodes())[0].assigned.cpu_milli == 4000


async def test_a_request_that_no_node_can_ever_hold_is_refused_with_the_resource(
    client: Client, node: ScriptedNode
) -> None:
    ack = await client.submit("big", req_memory=9.0)
    assert (ack.success, ack.reason) == (False, "INSUFFICIENT_MEMORY")
    assert "8.00 GiB" in ack.message
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.get("big")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_before_any_node_is_known_everything_queues_and_the_impossible_is_rejected_later(
    settings: MasterSettings,
) -> None:
    running = Master(replace(settings, scheduler=replace(FAST, impossible_seconds=0.2)))
    await running.start()
    client = Client(running.address)
    try:
        assert (await client.submit("big", req_memory=9.0)).success
        await eventually(lambda: _reason(client, "big", "NO_NODE"))
        async with ScriptedNode(running.address) as node:
            await node.register()
            assert (await client.until("big", "REJECTED")).reason == "INSUFFICIENT_MEMORY"
            assert node.assigned == []
    finally:
        await client.channel.close(None)
        await running.stop()


async def test_the_target_node_is_honoured(client: Client, master: Master, node: ScriptedNode) -> None:
    async with ScriptedNode(master.address, "w2") as second:
        await second.register()
        for number in range(3):
            await client.submit(f"t{number}", target_worker_id="w2", req_cpu=0.5)
        await second.got("t0", "t1", "t2")
        assert node.assigned == []


async def test_a_draining_node_gets_nothing(client: Client, node: ScriptedNode) -> None:
    await node.beat(draining=True)
    await client.submit("t1")
    await eventually(lambda: _reason(client, "t1", "NODE_UNAVAILABLE"))
    assert node.assigned == []
    await node.beat(draining=False)
    await node.got("t1")


async def test_a_node_that_is_not_well_gets_nothing_and_the_reason_is_told(client: Client, node: ScriptedNode) -> None:
    await node.beat(conditions=["DISK_LOW: 1 % of /var is free"])
    await client.submit("t1")
    await eventually(lambda: _reason(client, "t1", "NODE_UNAVAILABLE"))
    assert "1 % of /var is free" in (await client.get("t1")).message
    assert node.assigned == []
    await node.beat()
    await node.got("t1")


async def test_a_task_that_waited_as_long_as_it_was_willing_to_is_given_up(client: Client, node: ScriptedNode) -> None:
    await client.submit("first", req_cpu=3.0)
    await node.got("first")
    await client.submit("second", req_cpu=3.0, wait_timeout_seconds=0.2)
    ended = await client.until("second", "REJECTED")
    assert ended.reason == "WAIT_TIMEOUT"
    assert "CPU" in ended.message
    assert node.ids() == ["first"]


@pytest.mark.parametrize("jump_ms", [3_600_000, -3_600_000])
async def test_a_clock_that_is_set_neither_shortens_nor_prolongs_a_wait(
    client: Client, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch, jump_ms: int
) -> None:
    await client.submit("first", req_cpu=3.0)
    await node.got("first")
    await client.submit("patient", req_cpu=3.0, wait_timeout_seconds=1800.0)
    await client.submit("second", req_cpu=3.0, wait_timeout_seconds=0.5)

    async def seen() -> bool:
        return bool((await client.get("second")).reason and (await client.get("patient")).reason)

    await eventually(seen)
    monkeypatch.setattr(MasterClock, "unix_ms", lambda _self: time.time_ns() // 1_000_000 + jump_ms)
    assert (await client.until("second", "REJECTED")).reason == "WAIT_TIMEOUT"
    assert (await client.get("patient")).state == "QUEUED"


async def test_hundreds_of_submissions_at_once_are_all_kept_and_none_overcommits(
    client: Client, node: ScriptedNode
) -> None:
    acks = await asyncio.gather(*(client.submit(f"t{n}") for n in range(300)))
    assert all(ack.success for ack in acks)
    await eventually(lambda: len(node.assigned) == 4)
    assert len((await client.stub.ListTasks(pb.ListTasksRequest(), timeout=10)).tasks) == 300
    for _ in range(3):
        done = node.ids()[-4:]
        before = len(node.assigned)
        for task_id in done:
            await node.report(task_id)
        await eventually(lambda expected=before + 4: len(node.assigned) == expected)
    assert len(set(node.ids())) == 16


# ---- refusals and silence ---------------------------------------------------------------------------------------------


async def test_a_refusal_for_want_of_room_puts_the_task_back_and_it_is_tried_again(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    node.refuse_with = "INSUFFICIENT_STORAGE"
    await client.submit("t1")
    await eventually(lambda: len(node.assigned) >= 2)
    node.refuse_with = None
    await eventually(lambda: _answered(master, "t1"))
    await node.report("t1")
    assert (await client.get("t1")).state == "SUCCEEDED"


def _answered(master: Master, task_id: str) -> bool:
    """The node has answered the assignment with success; no client can see that."""
    row = master._book.get_open((task_id, 1))
    return row is not None and row.accepted


@pytest.mark.parametrize("reason", ["INVALID_REQUEST", "TASK_CONFLICT"])
async def test_a_refusal_that_nothing_can_change_rejects_the_task(
    client: Client, node: ScriptedNode, reason: str
) -> None:
    node.refuse_with = reason
    await client.submit("t1")
    view = await client.until("t1", "REJECTED")
    assert view.reason == reason
    assert "not here" in view.message


async def test_a_refused_task_goes_to_another_node(client: Client, master: Master, node: ScriptedNode) -> None:
    node.refuse_with = "NODE_DRAINING"
    async with ScriptedNode(master.address, "w2", cpu=16, memory=64) as second:
        await second.register()
        await client.submit("t1")
        await second.got("t1")
        assert node.ids() == ["t1"], "the tighter fit was asked first, once"


async def test_an_assignment_without_an_answer_is_repeated_to_the_same_node_and_to_no_other(
    settings: MasterSettings,
) -> None:
    master = Master(settings)
    await master.start()
    client = Client(master.address)
    try:
        async with ScriptedNode(master.address) as node, ScriptedNode(master.address, "w2", cpu=16) as other:
            await node.register()
            await other.register()
            await node.deaf()
            await client.submit("t1")
            await eventually(lambda: _reason(client, "t1", "NODE_UNREACHABLE"))
            assert (await client.get("t1")).worker_id == "w1"
            await node.listen()
            await node.got("t1")
            assert other.assigned == []
            await eventually(lambda: _answered(master, "t1"))
            count = len(node.assigned)
            await asyncio.sleep(0.3)
            assert len(node.assigned) == count, "an answered assignment is not repeated"
    finally:
        await client.channel.close(None)
        await master.stop()


async def test_a_silent_node_is_inactive_gets_nothing_and_is_active_again_when_it_speaks(
    settings: MasterSettings,
) -> None:
    master = Master(replace(settings, heartbeat_timeout_seconds=0.3))
    await master.start()
    client = Client(master.address)
    try:
        async with ScriptedNode(master.address) as node:
            await node.register()
            await eventually(lambda: _node_state(client, "INACTIVE"))
            await client.submit("t1")
            await eventually(lambda: _reason(client, "t1", "NODE_UNAVAILABLE"))
            assert await node.beat()
            await node.got("t1")
    finally:
        await client.channel.close(None)
        await master.stop()


async def _node_state(client: Client, state: str) -> bool:
    return [node.state for node in await client.nodes()] == [state]


async def test_what_a_gone_node_never_answered_for_becomes_a_new_attempt_elsewhere(settings: MasterSettings) -> None:
    master = Master(replace(settings, heartbeat_timeout_seconds=0.2, gone_after_seconds=0.6))
    await master.start()
    client = Client(master.address)
    try:
        async with ScriptedNode(master.address) as node, ScriptedNode(master.address, "w2", cpu=16) as second:
            await node.register()
            await node.deaf()
            await client.submit("t1")
            await eventually(lambda: _reason(client, "t1", "NODE_UNREACHABLE"))
            await second.register()

            async def beat_until_assigned() -> bool:
                await second.beat()
                return bool(second.assigned)

            await eventually(beat_until_assigned)
            assert [(task.task_id, task.attempt) for task in second.assigned] == [("t1", 2)]
            assert (await client.get("t1", 1)).reason == "NODE_GONE"
            late = await node.report("t1", attempt=1)
            assert late.success, "the zombie may clean up"
            assert (await client.get("t1", 1)).state == "LOST"
            assert (await client.get("t1")).state in ("ASSIGNED", "RUNNING")
    finally:
        await client.channel.close(None)
        await master.stop()


@pytest.fixture
async def deaf(settings: MasterSettings) -> AsyncIterator[tuple[Client, ScriptedNode]]:
    """A node that beats and answers no call, with the task t1; its master gives it up for a task after 2 s."""
    master = Master(replace(settings, gone_after_seconds=2.0))
    await master.start()
    client = Client(master.address)
    async with ScriptedNode(master.address, cpu=4) as node:
        await node.register()
        await node.deaf()
        async with node.beating():
            await client.submit("t1")
            await eventually(lambda: _reason(client, "t1", "NODE_UNREACHABLE"))
            yield client, node
    await client.channel.close(None)
    await master.stop()


async def test_a_node_that_beats_and_answers_no_call_keeps_no_task_from_the_others(
    deaf: tuple[Client, ScriptedNode],
) -> None:
    client, node = deaf
    await client.submit("t2")
    await eventually(lambda: _reason(client, "t2", "NODE_UNAVAILABLE"))
    async with ScriptedNode(node.master, "w2", cpu=16) as other:
        await other.register()
        async with other.beating():
            await other.got("t1", "t2")
        assert sorted((task.task_id, task.attempt) for task in other.assigned) == [("t1", 2), ("t2", 1)]


async def test_a_cancelled_task_does_not_wait_for_ever_for_a_node_that_answers_no_call(
    deaf: tuple[Client, ScriptedNode],
) -> None:
    client, _ = deaf
    assert (await client.cancel("t1")).success
    assert (await client.until("t1", "CANCELLED")).reason == "NODE_GONE"


@pytest.fixture
async def hasty(settings: MasterSettings) -> AsyncIterator[Master]:
    """Gives a node up in no time."""
    running = Master(replace(settings, heartbeat_timeout_seconds=0.2, gone_after_seconds=0.4))
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def hurried(hasty: Master) -> AsyncIterator[Client]:
    connected = Client(hasty.address)
    yield connected
    await connected.channel.close(None)


async def _lost_with_its_node(client: Client, node: ScriptedNode, task_id: str = "t1") -> None:
    """The node takes the task, and then says nothing until the master gives it up."""
    await node.register()
    await node.beat()
    await client.submit(task_id)
    await node.got(task_id)
    await node.beat(pb.RunningTask(task_id=task_id, attempt=1, phase="RUNNING"))
    await client.until(task_id, "QUEUED")
    assert [(one.attempt, one.state, one.reason) for one in (await client.get(task_id)).attempts] == [
        (1, "LOST", "NODE_GONE"), (2, "QUEUED", (await client.get(task_id)).reason),
    ]  # fmt: skip


async def _beat_until_given(node: ScriptedNode, *running: pb.RunningTask) -> None:
    async def given() -> bool:
        await node.beat(*running)
        return bool(node.assigned)

    await eventually(given)


async def test_a_node_that_comes_back_after_its_task_went_elsewhere_is_told_to_end_it(
    hasty: Master, hurried: Client
) -> None:
    running = pb.RunningTask(task_id="t1", attempt=1, phase="RUNNING")
    async with ScriptedNode(hasty.address) as node, ScriptedNode(hasty.address, "w2") as second:
        await _lost_with_its_node(hurried, node)
        await second.register()
        await _beat_until_given(second)
        assert second.assigned[0].attempt == 2

        async def recalled() -> bool:
            await node.beat(running)
            return bool(node.cancelled)

        await eventually(recalled)
        assert {(one.task_id, one.attempt) for one in node.cancelled} == {("t1", 1)}
        late = await node.report("t1", status="success", outcome="SUCCEEDED", reason="COMPLETED")
        assert (late.success, late.message.startswith("too late")) == (True, True)
        assert (await hurried.get("t1")).state in ("ASSIGNED", "RUNNING")
        await second.report("t1", attempt=2, outcome="SUCCEEDED", reason="COMPLETED")
        view = await hurried.get("t1")
        assert (view.state, view.worker_id, view.task.attempt) == ("SUCCEEDED", "w2", 2)
        assert [(one.state, one.late_outcome) for one in view.attempts] == [("LOST", "SUCCEEDED"), ("SUCCEEDED", "")]
        assert second.cancelled == []


async def test_a_node_that_comes_back_before_its_task_went_elsewhere_goes_on_with_it(
    hasty: Master, hurried: Client
) -> None:
    async with ScriptedNode(hasty.address) as node:
        await _lost_with_its_node(hurried, node)
        await node.register()
        assert await node.beat(pb.RunningTask(task_id="t1", attempt=1, phase="RUNNING"))
        view = await hurried.get("t1")
        assert (view.state, view.task.attempt) == ("RUNNING", 1)
        assert [one.state for one in view.attempts] == ["RUNNING", "DROPPED"]
        await node.report("t1", outcome="SUCCEEDED", reason="COMPLETED")
        assert (await hurried.get("t1")).state == "SUCCEEDED"
        assert [task.attempt for task in node.assigned] == [1]
        assert node.cancelled == []


async def test_the_result_of_a_lost_attempt_is_taken_while_no_node_has_the_next(hasty: Master, hurried: Client) -> None:
    async with ScriptedNode(hasty.address) as node:
        await _lost_with_its_node(hurried, node)
        for _ in range(2):
            assert (await node.report("t1", outcome="SUCCEEDED", reason="COMPLETED")).success
        view = await hurried.get("t1")
        assert (view.state, view.task.attempt, len(view.attempts)) == ("SUCCEEDED", 1, 2)
        listed = await hurried.stub.ListTasks(pb.ListTasksRequest(), timeout=10)
        assert [(one.task.task_id, one.state) for one in listed.tasks] == [("t1", "SUCCEEDED")]


async def test_a_fault_of_the_node_places_the_task_elsewhere_without_the_users_retries(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    async with ScriptedNode(master.address, "w2", cpu=16, memory=64) as second:
        await second.register()
        await client.submit("t1", max_retries=1)
        await node.got("t1")
        fault = {"status": "failed", "outcome": "FAILED", "reason": "NODE_DRAINED", "retryable": True}
        assert "another attempt" in (await node.report("t1", **fault)).message
        await second.got("t1")
        for number in (2, 3, 4):
            where = await _holder(client, "t1", number)
            await (node if where == "w1" else second).report("t1", attempt=number, **fault)
        view = await client.get("t1")
        assert (view.state, view.reason, view.task.attempt) == ("FAILED", "NODE_DRAINED", 4)
        assert [one.worker_id for one in view.attempts][:2] == ["w1", "w2"], "it is not placed again where it failed"


async def _holder(client: Client, task_id: str, attempt: int) -> str:
    await eventually(lambda: _is_given(client, task_id, attempt))
    return (await client.get(task_id)).worker_id


async def _is_given(client: Client, task_id: str, attempt: int) -> bool:
    view = await client.get(task_id)
    return view.task.attempt == attempt and bool(view.worker_id)


async def test_a_follower_of_the_log_is_told_of_the_next_attempt_and_hears_it(
    client: Client, node: ScriptedNode
) -> None:
    node.lines["t1"] = ["one"]
    await client.submit("t1", max_retries=1, retry_own_failures=True)
    await node.got("t1")
    following = asyncio.create_task(client.log("t1", follow=True))
    node.log_ended["t1"] = "failed"
    await eventually(lambda: node.logs_told == 1)
    del node.log_ended["t1"]
    await node.report("t1", status="failed", outcome="FAILED", reason="EXIT_NONZERO")
    await eventually(lambda: [task.attempt for task in node.assigned] == [1, 2])
    node.log_ended["t1"] = "completed"
    await node.report("t1", attempt=2, logs="one\n")
    chunks = await asyncio.wait_for(following, 20)
    assert chunks[-1].status == "completed"
    words = "[attempt 1 is over: EXIT_NONZERO; attempt 2 follows]"
    assert [one.content for one in chunks] == ["one", words, "one", ""]


@pytest.mark.parametrize("follow", [False, True])
async def test_the_log_of_an_earlier_attempt_is_asked_for_by_its_number_and_ends_with_it(
    client: Client, node: ScriptedNode, follow: bool
) -> None:
    node.lines |= {"t1.1": ["of the first"], "t1.2": ["of the second"]}
    node.log_ended["t1"] = "failed"
    await client.submit("t1", max_retries=1, retry_own_failures=True)
    await node.got("t1")
    await node.report("t1", status="failed", outcome="FAILED", reason="EXIT_NONZERO")
    await eventually(lambda: [task.attempt for task in node.assigned] == [1, 2])
    first = await client.log("t1", follow=follow, attempt=1)
    assert [(one.content, one.status) for one in first] == [("of the first", ""), ("", "failed")]
    newest = await client.log("t1", follow=False)
    assert newest[0].content == "of the second"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.log("t1", follow=follow, attempt=3)
    assert caught.value.details() == "there is no attempt 3 of task t1"


async def test_a_task_that_its_node_has_lost_is_offered_to_it_again(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    await client.submit("t1")
    await eventually(lambda: _answered(master, "t1"))
    listed = pb.RunningTask(task_id="t1", attempt=1, phase="PULLING")
    for _ in range(5):
        await node.beat(listed)
    assert node.ids() == ["t1"]
    for _ in range(3):
        await node.beat()
    await eventually(lambda: node.ids() == ["t1", "t1"])


async def test_an_unknown_node_is_told_to_register(client: Client, master: Master) -> None:
    async with ScriptedNode(master.address, "stranger") as stranger:
        assert not await stranger.beat()
        assert (await stranger.register()).success
        assert await stranger.beat()


# ---- cancel -----------------------------------------------------------------------------------------------------------


async def test_a_queued_task_is_cancelled_at_once(client: Client) -> None:
    await client.submit("t1")
    assert (await client.cancel("t1")).success
    view = await client.get("t1")
    assert (view.state, view.reason) == ("CANCELLED", "CANCELLED")


async def test_a_cancellation_is_passed_to_the_node_whose_report_ends_the_task(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    await client.submit("t1")
    await eventually(lambda: _answered(master, "t1"))
    ack = await client.cancel("t1")
    assert ack.success
    assert "w1" in ack.message
    assert [(c.task_id, c.attempt) for c in node.cancelled] == [("t1", 1)]
    assert (await client.get("t1")).state == "ASSIGNED"
    await node.report("t1", status="cancelled")
    assert (await client.get("t1")).state == "CANCELLED"


async def test_cancelling_what_has_ended_says_so(client: Client, node: ScriptedNode) -> None:
    await client.submit("t1")
    await node.got("t1")
    await node.report("t1")
    ack = await client.cancel("t1")
    assert (ack.success, ack.reason) == (False, "ALREADY_ENDED")
    assert "SUCCEEDED" in ack.message


async def test_a_cancellation_that_the_node_cannot_hear_is_kept_and_passed_on_later(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    await client.submit("t1")
    await eventually(lambda: _answered(master, "t1"))
    await node.deaf()
    ack = await client.cancel("t1")
    assert ack.success
    assert "not answered" in ack.message
    assert (await client.get("t1")).reason == "CANCELLING"
    await node.listen()
    await eventually(lambda: bool(node.cancelled))


async def test_a_cancelled_task_that_its_node_has_lost_is_not_started_anew(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    await client.submit("t1")
    await eventually(lambda: _answered(master, "t1"))
    node.cancel_answer = pb.TaskAck(success=False, message="not known here", reason="NOT_FOUND")
    assert (await client.cancel("t1")).success
    for _ in range(3):
        await node.beat()
    assert (await client.until("t1", "CANCELLED")).reason == "CANCELLED"
    assert node.ids() == ["t1"]


async def test_a_cancelled_task_whose_end_its_node_has_told_before_is_told_again(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    await client.submit("t1")
    await eventually(lambda: _answered(master, "t1"))
    node.cancel_answer = pb.TaskAck(success=False, message="ended", reason="ALREADY_ENDED")
    assert (await client.cancel("t1")).success
    for _ in range(3):
        await node.beat()
    await eventually(lambda: node.ids() == ["t1", "t1"])
    assert node.metadata[-1]["nodeservice-report-again"] == "1"


async def test_a_task_cancelled_before_its_node_refused_it_is_cancelled(client: Client, node: ScriptedNode) -> None:
    node.hang = True
    await client.submit("t1")
    await node.got("t1")
    assert (await client.cancel("t1")).success
    assert (await client.get("t1")).state == "ASSIGNED"
    node.hang, node.refuse_with = False, "NODE_DRAINING"
    await node.deaf()
    await node.listen()
    await client.until("t1", "CANCELLED")


# ---- restart ----------------------------------------------------------------------------------------------------------


async def test_a_restart_keeps_the_queue_the_nodes_and_what_was_assigned(settings: MasterSettings) -> None:
    first = Master(settings)
    await first.start()
    port = first.address.rpartition(":")[2]
    async with ScriptedNode(first.address) as node:
        await node.register()
        client = Client(first.address)
        await client.submit("accepted", req_cpu=2.0)
        await eventually(lambda: _answered(first, "accepted"))
        node.hang = True
        await client.submit("unanswered", req_cpu=2.0)
        await node.got("unanswered")
        await client.submit("waiting", req_cpu=2.0)
        await client.submit("ended", req_cpu=0.1)
        await client.cancel("ended")
        await first.stop()
        node.hang = False
        second = Master(replace(settings, listen=f"127.0.0.1:{port}"))
        await second.start()
        try:

            async def states() -> dict[str, str]:
                views = await client.stub.ListTasks(pb.ListTasksRequest(), timeout=10, wait_for_ready=True)
                return {view.task.task_id: view.state for view in views.tasks}

            assert (await states()) == {
                "accepted": "ASSIGNED", "unanswered": "ASSIGNED", "waiting": "QUEUED", "ended": "CANCELLED",
            }  # fmt: skip
            await eventually(lambda: node.ids().count("unanswered") == 2)
            assert node.ids().count("accepted") == 1, "what was answered is not sent again"
            assert await node.beat(), "the node is still known"
            assert (await node.report("accepted")).success
            await node.got("waiting")
        finally:
            await client.channel.close(None)
            await second.stop()


async def test_two_masters_never_share_a_state_directory(master: Master, settings: MasterSettings) -> None:
    with pytest.raises(TransientError, match="is running") as caught:
        await Master(settings).start()
    assert caught.value.field == "state_dir"


async def test_a_port_that_is_taken_is_told_and_may_be_free_again(
    master: Master, settings: MasterSettings, tmp_path: Path
) -> None:
    second = Master(replace(settings, listen=master.address, state_dir=tmp_path / "other"))
    with pytest.raises(TransientError, match=r"listen 127\.0\.0\.1:.*Address already in use") as caught:
        await second.start()
    assert caught.value.field == "listen"


async def test_nodes_that_wait_are_called_with_the_masters_address(settings: MasterSettings) -> None:
    node = ScriptedNode("127.0.0.1:1")
    await node.listen()
    master = Master(replace(settings, nodes=(f"127.0.0.1:{node.port}",), announce_seconds=0.05))
    await master.start()
    try:
        await eventually(lambda: len(node.announced) >= 2)
        assert set(node.announced) == {master.address}
    finally:
        await master.stop()
        await node.deaf()


async def test_a_node_that_is_dialled_elsewhere_while_it_is_called_is_called_again(settings: MasterSettings) -> None:
    node = ScriptedNode("127.0.0.1:1")
    node.hang = True
    await node.listen()
    master = Master(replace(settings, nodes=(f"127.0.0.1:{node.port}",), announce_seconds=0.05))
    await master.start()
    try:
        await eventually(lambda: len(node.announced) == 1)
        async with ScriptedNode(master.address) as moved:
            await moved.register(worker_ip=f"127.0.0.1:{node.port}")
            await moved.register()
        await eventually(lambda: len(node.announced) == 2)
        assert not master.broken.is_set()
    finally:
        await master.stop()
        await node.deaf()


async def test_a_wildcard_is_never_told_to_nodes(settings: MasterSettings) -> None:
    with pytest.raises(ConfigError) as caught:
        await Master(replace(settings, listen="0.0.0.0:0", nodes=("127.0.0.1:1",))).start()
    assert caught.value.field == "advertise"


# ---- reports that fit nowhere -----------------------------------------------------------------------------------------


async def test_a_report_on_an_unknown_task_is_kept_aside_and_acknowledged(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    for _ in range(2):
        assert (await node.report("never-heard-of")).success
    assert await master._store.count_orphans() == 1
    with pytest.raises(grpc.aio.AioRpcError):
        await client.get("never-heard-of")


async def test_a_report_by_a_node_that_does_not_hold_the_task_ends_nothing(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    await client.submit("t1")
    await node.got("t1")
    async with ScriptedNode(master.address, "w2") as other:
        assert (await other.report("t1")).success
    assert (await client.get("t1")).state == "ASSIGNED"
    assert await master._store.count_orphans() == 1


# ---- logs -------------------------------------------------------------------------------------------------------------


async def test_a_log_is_followed_from_before_the_task_is_assigned_to_its_end(client: Client, master: Master) -> None:
    await client.submit("t1")
    following = asyncio.create_task(client.log("t1", follow=True))
    async with ScriptedNode(master.address) as node:
        node.lines["t1"] = ["one"]
        await node.register()
        await node.got("t1")
        node.lines["t1"].append("two")
        node.log_ended["t1"] = "completed"
        chunks = await asyncio.wait_for(following, 20)
    assert [c.content for c in chunks[:-1]] == ["one", "two"]
    assert (chunks[-1].is_complete, chunks[-1].status) == (True, "completed")


async def test_following_goes_on_after_a_node_was_away_and_repeats_no_line(client: Client, node: ScriptedNode) -> None:
    node.lines["t1"] = ["one", "two"]
    await client.submit("t1")
    await node.got("t1")
    seen: list[str] = []
    notices: list[str] = []

    async def follow() -> None:
        async for chunk in client.stub.StreamTaskLogs(pb.TaskLogRequest(task_id="t1", follow=True)):
            (notices if chunk.HasField("notice") else seen).append(chunk.content)

    following = asyncio.create_task(follow())
    await eventually(lambda: seen == ["one", "two"])
    await node.deaf()
    node.lines["t1"].append("three")
    node.log_ended["t1"] = "completed"
    await eventually(lambda: len(notices) == 1)
    await node.listen()
    await asyncio.wait_for(following, 20)
    assert seen == ["one", "two", "three", ""]
    assert notices == ["[node w1 does not answer; its log goes on once it does]"]


async def test_following_goes_on_at_the_new_address_of_a_node(client: Client, node: ScriptedNode) -> None:
    node.lines["t1"] = ["one"]
    await client.submit("t1")
    await node.got("t1")
    seen: list[str] = []

    async def follow() -> None:
        async for chunk in client.stub.StreamTaskLogs(pb.TaskLogRequest(task_id="t1", follow=True), timeout=20):
            seen.append(chunk.status or chunk.content)

    following = asyncio.create_task(follow())
    await eventually(lambda: seen == ["one"])
    async with ScriptedNode(node.master) as moved:
        moved.lines["t1"] = ["one", "two"]
        moved.log_ended["t1"] = "completed"
        await moved.register()
        await following
    assert [line for line in seen if not line.startswith("[")] == ["one", "two", "completed"]


@pytest.mark.parametrize("before", [[], ["early"]])
async def test_a_follower_hears_once_that_a_node_whose_log_is_quiet_is_silent(
    settings: MasterSettings, before: list[str]
) -> None:
    master = Master(replace(settings, heartbeat_timeout_seconds=0.2))
    await master.start()
    client = Client(master.address)
    try:
        async with ScriptedNode(master.address) as node:
            node.lines["t1"] = list(before)
            await node.register()
            await client.submit("t1")

            async def is_assigned() -> bool:
                await node.beat()
                return "t1" in node.ids()

            await eventually(is_assigned)
            following = asyncio.create_task(client.log("t1", follow=True))
            await eventually(lambda: node.log_calls >= 3)
            node.lines["t1"].append("late")
            node.log_ended["t1"] = "completed"
            chunks = await asyncio.wait_for(following, 20)
    finally:
        await client.channel.close(None)
        await master.stop()
    assert [chunk.content for chunk in chunks if not chunk.HasField("notice")] == [*before, "late", ""]
    assert [chunk.notice for chunk in chunks if chunk.HasField("notice")] == [
        "node w1 does not answer; its log goes on once it does"
    ]


async def test_a_log_that_is_not_followed_fails_where_its_node_does_not_answer(
    client: Client, node: ScriptedNode
) -> None:
    node.lines["t1"] = ["one"]
    await client.submit("t1")
    await node.got("t1")
    await node.deaf()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.log("t1", follow=False)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "node w1 does not answer" in str(caught.value.details())
    await node.listen()
    await node.report("t1", status="failed", logs="one\n")
    await node.deaf()
    chunks = await client.log("t1", follow=False)
    assert chunks[0].notice == "node w1 does not answer; this is what its report has of the log"
    assert [(chunk.content, chunk.status) for chunk in chunks[1:]] == [("one", ""), ("", "failed")]


async def test_after_the_end_a_node_that_forgot_the_log_is_replaced_by_the_tail_of_the_report(
    client: Client, node: ScriptedNode
) -> None:
    await client.submit("t1")
    await node.got("t1")
    await node.report("t1", status="failed", logs="last\nwords\n")
    for _ in range(2):
        chunks = await client.log("t1", follow=True)
        assert [(c.content, c.status) for c in chunks] == [("last", ""), ("words", ""), ("", "failed")]
        node.lines["t1"], node.log_ended["t1"] = [], "failed"


async def test_without_following_a_task_that_still_runs_gives_what_is_there(client: Client, node: ScriptedNode) -> None:
    node.lines["t1"] = ["so far"]
    await client.submit("t1")
    await node.got("t1")
    assert [(c.content, c.is_complete) for c in await client.log("t1", follow=False)] == [("so far", False)]
    await client.submit("t2", target_worker_id="elsewhere")
    assert await client.log("t2", follow=False) == []


async def test_an_unknown_attempt_of_a_known_task_is_told_as_that(client: Client) -> None:
    await client.submit("t1")
    for attempt, words in ((7, "there is no attempt 7 of task t1"), (-1, "there is no attempt -1 of task t1")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.get("t1", attempt)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, words)


async def test_the_log_of_an_unknown_task_is_not_found(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.log("nobody", follow=True)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# ---- hostile input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"task_id": "../../etc/passwd"}, {"task_id": "x" * 3_000_000}, {"req_cpu": math.nan}, {"req_memory": -1.0},
        {"req_storage": 1e308}, {"task_name": "../x"}, {"req_gpu": math.inf},
    ],
)  # fmt: skip
async def test_a_hostile_submission_is_refused_with_a_reason_and_the_master_lives(
    client: Client, fields: dict[str, Any]
) -> None:
    ack = await client.submit(**fields)
    assert (ack.success, ack.reason) == (False, "INVALID_REQUEST")
    assert len(ack.message) < 500
    assert (await client.submit("fine")).success


async def test_a_message_over_the_limit_is_refused_and_the_master_lives(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.submit("x" * 10_000_000)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await client.submit("fine")).success


async def test_hostile_nodes_are_refused_and_hostile_heartbeats_change_nothing(
    client: Client, master: Master, node: ScriptedNode
) -> None:
    for fields in ({"worker_ip": "unix:/etc/passwd"}, {"worker_ip": "a b"}):
        async with ScriptedNode(master.address, "evil") as evil:
            assert not (await evil.register(**fields)).success
    async with ScriptedNode(master.address, "../evil") as evil:
        assert not (await evil.register()).success
        assert not (await evil.report("t1")).success
    running = [
        pb.RunningTask(task_id="../x", phase="RUNNING"),
        pb.RunningTask(task_id="t1", attempt=-7, phase="y" * 999),
    ]
    assert await node.beat(*running, cpu_usage=math.nan, memory_usage=-math.inf, allocatable=pb.Resources(cpu_milli=-5))
    (view,) = await client.nodes()
    assert (view.cpu_usage_percent, view.memory_usage_percent) == (0.0, 0.0)
    assert await node.beat(allocatable=pb.Resources(cpu_milli=4000, memory_bytes=8 * GIB, disk_bytes=GIB))
    await client.submit("t1")
    await node.got("t1")


async def test_each_node_is_listed_with_the_version_that_it_registered_with_last(
    client: Client, node: ScriptedNode
) -> None:
    for version in ("0.1.0", "0.2.0"):
        assert (await node.register(node_version=version)).success
        assert [view.node_version for view in await client.nodes()] == [version]


# ---- GPUs -------------------------------------------------------------------------------------------------------------


def gpu(number: int, name: str = "NVIDIA H200", **fields: Any) -> pb.GpuInfo:
    known = {"memory_total_bytes": 140 * GIB, "leasable": True, "counted": True, "state": "WELL"}
    return pb.GpuInfo(uuid=f"GPU-00000000-0000-0000-0000-{number:012d}", name=name, **(known | fields))


def with_gpus(count: int) -> dict[str, Any]:
    amounts = pb.Resources(cpu_milli=4000, memory_bytes=8 * GIB, disk_bytes=100 * GIB, gpu_count=count)
    return {"allocatable": amounts, "capacity": amounts}


async def test_the_gpus_that_are_asked_for_reach_the_node_unchanged(client: Client, master: Master) -> None:
    asked = pb.GpuRequest(model="h200", min_memory_bytes=GIB, uuids=[gpu(1).uuid, gpu(2).uuid])
    async with ScriptedNode(master.address) as node:
        await node.register(gpus=[gpu(1), gpu(2)], **with_gpus(2))
        assert (await client.submit("t", req_gpu=2, gpu=asked)).success
        await node.got("t")
    assert (node.assigned[0].gpu, node.assigned[0].req_gpu) == (asked, 2.0)


async def test_a_gpu_out_of_service_is_taken_up_from_the_registration_and_not_only_from_a_heartbeat(
    client: Client, master: Master
) -> None:
    async with ScriptedNode(master.address) as node:
        await node.register(gpus=[gpu(1), gpu(2, "Tesla T4")], **with_gpus(2))
        assert await node.beat(gpus=[gpu(1), gpu(2, "Tesla T4")], allocatable=with_gpus(2)["allocatable"])
        sick = gpu(2, "Tesla T4", state="FAULTY", state_reason="fell off the bus")
        await node.register(gpus=[gpu(1), sick], **with_gpus(1))
        (shown,) = await client.nodes()
        assert shown.allocatable.gpu_count == 1
        assert [one.state for one in shown.gpus] == ["WELL", "FAULTY"]
        assert (await client.submit("t", req_gpu=1, gpu=pb.GpuRequest(model="T4"))).success
        assert (await client.submit("h", req_gpu=1)).success
        await node.got("h")
        waiting = await client.get("t")
        assert (waiting.state, waiting.reason) == ("QUEUED", "INSUFFICIENT_GPU")
        assert "fell off the bus" in waiting.message
        assert node.ids() == ["h"]


async def test_what_a_node_was_given_since_its_heartbeat_is_not_given_twice_and_what_is_over_is_free(
    client: Client, master: Master
) -> None:
    asked: dict[str, Any] = {"req_gpu": 1, "gpu": pb.GpuRequest(model="H200"), "req_cpu": 0.1, "req_memory": 0.1}
    async with ScriptedNode(master.address) as node:
        await node.register(gpus=[gpu(1)], **with_gpus(1))
        assert (await client.submit("first", **asked)).success
        await node.got("first")
        assert (await client.submit("second", **asked)).success
        running = pb.RunningTask(
            task_id="first", attempt=1, phase="RUNNING", gpu_uuids=[gpu(1).uuid], gpu_allocated=1.0
        )
        assert await node.beat(running, gpus=[gpu(1, held_milli=1000)], allocatable=with_gpus(1)["allocatable"])
        assert list((await client.until("first", "RUNNING")).running.gpu_uuids) == [gpu(1).uuid]
        assert (await client.get("second")).state == "QUEUED"
        await node.report("first")
        await node.got("second")
        assert (await client.submit("third", **asked)).success
        uploading = pb.RunningTask(task_id="second", attempt=1, phase="UPLOADING", compute_released=True)
        assert await node.beat(uploading, gpus=[gpu(1)], allocatable=with_gpus(1)["allocatable"])
        await node.got("third")


async def test_a_request_that_no_gpu_of_any_node_meets_is_refused_with_what_there_is(
    client: Client, master: Master
) -> None:
    async with ScriptedNode(master.address) as node:
        await node.register(gpus=[gpu(1)], **with_gpus(1))
        refused = await client.submit("t", req_gpu=1, gpu=pb.GpuRequest(model="B200"))
    assert (refused.success, refused.reason) == (False, "INSUFFICIENT_GPU")
    assert refused.message == "1 GPU (model B200) asked; node w1 has 0 that will do, of 1 (NVIDIA H200)"


async def test_a_peer_of_the_old_protocol_is_given_what_only_it_can_judge(client: Client, master: Master) -> None:
    async with ScriptedNode(master.address, gpus=2) as node:
        await node.register()
        assert (await client.submit("t", req_gpu=1, gpu=pb.GpuRequest(model="B200"))).success
        await node.got("t")
        assert not (await client.submit("u", req_gpu=3)).success
