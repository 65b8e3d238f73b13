"""tools/test_gpu.py itself: its device rules on this kernel, its report, and its checks against a false driver.

It also meets a false CUDA library, which takes memory and works as the false driver's state says, and a false nvidia-smi.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeservice.testing.false_driver import FalseDriver, Machine
from nodeservice.testing.false_driver import build as build_module

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "test_gpu.py"
Build = Callable[[str | Machine], FalseDriver]

FALSE_CUDA = r"""
#include "state.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }

int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &state; return device; }
int cuCtxSetCurrent(void *context) { return context ? 0 : 1; }

int cuMemAlloc_v2(uint64_t *pointer, size_t size) {
  char head[256], body[256], line[1024];
  unsigned long long ticks = 0;
  FILE *stat = fopen("/proc/self/stat", "r");
  if (stat && fgets(line, sizeof line, stat))
    sscanf(strrchr(line, ')') + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
           &ticks);
  if (stat) fclose(stat);
  *pointer = 4096;
  snprintf(head, sizeof head, "process %s %d", getenv("CUDA_VISIBLE_DEVICES"), getpid());
  snprintf(body, sizeof body, "used_bytes=%zu\nstart_ticks=%llu\nsm_percent=90", size + (300u << 20), ticks);
  return state_add(head, body);
}

/* Draws 500 W while it works, and tells so twenty times a second. */
static double told, began;
int cuMemsetD32_v2(uint64_t pointer, unsigned value, size_t count) { return pointer && count ? (int)(value & 0) : 1; }
int cuCtxSynchronize(void) {
  char head[256], body[256];
  if (now() - told > 1) began = told = now();
  if (now() - told < 0.05) return 0;
  snprintf(head, sizeof head, "gpu %s", getenv("CUDA_VISIBLE_DEVICES"));
  told = now();
  snprintf(body, sizeof body, "utilization_percent=97\npower_milliwatts=500000\nenergy_millijoules=%.0f",
           1e9 + 500000 * (told - began));
  return state_add(head, body);
}
"""

FALSE_SMI = """#!{python}
import sys
import pynvml as n
n.nvmlInit()
(query,) = [a.partition("=")[2].split(",") for a in sys.argv if a.startswith("--query-gpu=")] or [[]]
for index in range(n.nvmlDeviceGetCount()):
    h = n.nvmlDeviceGetHandleByIndex(index)
    row = {{
        "uuid": n.nvmlDeviceGetUUID(h),
        "index": index,
        "name": n.nvmlDeviceGetName(h),
        "pci.bus_id": n.nvmlDeviceGetPciInfo(h).busId,
        "driver_version": n.nvmlSystemGetDriverVersion(),
        "memory.total": {memory} or n.nvmlDeviceGetMemoryInfo(h).total >> 20,
        "compute_cap": "%d.%d" % n.nvmlDeviceGetCudaComputeCapability(h),
        "compute_mode": "Default",
    }}
    print(", ".join(str(row[column]) for column in query))
"""


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tools' folder on the path of imports."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu_check"]:
        del sys.modules[name]


def check(
    driver: FalseDriver | None, out: Path | None, *arguments: str, **environment: str
) -> tuple[int, dict[str, Any]]:
    """Exit code, and the findings by name."""
    command = [sys.executable, TOOL, "--repeat", "5", *arguments, *(["--out", str(out)] if out else [])]
    variables = {**os.environ, **(driver.environment if driver else {})}
    for name, value in environment.items():
        variables[name] = f"{value}:{variables.get(name, '')}"
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)
    if out is None or not (out / "evidence.json").exists():
        return done.returncode, {"output": done.stdout + done.stderr}
    evidence = json.loads((out / "evidence.json").read_text())
    return done.returncode, {finding["name"]: finding for finding in evidence["checks"]}


@pytest.fixture
def false_smi(tmp_path: Path) -> Callable[[int], str]:
    """A folder with an nvidia-smi that tells what the false driver tells, but for the memory, where it is not 0."""

    def build(memory_mib: int) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "nvidia-smi").write_text(FALSE_SMI.format(python=sys.executable, memory=memory_mib))
        (folder / "nvidia-smi").chmod(0o755)
        return str(folder)

    return build


# ---- the whole against a false driver ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "machine",
    ["h200-mig", "old", *(pytest.param(name, marks=pytest.mark.slow) for name in ("h200x8", "t4x4", "mixed", "r615"))],
)
def test_no_check_fails_on_a_machine_whose_driver_is_well(false_driver: Build, tmp_path: Path, machine: str) -> None:
    code, findings = check(false_driver(machine), tmp_path / "out")

    failed = {name: finding["reasons"] for name, finding in findings.items() if finding["outcome"] == "failed"}
    assert (code, failed) == (0, {})
    assert {name for name, finding in findings.items() if finding["outcome"] == "passed"} >= {
        "readings",
        "health",
        "topology",
        "events",
        "threads",
        "time of each call",
        "settings",
    }
    assert all(finding["reasons"] for finding in findings.values() if finding["outcome"] == "not run")


def test_nobody_can_mistake_a_pretended_run_for_evidence(false_driver: Build, tmp_path: Path) -> None:
    driver = false_driver("t4x4")
    check(driver, tmp_path / "out")

    report = (tmp_path / "out" / "report.md").read_text()
    assert report.startswith("# PRETENDED: ")
    assert "This is no evidence" in report
    assert json.loads((tmp_path / "out" / "evidence.json").read_text())["machine"]["pretended"] == "t4x4"

    code, without_folder = check(driver, None)
    assert code == 2
    assert "name a folder with --out" in without_folder["output"]


def test_a_machine_where_nothing_can_be_checked_is_no_success(false_driver: Build, tmp_path: Path) -> None:
    code, said = check(false_driver("driver-not-loaded"), tmp_path / "out")
    assert code == 2
    assert "NOTHING WAS CHECKED: NVML does not start: Driver Not Loaded (9)" in said["output"]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("nvmlDeviceGetMemoryInfo", "readings"),
        ("nvmlDeviceGetTotalEccErrors", "health"),
        ("nvmlEventSetWait", "events"),
    ],
)
def test_a_driver_that_answers_with_an_error_fails_the_check(
    false_driver: Build, tmp_path: Path, call: str, name: str
) -> None:
    driver = false_driver("t4x4")
    driver.fail(call, 999)
    code, findings = check(driver, tmp_path / "out")
    assert code == 1
    assert findings[name]["outcome"] == "failed"
    assert "999" in "".join(findings[name]["reasons"])


def test_what_nvidia_smi_says_otherwise_fails_the_check(
    false_driver: Build, tmp_path: Path, false_smi: Callable[[int], str]
) -> None:
    driver, folder = false_driver("t4x4"), false_smi(0)
    code, findings = check(driver, tmp_path / "out", PATH=folder)
    assert (code, findings["inventory"]["outcome"]) == (0, "passed")

    (tmp_path / "bin" / "nvidia-smi").write_text(FALSE_SMI.format(python=sys.executable, memory=15361))
    code, findings = check(driver, tmp_path / "out", PATH=folder)
    assert code == 1
    assert "memory.total is 15360, and 15361 in nvidia-smi" in findings["inventory"]["reasons"][0]


@pytest.mark.slow
def test_the_memory_and_the_load_of_a_program_are_measured(false_driver: Build, tmp_path: Path) -> None:
    compiler = build_module.compiler()
    assert compiler is not None
    driver, native = false_driver("h200x8"), Path(build_module.__file__).parent / "native"
    (tmp_path / "cuda.c").write_text(FALSE_CUDA)
    sources = [tmp_path / "cuda.c", native / "state.c", native / "state_file.c"]
    library = ["-shared", "-fPIC", f"-I{native}", "-o", tmp_path / "libcuda.so.1", *sources]
    subprocess.run([compiler, "-std=gnu11", *library], check=True)

    code, findings = check(driver, tmp_path / "out", "--measure-seconds", "2", LD_LIBRARY_PATH=str(tmp_path))

    memory, energy = findings["memory of a process"], findings["energy and load"]
    assert (code, memory["outcome"], energy["outcome"]) == (0, "passed", "passed"), (memory, energy)
    assert memory["facts"]["told by NVML MiB"] == 1024 + 300
    assert energy["facts"]["busy: watts by energy"] == pytest.approx(500, rel=0.2)
    assert energy["facts"]["busy: utilisation %, median"] == 97

    driver.fail("nvmlDeviceGetComputeRunningProcesses", 999)
    code, findings = check(driver, tmp_path / "out", "--measure-seconds", "2", LD_LIBRARY_PATH=str(tmp_path))
    assert (code, findings["memory of a process"]["outcome"]) == (1, "failed")


# ---- no setting is touched --------------------------------------------------------------------------------------------


def test_the_checks_call_nothing_that_changes_a_gpu() -> None:
    sources = [TOOL, *(ROOT / "tools" / "gpu_check").glob("*.py")]
    called = {name for source in sources for name in re.findall(r"\bnvml[A-Z]\w+", source.read_text())}
    assert len(called) > 40
    own = {"nvmlEventSetCreate", "nvmlEventSetWait", "nvmlEventSetFree"}
    assert not [name for name in called - own if re.search("Set|Clear|Reset|Create|Destroy|Remove|Modify", name)]


# ---- device rules -----------------------------------------------------------------------------------------------------


def allows(code: bytes, kind: int, major: int, minor: int) -> bool:
    """What a filter says, by the few instructions that it is made of."""
    registers = [0] * 11
    context = {0: kind | 6 << 16, 4: major, 8: minor}
    at = 0
    while True:
        operation, names, offset, value = struct.unpack_from("=BBhi", code, at * 8)
        to = names & 0xF
        at += 1
        match operation:
            case 0x61:
                assert names >> 4 == 1
                registers[to] = context[offset]
            case 0x54:
                registers[to] &= value
            case 0x55:
                at += offset if registers[to] != value else 0
            case 0xB7:
                registers[to] = value
            case 0x95:
                return registers[0] == 1
            case _:
                raise AssertionError(hex(operation))


def test_a_filter_allows_what_its_rules_name_and_nothing_else(tools: None) -> None:
    from gpu_check.device_rules import filter_code

    code = filter_code([(1, 3), (136, None), (195, 255)])
    allowed = {(major, minor) for major in (1, 136, 195) for minor in (0, 3, 255) if allows(code, 2, major, minor)}
    assert allowed == {(1, 3), (136, 0), (136, 3), (136, 255), (195, 255)}
    assert not allows(code, 1, 1, 3), "a block device of the same numbers"
    assert not allows(filter_code([]), 2, 1, 3)


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: device rules need it")
@pytest.mark.parametrize("version", ["CgroupV1", "CgroupV2"])
def test_device_rules_hold_on_this_kernel_and_may_change_meanwhile(tools: None, version: str) -> None:
    """With /dev/full and /dev/zero in the place of GPUs."""
    from gpu_check import device_rules
    from gpu_check.isolation import Probe
    from gpu_check.record import CannotRunError

    question = {"nodes": ["/dev/null", "/dev/full"], "copies": [["full", 1, 7], ["zero", 1, 5]]}
    try:
        cgroup = getattr(device_rules, version)()
    except CannotRunError as reason:
        pytest.skip(str(reason))
    with cgroup:
        try:
            cgroup.allow([rule for rule in device_rules.BASE_RULES if rule != (1, 7)])
        except CannotRunError as reason:
            pytest.skip(str(reason))
        with Probe(cgroup) as probe:
            without = probe.ask(**question)
            cgroup.allow(device_rules.BASE_RULES)
            given = probe.ask(**question)
            cgroup.allow([(1, 3)])
            taken = probe.ask(**question)
    assert not cgroup.directory.exists()
    assert without["nodes"] == {"/dev/null": "open", "/dev/full": "EPERM"}
    assert without["copies"] == {"full": "mknod EPERM", "zero": "open"}
    assert (given["nodes"], given["copies"]) == (
        {"/dev/null": "open", "/dev/full": "open"},
        {"full": "open", "zero": "open"},
    )
    assert taken["nodes"] == {"/dev/null": "open", "/dev/full": "EPERM"}


# ---- the record -------------------------------------------------------------------------------------------------------


def test_a_check_that_cannot_run_says_why_and_one_that_raises_has_failed(tools: None) -> None:
    from gpu_check.record import CannotRunError, Finding, markdown, run

    def cannot(_: Finding) -> None:
        raise CannotRunError("there is none")

    def breaks(_: Finding) -> None:
        raise ZeroDivisionError("oh")

    def fails_and_cannot(finding: Finding) -> None:
        finding.expect(False, "it is | wrong")
        raise CannotRunError("no more")

    findings = [run(check.__name__, "about", check) for check in (cannot, breaks, fails_and_cannot)]

    assert [finding.outcome for finding in findings] == ["not run", "failed", "failed"]
    assert "ZeroDivisionError: oh" in findings[1].reasons[0]
    text = markdown({"title": "Checks of 1 × X", "pretended": None, "date": "2026-01-01"}, findings)
    assert "| cannot | not run | " in text
    assert "it is \\| wrong; no more" in text
    assert "PRETENDED" not in text
