"""Silence of nodes, and of the master itself."""

from __future__ import annotations

from typing import Any

import pytest

from nodeservice.master.amounts import Amounts
from nodeservice.master.clock import MasterClock
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.request import Request
from nodeservice.master.rows import Untold
from nodeservice.wire import master_worker_pb2 as pb


class Hours(MasterClock):
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class NoStore:
    async def save_node(self, row: object) -> None:
        return None


async def registry(clock: Hours) -> NodeRegistry:
    nothing: Any = NoStore()
    nodes = NodeRegistry(nothing, nothing, clock, timeout_seconds=30, gone_after_seconds=600)
    await nodes.register(pb.WorkerInfo(worker_id="w", total_cpu=1), "ipv4:127.0.0.1:1")
    return nodes


async def test_a_node_that_is_silent_for_long_is_given_up() -> None:
    clock = Hours()
    nodes = await registry(clock)
    for _ in range(605):
        clock.now += 1
        nodes.notice_silence()
    assert nodes.is_gone("w")


@pytest.mark.parametrize("was_heard", [True, False])
async def test_time_in_which_the_master_was_frozen_is_no_silence_of_its_nodes(was_heard: bool) -> None:
    clock = Hours()
    nodes = await registry(clock)
    if not was_heard:  # as after a restart of the master
        nodes._nodes["w"].heard_at = None
    clock.now += 7200
    nodes.notice_silence()
    assert not nodes.is_gone("w")
    assert nodes.is_active("w") is was_heard
    for _ in range(31):
        clock.now += 1
        nodes.notice_silence()
    assert not nodes.is_active("w"), "silence from then on is silence"


async def test_a_node_that_was_given_up_gets_nothing_before_it_told_what_it_holds() -> None:
    clock = Hours()
    nodes = await registry(clock)
    for _ in range(605):
        clock.now += 1
        nodes.notice_silence()
    await nodes.register(pb.WorkerInfo(worker_id="w", total_cpu=1), "ipv4:127.0.0.1:1")
    assert "has not told yet" in nodes.offers({})[0].blocked
    assert nodes.heartbeat(pb.Heartbeat(worker_id="w")) is not None
    assert nodes.offers({})[0].blocked
    nodes.settled("w")
    assert not nodes.offers({})[0].blocked


async def test_a_node_that_comes_back_between_two_looks_at_the_silence_has_to_tell_what_it_holds_too() -> None:
    clock = Hours()
    nodes = await registry(clock)
    for _ in range(600):
        clock.now += 1
        nodes.notice_silence()
    clock.now += 0.5
    assert nodes.is_gone("w")
    assert nodes.heartbeat(pb.Heartbeat(worker_id="w")) is not None
    assert "has not told yet" in nodes.offers({})[0].blocked


async def test_an_offer_that_is_kept_follows_what_is_given_to_the_node_and_what_it_tells() -> None:
    clock = Hours()
    nodes = await registry(clock)
    nodes.heartbeat(pb.Heartbeat(worker_id="w"))
    asked = Request(amounts=Amounts(cpu_milli=400))
    assert nodes.offers({})[0].free.cpu_milli == 1000
    assert nodes.offers({"w": {("t", 1): asked}})[0].free.cpu_milli == 600
    assert nodes.offers({})[0].free.cpu_milli == 1000
    nodes.heartbeat(pb.Heartbeat(worker_id="w", allocatable=pb.Resources(cpu_milli=300)))
    assert nodes.offers({})[0].free.cpu_milli == 300
    nodes.heartbeat(pb.Heartbeat(worker_id="w", draining=True))
    assert nodes.offers({})[0].blocked
    clock.now += 31
    assert "silent" in nodes.offers({})[0].blocked


async def test_what_a_node_could_hold_is_asked_of_the_target_alone() -> None:
    nodes = await registry(Hours())
    asked, more = Request(amounts=Amounts(cpu_milli=1000)), Request(amounts=Amounts(cpu_milli=1001))
    assert nodes.could_hold(asked)
    assert nodes.could_hold(asked, "w")
    assert not nodes.could_hold(asked, "x")
    assert not nodes.could_hold(more)


async def test_the_first_word_after_a_silence_is_news_though_nobody_had_looked_meanwhile() -> None:
    clock = Hours()
    nodes = await registry(clock)
    nodes.heartbeat(pb.Heartbeat(worker_id="w"))
    for _ in range(298):
        clock.now += 0.1
        nodes.notice_silence()
    clock.now += 0.5
    nodes.notice_silence()
    assert "silent" in nodes.offers({})[0].blocked
    beat = nodes.heartbeat(pb.Heartbeat(worker_id="w"))
    assert beat is not None
    assert beat.has_news
    assert not nodes.offers({})[0].blocked


async def test_a_node_may_have_more_to_tell_while_it_lists_a_task_or_is_away_and_not_for_ever() -> None:
    clock = Hours()
    nodes = await registry(clock)
    assert nodes.untold(clock.unix_ms()) == Untold(frozenset({"w"})), "it has not told what it holds"
    kept = pb.RunningTask(task_id="t", attempt=1, phase="RETAINING")
    assert nodes.heartbeat(pb.Heartbeat(worker_id="w", running_tasks=[kept])) is not None
    assert nodes.untold(clock.unix_ms()) == Untold(frozenset(), frozenset({"t"}))
    for _ in range(86_399 // 2):
        clock.now += 2
        nodes.notice_silence()
    now_ms = clock.unix_ms() + 1
    assert nodes.untold(now_ms).worker_ids == {"w"}, "the master may have started just now"
    for _ in range(2):
        clock.now += 2
        nodes.notice_silence()
    assert nodes.untold(now_ms).worker_ids == frozenset()
    assert nodes.untold(0).worker_ids == {"w"}, "it was heard of since"
