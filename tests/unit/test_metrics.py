"""Metrics of a real node, without an engine, over a real OTLP connection; and what a collector that is away costs."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog.testing

from nodeservice.config import load_config
from nodeservice.daemon.instruments import INSTRUMENTS, PHASE_DURATION
from nodeservice.daemon.measured import Measured
from nodeservice.daemon.node import Node, build
from nodeservice.errors import ConfigError
from nodeservice.telemetry import otlp_metrics
from nodeservice.telemetry.metrics import Instrument, Kind, Metrics, Reading, open_metrics
from nodeservice.testing.false_driver import FalseDriver, Machine
from nodeservice.testing.otlp import OtlpReceiver, ReceivedExport
from tests.unit.test_gpu_nvml import machine

__all__ = ["machine"]

LEVEL = Instrument("level", Kind.LEVEL, "1", (), "")
TIMES = Instrument("times", Kind.HISTOGRAM, "s", (), "", (1.0, 10.0))


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "30")
    with OtlpReceiver() as receiver:
        yield receiver


@asynccontextmanager
async def built(path: Path, endpoint: str | None = None) -> AsyncIterator[tuple[Node, Measured]]:
    """A node whose engine is away, as it is before anything runs."""
    settings = {
        "insecure": True, "worker_id": "node-1", "state_dir": str(path), "docker_host": f"unix://{path}/no.sock",
        "gpu_lock_dir": str(path / "locks"), "gpu_poll_seconds": 0.02, "otlp_metrics_endpoint": endpoint,
    }  # fmt: skip
    node = await build(load_config(None, settings, {}))
    measured = Measured(node)
    try:
        measured.open()
        yield node, measured
    finally:
        await asyncio.gather(node.close(), measured.close())


def meter(endpoint: str, read: Callable[[], Reading] = lambda: {"level": [(1, {})]}) -> Metrics:
    opened = open_metrics(endpoint, insecure=False, worker_id="node-1", instruments=(LEVEL, TIMES), read=read)
    assert opened is not None
    return opened


async def until(receiver: OtlpReceiver, holds: Callable[[ReceivedExport], bool]) -> ReceivedExport:
    return await asyncio.to_thread(receiver.wait_for_metrics, holds)


# ---- what is told -----------------------------------------------------------------------------------------------------


async def test_a_node_tells_what_it_knows_and_nothing_else(tmp_path: Path, receiver: OtlpReceiver) -> None:
    async with built(tmp_path, receiver.endpoint) as (node, _):
        node.tally.on_phase("pull", 2.5)
        node.tally.note_refusal("NODE_DRAINING")
        told = await until(receiver, lambda export: export.value(PHASE_DURATION) is not None)
        assert told.value("nodeservice.engine.reachable") == 0
        assert told.value("nodeservice.node.accepting") == 0
        assert told.value("nodeservice.node.mode", "ACTIVE") == 1
        assert told.value("nodeservice.memory.allocatable") == node.driver.ledger.allocatable.memory_bytes
        assert told.value("nodeservice.memory.capacity") > node.driver.ledger.allocatable.memory_bytes
        assert told.value("nodeservice.task.refused", "NODE_DRAINING") == 1
        assert told.value("nodeservice.task.finished", "GPU_FAULT", "FAILED") == 0
        assert [(point.value, point.count) for point in told.of(PHASE_DURATION, "pull")] == [(2.5, 1)]
        # No master is known, no task is in a phase, no GPU is there: of these nothing is told, not even 0.
        names = {point.name for point in told}
        assert not [name for name in names if name.startswith(("hw.", "nodeservice.master.")) or name.endswith(".age")]
        assert {point.resource["service.instance.id"] for point in told} == {"node-1"}
        known = {each.name: (each.kind, each.unit, {*each.attributes}) for each in INSTRUMENTS}
        assert not [point for point in told if known[point.name] != (point.kind, point.unit, {*point.attributes})]


async def test_a_condition_that_has_passed_is_told_as_0(tmp_path: Path) -> None:
    async with built(tmp_path) as (node, measured):
        node.driver.conditions["DISK_LOW"] = "so many bytes are left"
        during = measured.read()
        node.driver.conditions.clear()
        after = measured.read()
    name = {"nodeservice.condition": "DISK_LOW"}
    assert (during["nodeservice.node.condition"], after["nodeservice.node.condition"]) == ([(1, name)], [(0, name)])


async def test_a_gpu_tells_its_health_and_nothing_that_was_before(
    tmp_path: Path, machine: Callable[[str | Machine], FalseDriver]
) -> None:
    driver = machine("h200x8")
    ill, well = driver.gpus[:2]
    driver.set(well, utilization_percent=40, temperature_celsius=61, power_milliwatts=350_000, throttle_reasons=0x40)

    def of(name: str, uuid: str, **attributes: str) -> list[float]:
        wanted = {"hw.id": uuid, **{key.replace("__", "."): value for key, value in attributes.items()}}
        return [value for value, found in measured.read().get(name, ()) if wanted.items() <= found.items()]

    async with built(tmp_path) as (node, measured):

        async def look_until(holds: Callable[[], bool]) -> None:
            async with asyncio.timeout(20):
                while not holds():
                    await node.keeper.look()
                    await asyncio.sleep(0.01)

        await look_until(lambda: of("hw.gpu.utilization", well) == [0.4])
        assert (of("hw.temperature", well), of("hw.power", well)) == ([61], [350])
        assert of("nodeservice.gpu.throttled", well, nodeservice__throttle_reason="HW_THERMAL") == [1]
        assert of("nodeservice.gpu.throttled", well, nodeservice__throttle_reason="SW_POWER_CAP") == [0]
        assert of("hw.status", ill, hw__state="ok") == [1]
        driver.xid(ill, 79)
        await look_until(lambda: of("hw.status", ill, hw__state="failed") == [1])
        assert of("hw.errors", ill, error__type="xid_79") == [1]
        driver.fail("nvmlDeviceGetCount", 999)
        await look_until(lambda: not of("hw.status", well, hw__state="ok"))
        assert (of("hw.gpu.utilization", well), of("hw.temperature", well)) == ([], [])
        assert of("hw.errors", ill, error__type="xid_79") == [1]


# ---- a collector that is away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [False, True])
async def test_a_dead_collector_holds_up_nothing(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "10")
    monkeypatch.setattr(otlp_metrics, "CLOSE_SECONDS", 0.2)
    with socket.socket() as listener, structlog.testing.capture_logs() as logs:
        listener.bind(("127.0.0.1", 0))
        if answers:
            listener.listen(16)
        opened = meter(f"http://127.0.0.1:{listener.getsockname()[1]}")
        before = time.monotonic()
        for _ in range(1000):
            opened.record("times", 1.0, {})
        await asyncio.sleep(0.05)  # so that an export is under way
        await opened.close()
        await opened.close()
        assert time.monotonic() - before < 5
    assert [entry["event"] for entry in logs if entry["log_level"] != "debug"] in (
        [],
        ["metrics.collector_unreachable"],
    )


async def test_an_outage_is_told_once_and_so_is_its_end(receiver: OtlpReceiver) -> None:
    receiver.takes_metrics = False
    with structlog.testing.capture_logs() as logs:
        opened = meter(receiver.endpoint)
        async with asyncio.timeout(10):
            while receiver.refused_export_count < 3:
                await asyncio.sleep(0.01)
        receiver.takes_metrics = True
        await until(receiver, lambda export: export.value("level") == 1)
        await opened.close()
    assert [entry["event"] for entry in logs] == ["metrics.collector_unreachable", "metrics.collector_back"]
    assert logs[1]["lost_export_count"] >= 2


async def test_what_is_left_is_sent_at_the_end(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "3600000")
    opened = meter(receiver.endpoint)
    opened.record("times", 2.0, {})
    await opened.close()
    (last,) = receiver.exports
    assert (last.value("level"), last.value("times")) == (1, 2)
    assert [point.bounds for point in last.of("times")] == [TIMES.bounds]


async def test_a_reading_that_fails_is_told_once_and_nothing_is_sent_in_its_place(receiver: OtlpReceiver) -> None:
    broken = False

    def read() -> Reading:
        if broken:
            raise OSError("no such file")
        return {"level": [(1, {})]}

    with structlog.testing.capture_logs() as logs:
        opened = meter(receiver.endpoint, read)
        await until(receiver, lambda export: export.value("level") == 1)
        broken = True
        async with asyncio.timeout(10):
            while not logs:
                await asyncio.sleep(0.01)
        before = len(receiver.exports)
        await asyncio.sleep(0.1)
        assert len(receiver.exports) == before
        await opened.close()
    assert [entry["event"] for entry in logs] == ["metrics.not_read"]


async def test_a_loop_that_hangs_tells_nothing(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp_metrics, "_LOOP_SECONDS", 0.02)
    with structlog.testing.capture_logs() as logs:
        opened = meter(receiver.endpoint)
        give_up_at = time.monotonic() + 10
        while not logs and time.monotonic() < give_up_at:
            time.sleep(0.01)  # and so the loop hangs
        assert not receiver.exports
        monkeypatch.setattr(otlp_metrics, "_LOOP_SECONDS", 10.0)
        await until(receiver, lambda export: export.value("level") == 1)
        await opened.close()
    assert [entry["event"] for entry in logs] == ["metrics.not_read"]


@pytest.mark.parametrize("interval", ["0", "-1"])
async def test_an_interval_that_cannot_be_is_the_operator_s_to_change(
    monkeypatch: pytest.MonkeyPatch, interval: str
) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", interval)
    with pytest.raises(ConfigError, match="interval"):
        meter("http://127.0.0.1:1")
