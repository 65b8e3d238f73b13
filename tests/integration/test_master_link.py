"""When a node beats and registers: `MasterLink` alone, under a master on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from nodeservice.certificates import EXPIRED
from nodeservice.clock import SystemClock
from nodeservice.core.model import AttemptId, Outcome, Phase, Reason, Verdict
from nodeservice.core.retry import Backoff
from nodeservice.errors import TransientError
from nodeservice.rpc.uplink import MasterLink
from nodeservice.wire import master_worker_pb2 as pb
from tests.contract.test_journal import a_record
from tests.integration.listening_master import AskingMaster, ListeningMaster
from tests.integration.scripted_node import eventually

pytestmark = pytest.mark.timeout(120)
NEVER_SECONDS = 3600.0


class Status:
    """Of a node that has nothing to tell but that it is there."""

    worker_id = "w"
    driver = SimpleNamespace(warnings={EXPIRED: "since yesterday"})
    failures = 0

    async def registration(self) -> pb.WorkerInfo:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        return pb.WorkerInfo(worker_id="w")

    async def heartbeat(self) -> pb.Heartbeat:
        return pb.Heartbeat(worker_id="w")


@contextlib.asynccontextmanager
async def linked(master: ListeningMaster, *, status: Status | None = None, **options: Any) -> AsyncIterator[MasterLink]:
    backoff = Backoff(first_seconds=0.01, max_seconds=15.0)
    options = {"heartbeat_seconds": NEVER_SECONDS, "call_deadline_seconds": 35.0, "backoff": backoff} | options
    link = MasterLink(status or Status(), clock=SystemClock(), credentials=None, **options)  # type: ignore[arg-type]
    link.set_master(f"127.0.0.1:{master.port}")
    running = asyncio.create_task(link.run())
    try:
        await asyncio.wait_for(link._registered.wait(), 30)
        yield link
    finally:
        running.cancel()
        await asyncio.wait({running})


def release(link: MasterLink, name: str, phase: Phase = Phase.COLLECTING) -> None:
    link.note_release(a_record(name, phase=phase, compute_released=True))


async def test_many_releases_are_told_in_one_heartbeat() -> None:
    async with AskingMaster() as master, linked(master) as link:
        for number in range(100):
            release(link, f"t{number}")
            release(link, f"t{number}", Phase.UPLOADING)
        await eventually(lambda: bool(master.beats))
        assert (link._untold, link._telling, len(master.beats)) == ({}, None, 1)
        release(link, "later")
        await eventually(lambda: len(master.beats) == 2)


async def test_a_release_whose_report_comes_first_is_not_told() -> None:
    async with AskingMaster() as master, linked(master) as link:
        release(link, "short")
        release(link, "short", Phase.REPORTING)
        assert link._untold == {}
        release(link, "long")
        assert [*link._untold] == [AttemptId("long")]
        await eventually(lambda: bool(master.beats))


async def test_a_master_that_does_not_ask_is_told_no_release() -> None:
    async with ListeningMaster() as master, linked(master) as link:
        release(link, "t")
        assert (link._untold, link._telling) == ({}, None)


async def test_a_new_master_is_registered_with_at_once_though_the_old_one_does_not_answer() -> None:
    slow = Backoff(first_seconds=NEVER_SECONDS, max_seconds=NEVER_SECONDS)
    async with AskingMaster() as new, contextlib.AsyncExitStack() as stack:
        async with AskingMaster() as old:
            link = await stack.enter_async_context(linked(old, backoff=slow))
        link.set_master(f"127.0.0.1:{new.port}")
        await eventually(lambda: new.registrations == 1)
        link.register_again()
        await eventually(lambda: new.registrations == 2)
        assert new.beats == []


async def test_a_host_that_cannot_be_looked_at_is_registered_once_it_can() -> None:
    status = Status()
    status.failures = 2
    with capture_logs() as logs:
        async with AskingMaster() as master, linked(master, status=status):
            assert (status.failures, master.registrations) == (0, 1)
    (told,) = (line for line in logs if line["event"] == "master.unreachable")
    assert "Input/output error" in told["error"]
    assert (told["failures"], told["hint"]) == (1, "since yesterday")


class WordyMaster(ListeningMaster):
    async def ReportTaskCompletion(self, request: pb.TaskResult, context: Any) -> pb.Ack:  # noqa: N802
        return pb.Ack(success=False, message="x" * 3_000_000)


async def test_a_master_that_refuses_in_many_words_fills_no_log() -> None:
    async with WordyMaster() as master, linked(master) as link:
        verdict = Verdict(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message="")
        with pytest.raises(TransientError) as caught:
            await link.report(a_record("t", phase=Phase.REPORTING, verdict=verdict))
    assert len(str(caught.value)) < 1000


async def test_a_master_that_calls_for_a_registration_all_the_time_hears_heartbeats_too() -> None:
    class Calling(AskingMaster):
        link: MasterLink | None = None

        async def RegisterWorker(self, request: pb.WorkerInfo, context: object) -> pb.RegisterAck:  # noqa: N802
            if self.link is not None:
                self.link.register_again()
            return await super().RegisterWorker(request, context)

    async with Calling() as master, linked(master, heartbeat_seconds=0.1) as link:
        master.link = link
        link.register_again()
        heard = len(master.beats)
        await eventually(lambda: len(master.beats) >= heard + 3)
        registered = master.registrations
        await eventually(lambda: master.registrations > registered)


async def test_an_end_that_is_reported_again_is_reported_once_each_time_and_a_failure_is_not_repeated() -> None:
    class Refusing(AskingMaster):
        refusals = 1

        async def ReportTaskCompletion(self, request: pb.TaskResult, context: object) -> pb.Ack:  # noqa: N802
            await super().ReportTaskCompletion(request, context)
            return pb.Ack(success=len(self.reports) > self.refusals)

    verdict = Verdict(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message="")
    record = a_record("t", phase=Phase.FINISHED, verdict=verdict)
    async with Refusing() as master, linked(master) as link:
        for count in (1, 2):
            link.report_again(record)
            link.report_again(record)
            await eventually(lambda: link._again == {})
            assert [report.task_id for report in master.reports] == ["t"] * count
