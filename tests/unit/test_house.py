"""Holds the house to its own rules: generated code, lock files, module sizes, purity, and docs that match the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nodeservice.cli.exit_codes import ExitCode
from nodeservice.config.settings import CREDENTIALS, NodeConfig
from nodeservice.core import events as ev
from nodeservice.core import machine
from nodeservice.core.model import (
    AttemptId,
    Collected,
    Lease,
    Outcome,
    Phase,
    PhaseTiming,
    Reason,
    Resources,
    StopCause,
    StopRequest,
    TaskRecord,
    TaskSpec,
    TraceIds,
    Usage,
    Verdict,
)
from nodeservice.daemon.instruments import INSTRUMENTS
from nodeservice.telemetry.metrics import Instrument, Kind

ROOT = Path(__file__).resolve().parents[2]
WIRE = ROOT / "nodeservice" / "wire"
LOCK_FILES = ("runtime.txt", "dev.txt")
MAX_MODULE_LINES = 400
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def own_modules() -> list[Path]:
    """What people wrote: the package without generated code, and the tools."""
    package = [path for path in (ROOT / "nodeservice").rglob("*.py") if WIRE not in path.parents]
    return sorted([*package, *(ROOT / "tools").glob("*.py")])


# ---- code -------------------------------------------------------------------------------------------------------------


def test_the_generated_wire_code_is_what_the_proto_file_generates(tmp_path: Path) -> None:
    include = f"-Inodeservice/wire={ROOT / 'proto' / 'cluster'}"
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", include, *outputs, "nodeservice/wire/master_worker.proto"]
    subprocess.run(command, check=True, timeout=60)
    generated = sorted((tmp_path / "nodeservice" / "wire").iterdir())
    assert [path.name for path in generated] == [
        "master_worker_pb2.py",
        "master_worker_pb2.pyi",
        "master_worker_pb2_grpc.py",
    ]
    stale = [path.name for path in generated if path.read_bytes() != (WIRE / path.name).read_bytes()]
    assert not stale, "run `make proto`"


def test_no_module_is_longer_than_a_person_reads_at_once() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in own_modules()
        if (count := len(path.read_text().splitlines())) > MAX_MODULE_LINES
    }
    assert not long


def test_every_module_says_in_its_first_line_what_it_does() -> None:
    silent = [
        str(path.relative_to(ROOT)) for path in own_modules() if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_the_core_never_asks_for_the_time() -> None:
    """Import-linter bars `time`; `datetime` is there as a type, so its clock must be barred here."""
    asking = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "nodeservice" / "core").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"now", "utcnow", "today", "fromtimestamp"}
    ]
    assert not asking


# ---- lock files -------------------------------------------------------------------------------------------------------


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Package → (version with its condition, number of hashes)."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements" / name).read_text().strip())
    pins = {}
    for entry in entries:
        pin, *rest = entry.split("\\\n")
        package, version = pin.strip().split("==", 1)
        pins[package] = (version, sum(line.strip().startswith("--hash=sha256:") for line in rest))
    return pins


def test_nobody_waits_with_a_call_that_can_swallow_a_cancellation() -> None:
    """asyncio.wait_for before Python 3.12: a cancellation that meets the end of the wait is lost, and a shutdown hangs."""
    found = [str(path.relative_to(ROOT)) for path in own_modules() if "asyncio.wait_for" in path.read_text()]
    assert found == []


@pytest.mark.parametrize("name", LOCK_FILES)
def test_a_lock_file_names_no_host(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    assert not re.findall(r"https?://|--(?:extra-)?index-url|--find-links|--trusted-host| @ ", text)


@pytest.mark.parametrize("name", LOCK_FILES)
def test_a_lock_file_pins_every_package_by_hash(name: str) -> None:
    pins = locked(name)
    assert len(pins) > 10
    assert not [package for package, (_, hashes) in pins.items() if not hashes]


def test_the_tests_run_with_the_versions_that_a_node_runs_with() -> None:
    runtime, dev = locked("runtime.txt"), locked("dev.txt")
    assert {package: dev.get(package) for package in runtime} == runtime


# ---- docs -------------------------------------------------------------------------------------------------------------


def sample_record(phase: Phase, *, stop: StopRequest | None, retained: bool) -> TaskRecord:
    spec = TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=1, fingerprint="f")
    return TaskRecord(
        spec=spec,
        lease=Lease(granted=Resources()),
        trace=TraceIds(trace_id="1" * 32, span_id="2" * 16),
        accepted_at=NOW,
        phase=phase,
        timings=(PhaseTiming(name="so far", started_at=NOW),),
        stop=stop,
        retained=retained,
    )


STOP = StopRequest(cause=StopCause.CANCELLED, requested_at=NOW)
COLLECTED = Collected(manifest_sha256="", file_count=0, total_bytes=0, log_bytes=0, log_tail="", paths=())
FAILURE = Verdict(outcome=Outcome.FAILED, reason=Reason.NODE_FAULT, message="")
SAMPLES: tuple[ev.Event, ...] = (
    ev.StopRequested(at=NOW, stop=STOP),
    ev.ImagePulled(at=NOW, digest="d"),
    ev.StepFailed(at=NOW, reason=Reason.START_FAILED, message=""),
    ev.ContainerCreated(at=NOW, container_id="c"),
    ev.ContainerStarted(at=NOW, started_at=NOW),
    ev.ContainerExited(at=NOW, exit_code=0, oom_killed=False),
    ev.ContainerLost(at=NOW, message=""),
    ev.ContainerGone(at=NOW),
    ev.ContainerStuck(at=NOW, message=""),
    ev.ResultsCollected(at=NOW, collected=COLLECTED, usage=Usage()),
    ev.CollectFailed(at=NOW, message="", usage=Usage()),
    ev.ResultsStored(at=NOW, location="l"),
    ev.ResultsRetained(at=NOW, location="l", message=""),
    ev.ResultsGivenUp(at=NOW, message=""),
    ev.ReportAcknowledged(at=NOW),
    ev.CleanedUp(at=NOW),
    ev.TaskAbandoned(at=NOW, verdict=FAILURE),
)


def test_the_diagram_in_the_docs_is_the_transition_table() -> None:
    assert {type(sample) for sample in SAMPLES} == set(machine.TRANSITIONS), "a new event needs a sample here"
    real = {
        (phase.name, machine.advance(record, sample).record.phase.name, type(sample).__name__)
        for sample in SAMPLES
        for phase in machine.TRANSITIONS[type(sample)]
        for stop in (None, STOP)
        for retained in (False, True)
        for record in [sample_record(phase, stop=stop, retained=retained)]
    }
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = {
        (source, target, event.strip())
        for source, target, events in re.findall(r"^ *([A-Z]+) --> ([A-Z]+) : (.+)$", text, re.MULTILINE)
        for event in events.split(",")
    }
    assert drawn == real


def test_the_manual_explains_every_outcome_and_reason() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert not [name for name in (*Outcome, *Reason) if f"`{name.value}`" not in text]


def written(default: object) -> str:
    match default:
        case None:
            return "–"
        case bool():
            return f"`{str(default).lower()}`"
        case float() if default.is_integer():
            return f"`{int(default)}`"
        case _:
            return f"`{default}`"


def test_the_manual_lists_every_setting_with_its_default() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    configuration = text.partition("## Configuration")[2].partition("## Outcomes")[0]
    listed = dict(re.findall(r"^\| `([a-z_0-9]+)` \| (.+?) \|", configuration, re.MULTILINE))
    settings = {name: field for name, field in NodeConfig.model_fields.items() if name not in CREDENTIALS}
    assert set(listed) == set(settings)
    fixed = {name: written(field.default) for name, field in settings.items() if field.default_factory is None}
    assert {name: listed[name] for name in fixed} == fixed


def test_the_manual_lists_every_metric() -> None:
    text = (ROOT / "docs" / "operations.md").read_text().partition("## Metrics\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_.]+)` \| (\w+) \| `(.+?)` \| (.+?) \|", text, re.MULTILINE)
    told = [(each.name, each.kind.value, each.unit, each.attributes) for each in INSTRUMENTS]
    assert [(name, kind, unit, tuple(re.findall("`(.+?)`", names))) for name, kind, unit, names in rows] == told


def in_prometheus(metric: Instrument) -> str:
    """As its translator of OTLP names it (github.com/prometheus/otlptranslator)."""
    unit = {"s": "_seconds", "By": "_bytes", "Cel": "_celsius", "W": "_watts", "J": "_joules"}.get(metric.unit, "")
    ratio = "_ratio" if (metric.unit, metric.kind) == ("1", Kind.GAUGE) else ""
    return f"{metric.name.replace('.', '_')}{unit}{ratio}{'_total' if metric.kind is Kind.COUNTER else ''}"


def test_the_alerts_in_the_manual_ask_for_metrics_and_attributes_that_there_are() -> None:
    alerts = re.findall(r"^ +expr: (.+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    asked = set(re.findall(r"\b(?:nodeservice|hw)_[a-z_]+", " ".join(alerts)))
    labels = {name.replace(".", "_") for each in INSTRUMENTS for name in each.attributes}
    assert len(alerts) > 3
    assert not asked - labels - {in_prometheus(each) for each in INSTRUMENTS}


def test_the_manual_explains_every_exit_code() -> None:
    text = (ROOT / "docs" / "operations.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == {0, *map(int, ExitCode)}


def test_the_manual_names_only_log_events_that_exist() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    named = {
        event
        for line in text.splitlines()
        if line.startswith("| log ")
        for event in re.findall(r"`([a-z_]+\.[a-z_]+)`", line.split("|")[1])
    }
    code = "".join(path.read_text() for path in own_modules())
    assert len(named) > 5
    assert not [event for event in named if f'"{event}"' not in code]


def test_links_between_the_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    dead = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in documents
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert not dead


def test_the_makefile_describes_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE))
