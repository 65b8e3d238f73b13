"""The way to the master: register, beat, report, and find back after every kind of silence."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

import grpc
import structlog

from nodeservice.certificates import EXPIRED
from nodeservice.core.model import AttemptId, Phase, TaskRecord
from nodeservice.core.retry import Backoff, is_worth_telling
from nodeservice.errors import TransientError
from nodeservice.ports import Clock
from nodeservice.rpc import convert
from nodeservice.rpc.calls import answered
from nodeservice.rpc.status import NodeStatus
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)
T = TypeVar("T")

_MOST_IDLE_SECONDS = 0.25
"""Between the release of a task's CPU, memory and GPUs and a heartbeat that tells it: small results are stored in less, and
their report tells it too. A heartbeat costs the node about a tenth of what the rest of a short task costs it."""

_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)


class MasterLink:
    """Implements the Uplink port. `run` keeps the node registered; `report` waits for that.

    A master that does not know us answers a heartbeat with an error or success=false: we register again. Calls have a
    deadline above 30 s, since a master can hold a lock that long (wire.md).

    A master that asks for it (`wants_releases`) also gets a heartbeat when the results of a task take longer to be stored
    than its CPU, memory and GPUs should lie idle for. Who does not ask sees the usual rhythm alone.
    """

    def __init__(
        self,
        status: NodeStatus,
        *,
        clock: Clock,
        credentials: grpc.ChannelCredentials | None,
        heartbeat_seconds: float,
        call_deadline_seconds: float,
        backoff: Backoff,
    ) -> None:
        self._status = status
        self._clock = clock
        self._credentials = credentials
        self._heartbeat_seconds = heartbeat_seconds
        self._deadline = call_deadline_seconds
        self._backoff = backoff
        self._address: str | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: pb_grpc.MasterWorkerStub | None = None
        self._registered = asyncio.Event()
        self._connected_to: str | None = None
        self._heard_at: datetime | None = None
        self._wanted = False
        self._beat_at = 0.0
        """Of the loop: when the next heartbeat is due. A master may call for a registration more often than that."""
        self._wake = asyncio.Event()
        """Something is not to wait for the next heartbeat's time: a new registration (`_wanted`), or a release."""
        self._wants_releases = False
        self._untold: set[AttemptId] = set()
        """Attempts that released what they computed with since the last heartbeat."""
        self._again: dict[AttemptId, asyncio.Task[None]] = {}
        self._reports_under_way = 0
        self._no_report = asyncio.Event()
        self._no_report.set()

    @property
    def heard_at(self) -> datetime | None:
        return self._heard_at

    @property
    def is_registered(self) -> bool:
        """The master took the registration, and has answered each heartbeat since."""
        return self._registered.is_set()

    async def settled(self) -> None:
        await self._no_report.wait()

    @property
    def address(self) -> str | None:
        return self._address

    def stub(self) -> pb_grpc.MasterWorkerStub | None:
        """For those who stream results to the master; None while none is known."""
        return self._stub

    def set_master(self, address: str) -> None:
        """Register with the master at `host:port`. The same address again means: register again, on the same channel."""
        if address != self._address:
            log.info("master.address", address=address)
        self._address = address
        self.register_again()

    def register_again(self) -> None:
        """What this node has for tasks has changed."""
        self._wanted = True
        self._wake.set()

    def note_release(self, record: TaskRecord) -> None:
        """For `Driver.on_change`: that a task's CPU, memory and GPUs are free is told soon, if no report comes first."""
        if record.phase > Phase.UPLOADING:
            self._untold.discard(record.id)
        elif record.compute_released and self._wants_releases:
            self._untold.add(record.id)
            asyncio.get_running_loop().call_later(_MOST_IDLE_SECONDS, self._tell_release, record.id)

    def _tell_release(self, id_: AttemptId) -> None:
        """Where it has not been told yet. A heartbeat tells all, so they are no more than four in a second."""
        if id_ in self._untold:
            self._wake.set()

    async def run(self) -> None:
        """Register and beat until cancelled."""
        failures = 0
        try:
            while True:
                while self._address is None:
                    await self._wait_until_woken(None)
                self._wanted = False
                self._wake.clear()
                await self._connect(self._address)
                try:
                    await self._register()
                    failures = 0
                    await self._beat()
                except TransientError as error:
                    failures += 1
                    if is_worth_telling(failures):
                        # Who does not take our certificate only hangs up.
                        hint = self._status.driver.warnings.get(EXPIRED)
                        told = {"failures": failures, "error": str(error)} | ({"hint": hint} if hint else {})
                        log.warning("master.unreachable", address=self._address, **told)
                    self._registered.clear()
                    pause = self._backoff.delay(failures, random.random())  # noqa: S311
                    self._wants_releases = False  # until it says so again; its first heartbeat then tells all
                    self._untold.clear()
                    await self._wait_until_woken(pause)
        finally:
            for task in self._again.values():
                task.cancel()
            await self._disconnect()

    async def report(self, record: TaskRecord) -> None:
        await self._registered.wait()
        result = convert.task_result(record, self._status.worker_id)
        self._reports_under_way += 1
        self._no_report.clear()
        try:
            ack = await self._call(
                "ReportTaskCompletion", lambda stub: stub.ReportTaskCompletion(result, timeout=self._deadline)
            )
        finally:
            self._reports_under_way -= 1
            if not self._reports_under_way:
                self._no_report.set()
        if not ack.success:
            raise TransientError(f"the master refused the report: {ack.message[:500]}", reason="REPORT_REFUSED")

    def report_again(self, record: TaskRecord) -> None:
        """For a master that has forgotten what it acknowledged. Tried once: it offers the attempt again until it knows."""
        if record.id not in self._again:
            log.info("report.again", task_id=record.id.task_id, attempt=record.id.attempt)
            self._again[record.id] = task = asyncio.create_task(self._report_once(record), name="report again")
            task.add_done_callback(lambda _: self._again.pop(record.id, None))

    async def _report_once(self, record: TaskRecord) -> None:
        try:
            await self.report(record)
        except TransientError as error:
            log.warning("report.not_delivered", task_id=record.id.task_id, attempt=record.id.attempt, error=str(error))

    async def _register(self) -> None:
        try:
            info = await self._status.registration()
        except OSError as error:  # a file system that fails; who keeps the tasks to their limits goes on
            raise TransientError(f"this host cannot be looked at: {error}", reason="HOST_NOT_SEEN") from error
        ack = await self._call("RegisterWorker", lambda stub: stub.RegisterWorker(info, timeout=self._deadline))
        if not ack.success:
            raise TransientError(
                f"the master refused the registration: {ack.message[:500]}", reason="REGISTRATION_REFUSED"
            )
        self._wants_releases = ack.wants_releases
        if not self._registered.is_set():
            log.info("master.registered", address=self._address, message=ack.message[:500])
            self._beat_at = asyncio.get_running_loop().time() + self._heartbeat_seconds
        self._registered.set()

    async def _beat(self) -> None:
        """Beat until the master forgets us or goes away (TransientError), or a new registration is wanted (return)."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_until_woken(self._beat_at - loop.time())
            if self._wanted and (self._address != self._connected_to or loop.time() < self._beat_at):
                return
            ack = await self._send_heartbeat()
            if not ack.success:
                log.warning("master.forgot_us", address=self._address)
                self._registered.clear()
                return
            self._wants_releases = ack.wants_releases
            if self._wanted:
                return

    async def _send_heartbeat(self) -> pb.HeartbeatAck:
        self._beat_at = asyncio.get_running_loop().time() + self._heartbeat_seconds
        self._untold.clear()
        beat = await self._status.heartbeat()
        return await self._call("SendHeartbeat", lambda stub: stub.SendHeartbeat(beat, timeout=self._deadline))

    async def _call(self, name: str, call: Callable[[pb_grpc.MasterWorkerStub], Awaitable[T]]) -> T:
        if self._stub is None:  # the master's address changed between the registration and what waited for it
            raise TransientError("not connected to a master just now", reason="NO_MASTER")
        try:
            answer = await answered(call(self._stub), name=name)
        except grpc.aio.AioRpcError as error:
            raise TransientError(
                f"{name} at {self._address}: {error.code().name} {error.details() or ''}".rstrip(),
                reason="MASTER_UNREACHABLE",
            ) from error
        self._heard_at = self._clock.now()
        return answer

    async def _wait_until_woken(self, seconds: float | None) -> None:
        """No longer than `seconds`; None: however long it takes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    async def _connect(self, address: str) -> None:
        if address == self._connected_to:
            return
        await self._disconnect()
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, self._credentials, options=_CHANNEL_OPTIONS)
        self._connected_to = address
        self._stub = pb_grpc.MasterWorkerStub(self._channel)

    async def _disconnect(self) -> None:
        self._registered.clear()
        channel, self._channel, self._stub, self._connected_to = self._channel, None, None, None
        if channel is not None:
            await channel.close(None)
