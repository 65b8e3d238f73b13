"""Which heartbeats are news to the master's scheduler: it is woken by those alone."""

from __future__ import annotations

from typing import Any

import pytest

from nodeservice.master.nodes import Node, NodeRegistry
from nodeservice.wire import master_worker_pb2 as pb

ROOM = pb.Resources(cpu_milli=4000, memory_bytes=2**33, disk_bytes=2**35)


class Nothing:
    """Keeps and dials nothing."""

    async def save_node(self, row: object) -> None:
        return None


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def unix_ms(self) -> int:
        return int(self.now * 1000)


def gpu(**fields: Any) -> pb.GpuInfo:
    return pb.GpuInfo(
        uuid="GPU-1", memory_total_bytes=2**34, leasable=True, counted=True, **({"state": "WELL"} | fields)
    )


def beat(**fields: Any) -> pb.Heartbeat:
    return pb.Heartbeat(worker_id="w", **({"allocatable": ROOM, "gpus": [gpu()]} | fields))


@pytest.fixture
async def nodes() -> NodeRegistry:
    made: Any = NodeRegistry(Nothing(), Nothing(), Clock(), timeout_seconds=30, gone_after_seconds=600)  # type: ignore[arg-type]
    await made.register(pb.WorkerInfo(worker_id="w", allocatable=ROOM, gpus=[gpu()]), "ipv4:127.0.0.1:1")
    made.heartbeat(beat())
    return made  # type: ignore[no-any-return]


def told(nodes: NodeRegistry, **fields: Any) -> Node:
    node = nodes.heartbeat(beat(**fields))
    assert node is not None
    return node


def test_load_and_temperatures_are_no_news(nodes: NodeRegistry) -> None:
    hot = gpu(utilization_percent=99.0, temperature_celsius=80.0, power_watts=600.0, memory_used_bytes=2**33)
    assert not told(nodes).has_news
    assert not told(nodes, cpu_usage=50.0, gpus=[hot]).has_news


def test_a_release_is_news(nodes: NodeRegistry) -> None:
    collecting = {"task_id": "t", "attempt": 1, "phase": "COLLECTING"}
    told(nodes, running_tasks=[pb.RunningTask(**collecting, compute_released=False)])  # type: ignore[arg-type]
    assert not told(nodes, running_tasks=[pb.RunningTask(**collecting)]).has_news  # type: ignore[arg-type]
    assert told(nodes, running_tasks=[pb.RunningTask(**collecting, compute_released=True)]).has_news  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"allocatable": pb.Resources(cpu_milli=8000)},
        {"draining": True},
        {"conditions": ["DISK_LOW: little"]},
        {"warnings": ["GPU_DRIVER: away"]},
        {"running_tasks": [pb.RunningTask(task_id="t", attempt=1, phase="RUNNING")]},
        {"gpus": [gpu(state="FAULTY")]},
        {"gpus": [gpu(held_milli=500)]},
        {"gpus": []},
    ],
)
def test_what_may_let_a_task_move_is_news_once(nodes: NodeRegistry, fields: dict[str, Any]) -> None:
    assert told(nodes, **fields).has_news
    assert not told(nodes, **fields).has_news
    assert told(nodes).has_news


def test_the_first_word_after_a_report_is_news_since_the_node_may_still_list_the_task(nodes: NodeRegistry) -> None:
    nodes.note_end("w", ("t", 1))
    assert told(nodes).has_news
    assert not told(nodes).has_news


def test_every_word_is_news_until_what_the_node_holds_has_been_compared(nodes: NodeRegistry) -> None:
    nodes._nodes["w"].unsettled = True
    assert told(nodes).has_news
    nodes.settled("w")
    assert not told(nodes).has_news


def test_a_node_that_speaks_after_a_silence_is_news(nodes: NodeRegistry) -> None:
    clock: Any = nodes._clock
    for _ in range(20):  # at once, it would be the master that was away
        clock.now += 2
        nodes.notice_silence()
    assert told(nodes).has_news
    assert not told(nodes).has_news
