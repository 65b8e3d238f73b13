"""When a node beats and registers: `MasterLink` alone, under a master on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from nodeservice.certificates import EXPIRED
from nodeservice.clock import SystemClock
from nodeservice.core.model import AttemptId, Outcome, Phase, Reason, Verdict
from nodeservice.core.retry import Backoff
from nodeservice.errors import TransientError
from nodeservice.rpc import uplink
from nodeservice.rpc.uplink import MasterLink
from nodeservice.wire import master_worker_pb2 as pb
from tests.contract.test_journal import a_record
from tests.integration.listening_master import AskingMaster, ListeningMaster
from tests.integration.scripted_node import eventually

pytestmark = pytest.mark.timeout(120)
NEVER_SECONDS = 3600.0
SLOW = Backoff(first_seconds=NEVER_SECONDS, max_seconds=NEVER_SECONDS)
ENDED = a_record(
    "t",
    phase=Phase.REPORTING,
    verdict=Verdict(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message=""),
)


class Status:
    """Of a node that has nothing to tell but that it is there."""

    worker_id = "w"
    driver = SimpleNamespace(warnings={EXPIRED: "since yesterday"})
    failures = 0
    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    async def registration(self) -> pb.WorkerInfo:
        if self.failures:
            self.failures -= 1
            self.meanwhile()
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
        due_at = link._beat_at
        for number in range(100):
            release(link, f"t{number}")
            release(link, f"t{number}", Phase.UPLOADING)
        await eventually(lambda: bool(master.beats))
        assert (link._untold, len(master.beats)) == (set(), 1)
        assert link._beat_at > due_at, "the next one is not before its time"
        release(link, "later")
        await eventually(lambda: len(master.beats) == 2)


async def test_a_release_whose_report_comes_first_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AskingMaster() as master, linked(master) as link:
        link.note_release(a_record("runs", phase=Phase.RUNNING))
        release(link, "short")
        release(link, "short", Phase.REPORTING)
        release(link, "long")
        assert link._untold == {AttemptId("long")}
        await link.report(ENDED)
        assert master.beats == [], "it waits for a moment"
        await eventually(lambda: bool(master.beats))
        monkeypatch.setattr(uplink, "_MOST_IDLE_SECONDS", 0.0)
        release(link, "short")
        release(link, "short", Phase.REPORTING)
        for _ in range(3):
            await link.report(ENDED)
        assert len(master.beats) == 1


async def test_a_master_that_does_not_ask_is_told_no_release() -> None:
    async with ListeningMaster() as master, linked(master) as link:
        release(link, "t")
        assert link._untold == set()


async def test_a_new_master_is_registered_with_at_once_though_the_old_one_does_not_answer() -> None:
    with capture_logs() as logs:
        async with AskingMaster() as new, contextlib.AsyncExitStack() as stack:
            async with AskingMaster() as old:
                link = await stack.enter_async_context(linked(old, backoff=SLOW))
            link.set_master(f"127.0.0.1:{new.port}")
            await eventually(lambda: new.registrations == 1)
            link.register_again()
            await eventually(lambda: new.registrations == 2)
            assert new.beats == []
    assert [line["event"] for line in logs] == 2 * ["master.address", "master.registered"]


async def test_a_host_that_cannot_be_looked_at_is_registered_once_it_can() -> None:
    status = Status()
    status.failures = 2
    with capture_logs() as logs:
        async with AskingMaster() as master, linked(master, status=status) as link:
            assert (status.failures, master.registrations) == (0, 1)
            status.failures = 1
            link.register_again()
            await eventually(lambda: master.registrations == 2)
            await link.report(ENDED)
    events = ["master.address", *2 * ["master.unreachable", "master.registered"]]
    assert [line["event"] for line in logs] == events
    for told in (logs[1], logs[3]):
        assert "Input/output error" in told["error"]
        assert (told["failures"], told["hint"]) == (1, "since yesterday")


async def test_while_a_node_is_not_registered_it_waits_with_reports_and_tells_no_release() -> None:
    class Noting(AskingMaster):
        reported_at = 0

        async def ReportTaskCompletion(self, request: pb.TaskResult, context: object) -> pb.Ack:  # noqa: N802
            self.reported_at = self.registrations
            return pb.Ack(success=True)

    status = Status()
    async with Noting() as master, linked(master, status=status, backoff=SLOW) as link:
        release(link, "before")
        status.failures = 1
        link.register_again()
        await eventually(lambda: not link._registered.is_set())
        release(link, "meanwhile")
        assert link._untold == set()
        reporting = asyncio.create_task(link.report(ENDED))
        await asyncio.sleep(0.01)
        status.failures, status.meanwhile = 1, link.register_again  # which comes while a try fails
        link.register_again()
        await reporting
        assert master.reported_at == 2
        status.failures, status.meanwhile = 1, lambda: None
        link.register_again()
        await eventually(lambda: not link._registered.is_set())
        link.report_again(ENDED)
    await eventually(lambda: link._again == {})
    assert link._channel is None


async def test_a_master_that_forgot_a_node_hears_of_it_again_and_may_ask_for_releases_later() -> None:
    class Forgetful(AskingMaster):
        async def RegisterWorker(self, request: pb.WorkerInfo, context: object) -> pb.RegisterAck:  # noqa: N802
            return pb.RegisterAck(success=True)

        async def SendHeartbeat(self, request: pb.Heartbeat, context: object) -> pb.HeartbeatAck:  # noqa: N802
            ack = await super().SendHeartbeat(request, context)
            return pb.HeartbeatAck(success=len(self.beats) != 1, wants_releases=ack.wants_releases)

    with capture_logs() as logs:
        async with Forgetful() as master, linked(master, heartbeat_seconds=0.05) as link:
            await eventually(lambda: len(master.beats) >= 3)
            release(link, "t")
            assert link._untold == {AttemptId("t")}
    events = ["master.address", "master.registered", "master.forgot_us", "master.registered"]
    assert [line["event"] for line in logs] == events


async def test_a_call_that_a_master_does_not_answer_has_its_end() -> None:
    class Silent(AskingMaster):
        """At the first call of each kind."""

        async def RegisterWorker(self, request: pb.WorkerInfo, context: object) -> pb.RegisterAck:  # noqa: N802
            await first("register")
            return await super().RegisterWorker(request, context)

        async def SendHeartbeat(self, request: pb.Heartbeat, context: object) -> pb.HeartbeatAck:  # noqa: N802
            await first("beat")
            return await super().SendHeartbeat(request, context)

        async def ReportTaskCompletion(self, request: pb.TaskResult, context: object) -> pb.Ack:  # noqa: N802
            await first("report")
            return await super().ReportTaskCompletion(request, context)

    async def first(kind: str) -> None:
        if kind not in called:
            called.append(kind)
            await asyncio.Event().wait()

    called: list[str] = []
    async with Silent() as master, linked(master, heartbeat_seconds=0.05, call_deadline_seconds=0.1) as link:
        assert link.heard_at is not None
        await eventually(lambda: bool(master.beats))
        with pytest.raises(TransientError, match="DEADLINE_EXCEEDED"):
            await link.report(ENDED)
    assert called == ["register", "beat", "report"]


async def test_it_has_settled_when_no_report_is_under_way() -> None:
    class Holding(AskingMaster):
        async def ReportTaskCompletion(self, request: pb.TaskResult, context: object) -> pb.Ack:  # noqa: N802
            await super().ReportTaskCompletion(request, context)
            await answers[len(self.reports) - 1].wait()
            return pb.Ack(success=True)

    answers = [asyncio.Event(), asyncio.Event()]
    async with Holding() as master, linked(master) as link:
        await link.settled()
        reporting = {asyncio.create_task(link.report(ENDED)) for _ in answers}
        await eventually(lambda: len(master.reports) == 2)
        settled = asyncio.create_task(link.settled())
        answers[0].set()
        await asyncio.wait(reporting, return_when=asyncio.FIRST_COMPLETED)
        assert not settled.done()
        answers[1].set()
        await settled


class WordyMaster(ListeningMaster):
    refusals = 1

    async def RegisterWorker(self, request: pb.WorkerInfo, context: Any) -> pb.RegisterAck:  # noqa: N802
        self.refusals -= 1
        return pb.RegisterAck(success=self.refusals < 0, message="x" * 3_000_000)

    async def ReportTaskCompletion(self, request: pb.TaskResult, context: Any) -> pb.Ack:  # noqa: N802
        return pb.Ack(success=False, message="x" * 3_000_000)


async def test_a_master_that_refuses_in_many_words_fills_no_log() -> None:
    with capture_logs() as logs:
        async with WordyMaster() as master, linked(master) as link:
            with pytest.raises(TransientError) as caught:
                await link.report(ENDED)
    assert len(str(caught.value)) < 1000
    assert [line["event"] for line in logs] == ["master.address", "master.unreachable", "master.registered"]
    assert len(str(logs)) < 2000


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

    async with Refusing() as master, linked(master) as link:
        for count in (1, 2):
            link.report_again(ENDED)
            link.report_again(ENDED)
            await eventually(lambda: link._again == {})
            assert [report.task_id for report in master.reports] == ["t"] * count
