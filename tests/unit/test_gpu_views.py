"""GPUs as people and programs are shown them: JSON, and tables of 100 columns."""

from __future__ import annotations

import dataclasses
import io
import json
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from nodeservice.cli import render
from nodeservice.cli.gpu_json import bill_document, gpus_document
from nodeservice.cli.gpu_tables import asked_words, bill_table, bill_words, gpu_tables
from nodeservice.cli.result_view import record_as_dict
from nodeservice.cli.task_json import node_document, task_document, task_summary
from nodeservice.core.gpus import GpuPart, GpuRequest, GpuShare, GpuUnit, GpuUsage, ShareMethod
from nodeservice.core.model import (
    GIB,
    MIB,
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
from nodeservice.gpu.health import GpuState
from nodeservice.ports import Gpu, GpuInventory, MigInstance
from nodeservice.rpc.convert import running_task, task_result
from nodeservice.rpc.convert_gpu import gpu_infos
from nodeservice.wire import master_worker_pb2 as pb

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WHOLE, SPLIT = (f"GPU-00000000-0000-0000-0000-{number:012d}" for number in (1, 2))
MIG = "MIG-00000000-0000-0000-0000-000000000003"
BILL = GpuUsage(
    uuid=WHOLE, name="NVIDIA H200", seconds=60.0, utilization_mean_percent=81.5, utilization_peak_percent=99.0,
    memory_peak_bytes=9 * GIB, energy_joules=12_345.0, throttled_seconds=2.5, xids=(13, 31),
)  # fmt: skip
RECORD = TaskRecord(
    spec=TaskSpec(
        id=AttemptId("t", 1), image="i", request=Resources(cpu_milli=1000, memory_bytes=64 * MIB, disk_bytes=GIB),
        gpu=GpuRequest(model="H200", share=GpuShare(memory_bytes=10 * GIB)), pids_limit=10, fingerprint="f",
    ),
    lease=Lease(
        granted=Resources(),
        gpu_uuids=(WHOLE,),
        gpu_part=GpuPart(memory_bytes=10 * GIB, sm_percent=0, method=ShareMethod.WATCHED),
    ),
    trace=TraceIds(trace_id="1" * 32, span_id="2" * 16), accepted_at=NOW, phase=Phase.REPORTING, timings=(),
    verdict=Verdict(outcome=Outcome.FAILED, reason=Reason.GPU_FAULT, message="m"), usage=Usage(gpus=(BILL,)),
)  # fmt: skip


def infos(*, unwell: str = "", state: GpuState = GpuState.WELL, sharing_allowed: bool = False) -> list[pb.GpuInfo]:
    instance = MigInstance(
        uuid=MIG, name="NVIDIA H200 MIG 1g.18gb", profile="1g.18gb", memory_total_bytes=16 * GIB, gpu_instance_id=7,
        compute_instance_id=0,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "name": "NVIDIA H200", "memory_total_bytes": 140 * GIB, "compute_capability": (9, 0), "ecc_enabled": True,
        "ecc_uncorrected_count": 2, "power_watts": 76.0, "power_limit_watts": 700.0, "nvlink_count": 18, "numa_node": 1,
        "pci_address": "00000000:1B:00.0", "temperature_celsius": 31.0,
    }  # fmt: skip
    whole = Gpu(uuid=WHOLE, memory_used_bytes=GIB, utilization_percent=93.0, throttle_reasons=0x20, **facts)
    split = Gpu(uuid=SPLIT, mig_enabled=True, mig_instances=(instance,), **facts)
    leasable = [
        GpuUnit(
            uuid=WHOLE, name="NVIDIA H200", memory_bytes=140 * GIB, unwell=unwell,
            share_methods=(ShareMethod.DRIVER, ShareMethod.WATCHED),
        ),
        GpuUnit(uuid=MIG, name=instance.name, memory_bytes=16 * GIB, mig_profile="1g.18gb", counts=False),
    ]  # fmt: skip
    part = GpuPart(memory_bytes=35 * GIB, sm_percent=0, method=ShareMethod.DRIVER)
    leases = [
        Lease(granted=Resources(), gpu_uuids=(WHOLE,), gpu_part=part),
        Lease(granted=Resources(), gpu_uuids=(MIG,)),
    ]
    return gpu_infos(
        GpuInventory(gpus=(whole, split)),
        leasable,
        leases,
        lambda uuid: (
            (state, "fell off the bus") if uuid == WHOLE and state is not GpuState.WELL else (GpuState.WELL, "")
        ),
        sharing_allowed=sharing_allowed,
    )


def at_100_columns(*parts: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False)
    for part in parts:
        console.print(part)
    return out.getvalue()


# ---- what a node tells ---------------------------------------------------------------------------------------------------


def test_a_gpu_is_told_with_its_state_its_hardware_and_its_mig_instances() -> None:
    whole, split = json.loads(json.dumps(gpus_document(infos())))
    assert (whole["uuid"], whole["state"], whole["state_reason"], whole["held_milli"]) == (WHOLE, "WELL", None, 250)
    for name, value in {
        "compute_capability": "9.0", "numa_node": 1, "nvlink_count": 18, "ecc_enabled": True, "ecc_uncorrected_count": 2,
        "power_watts": 76.0, "power_limit_watts": 700.0, "temperature_celsius": 31.0, "utilization_percent": 93.0,
        "memory_used_bytes": GIB, "pci_address": "00000000:1B:00.0", "throttle_reasons": ["SW_THERMAL"],
    }.items():  # fmt: skip
        assert whole[name] == value
    assert (split["leasable"], split["counted"]) == (False, False)
    (instance,) = split["mig_instances"]
    assert (instance["uuid"], instance["mig_profile"], instance["held_milli"]) == (MIG, "1g.18gb", 1000)
    assert (instance["leasable"], instance["counted"]) == (True, False)


def test_what_is_not_known_of_a_gpu_is_null_and_not_zero() -> None:
    (gpu,) = gpus_document([pb.GpuInfo(uuid=WHOLE, name="x", memory_total_bytes=1)])
    assert [gpu[name] for name in ("state", "ecc_enabled", "power_watts", "nvlink_count", "numa_node")] == [None] * 5


def test_a_part_that_is_only_watched_is_offered_only_where_the_operator_allows_it() -> None:
    assert list(infos()[0].share_methods) == ["driver"]
    assert list(infos(sharing_allowed=True)[0].share_methods) == ["driver", "watched"]


def test_a_gpu_that_takes_no_tasks_for_another_reason_than_its_health_is_not_called_well() -> None:
    told = infos(unwell="its compute mode is 'prohibited'")[0]
    assert (told.state, told.state_reason) == ("SUSPECT", "its compute mode is 'prohibited'")


# ---- tables --------------------------------------------------------------------------------------------------------------


def test_gpus_are_readable_at_100_columns_and_every_uuid_is_whole() -> None:
    text = at_100_columns(*gpu_tables(gpus_document(infos(state=GpuState.FAULTY)), title="GPUs of n: driver 580"))
    rows: dict[str, list[str]] = {}
    for line in filter(str.strip, text.splitlines()):
        rows.setdefault(line.split()[0], line.split())
    assert rows[WHOLE] == [WHOLE, "H200", "FAULTY", "25", "%", "93", "%", "1", "GiB", "140", "GiB"]
    assert rows[MIG] == [MIG, "MIG", "1g.18gb", "WELL", "all", "?", "16", "GiB"]
    assert "split" in rows[SPLIT]
    assert f"{WHOLE} FAULTY: fell off the bus" in text
    assert "held back by SW_THERMAL" in text
    assert "on, 2 errors" in text
    assert "76 of 700 W" in text


def test_the_bill_is_readable_at_100_columns() -> None:
    document = record_as_dict(RECORD, None)
    text = at_100_columns(bill_table(document["usage"]["gpus"]))  # type: ignore[index]
    assert max(map(len, text.splitlines())) <= 100
    (row,) = [line for line in text.splitlines() if line.strip().startswith(WHOLE[:12])]
    for word in ("H200", "60.0", "82 %", "99 %", "9 GiB", "12.35 kJ", "2.5 s", "13, 31"):
        assert word in row, word
    assert list(bill_words(document["usage"]["gpus"])) == [  # type: ignore[index]
        f"{WHOLE}: 60 s, load 82 % (peak 99 %), memory 9 GiB, 12.35 kJ, 2.5 s throttled, XID 13 and 31"
    ]


def test_what_is_not_known_stands_as_a_question_mark_in_the_table_and_not_at_all_in_words() -> None:
    (unknown,) = bill_document([pb.GpuUsage(uuid=WHOLE, name="x", seconds=3)])
    assert at_100_columns(bill_table([unknown])).count("?") == 5
    assert list(bill_words([unknown])) == [f"{WHOLE}: 3 s"]


def test_text_from_a_node_is_no_markup_and_moves_no_cursor() -> None:
    hostile = pb.GpuInfo(uuid="[red]u[/]", name="[bold]n[/nonsense]\x1b[2J", state="[x]", state_reason="\x1b[2J[/x]")
    text = at_100_columns(*gpu_tables(gpus_document([hostile]), title="t"))
    assert "\x1b" not in text
    for words in ("[red]u[/]", "[bold]n[/nonsense]", "[x]", "[/x]"):
        assert words in text


def test_the_words_of_a_request() -> None:
    assert asked_words(0, None) == "0 GPU"
    gpu = {"model": "H200", "min_memory_bytes": 40 * GIB, "min_compute_capability": "9.0"}
    assert asked_words(2, gpu) == "2 GPU (model H200, at least 40 GiB, capability 9.0)"
    assert asked_words(0, {"share": {"milli": 500}}) == "0.5 of a GPU"
    amounts = {"share": {"memory_bytes": 10 * GIB, "sm_percent": 30}, "model": "A100"}
    assert asked_words(0, amounts) == "10 GiB and 30 % of the SMs of a GPU (model A100)"
    assert [asked_words(2, gpu, brief=True), asked_words(0, amounts, brief=True)] == ["2 H200", "10 GiB A100"]


# ---- tasks ---------------------------------------------------------------------------------------------------------------


def view(**fields: Any) -> pb.TaskView:
    task = pb.Task(
        task_id="t", docker_image="i", gpu=pb.GpuRequest(model="H200", share=pb.GpuShare(memory_bytes=10 * GIB))
    )
    return pb.TaskView(task=task, **fields)


def test_run_and_show_tell_the_same_of_gpus() -> None:
    ran = record_as_dict(RECORD, None)
    shown = task_document(view(state="FAILED", result=task_result(RECORD, "w")))
    assert ran["request"]["gpu"] == shown["request"]["gpu"]  # type: ignore[index]
    assert shown["request"]["gpu"]["share"] == {"milli": None, "memory_bytes": 10 * GIB, "sm_percent": None}  # type: ignore[index]
    for name in ("gpu_uuids", "gpu_part"):
        assert ran[name] == shown[name], name
    assert ran["gpu_part"] == {"memory_bytes": 10 * GIB, "sm_percent": None, "method": "watched"}
    assert ran["usage"]["gpus"] == shown["usage"]["gpus"]  # type: ignore[index]
    assert ran["usage"]["gpus"] == [  # type: ignore[index]
        {
            "uuid": WHOLE, "name": "NVIDIA H200", "seconds": 60.0, "utilization_mean_percent": 81.5,
            "utilization_peak_percent": 99.0, "memory_peak_bytes": 9 * GIB, "energy_joules": 12_345.0,
            "throttled_seconds": 2.5, "xids": [13, 31],
        }
    ]  # fmt: skip
    assert shown["retryable"] is True


def test_while_a_task_runs_its_gpus_are_those_that_its_node_tells() -> None:
    running = pb.RunningTask(task_id="t", gpu_uuids=[WHOLE], gpu_part=pb.GpuPart(memory_bytes=GIB, method="mps"))
    summary = task_summary(view(state="RUNNING", running=running))
    assert summary["gpu_uuids"] == [WHOLE]
    assert summary["gpu_part"] == {"memory_bytes": GIB, "sm_percent": None, "method": "mps"}


def test_a_task_that_gave_its_gpus_back_is_told_to_hold_none() -> None:
    assert running_task(with_timing()).gpu_part.method == "watched"
    gone = running_task(dataclasses.replace(with_timing(), compute_released=True))
    assert (list(gone.gpu_uuids), gone.HasField("gpu_part")) == ([], False)


def with_timing() -> TaskRecord:
    return dataclasses.replace(RECORD, timings=(PhaseTiming(name="run", started_at=NOW),))


# ---- nodes ---------------------------------------------------------------------------------------------------------------


def test_a_broken_driver_is_told_with_its_remedy_and_never_as_no_gpus(capsys: Any) -> None:
    warning = "GPU_DRIVER: the NVIDIA driver is not loaded (NVML error 9); load it with `modprobe nvidia`"
    broken = pb.NodeView(worker_id="n1", state="ACTIVE", warnings=[warning], last_heartbeat_unix_ms=1)
    document = node_document(broken)
    assert document["warnings"] == [warning]
    render.show_nodes([document, node_document(pb.NodeView(worker_id="n2", state="ACTIVE"))])
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "fault" in next(
        line for line in shown.splitlines() if line.startswith(" n1 ACTIVE".rstrip()) or " n1 " in line
    )
    assert f"n1 {warning}" in shown
    assert "0/0" in rows["n2"]


def test_the_column_of_gpus_is_there_only_where_a_task_asks_for_some(capsys: Any) -> None:
    render.show_tasks([task_summary(view(state="QUEUED"))])
    assert "10 GiB H200" in capsys.readouterr().out
    render.show_tasks([task_summary(pb.TaskView(task=pb.Task(task_id="t")))])
    assert "GPU" not in capsys.readouterr().out
