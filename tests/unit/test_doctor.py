"""What the doctor concludes from how a probe went; the probes themselves run in tests/integration."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nodeservice.cli import build_app
from nodeservice.core.model import (
    MIB,
    Collected,
    Lease,
    Outcome,
    Phase,
    PhaseTiming,
    PullPolicy,
    Reason,
    Resources,
    TaskRecord,
    TraceIds,
    Usage,
    Verdict,
)
from nodeservice.doctor.checks import all_probes
from nodeservice.doctor.checks.gpu import judge_access
from nodeservice.doctor.finding import Diagnosis, Finding, State
from nodeservice.doctor.host import Share, has_swap, judge_share, processes_of, read_share
from nodeservice.doctor.probe import Probe, Seen
from nodeservice.doctor.toolkit import gpu_advice, toolkit_version

START = datetime(2026, 1, 1, tzinfo=UTC)
PROBES = {probe.name: probe for probe in all_probes(cpu_count=2, has_swap=True)}
GOOD: dict[str, Any] = {
    "cpu_milli": 200,
    "memory_bytes": 16 * MIB,
    "memory_swap_bytes": 16 * MIB,
    "pids_limit": 16,
    "cpu_ids": "1",
    "write_bytes_per_second": MIB,
    "open_files_limit": 64,
    "core_file_bytes": 0,
    "capabilities": "00000000800405fb",
    "seccomp": 2,
    "no_new_privileges": 1,
    "oom_score_adj": 0,
    "devices": "null",
    "device_rules": "c 1:3 rwm",
    "shm_bytes": 64 * MIB,
}


def seen(
    name: str,
    reason: Reason | None = Reason.COMPLETED,
    *,
    exit_code: int = 0,
    log: str = "",
    usage: Usage | None = None,
    seconds: float = 2.0,
    start_seconds: float = 0.0,
    mismatches: tuple[str, ...] = (),
    held: dict[str, Any] | None = None,
    started: bool = True,
    left: tuple[int, ...] = (),
) -> Seen:
    probe = PROBES[name]
    spec = probe.spec(task_id="d-1", image="i", pull=PullPolicy.NEVER)
    effective = GOOD if held is None else held
    ended_at = START + timedelta(seconds=seconds)
    return Seen(
        record=TaskRecord(
            spec=spec,
            lease=Lease(granted=spec.request),
            trace=TraceIds(trace_id="a" * 32, span_id="b" * 16),
            accepted_at=START,
            phase=Phase.FINISHED,
            timings=(
                PhaseTiming(name="start", started_at=START - timedelta(seconds=start_seconds), ended_at=START),
                PhaseTiming(name="run", started_at=START, ended_at=ended_at),
            ),
            verdict=Verdict(outcome=Outcome.FAILED, reason=reason, message="so it was", exit_code=exit_code)
            if reason
            else None,
            started_at=START if started else None,
            deadline_at=START + timedelta(seconds=1),
            usage=usage or Usage(),
            limits={
                "effective": effective,
                "read_from": dict.fromkeys(effective, "/a/file"),
                "unread": {},
                "mismatches": list(mismatches),
            },
            collected=Collected(manifest_sha256="", file_count=0, total_bytes=0, log_bytes=0, log_tail=log, paths=()),
        ),
        processes_left=left,
    )


def states(probe: str, went: Seen) -> dict[str, State]:
    return {finding.limit: finding.state for finding in PROBES[probe].judge(went)}


def state(probe: str, went: Seen) -> State:
    (only,) = states(probe, went).values()
    return only


@pytest.mark.parametrize(
    ("start_seconds", "used", "expected"),
    [
        (0, 0.40, State.HARD),
        (0, 0.43, State.HARD),
        (0, 0.50, State.FAILED),
        (4, 1.2, State.HARD),
        (4, 1.4, State.FAILED),
    ],
)
def test_busy_loops_and_their_start_may_use_their_quota_and_little_more(
    start_seconds: float, used: float, expected: State
) -> None:
    went = seen("cpu", Reason.DEADLINE, usage=Usage(cpu_seconds=used), start_seconds=start_seconds)
    assert state("cpu", went) is expected


def test_cpu_time_that_cannot_be_read_is_told_and_the_quota_in_force_counts() -> None:
    (finding,) = PROBES["cpu"].judge(seen("cpu", Reason.DEADLINE))

    assert finding.state is State.HARD
    assert "could not be read" in finding.evidence
    assert finding.remedy


def test_a_memory_limit_is_one_that_kills_and_is_told_as_such() -> None:
    peak = Usage(memory_peak_bytes=16 * MIB)

    assert set(states("memory", seen("memory", Reason.MEMORY_LIMIT, usage=peak)).values()) == {State.HARD}
    assert states("memory", seen("memory", Reason.EXIT_NONZERO, exit_code=137)) == {
        "memory": State.FAILED,
        "swap": State.FAILED,
    }
    beyond = Usage(memory_peak_bytes=17 * MIB)
    assert states("memory", seen("memory", Reason.MEMORY_LIMIT, usage=beyond))["memory"] is State.FAILED


@pytest.mark.parametrize(("swap", "expected"), [(True, State.MISSING), (False, State.HARD)])
def test_an_unlimited_swap_matters_where_there_is_swap(swap: bool, expected: State) -> None:
    (probe,) = [probe for probe in all_probes(cpu_count=2, has_swap=swap) if probe.name == "memory"]
    went = seen("memory", Reason.MEMORY_LIMIT, mismatches=("memory_swap_bytes: asked 1, in force no limit",))

    found = {finding.limit: finding for finding in probe.judge(went)}

    assert (found["memory"].state, found["swap"].state) == (State.HARD, expected)
    assert bool(found["swap"].remedy) is swap


def test_a_fork_that_all_succeeded_is_a_limit_that_failed() -> None:
    assert state("processes", seen("processes", Reason.DEADLINE)) is State.HARD
    assert state("processes", seen("processes", log="all started\n")) is State.FAILED
    many = Usage(pids_peak_count=60)
    assert state("processes", seen("processes", Reason.DEADLINE, usage=many)) is State.FAILED


@pytest.mark.parametrize(
    ("reason", "exit_code", "expected"),
    [
        (Reason.DISK_LIMIT, 137, State.WATCHED),
        (Reason.EXIT_NONZERO, 3, State.HARD),
        (Reason.EXIT_NONZERO, 4, State.FAILED),
        (Reason.COMPLETED, 0, State.FAILED),
        (Reason.DEADLINE, 137, State.FAILED),
    ],
)
@pytest.mark.parametrize("name", ["disk-results", "disk-layer", "disk-log"])
def test_a_disk_is_hard_where_writing_fails_and_watched_where_the_task_is_ended(
    name: str, reason: Reason, exit_code: int, expected: State
) -> None:
    (finding,) = PROBES[name].judge(seen(name, reason, exit_code=exit_code))

    assert finding.state is expected
    assert bool(finding.remedy) is (expected is not State.HARD)
    assert "btrfs" not in finding.remedy  # it has no project quotas


def test_patience_lengthens_what_every_probe_may_take() -> None:
    """The one of time too: an engine that takes longer to start a task than its time limit is not tried at all."""
    patient = all_probes(cpu_count=2, has_swap=True, patience=3)
    assert {p.name: p.timeout_seconds for p in patient} == {n: 3 * p.timeout_seconds for n, p in PROBES.items()}


def test_what_outlives_the_deadline_is_a_failure() -> None:
    assert state("time", seen("time", Reason.DEADLINE, seconds=1.3)) is State.HARD
    assert state("time", seen("time", Reason.DEADLINE, seconds=1.3, left=(77,))) is State.FAILED
    assert state("time", seen("time", Reason.DEADLINE, seconds=30)) is State.FAILED
    assert state("time", seen("time", Reason.COMPLETED, seconds=1.3)) is State.FAILED


@pytest.mark.parametrize(("seconds", "expected"), [(2.1, State.HARD), (0.1, State.FAILED)])
def test_a_rate_that_is_set_and_not_kept_is_a_failure(seconds: float, expected: State) -> None:
    assert state("io", seen("io", log="written\n", seconds=seconds)) is expected


def test_what_a_process_may_do_is_told_limit_by_limit() -> None:
    assert set(states("confinement", seen("confinement")).values()) == {State.HARD}
    broken = states(
        "confinement",
        seen("confinement", log="raised open files\nmade a device\n", mismatches=("seccomp: asked 2, in force 0 (f)",)),
    )
    assert {limit for limit, how in broken.items() if how is State.FAILED} == {"open files", "devices"}
    assert {limit for limit, how in broken.items() if how is State.MISSING} == {"system calls"}


VOID = "it is told NVIDIA_VISIBLE_DEVICES=void\n"


@pytest.mark.parametrize(
    ("log", "mismatches", "expected"),
    [
        (VOID, (), State.HARD),
        ("found /dev/nvidia0\n" + VOID, (), State.FAILED),
        (VOID.replace("void", "all"), (), State.FAILED),
        ("", (), State.FAILED),
        (VOID, ("devices: sees nvidia0 (195:0), which it was not granted",), State.MISSING),
        (VOID, ("device_rules: may open 195:0 of GPU-a, which it was not granted",), State.MISSING),
    ],
)
def test_a_task_without_gpus_finds_none_and_may_open_none(
    log: str, mismatches: tuple[str, ...], expected: State
) -> None:
    (finding,) = PROBES["no-gpu"].judge(seen("no-gpu", log=log, mismatches=mismatches))
    assert finding.state is expected
    assert bool(finding.remedy) is (expected is not State.HARD)


def test_how_gpus_are_handed_is_told_where_there_are_any() -> None:
    told = {"words": "by CDI", "passed_over": ("x",), "remedy": "install it"}
    assert judge_access(0, is_possible=False, **told) == []
    (good,) = judge_access(2, is_possible=True, **told)
    assert (good.state, good.evidence) == (State.HARD, "2 handed by CDI (x)")
    (bad,) = judge_access(2, is_possible=False, **told)
    assert (bad.state, bad.remedy) == (State.MISSING, "install it")


def test_a_driver_that_does_not_work_is_no_host_without_gpus() -> None:
    told = {"words": "by CDI", "passed_over": (), "remedy": "", "is_possible": True}
    (only,) = judge_access(0, trouble=("the NVIDIA driver is not loaded",), **told)
    assert (only.state, only.evidence) == (State.MISSING, "the NVIDIA driver is not loaded")
    dead, others = judge_access(7, trouble=("GPU 3: a GPU has fallen off the bus",), **told)
    assert (dead.state, others.state) == (State.MISSING, State.HARD)


@pytest.mark.parametrize(
    ("default", "path", "version", "said"),
    [
        ("runc", "runc", None, []),
        ("runc", "runc", "1.19.1", []),
        ("runc", "runc", "1.20.0-1", []),
        ("runc", "runc", "1.17.8", ["1.19.1"]),
        ("nvidia", "/usr/bin/nvidia-container-runtime", "1.19.0", ["default-runtime", "1.19.1"]),
        ("mine", "/usr/bin/nvidia-container-runtime", None, ["default-runtime"]),
    ],
)
def test_a_default_runtime_of_nvidia_and_an_old_toolkit_are_advised_against(
    default: str, path: str, version: str | None, said: list[str]
) -> None:
    advice = list(gpu_advice({"DefaultRuntime": default, "Runtimes": {default: {"path": path}}}, version))
    assert [word in sentence for word, sentence in zip(said, advice, strict=True)] == [True] * len(said)


def test_the_version_of_the_toolkit_is_what_its_program_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-ctk"
    program.write_text("#!/bin/sh\necho 'NVIDIA Container Toolkit CLI version 1.17.8'\necho 'commit: f202b80'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert toolkit_version() == "1.17.8"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert toolkit_version() is None, "this host has no such package"


def test_shared_memory_ends_where_it_should() -> None:
    full = f"shared memory is full at {64 * MIB}\n"

    assert state("shm", seen("shm", log=full)) is State.HARD
    assert state("shm", seen("shm", log="shared memory is full at 99999999\n")) is State.FAILED
    assert state("shm", seen("shm", Reason.MEMORY_LIMIT, exit_code=137)) is State.FAILED


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_no_probe_takes_silence_for_a_limit(probe: Probe) -> None:
    cases = {
        "refused": (Seen(record=None, refused="not enough CPU"), State.MISSING),
        "not enforced": (seen(probe.name, Reason.LIMIT_NOT_ENFORCED, started=False), State.MISSING),
        "not started": (seen(probe.name, Reason.START_FAILED, started=False), State.FAILED),
        "not ended": (seen(probe.name, None), State.FAILED),
        "no record": (Seen(record=None), State.MISSING),
    }
    for went, expected in cases.values():
        found = probe.judge(went)
        assert found
        assert {finding.state for finding in found} == {expected}
        assert all(finding.evidence for finding in found)


def test_what_was_not_read_is_not_kept() -> None:
    assert set(states("confinement", seen("confinement", held={})).values()) == {State.FAILED}


def test_every_limit_has_one_finding_whatever_happens() -> None:
    for probe in PROBES.values():
        good = [finding.limit for finding in probe.judge(seen(probe.name))]
        assert good == [finding.limit for finding in probe.judge(Seen(record=None))]
        assert len(set(good)) == len(good)


def test_a_host_with_one_cpu_gives_none_away() -> None:
    assert "exclusive" not in {probe.name for probe in all_probes(cpu_count=1, has_swap=True)}


def test_probes_have_names_that_are_safe_in_ids() -> None:
    assert all(name.replace("-", "").isalnum() for name in PROBES)


ALLOCATABLE = Resources(cpu_milli=1800, memory_bytes=1000 * MIB)
KEPT = Share(path="/n", cpu_milli=1800, memory_bytes=1000 * MIB, pids=1000)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (KEPT, State.HARD),
        (None, State.MISSING),
        (Share(), State.MISSING),
        (replace(KEPT, cpu_milli=None), State.MISSING),
        (replace(KEPT, memory_bytes=1001 * MIB), State.MISSING),
        (replace(KEPT, pids=None), State.MISSING),
    ],
)
def test_the_reserve_is_kept_where_all_tasks_together_are_limited(share: Share | None, expected: State) -> None:
    assert judge_share(share, ALLOCATABLE, None).state is expected


MOUNTS_V1 = "".join(
    f"{n} 1 0:{n} / /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}\n"
    for n, name in enumerate(["cpu", "memory", "pids"], 30)
)
MOUNTS_V2 = "30 1 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_share_of_all_tasks_is_read_above_the_task_on_v1(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/mountinfo": MOUNTS_V1,
            "sys/fs/cgroup/cpu/nodeservice/n.node/cpu.cfs_quota_us": "180000\n",
            "sys/fs/cgroup/cpu/nodeservice/n.node/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/nodeservice/n.node/memory.limit_in_bytes": f"{MIB}\n",
            "sys/fs/cgroup/memory/nodeservice/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/pids/nodeservice/n.node/pids.max": "500\n",
            "sys/fs/cgroup/pids/nodeservice/pids.max": "max\n",
            "sys/fs/cgroup/pids/nodeservice/n.node/t.1/pids.max": "7\n",
        },
    )

    share = read_share("/nodeservice/n.node/t.1", version=1, root=tmp_path)

    assert share == Share(path="/nodeservice/n.node", cpu_milli=1800, memory_bytes=MIB, pids=500)


def test_the_share_of_all_tasks_is_read_above_the_task_on_v2(tmp_path: Path) -> None:
    node = "sys/fs/cgroup/nodeservice.slice/nodeservice-n.slice"
    write(
        tmp_path,
        {
            "proc/self/mountinfo": MOUNTS_V2,
            f"{node}/cpu.max": "180000 100000\n",
            f"{node}/memory.max": f"{MIB}\n",
            f"{node}/pids.max": "max\n",
            "sys/fs/cgroup/nodeservice.slice/cpu.max": "max 100000\n",
        },
    )

    share = read_share("/nodeservice.slice/nodeservice-n.slice/t.slice", version=2, root=tmp_path)

    assert share == Share(path="/nodeservice.slice/nodeservice-n.slice", cpu_milli=1800, memory_bytes=MIB)


@pytest.mark.parametrize(("text", "expected"), [("Filename Type\n", False), ("Filename\n/dev/x\n", True), (None, True)])
def test_swap_that_cannot_be_seen_may_be_there(tmp_path: Path, text: str | None, expected: bool) -> None:
    if text is not None:
        write(tmp_path, {"proc/swaps": text})

    assert has_swap(tmp_path) is expected


def test_processes_are_found_by_the_whole_id(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/7/environ": "A=b\0NODESERVICE_TASK_ID=d-1\0",
            "proc/8/environ": "NODESERVICE_TASK_ID=d-10\0",
            "proc/self/environ": "NODESERVICE_TASK_ID=d-1\0",
        },
    )
    (tmp_path / "proc/9").mkdir()

    assert list(processes_of("d-1", tmp_path)) == [7]


@pytest.mark.parametrize("how", State)
def test_a_machine_is_sound_where_every_limit_is_kept(how: State) -> None:
    diagnosis = Diagnosis(findings=[Finding(limit="CPU", state=how, evidence="e", remedy="r")], facts={"kernel": "6"})

    assert diagnosis.is_sound is (how in (State.HARD, State.WATCHED))
    document = diagnosis.as_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["checks"] == [{"limit": "CPU", "state": how.value, "evidence": "e", "remedy": "r"}]


def test_a_pipe_gets_evidence_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = "/sys/fs/cgroup/" + "a" * 200

    async def examine(*_: object, **__: object) -> Diagnosis:
        return Diagnosis(findings=[Finding(limit="CPU", state=State.HARD, evidence=path)], facts={}, advice=[path])

    monkeypatch.setattr("nodeservice.telemetry.logs.configure_logging", lambda *_: None)  # it is the whole process's
    monkeypatch.setattr("nodeservice.doctor.examine.examine", examine)
    assert build_app()(["doctor"], standalone_mode=False) in (0, None)
    assert capsys.readouterr().out.count(path) == 2
