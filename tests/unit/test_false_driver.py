"""The false NVIDIA driver through the real binding: ABI, init, identity, readings, faults, threads."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

from nodeservice.testing.false_driver import MACHINES, FalseDriver, Machine
from nodeservice.testing.false_driver import build as build_module
from nodeservice.testing.false_driver.build import LIBRARY, compiled
from nodeservice.testing.false_driver.facts import known_facts
from tests.nvml_caller import Caller, NvmlCallError

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
Build = Callable[[str | Machine], FalseDriver]
NATIVE = Path(build_module.__file__).parent / "native"

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST = 3, 4, 6, 13, 15


@pytest.fixture
def driver(false_driver: Build) -> FalseDriver:
    return false_driver("h200x8")


# ---- the binary interface ---------------------------------------------------------------------------------------------

STRUCTURES = {
    "pci_info": pynvml.nvmlPciInfo_t,
    "memory_v1": pynvml.c_nvmlMemory_t,
    "memory_v2": pynvml.c_nvmlMemory_v2_t,
    "utilization": pynvml.c_nvmlUtilization_t,
    "temperature_v1": pynvml.c_nvmlTemperature_v1_t,
    "process_info": pynvml.c_nvmlProcessInfo_v3_t,
    "process_sample": pynvml.c_nvmlProcessUtilizationSample_t,
    "accounting_stats": pynvml.c_nvmlAccountingStats_t,
    "event_data": pynvml.c_nvmlEventData_t,
    "field_value": pynvml.c_nvmlFieldValue_t,
    "mig_attributes": pynvml.c_nvmlDeviceAttributes,
    "set_memory_limits": pynvml.c_nvmlSetMemoryLimits_v1_t,
    "get_memory_limits": pynvml.c_nvmlGetMemoryLimits_v1_t,
    "fabric_v2": pynvml.c_nvmlGpuFabricInfo_v2_t,
    "fabric_v3": pynvml.c_nvmlGpuFabricInfo_v3_t,
}


def test_each_structure_has_the_size_that_the_binding_gives_it(false_driver_cache: Path, tmp_path: Path) -> None:
    compiler = build_module.compiler()
    assert compiler is not None
    source = tmp_path / "sizes.c"
    lines = [
        f'_Static_assert(sizeof({name}) == {ctypes.sizeof(structure)}, "{name}");'
        for name, structure in STRUCTURES.items()
    ]
    source.write_text('#include "abi.h"\n' + "\n".join(lines))

    command = [compiler, "-std=gnu11", "-fsyntax-only", f"-I{NATIVE}", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    declared = set(re.findall(r"^} (\w+);", (NATIVE / "abi.h").read_text(), re.MULTILINE))
    assert declared - {"nvml_code", "field_number"} == set(STRUCTURES), "a structure without a test"


def test_the_library_compiles_without_a_warning(
    false_driver_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_FLAGS", (*build_module._FLAGS, "-Werror", "-fsyntax-only"))
    with pytest.raises(FileNotFoundError):  # no library comes of -fsyntax-only, and no RuntimeError of a warning
        compiled(frozenset(), tmp_path)


def test_it_exports_nvml_functions_alone_and_those_of_no_version_that_the_binding_lacks(driver: FalseDriver) -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", driver.library], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    binding = Path(pynvml.__file__).read_text()

    strange = {name for name in names if f'"{name}"' not in binding}

    assert len(names) > 70
    assert strange == {"nvmlFalseDriverMachine", "nvmlInit", "nvmlInit_v2"}


def test_what_compiles_once_is_taken_from_the_cache(tmp_path: Path, false_driver_cache: Path) -> None:
    first = compiled(frozenset(), false_driver_cache)
    made_at = first.stat().st_mtime_ns

    assert compiled(frozenset(), false_driver_cache) == first
    assert first.stat().st_mtime_ns == made_at
    assert compiled({"nvmlDeviceGetName"}, false_driver_cache) != first


def test_every_fact_of_every_machine_is_one_that_the_library_knows() -> None:
    texts = {"cpus", "pcie_switch"}
    for machine in MACHINES.values():
        for gpu in machine.gpus:
            unknown = {fact for fact in gpu.facts if not fact.startswith("nvlink.")} - known_facts("GPU") - texts
            assert not unknown, machine.name


# ---- init -------------------------------------------------------------------------------------------------------------


def test_the_binding_loads_it_by_its_own_name_and_can_tell_that_it_is_false(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        assert nvml.loaded() == driver.library
        name = "ctypes.create_string_buffer(32)"
        assert nvml(f"(b := {name}, pynvml.nvmlLib.nvmlFalseDriverMachine(b, 32), b.value)[1:]") == [0, b"h200x8"]


def test_a_process_that_runs_already_gets_it_by_its_path(driver: FalseDriver) -> None:
    with Caller(init=False) as nvml:
        assert nvml.code("nvmlInit()") == 12
        nvml(f"os.environ['FALSE_NVIDIA_DRIVER'] = {driver.environment['FALSE_NVIDIA_DRIVER']!r}")
        nvml(f"kept = ctypes.CDLL({str(driver.library)!r})")
        nvml("nvmlInit()")
        assert nvml("nvmlDeviceGetCount()") == 8


def test_nothing_works_before_init_and_after_as_many_shutdowns(driver: FalseDriver) -> None:
    with Caller(driver, init=False) as nvml:
        nvml("pynvml._LoadNvmlLibrary()")
        assert nvml.code("nvmlDeviceGetCount()") == 1
        nvml("nvmlInit()\nnvmlInit()\nnvmlShutdown()")
        assert nvml("nvmlDeviceGetCount()") == 8
        nvml("nvmlShutdown()")
        assert nvml.code("nvmlDeviceGetCount()") == 1
        assert nvml.code("nvmlShutdown()") == 1


def test_versions_are_those_of_the_driver(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        versions = nvml("nvmlSystemGetDriverVersion(), nvmlSystemGetNVMLVersion(), nvmlSystemGetCudaDriverVersion_v2()")
    assert versions == ["580.95.05", "13.580.95.05", 13000]


def test_errors_have_words(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        assert nvml("nvmlErrorString(0), nvmlErrorString(15), nvmlErrorString(999), nvmlErrorString(12345)") == [
            "Success",
            "GPU is lost",
            "Unknown Error",
            "Unknown Error",
        ]


@pytest.mark.parametrize(
    ("machine", "code", "boards"),
    [
        ("library-only", 9, 0),
        ("driver-not-loaded", 9, 1),
        ("no-permission", 4, 1),
        ("version-mismatch", 18, 1),
        ("blocked", 999, 1),
    ],
)
def test_a_machine_whose_driver_does_not_work_says_why(
    false_driver: Build, machine: str, code: int, boards: int
) -> None:
    driver = false_driver(machine)
    with Caller(driver, init=False) as nvml:
        assert nvml.code("nvmlInit()") == code
        assert nvml.code("nvmlDeviceGetCount()") == 1
    assert len(list(driver.pci_devices.iterdir())) == boards


def test_a_library_without_a_state_file_has_no_driver(driver: FalseDriver) -> None:
    (driver.directory / "state").unlink()
    with Caller(driver, init=False) as nvml:
        assert nvml.code("nvmlInit()") == 9


# ---- identity ---------------------------------------------------------------------------------------------------------


def test_eight_gpus_are_found_by_index_uuid_and_bus_id(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        assert nvml("nvmlDeviceGetCount()") == 8
        assert nvml("[nvmlDeviceGetUUID(nvmlDeviceGetHandleByIndex(i)) for i in range(8)]") == driver.gpus
        assert nvml(f"[nvmlDeviceGetIndex(gpu(u)) for u in {driver.gpus}]") == list(range(8))
        for form in ("00000000:43:00.0", "0000:43:00.0", "43:00.0"):
            assert nvml(f"nvmlDeviceGetUUID(nvmlDeviceGetHandleByPciBusId('{form}'))") == driver.gpus[1]
        assert nvml.code("nvmlDeviceGetHandleByIndex(8)") == 2
        assert nvml.code("gpu('GPU-00000000-0000-0000-0000-000000000000')") == NOT_FOUND
        assert nvml.code("nvmlDeviceGetHandleByPciBusId('0000:99:00.0')") == NOT_FOUND
        assert nvml.code("nvmlDeviceGetHandleByPciBusId('nonsense')") == 2


def test_a_gpu_tells_what_it_is(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[1]}')")
        assert nvml("nvmlDeviceGetName(h)") == "NVIDIA H200"
        assert nvml("nvmlDeviceGetMinorNumber(h)") == 1
        assert nvml("nvmlDeviceGetCudaComputeCapability(h)") == [9, 0]
        assert nvml("nvmlDeviceGetArchitecture(h) == NVML_DEVICE_ARCH_HOPPER") is True
        assert nvml("nvmlDeviceGetBrand(h) == NVML_BRAND_NVIDIA") is True
        pci = nvml("nvmlDeviceGetPciInfo(h)")
        assert (pci["busId"], pci["busIdLegacy"]) == ("00000000:43:00.0", "0000:43:00.0")
        assert (pci["domain"], pci["bus"], pci["device"], pci["pciDeviceId"]) == (0, 0x43, 0, 0x233510DE)
        assert nvml("nvmlDeviceGetPersistenceMode(h)") == 1


def test_a_name_that_does_not_fit_is_an_error_and_not_cut(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        call = f"pynvml.nvmlLib.nvmlDeviceGetName(gpu('{driver.gpus[0]}'), ctypes.create_string_buffer(20), %d)"
        assert nvml(call % 11) == 7
        assert nvml(call % 12) == 0


def test_what_is_no_handle_is_an_invalid_argument(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        assert nvml.code("nvmlDeviceGetName(ctypes.c_void_p(0))") == 2
        assert nvml.code("nvmlDeviceGetName(ctypes.c_void_p(0x1234))") == 2


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        ("h200-mig", ["NVIDIA H200"] * 2),
        ("t4x4", ["Tesla T4"] * 4),
        ("mixed", ["NVIDIA H200 NVL", "NVIDIA A100 80GB PCIe", "Tesla T4"]),
        ("r615", ["NVIDIA H200"] * 2),
        ("old", ["NVIDIA A100-SXM4-80GB"] * 2),
    ],
)
def test_each_machine_has_its_gpus(false_driver: Build, machine: str, names: list[str]) -> None:
    driver = false_driver(machine)
    with Caller(driver) as nvml:
        assert nvml("[nvmlDeviceGetName(nvmlDeviceGetHandleByIndex(i)) for i in range(nvmlDeviceGetCount())]") == names
    assert driver.machine == machine
    assert len(list(driver.pci_devices.iterdir())) == len(names)


# ---- readings ---------------------------------------------------------------------------------------------------------


def test_memory_adds_up_in_both_versions(driver: FalseDriver) -> None:
    driver.add_process(driver.gpus[0], 4711, 1000 * MIB)
    driver.add_process(driver.gpus[0], 4712, 24 * MIB, kind="graphics")
    driver.add_process(driver.gpus[0], 4713, None)
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}')")
        old, new = nvml("nvmlDeviceGetMemoryInfo(h)"), nvml("nvmlDeviceGetMemoryInfo(h, version=nvmlMemory_v2)")

        assert new["used"] == 1024 * MIB
        assert new["used"] + new["reserved"] + new["free"] == new["total"] == 143771 * MIB
        assert old["used"] == new["used"] + new["reserved"]
        assert old["used"] + old["free"] == old["total"]

        driver.set(driver.gpus[0], memory_used_bytes=5 * MIB)
        assert nvml("nvmlDeviceGetMemoryInfo(h, version=nvmlMemory_v2).used") == 5 * MIB


@pytest.mark.parametrize("version", [0x01000028, 0x02000020, 2])
def test_memory_of_another_structure_version_is_refused(driver: FalseDriver, version: int) -> None:
    with Caller(driver) as nvml:
        assert nvml.code(f"nvmlDeviceGetMemoryInfo(gpu('{driver.gpus[0]}'), version={version})") == 25


def test_readings_are_what_was_set_while_the_caller_runs(driver: FalseDriver) -> None:
    first, second = driver.gpus[:2]
    with Caller(driver) as nvml:
        nvml(f"h, other = gpu('{first}'), gpu('{second}')")
        driver.set(
            first,
            utilization_percent=87,
            power_milliwatts=512_345,
            power_limit_milliwatts=600_000,
            energy_millijoules=2**40,
            temperature_celsius=66,
            throttle_reasons=0x24,
        )
        assert nvml("nvmlDeviceGetUtilizationRates(h).gpu") == 87
        assert nvml("nvmlDeviceGetPowerUsage(h)") == 512_345
        assert nvml("nvmlDeviceGetEnforcedPowerLimit(h)") == 600_000
        assert nvml("nvmlDeviceGetTotalEnergyConsumption(h)") == 2**40
        assert nvml("nvmlDeviceGetTemperature(h, 0), nvmlDeviceGetTemperatureV(h, 0)") == [66, 66]
        assert nvml("nvmlDeviceGetCurrentClocksEventReasons(h), nvmlDeviceGetCurrentClocksThrottleReasons(h)") == [
            36,
            36,
        ]
        assert nvml("nvmlDeviceGetUtilizationRates(other).gpu") == 0


@pytest.mark.parametrize(
    ("fact", "call"),
    [
        ("power_milliwatts", "nvmlDeviceGetPowerUsage(h)"),
        ("energy_millijoules", "nvmlDeviceGetTotalEnergyConsumption(h)"),
        ("temperature_celsius", "nvmlDeviceGetTemperature(h, 0)"),
        ("utilization_percent", "nvmlDeviceGetUtilizationRates(h)"),
        ("throttle_reasons", "nvmlDeviceGetCurrentClocksEventReasons(h)"),
        ("ecc_enabled", "nvmlDeviceGetTotalEccErrors(h, 1, 0)"),
        ("compute_mode", "nvmlDeviceGetComputeMode(h)"),
        ("remapped_rows", "nvmlDeviceGetRemappedRows(h)"),
        ("cpus", "nvmlDeviceGetCpuAffinity(h, 3)"),
    ],
)
def test_what_a_gpu_does_not_tell_is_not_supported(driver: FalseDriver, fact: str, call: str) -> None:
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}')")
        assert nvml.code(call) == 0
        driver.set(driver.gpus[0], **{fact: None})
        assert nvml.code(call) == NOT_SUPPORTED


def test_an_unknown_fact_or_gpu_is_refused_and_changes_nothing(driver: FalseDriver) -> None:
    before = (driver.directory / "state").read_text()
    with pytest.raises(ValueError, match="no such facts: utilisation"):
        driver.set(driver.gpus[0], utilisation=3)
    with pytest.raises(KeyError):
        driver.set("GPU-nobody", utilization_percent=3)
    assert (driver.directory / "state").read_text() == before


# ---- health -----------------------------------------------------------------------------------------------------------


def test_ecc_errors_count_since_the_driver_was_loaded_and_for_the_life_of_the_board(driver: FalseDriver) -> None:
    driver.set(driver.gpus[0], ecc_uncorrected=3, ecc_uncorrected_before=4, ecc_corrected=1)
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}')")
        assert nvml("nvmlDeviceGetEccMode(h)") == [1, 1]
        assert nvml("[nvmlDeviceGetTotalEccErrors(h, kind, life) for kind in (0, 1) for life in (0, 1)]") == [
            1,
            1,
            3,
            7,
        ]
        assert nvml.code("nvmlDeviceGetTotalEccErrors(h, 2, 0)") == 2


def test_remapped_rows_are_of_ampere_and_newer_and_retired_pages_of_what_came_before(false_driver: Build) -> None:
    driver = false_driver("mixed")
    hopper, _, turing = driver.gpus
    driver.set(hopper, remapped_rows=(5, 1, 1, 0))
    driver.set(turing, retired_pending=1)
    with Caller(driver) as nvml:
        assert nvml(f"nvmlDeviceGetRemappedRows(gpu('{hopper}'))") == [5, 1, 1, 0]
        assert nvml.code(f"nvmlDeviceGetRetiredPagesPendingStatus(gpu('{hopper}'))") == NOT_SUPPORTED
        assert nvml(f"nvmlDeviceGetRetiredPagesPendingStatus(gpu('{turing}'))") == 1
        assert nvml.code(f"nvmlDeviceGetRemappedRows(gpu('{turing}'))") == NOT_SUPPORTED


def test_field_values_have_a_code_each(driver: FalseDriver) -> None:
    driver.set(driver.gpus[0], recovery_action=2, energy_millijoules=2**40)
    with Caller(driver) as nvml:
        fields = f"nvmlDeviceGetFieldValues(gpu('{driver.gpus[0]}'), [230, 83, 9999, 91])"
        action, energy, unknown, links = nvml(fields)
    assert (action["nvmlReturn"], action["valueType"], action["value"]["uiVal"]) == (0, 1, 2)
    assert (energy["nvmlReturn"], energy["valueType"], energy["value"]["ullVal"]) == (0, 3, 2**40)
    assert unknown["nvmlReturn"] == NOT_SUPPORTED
    assert links["value"]["uiVal"] == 18
    assert action["timestamp"] > 1_700_000_000_000_000


# ---- faults -----------------------------------------------------------------------------------------------------------


def test_a_lost_gpu_is_counted_and_nothing_else(driver: FalseDriver) -> None:
    lost, other = driver.gpus[:2]
    with Caller(driver) as nvml:
        nvml(f"h, other = gpu('{lost}'), gpu('{other}')")
        driver.lose(lost)
        assert nvml("nvmlDeviceGetCount()") == 8
        for call in ("nvmlDeviceGetUUID(h)", "nvmlDeviceGetMemoryInfo(h)", "nvmlDeviceGetComputeRunningProcesses(h)"):
            assert nvml.code(call) == GPU_IS_LOST
        assert nvml.code("nvmlDeviceGetHandleByIndex(0)") == GPU_IS_LOST
        assert nvml.code(f"gpu('{lost}')") == GPU_IS_LOST
        assert nvml("nvmlDeviceGetUUID(other)") == other
        driver.restore(lost)
        assert nvml("nvmlDeviceGetUUID(h)") == lost


def test_a_gpu_that_may_not_be_opened_is_counted(driver: FalseDriver) -> None:
    driver.deny(driver.gpus[0])
    with Caller(driver) as nvml:
        assert nvml("nvmlDeviceGetCount()") == 8
        assert nvml.code("nvmlDeviceGetHandleByIndex(0)") == NO_PERMISSION
        assert nvml.code(f"gpu('{driver.gpus[0]}')") == NOT_FOUND
        driver.allow(driver.gpus[0])
        assert nvml.code("nvmlDeviceGetHandleByIndex(0)") == 0


def test_a_named_function_fails_in_all_its_versions_until_it_is_healed(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}')")
        driver.fail("nvmlDeviceGetMemoryInfo", 999)
        assert nvml.code("nvmlDeviceGetMemoryInfo(h)") == 999
        assert nvml.code("nvmlDeviceGetMemoryInfo(h, version=nvmlMemory_v2)") == 999
        assert nvml.code("nvmlDeviceGetName(h)") == 0
        driver.heal("nvmlDeviceGetMemoryInfo")
        assert nvml.code("nvmlDeviceGetMemoryInfo(h)") == 0


def test_a_function_may_fail_for_one_gpu_alone(driver: FalseDriver) -> None:
    driver.fail("nvmlDeviceGetPowerUsage", 999, device=driver.gpus[0])
    with Caller(driver) as nvml:
        codes = [nvml.code(f"nvmlDeviceGetPowerUsage(gpu('{uuid}'))") for uuid in driver.gpus[:2]]
    assert codes == [999, 0]


def test_every_function_may_fail_init_too(driver: FalseDriver) -> None:
    driver.fail("*", 999)
    with Caller(driver, init=False) as nvml:
        assert nvml.code("nvmlInit()") == 999
        driver.heal("*")
        assert nvml.code("nvmlInit()") == 0
        driver.fail("*", 999)
        assert nvml.code("nvmlDeviceGetCount()") == 999


def test_a_call_hangs_until_it_is_released(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        driver.hang(3600)
        nvml.send("nvmlDeviceGetCount()")
        assert not nvml.has_answered(0.1)
        driver.unhang()
        assert nvml.answer() == 8


def test_a_call_hangs_no_longer_than_it_was_told_to(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        driver.hang(0.05)
        assert nvml("(t := time.monotonic(), nvmlDeviceGetCount(), time.monotonic() - t)[2]") >= 0.05


def test_a_call_that_hangs_blocks_no_other(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}')")
        driver.hang(3600, "nvmlDeviceGetName,nvmlDeviceGetMemoryInfo")
        nvml("t = threading.Thread(target=nvmlDeviceGetMemoryInfo, args=(h, nvmlMemory_v2)); t.start()")
        assert nvml("nvmlDeviceGetCount()") == 8
        assert nvml("t.is_alive()") is True
        driver.unhang()
        assert nvml("(t.join(30), t.is_alive())[1]") is False


# ---- an old driver ----------------------------------------------------------------------------------------------------


def test_an_old_driver_lacks_functions_and_the_binding_says_so(false_driver: Build) -> None:
    driver = false_driver("old")
    driver.add_process(driver.gpus[0], 4711, MIB)
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}')")
        assert nvml.code("nvmlDeviceGetMemoryInfo(h, version=nvmlMemory_v2)") == FUNCTION_NOT_FOUND
        assert nvml.code("nvmlDeviceGetComputeRunningProcesses_v3(h)") == FUNCTION_NOT_FOUND
        with pytest.raises(AssertionError, match="NVMLLibraryMismatchError"):
            nvml("nvmlDeviceGetComputeRunningProcesses(h)")
        assert [entry["pid"] for entry in nvml("nvmlDeviceGetComputeRunningProcesses_v2(h)")] == [4711]
        assert nvml("nvmlDeviceGetMemoryInfo(h).total") == 81920 * MIB
        assert nvml.code("nvmlDeviceGetCurrentClocksEventReasons(h)") == FUNCTION_NOT_FOUND
        assert nvml("nvmlDeviceGetCurrentClocksThrottleReasons(h)") == 1
        assert nvml("nvmlDeviceGetFieldValues(h, [230])[0].nvmlReturn") == NOT_SUPPORTED
        assert nvml("nvmlDeviceGetRemappedRows(h)") == [0, 0, 0, 0]


def test_only_the_new_driver_limits_memory(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        call = f"nvmlDeviceSetMemoryLimits_v1(gpu('{driver.gpus[0]}'), c_nvmlSetMemoryLimits_v1_t(b'/tmp', 0, 1))"
        assert nvml.code(call) == FUNCTION_NOT_FOUND


# ---- threads and changes ----------------------------------------------------------------------------------------------


def test_eight_threads_see_whole_states_while_they_change(driver: FalseDriver) -> None:
    first = driver.gpus[0]
    driver.set(first, power_milliwatts=1000, power_limit_milliwatts=1000)
    work = """
def look():
    for _ in range(400):
        nvmlInit()
        h = gpu(UUID)
        reads.append((nvmlDeviceGetCount(), nvmlDeviceGetName(h), nvmlDeviceGetMemoryInfo(h).used))
        nvmlShutdown()
"""
    with Caller(driver) as nvml:
        nvml(f"reads = []; UUID = '{first}'; exec({work!r}, globals())")
        nvml("threads = [threading.Thread(target=look) for _ in range(8)]; [t.start() for t in threads]")
        for number in range(40):
            driver.set(first, memory_used_bytes=number * MIB)
        nvml("[t.join() for t in threads]")
        assert nvml("len(reads)") == 8 * 400
        assert nvml("sorted({read[:2] for read in reads})") == [[8, "NVIDIA H200"]]
        driver_reserves = 609
        used = nvml("sorted({read[2] // 2**20 for read in reads})")
        assert set(used) <= {driver_reserves + number for number in range(40)}
        assert nvml("nvmlDeviceGetCount()") == 8


def test_what_one_process_sets_another_one_sees_and_changes_meanwhile_are_kept(driver: FalseDriver) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root: setting the compute mode needs privilege")
    first, second = driver.gpus[:2]
    with Caller(driver) as one, Caller(driver) as two:
        one(f"nvmlDeviceSetComputeMode(gpu('{first}'), NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)")
        driver.set(second, temperature_celsius=50)
        assert two(f"nvmlDeviceGetComputeMode(gpu('{first}'))") == 3
        assert two(f"nvmlDeviceGetTemperature(gpu('{second}'), 0)") == 50
        driver.set(first, compute_mode=0)
        assert one(f"nvmlDeviceGetComputeMode(gpu('{first}'))") == 0
        assert one.code(f"nvmlDeviceSetComputeMode(gpu('{first}'), 9)") == 2


def test_a_directory_is_opened_again_by_its_path(driver: FalseDriver) -> None:
    again = FalseDriver(driver.directory)
    again.set(driver.gpus[0], utilization_percent=12)
    assert again.gpus == driver.gpus
    assert driver.facts(driver.gpus[0])["utilization_percent"] == "12"


# ---- by hand ----------------------------------------------------------------------------------------------------------


def test_it_can_be_tried_by_hand(driver: FalseDriver) -> None:
    def hand(*arguments: object) -> str:
        command = [sys.executable, "-m", "nodeservice.testing.false_driver", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    first = driver.gpus[0]
    assert f"export LD_LIBRARY_PATH={driver.directory}/lib" in hand("show", driver.directory)
    hand("set", driver.directory, first, "utilization_percent=41", "temperature_celsius=")
    with Caller(driver) as nvml:
        assert nvml(f"nvmlDeviceGetUtilizationRates(gpu('{first}')).gpu") == 41
        assert nvml.code(f"nvmlDeviceGetTemperature(gpu('{first}'), 0)") == NOT_SUPPORTED


def test_without_a_compiler_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="install gcc"):
        FalseDriver.build(tmp_path / "driver", "t4x4")
    assert not list(tmp_path.rglob(LIBRARY))


def test_a_fault_tells_its_class(driver: FalseDriver) -> None:
    """Of the helper: what the other tests rely on."""
    driver.lose(driver.gpus[0])
    with Caller(driver) as nvml, pytest.raises(NvmlCallError) as fault:
        nvml("nvmlDeviceGetHandleByIndex(0)")
    assert fault.value.name == "NVMLError_GpuIsLost"
