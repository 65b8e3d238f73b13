"""Spans over a real OTLP connection, and what a missing collector costs."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog.testing
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core.model import (
    AttemptId,
    Lease,
    Outcome,
    Phase,
    PhaseTiming,
    Reason,
    Resources,
    TaskRecord,
    TaskSpec,
    TraceIds,
    Usage,
    Verdict,
)
from nodeservice.ports import TraceSink
from nodeservice.telemetry.otlp import OtlpTraceSink
from nodeservice.telemetry.tracing import NoTraceSink, new_trace_ids, open_trace_sink
from nodeservice.testing.otlp import OtlpReceiver, ReceivedSpan

NOW = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
NOW_NS = 1767268800123456000
PHASES = ("admit", "pull", "create", "start", "run", "collect", "upload", "report", "clean_up")
SUCCESS = Verdict(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message="Exited with code 0.", exit_code=0)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def a_record(*phases: str, verdict: Verdict | None = SUCCESS, **changes: Any) -> TaskRecord:
    """A finished record whose phases took one second each."""
    record = TaskRecord(
        spec=TaskSpec(
            id=AttemptId("task-1", 2),
            image="busybox:1",
            request=Resources(cpu_milli=500, memory_bytes=64 * 1024**2),
            pids_limit=64,
            timeout_seconds=20.0,
            fingerprint="f",
        ),
        lease=Lease(granted=Resources(cpu_milli=500)),
        trace=TraceIds(trace_id="0af7651916cd43dd8448eb211c80319c", span_id="00f067aa0ba902b7"),
        accepted_at=at(1),
        phase=Phase.FINISHED,
        timings=tuple(
            PhaseTiming(name=name, started_at=at(number), ended_at=at(number + 1))
            for number, name in enumerate(phases or PHASES)
        ),
        verdict=verdict,
        image_digest="busybox@sha256:abc",
        usage=Usage(memory_peak_bytes=1234),
    )
    return dataclasses.replace(record, **changes)


def tell(sink: TraceSink, record: TaskRecord) -> None:
    for timing in record.timings:
        sink.phase_ended(record, timing)
    sink.task_ended(record)


def close(sink: TraceSink) -> None:
    asyncio.run(sink.close())


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def received(receiver: OtlpReceiver, record: TaskRecord) -> dict[str, ReceivedSpan]:
    sink = open_trace_sink(receiver.endpoint, insecure=False, worker_id="node-1")
    tell(sink, record)
    close(sink)
    return {span.name: span for span in receiver.wait_for(len(record.timings) + 1)}


def test_a_task_is_one_trace_with_a_span_per_phase_below_its_root(receiver: OtlpReceiver) -> None:
    record = a_record()
    spans = received(receiver, record)
    assert set(spans) == {"task", *(f"task.{name}" for name in PHASES)}
    root = spans.pop("task")
    assert (root.trace_id, root.span_id, root.parent_span_id) == (record.trace.trace_id, record.trace.span_id, None)
    assert (root.start_ns, root.end_ns) == (NOW_NS, NOW_NS + 9 * 10**9)
    assert {(span.trace_id, span.parent_span_id) for span in spans.values()} == {(root.trace_id, root.span_id)}
    assert len({span.span_id for span in spans.values()} | {root.span_id}) == 10
    run = spans["task.run"]
    assert (run.start_ns, run.end_ns) == (NOW_NS + 4 * 10**9, NOW_NS + 5 * 10**9)
    assert {span.status for span in (root, *spans.values())} == {"UNSET"}
    assert (root.kind, {span.kind for span in spans.values()}) == ("CONSUMER", {"INTERNAL"})


def test_the_root_tells_the_story_and_every_span_the_identity(receiver: OtlpReceiver) -> None:
    spans = received(receiver, a_record())
    for name, span in spans.items():
        assert span.attributes["nodeservice.task_id"] == "task-1", name
        assert span.attributes["nodeservice.attempt"] == 2, name
        assert span.attributes["nodeservice.worker_id"] == "node-1", name
        assert span.resource["service.name"] == "nodeservice"
        assert span.resource["service.instance.id"] == "node-1"
    assert spans["task.pull"].attributes["nodeservice.phase"] == "pull"
    story = spans["task"].attributes
    assert story["container.image.name"] == "busybox:1"
    assert story["nodeservice.image_digest"] == "busybox@sha256:abc"
    assert story["nodeservice.limit.memory_bytes"] == 64 * 1024**2
    assert story["nodeservice.limit.timeout_seconds"] == 20.0
    assert story["nodeservice.usage.memory_peak_bytes"] == 1234
    assert (story["nodeservice.outcome"], story["nodeservice.reason"]) == ("SUCCEEDED", "COMPLETED")
    assert story["nodeservice.exit_code"] == 0
    assert "nodeservice.gpu_uuids" not in story


def test_the_caller_s_span_is_the_parent_of_the_root(receiver: OtlpReceiver) -> None:
    trace = TraceIds(trace_id="1" * 32, span_id="2" * 16, parent_span_id="3" * 16)
    spans = received(receiver, a_record(trace=trace))
    assert {name for name, span in spans.items() if span.is_parent_remote} == {"task"}
    root = spans["task"]
    assert (root.trace_id, root.span_id, root.parent_span_id) == ("1" * 32, "2" * 16, "3" * 16)


def test_spans_told_again_after_a_crash_are_the_same_spans(receiver: OtlpReceiver) -> None:
    for _ in range(2):
        sink = open_trace_sink(receiver.endpoint, insecure=False, worker_id="node-1")
        tell(sink, a_record())
        close(sink)
    spans = receiver.wait_for(20)
    assert len(spans) == 20
    assert len({(span.name, span.span_id, span.start_ns, span.end_ns) for span in spans}) == 10


def test_two_attempts_in_one_caller_s_trace_share_no_span(receiver: OtlpReceiver) -> None:
    sink = open_trace_sink(receiver.endpoint, insecure=False, worker_id="node-1")
    for number in "45":
        trace = TraceIds(trace_id="1" * 32, span_id=number * 16, parent_span_id="3" * 16)
        tell(sink, a_record(trace=trace))
    close(sink)
    assert len({span.span_id for span in receiver.wait_for(20)}) == 20


@pytest.mark.parametrize(
    ("phases", "reason", "blamed"),
    [
        (("admit", "pull", "collect", "report"), Reason.IMAGE_NOT_FOUND, "pull"),
        (("admit", "pull", "create", "start", "collect", "report"), Reason.COMMAND_NOT_FOUND, "start"),
        (PHASES, Reason.MEMORY_LIMIT, "run"),
        (PHASES, Reason.DEADLINE, "run"),
        (PHASES, Reason.COLLECT_FAILED, "collect"),
        (PHASES, Reason.RESULTS_NOT_STORED, "upload"),
    ],
)
def test_a_failure_marks_the_root_and_the_phase_that_failed(
    receiver: OtlpReceiver, phases: tuple[str, ...], reason: Reason, blamed: str
) -> None:
    verdict = Verdict(outcome=Outcome.FAILED, reason=reason, message=2000 * "x", exit_code=None)
    spans = received(receiver, a_record(*phases, verdict=verdict))
    assert {name for name, span in spans.items() if span.status == "ERROR"} == {"task", f"task.{blamed}"}
    assert spans["task"].status_message == f"{reason}: {verdict.message}"[:1000]
    assert spans["task"].attributes["nodeservice.message"] == verdict.message[:1000]
    assert "nodeservice.exit_code" not in spans["task"].attributes


def test_a_cancelled_task_is_no_error(receiver: OtlpReceiver) -> None:
    verdict = Verdict(outcome=Outcome.CANCELLED, reason=Reason.CANCELLED, message="Cancelled on request.")
    spans = received(receiver, a_record(verdict=verdict))
    assert {span.status for span in spans.values()} == {"UNSET"}
    assert spans["task"].attributes["nodeservice.outcome"] == "CANCELLED"


def test_a_caller_that_does_not_sample_gets_no_spans(receiver: OtlpReceiver) -> None:
    sink = open_trace_sink(receiver.endpoint, insecure=False, worker_id="node-1")
    tell(sink, a_record(trace=TraceIds(trace_id="1" * 32, span_id="2" * 16, sampled=False)))
    tell(sink, a_record())
    close(sink)
    assert {span.trace_id for span in receiver.wait_for(10)} == {a_record().trace.trace_id}


def test_spans_leave_while_the_node_runs_and_from_many_threads(receiver: OtlpReceiver) -> None:
    sink = open_trace_sink(f"127.0.0.1:{receiver.port}", insecure=True, worker_id="node-1")
    traces = [TraceIds(trace_id=f"{n:032x}", span_id=f"{n:016x}") for n in range(1, 9)]
    threads = [threading.Thread(target=tell, args=(sink, a_record(trace=trace))) for trace in traces]
    for thread in threads:
        thread.start()
    spans = receiver.wait_for(80)
    for thread in threads:
        thread.join()
    roots = {(span.trace_id, span.span_id) for span in spans if span.name == "task"}
    assert roots == {(trace.trace_id, trace.span_id) for trace in traces}
    assert {(span.trace_id, span.parent_span_id) for span in spans if span.name != "task"} == roots
    close(sink)


# ---- no collector -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["nobody listens", "accepts and never answers"])
def dead_endpoint(request: pytest.FixtureRequest) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "accepts and never answers":
            listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.slow
def test_a_dead_collector_costs_only_spans(dead_endpoint: str) -> None:
    with structlog.testing.capture_logs() as logs:
        sink = open_trace_sink(dead_endpoint, insecure=False, worker_id="node-1")
        slowest = 0.0
        for _ in range(1000):  # 10,000 spans: more than the queue and many batches
            before = time.monotonic()
            tell(sink, a_record())
            slowest = max(slowest, time.monotonic() - before)
        before = time.monotonic()
        close(sink)
        closing = time.monotonic() - before
    assert slowest < 1.0, "telling never waits for the collector"
    assert closing < 4.0
    assert not logging.getLogger("opentelemetry.exporter").isEnabledFor(logging.ERROR), "it would tell of each batch"
    assert "nodeservice-trace-flush" not in {thread.name for thread in threading.enumerate()}
    assert [entry["event"] for entry in logs].count("trace.collector_unreachable") == 1
    assert {entry["event"] for entry in logs if entry["log_level"] != "debug"} == {"trace.collector_unreachable"}
    tell(sink, a_record())
    close(sink)


@pytest.mark.slow
def test_a_collector_that_comes_back_is_used_again_and_the_outage_is_told_once(receiver: OtlpReceiver) -> None:
    receiver.stop()
    with structlog.testing.capture_logs() as logs:
        sink = open_trace_sink(receiver.endpoint, insecure=False, worker_id="node-1")
        deadline = time.monotonic() + 20
        while not logs and time.monotonic() < deadline:
            tell(sink, a_record())
            time.sleep(0.2)
        receiver.start()
        while not receiver.spans and time.monotonic() < deadline:
            tell(sink, a_record())
            time.sleep(0.2)
        tell(sink, a_record())
        close(sink)
    assert receiver.spans
    assert [entry["event"] for entry in logs] == ["trace.collector_unreachable", "trace.collector_back"]
    assert logs[1]["lost_span_count"] >= 10


@pytest.mark.parametrize(
    ("scheme", "insecure", "first_byte"),
    [("", False, b"\x16"), ("https://", True, b"\x16"), ("", True, b"P"), ("http://", False, b"P")],
)
def test_a_collector_hears_tls_unless_plain_text_is_asked_for(scheme: str, insecure: bool, first_byte: bytes) -> None:
    """0x16 begins a handshake (RFC 8446, 5.1), P the preface of HTTP/2 (RFC 9113, 3.4)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"{scheme}127.0.0.1:{listener.getsockname()[1]}"
        sink = OtlpTraceSink(endpoint, insecure=insecure, worker_id="node-1")
        sink.task_ended(a_record())
        flushing = threading.Thread(target=sink._processor.force_flush)
        flushing.start()
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(1) == first_byte
        sink._exporter.shutdown()
        flushing.join()
        close(sink)


def test_a_record_that_cannot_be_told_never_raises(receiver: OtlpReceiver) -> None:
    with structlog.testing.capture_logs() as logs:
        sink = open_trace_sink(receiver.endpoint, insecure=False, worker_id="node-1")
        tell(sink, a_record("run", trace=TraceIds(trace_id="not hex", span_id="2" * 16)))
        close(sink)
    assert [entry["event"] for entry in logs] == ["trace.span_lost", "trace.span_lost"]


def test_a_node_without_a_collector_does_not_load_opentelemetry() -> None:
    code = (
        "import sys; from nodeservice.telemetry.tracing import open_trace_sink;"
        "from nodeservice.telemetry.metrics import open_metrics; import nodeservice.daemon.instruments;"
        "open_trace_sink(None, insecure=False, worker_id='node-1');"
        "open_metrics(None, insecure=False, worker_id='node-1', instruments=(), read=dict);"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_sink_without_a_collector_takes_everything() -> None:
    sink = open_trace_sink(None, insecure=False, worker_id="node-1")
    assert isinstance(sink, NoTraceSink)
    tell(sink, a_record())
    close(sink)


# ---- trace context ----------------------------------------------------------------------------------------------------

TRACE_ID, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (f"00-{TRACE_ID}-{PARENT}-01", True),
        (f"00-{TRACE_ID}-{PARENT}-00", False),
        (f"00-{TRACE_ID}-{PARENT}-03", True),
        (f"00-{TRACE_ID}-{PARENT}-02", False),
        (f"cc-{TRACE_ID}-{PARENT}-01-what-the-future-holds", True),
    ],
)
def test_a_valid_header_makes_the_task_a_part_of_the_caller_s_trace(header: str, sampled: bool) -> None:
    ids = new_trace_ids(header)
    assert (ids.trace_id, ids.parent_span_id, ids.sampled) == (TRACE_ID, PARENT, sampled)
    assert ids.span_id != PARENT
    assert ids.traceparent == f"00-{TRACE_ID}-{ids.span_id}-{'01' if sampled else '00'}"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "garbage",
        f"ff-{TRACE_ID}-{PARENT}-01",
        f"00-{TRACE_ID}-{PARENT}-01-more",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID.upper()}-{PARENT}-01",
        f"00-{TRACE_ID}-{PARENT}-01\n",
        f"00-{TRACE_ID}-{PARENT}",
        f"01-{TRACE_ID}-{PARENT}-01-" + "x" * 10_000_000,
    ],
)
def test_a_header_that_is_not_valid_is_ignored(header: str | None) -> None:
    ids = new_trace_ids(header)
    assert ids.trace_id != TRACE_ID
    assert ids.parent_span_id is None
    assert ids.sampled


@given(st.text())
def test_no_header_at_all_can_break_it(header: str) -> None:
    ids = new_trace_ids(header)
    assert len(ids.trace_id) == 32
    assert len(ids.span_id) == 16


def test_ids_are_new_each_time() -> None:
    assert len({new_trace_ids(None).trace_id for _ in range(100)}) == 100
    assert len({new_trace_ids(f"00-{TRACE_ID}-{PARENT}-01").span_id for _ in range(100)}) == 100
