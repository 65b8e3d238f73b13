"""How long the service takes from word to deed, each beside the engine's own time for the same thing in the same run."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from benchmarks.rig.bare_engine import BareEngine
from benchmarks.rig.finding import Finding, Target, median, percentile
from benchmarks.rig.scale import Scale
from benchmarks.rig.service import (
    Service,
    Unavailable,
    engine_client,
    minio_server,
    need_image,
    running_service,
    sweep,
)

CPU_MILLI = 1000
TIMEOUT_SECONDS = 0.5
SHORT = "sleep 0.3; echo $EPOCHREALTIME"
ENDLESS = "exec sleep 600"
TRAPS = "trap 'echo $EPOCHREALTIME; exit 0' TERM; sleep 600 & wait"
ABOUT = (
    "One task at a time, service and bare engine (docker-py, same options) in turn; each finds the one before it removed, "
    "whosever it was. assignment to start: from before the call (AssignTask, or create) to the engine's StartedAt, of all "
    "three tasks of a round. exit to report: from the task's own note of the time, its last act, to the report's arrival at "
    "the master (bare: to the answer of wait). cancel to gone: from before the call (CancelTask, or kill) to the engine's "
    "`die` event. deadline to signal: from StartedAt plus timeout (bare: from before the call of kill) to the note of the "
    "time by the task that traps SIGTERM. `added` is service less engine by rank."
)
PARTS = ("assignment to start", "exit to report", "cancel to gone", "deadline to signal")
Row = list[tuple[str, float]]
"""Parts and how many ms each took."""


async def measure(scale: Scale) -> Finding:
    need_image()
    found = Finding(about=ABOUT)
    home = scale.directory("latency")
    node_id = f"bench-{secrets.token_hex(4)}"
    engine = BareEngine(node_id, home / "bare")
    try:
        with minio_server(home / "minio") as minio, _engine_events() as events:
            async with running_service(home / "node", minio=minio) as service:
                probe = _Probe(service, engine, events)
                ours, bare = await _rounds(probe, scale)
    finally:
        engine.close()
        sweep(node_id)
    _tell(found, ours, bare)
    return found


async def _rounds(probe: _Probe, scale: Scale) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    ours: dict[str, list[float]] = {part: [] for part in PARTS}
    bare: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in range(scale.pick(-1, -2), scale.pick(7, 60)):
        runs = [(ours, probe.service_round), (bare, probe.engine_round)]
        for rows, run in runs if number % 2 else reversed(runs):
            row = await run()
            if number >= 0:  # the first are for warming up
                for part, ms in row:
                    rows[part].append(ms)
    return ours, bare


def _tell(found: Finding, ours: dict[str, list[float]], bare: dict[str, list[float]]) -> None:
    for part in PARTS:
        added = [mine - theirs for mine, theirs in zip(sorted(ours[part]), sorted(bare[part]), strict=True)]
        for arm, samples in (("service", ours[part]), ("engine", bare[part]), ("added", added)):
            found.add("latency", "ms", part, arm, samples)
        name = part.replace(" ", "_")
        found.ratios[f"{name}_added_ms_p50"] = median(ours[part]) - median(bare[part])
        found.ratios[f"{name}_added_ms_p99"] = percentile(ours[part], 99) - percentile(bare[part], 99)
    found.ratios["latency_added_ms_p50"] = found.ratios["assignment_to_start_added_ms_p50"]
    found.targets += [
        Target(
            name="assignment → start, added ms p50", measured=found.ratios["latency_added_ms_p50"],
            bound=10, kind="at most",
        ),
        Target(
            name="assignment → start, added ms p99", measured=found.ratios["assignment_to_start_added_ms_p99"],
            bound=40, kind="at most",
        ),
        Target(
            name="deadline → signal, ms p99, the engine's part included",
            measured=percentile(ours["deadline to signal"], 99), bound=50, kind="at most",
        ),
    ]  # fmt: skip
    found.notes.append(
        f"{len(ours[PARTS[0]])} samples of a start, {len(ours[PARTS[1]])} of the others; latency_added_ms_p50 is that from "
        "assignment to start. The engine's part of a signal is the call of kill until the task's trap runs."
    )


class _Probe:
    def __init__(self, service: Service, engine: BareEngine, events: _Events) -> None:
        self._service = service
        self._engine = engine
        self._events = events

    async def service_round(self) -> Row:
        row: Row = []
        for part in (self._ours_short, self._ours_cancelled, self._ours_late):
            row += await part()
            await self._service.cleaned_up()
        return row

    async def engine_round(self) -> Row:
        return await asyncio.to_thread(lambda: [*self._bare_short(), *self._bare_killed(), *self._bare_signalled()])

    async def _ours_short(self) -> Row:
        task_id, began = _name(), time.time()
        await self._service.assign(task_id, SHORT, cpu_milli=CPU_MILLI)
        started = await asyncio.to_thread(self._events.started_at, f"nodeservice.{task_id}.1")
        result, reported_ns = await self._service.master.reported(task_id)
        return [
            ("assignment to start", 1000 * (started - began)),
            ("exit to report", 1000 * (reported_ns / 1e9 - float(result.logs))),
        ]

    async def _ours_cancelled(self) -> Row:
        from nodeservice.wire import master_worker_pb2 as pb

        task_id, assigned = _name(), time.time()
        name = f"nodeservice.{task_id}.1"
        await self._service.assign(task_id, ENDLESS, cpu_milli=CPU_MILLI)
        started = await asyncio.to_thread(self._events.started_at, name)
        await asyncio.sleep(0.2)
        began = time.time()
        await self._service.stub.CancelTask(pb.TaskID(task_id=task_id), timeout=10)
        died = await asyncio.to_thread(self._events.died_at, name)
        await self._service.master.reported(task_id)
        return [("assignment to start", 1000 * (started - assigned)), ("cancel to gone", 1000 * (died - began))]

    async def _ours_late(self) -> Row:
        task_id, assigned = _name(), time.time()
        await self._service.assign(task_id, TRAPS, cpu_milli=CPU_MILLI, timeout_seconds=TIMEOUT_SECONDS)
        started = await asyncio.to_thread(self._events.started_at, f"nodeservice.{task_id}.1")
        result, _ = await self._service.master.reported(task_id)
        late = float(result.logs) - started - TIMEOUT_SECONDS
        return [("assignment to start", 1000 * (started - assigned)), ("deadline to signal", 1000 * late)]

    def _bare_short(self) -> Row:
        client = self._engine.client
        container, _, start_ms = self._bare_start(SHORT)
        client.wait(container)
        ended = time.time()
        noted = float(client.logs(container))
        client.remove_container(container, v=True)
        return [("assignment to start", start_ms), ("exit to report", 1000 * (ended - noted))]

    def _bare_killed(self) -> Row:
        client = self._engine.client
        container, name, start_ms = self._bare_start(ENDLESS)
        time.sleep(0.2)
        began = time.time()
        client.kill(container, "SIGTERM")
        died = self._events.died_at(name)
        client.remove_container(container, v=True)
        return [("assignment to start", start_ms), ("cancel to gone", 1000 * (died - began))]

    def _bare_signalled(self) -> Row:
        client = self._engine.client
        container, _, start_ms = self._bare_start(TRAPS)
        time.sleep(TIMEOUT_SECONDS)
        began = time.time()
        client.kill(container, "SIGTERM")
        client.wait(container)
        noted = float(client.logs(container))
        client.remove_container(container, v=True)
        return [("assignment to start", start_ms), ("deadline to signal", 1000 * (noted - began))]

    def _bare_start(self, command: str) -> tuple[str, str, float]:
        """Id and name of a container that runs, and the ms from before its creation to its start."""
        began = time.time()
        container = self._engine.start(command, CPU_MILLI)
        told = self._engine.client.inspect_container(container)
        started = _instant(told["State"]["StartedAt"])
        return container, told["Name"].removeprefix("/"), 1000 * (started - began)


class _Events:
    """What the engine told of containers by name; looks at one as soon as it has started."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._started: dict[str, float] = {}
        self._died: dict[str, float] = {}

    def started_at(self, name: str) -> float:
        return self._await(self._started, name)

    def died_at(self, name: str) -> float:
        return self._await(self._died, name)

    def follow(self, stream: Any, client: Any) -> None:
        """In a thread, until the stream is closed."""
        for event in stream:
            name = event["Actor"]["Attributes"].get("name", "")
            if event["Action"] == "start" and name.startswith("nodeservice.l-"):
                at = _instant(client.inspect_container(event["id"])["State"]["StartedAt"])
                self._note(self._started, name, at)
            elif event["Action"] == "die":
                self._note(self._died, name, event["timeNano"] / 1e9)

    def _note(self, where: dict[str, float], name: str, at: float) -> None:
        with self._changed:
            where[name] = at
            self._changed.notify_all()

    def _await(self, where: dict[str, float], name: str) -> float:
        with self._changed:
            if not self._changed.wait_for(lambda: name in where, 60):
                raise Unavailable(f"the engine told nothing of {name} within 60 s")
            return where[name]


@contextmanager
def _engine_events() -> Iterator[_Events]:
    events = _Events()
    with engine_client() as client, engine_client() as other:
        stream = client.events(decode=True, filters={"type": "container", "event": ["start", "die"]})
        thread = threading.Thread(target=events.follow, args=(stream, other), daemon=True)
        thread.start()
        try:
            yield events
        finally:
            stream.close()
            thread.join(5)


def _instant(text: str) -> float:
    """Unix seconds of the engine's nanosecond time, which it writes in UTC."""
    base, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(base).replace(tzinfo=UTC).timestamp() + float(f"0.{fraction or 0}")


def _name() -> str:
    return f"l-{secrets.token_hex(6)}"
