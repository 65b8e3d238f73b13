"""The false NVIDIA driver through the real binding: MIG, processes, accounting, topology, events, memory limits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nodeservice.testing.false_driver import FalseDriver, Machine
from tests.nvml_caller import Caller

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
GIB = 1024 * MIB
Build = Callable[[str | Machine], FalseDriver]

INVALID, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, TIMEOUT, GPU_IS_LOST = 2, 3, 4, 6, 10, 15
NO_INSTANCE = 0xFFFFFFFF
UNLIMITED = 0xFFFFFFFFFFFFFFFF

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="not root: the driver refuses it to others")


@pytest.fixture
def driver(false_driver: Build) -> FalseDriver:
    return false_driver("h200x8")


@pytest.fixture
def split(false_driver: Build) -> FalseDriver:
    return false_driver("h200-mig")


@pytest.fixture
def readable(false_driver_cache: Path) -> Iterator[Build]:
    """Builds a machine where every user may read it: pytest's own folders are for this user alone."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield lambda machine: FalseDriver.build(Path(directory), machine, cache=false_driver_cache)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


# ---- MIG --------------------------------------------------------------------------------------------------------------


def test_mig_devices_stand_at_indices_with_holes(split: FalseDriver) -> None:
    parent, whole = split.gpus
    with Caller(split) as nvml:
        nvml(f"h = gpu('{parent}')")
        assert nvml("nvmlDeviceGetMigMode(h)") == [1, 1]
        assert nvml("nvmlDeviceGetMaxMigDeviceCount(h)") == 7
        codes = [nvml.code(f"nvmlDeviceGetMigDeviceHandleByIndex(h, {index})") for index in range(8)]
        assert codes == [0, NOT_FOUND, 0, 0, NOT_FOUND, NOT_FOUND, 0, INVALID]
        found = nvml("[nvmlDeviceGetUUID(nvmlDeviceGetMigDeviceHandleByIndex(h, i)) for i in (0, 2, 3, 6)]")
        assert found == list(split.migs)
        assert nvml(f"nvmlDeviceGetMigMode(gpu('{whole}'))") == [0, 0]
        assert nvml(f"nvmlDeviceGetMaxMigDeviceCount(gpu('{whole}'))") == 0
        assert nvml.code(f"nvmlDeviceGetMigDeviceHandleByIndex(gpu('{whole}'), 0)") == NOT_FOUND


def test_a_gpu_that_cannot_be_split_says_so(false_driver: Build) -> None:
    driver = false_driver("t4x4")
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}')")
        assert nvml.code("nvmlDeviceGetMigMode(h)") == NOT_SUPPORTED
        assert nvml("nvmlDeviceGetMaxMigDeviceCount(h)") == 0
        assert nvml.code("nvmlDeviceGetMigDeviceHandleByIndex(h, 0)") == NOT_SUPPORTED


def test_a_mig_device_tells_what_it_is_and_whose(split: FalseDriver) -> None:
    mig = list(split.migs)[1]
    with Caller(split) as nvml:
        nvml(f"m = gpu('{mig}')")
        assert nvml("nvmlDeviceIsMigDeviceHandle(m)") == 1
        assert nvml(f"nvmlDeviceIsMigDeviceHandle(gpu('{split.gpus[0]}'))") == 0
        assert nvml("nvmlDeviceGetName(m)") == "NVIDIA H200 MIG 2g.35gb"
        assert nvml("nvmlDeviceGetIndex(m)") == 2
        assert nvml("nvmlDeviceGetGpuInstanceId(m), nvmlDeviceGetComputeInstanceId(m)") == [3, 0]
        assert nvml("nvmlDeviceGetUUID(nvmlDeviceGetDeviceHandleFromMigDeviceHandle(m))") == split.gpus[0]
        attributes = nvml("nvmlDeviceGetAttributes_v2(m)")
        assert (attributes["gpuInstanceSliceCount"], attributes["multiprocessorCount"]) == (2, 32)
        assert nvml("nvmlDeviceGetMemoryInfo(m, version=nvmlMemory_v2).total") == attributes["memorySizeMB"] * MIB
        assert nvml.code(f"nvmlDeviceGetAttributes_v2(gpu('{split.gpus[0]}'))") == NOT_SUPPORTED
        assert nvml.code(f"nvmlDeviceGetGpuInstanceId(gpu('{split.gpus[0]}'))") == NOT_SUPPORTED


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetUtilizationRates(h)",
        "nvmlDeviceGetRemappedRows(h)",
        "nvmlDeviceGetProcessUtilization(h, 0)",
        "nvmlDeviceSetAccountingMode(h, 1)",
        "nvmlDeviceSetComputeMode(h, 3)",
    ],
)
def test_mig_takes_readings_and_settings_from_the_whole_gpu(split: FalseDriver, call: str) -> None:
    with Caller(split) as nvml:
        nvml(f"h = gpu('{split.gpus[0]}')")
        assert nvml.code(call) == NOT_SUPPORTED


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetPowerUsage(m)",
        "nvmlDeviceGetTemperature(m, 0)",
        "nvmlDeviceGetPciInfo(m)",
        "nvmlDeviceRegisterEvents(m, 8, nvmlEventSetCreate())",
    ],
)
def test_a_mig_device_has_no_readings_of_the_board(split: FalseDriver, call: str) -> None:
    with Caller(split) as nvml:
        nvml(f"m = gpu('{next(iter(split.migs))}')")
        assert nvml.code(call) == NOT_SUPPORTED


def test_processes_on_mig_devices_name_their_instance_and_use_the_memory_of_both(split: FalseDriver) -> None:
    parent = split.gpus[0]
    first, second, *_ = split.migs
    split.add_process(first, 100, 10 * MIB)
    split.add_process(second, 200, 20 * MIB)
    with Caller(split) as nvml:
        both = nvml(f"nvmlDeviceGetComputeRunningProcesses(gpu('{parent}'))")
        assert [(entry["pid"], entry["gpuInstanceId"], entry["computeInstanceId"]) for entry in both] == [
            (100, 1, 0),
            (200, 3, 0),
        ]
        assert [entry["pid"] for entry in nvml(f"nvmlDeviceGetComputeRunningProcesses(gpu('{second}'))")] == [200]
        used = [
            nvml(f"nvmlDeviceGetMemoryInfo(gpu('{uuid}'), version=nvmlMemory_v2).used") // MIB
            for uuid in (parent, first, second)
        ]
        assert used == [30, 10, 20]


@needs_root
def test_the_whole_of_a_split_gpu_is_only_for_the_privileged(readable: Build) -> None:
    split = readable("h200-mig")
    split.add_process(next(iter(split.migs)), 100, MIB)
    with Caller(split) as nvml:
        nvml(f"h, m = gpu('{split.gpus[0]}'), gpu('{next(iter(split.migs))}')")
        nvml("os.seteuid(65534)")
        assert nvml.code("nvmlDeviceGetMemoryInfo(h)") == NO_PERMISSION
        assert nvml.code("nvmlDeviceGetComputeRunningProcesses(h)") == NO_PERMISSION
        assert nvml.code("nvmlDeviceGetMemoryInfo(m)") == 0
        assert len(nvml("nvmlDeviceGetComputeRunningProcesses(m)")) == 1


def test_splitting_anew_keeps_what_stays_and_takes_the_rest_away(split: FalseDriver) -> None:
    parent = split.gpus[0]
    kept, gone = list(split.migs)[:2]
    split.add_process(gone, 100, MIB)
    with Caller(split) as nvml:
        nvml(f"m = gpu('{gone}')")
        migs = split.set_mig(parent, {0: "3g.71gb", 4: "1g.18gb"})
        assert migs[0] == kept
        assert nvml.code("nvmlDeviceGetUUID(m)") == INVALID
        assert nvml.code(f"gpu('{gone}')") == NOT_FOUND
        assert nvml(f"nvmlDeviceGetComputeRunningProcesses(gpu('{parent}'))") == []
        assert nvml(f"nvmlDeviceGetIndex(gpu('{migs[1]}'))") == 4


def test_a_stale_mig_handle_may_stand_for_another_device_later(split: FalseDriver) -> None:
    """As nvml.h warns at nvmlDeviceGetMigDeviceHandleByIndex: so UUIDs are asked for anew."""
    with Caller(split) as nvml:
        nvml(f"m = gpu('{list(split.migs)[1]}')")
        _, other = split.set_mig(split.gpus[0], {0: "3g.71gb", 2: "1g.18gb"})
        assert nvml("nvmlDeviceGetUUID(m)") == other


def test_mig_is_turned_off_and_on(split: FalseDriver) -> None:
    parent, whole = split.gpus
    split.set_mig(parent, None)
    migs = split.set_mig(whole, {0: "7g.141gb"})
    with Caller(split) as nvml:
        assert nvml(f"nvmlDeviceGetMigMode(gpu('{parent}'))") == [0, 0]
        assert nvml.code(f"nvmlDeviceGetUtilizationRates(gpu('{parent}'))") == 0
        assert nvml(f"nvmlDeviceGetUUID(nvmlDeviceGetMigDeviceHandleByIndex(gpu('{whole}'), 0))") == migs[0]
    assert split.migs == {migs[0]: whole}


def test_a_lost_gpu_takes_its_mig_devices_along(split: FalseDriver) -> None:
    with Caller(split) as nvml:
        nvml(f"m = gpu('{next(iter(split.migs))}')")
        split.lose(split.gpus[0])
        assert nvml.code("nvmlDeviceGetUUID(m)") == GPU_IS_LOST


# ---- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("compute", "nvmlDeviceGetComputeRunningProcesses"),
        ("graphics", "nvmlDeviceGetGraphicsRunningProcesses"),
        ("mps", "nvmlDeviceGetMPSComputeRunningProcesses"),
    ],
)
def test_processes_are_listed_by_their_kind_in_both_versions(driver: FalseDriver, kind: str, call: str) -> None:
    gpu = driver.gpus[0]
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{gpu}')")
        assert nvml(f"{call}(h)") == []
        for pid in range(1, 21):
            driver.add_process(gpu, pid, pid * MIB if pid > 1 else None, kind=kind)
        for version in ("", "_v2"):
            listed = nvml(f"{call}{version}(h)")
            assert [entry["pid"] for entry in listed] == list(range(1, 21))
            assert [entry["usedGpuMemory"] for entry in listed] == [None, *(pid * MIB for pid in range(2, 21))]
            assert {entry["gpuInstanceId"] for entry in listed} == {NO_INSTANCE}
        others = {"Compute", "Graphics", "MPSCompute"} - {call[13:-16]}
        assert [nvml(f"nvmlDeviceGet{other}RunningProcesses(h)") for other in others] == [[], []]
        driver.remove_process(gpu, 7)
        assert 7 not in [entry["pid"] for entry in nvml(f"{call}(h)")]


def test_a_list_that_is_too_short_is_told_how_many_there_are(driver: FalseDriver) -> None:
    for pid in (1, 2, 3):
        driver.add_process(driver.gpus[0], pid, MIB)
    with Caller(driver) as nvml:
        nvml(f"h, n = gpu('{driver.gpus[0]}'), ctypes.c_uint(2)")
        nvml("room = (c_nvmlProcessInfo_v3_t * 2)()")
        nvml("call = pynvml.nvmlLib.nvmlDeviceGetComputeRunningProcesses_v3")
        assert nvml("call(h, ctypes.byref(n), room), n.value") == [7, 3]


def test_a_real_process_is_forgotten_with_its_memory_when_it_ends(
    driver: FalseDriver, sleeper: subprocess.Popen[bytes]
) -> None:
    driver.add_process(driver.gpus[0], sleeper.pid, GIB, while_alive=True)
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}')")
        assert [entry["pid"] for entry in nvml("nvmlDeviceGetComputeRunningProcesses(h)")] == [sleeper.pid]
        assert nvml("nvmlDeviceGetMemoryInfo(h, version=nvmlMemory_v2).used") == GIB
        sleeper.kill()
        sleeper.wait()
        assert nvml("nvmlDeviceGetComputeRunningProcesses(h)") == []
        assert nvml("nvmlDeviceGetMemoryInfo(h, version=nvmlMemory_v2).used") == 0


@needs_root
def test_a_caller_in_another_pid_namespace_sees_no_processes_and_no_error(driver: FalseDriver) -> None:
    unshare = [shutil.which("unshare") or "unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this host permits no PID namespaces")
    driver.add_process(driver.gpus[0], 4711, GIB)
    script = (
        f"import pynvml as n; n.nvmlInit(); h = n.nvmlDeviceGetHandleByUUID('{driver.gpus[0]}'); "
        "print(len(n.nvmlDeviceGetComputeRunningProcesses(h)), n.nvmlDeviceGetMemoryInfo(h, version=n.nvmlMemory_v2).used)"
    )

    outputs = [
        subprocess.run(
            [*prefix, sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **driver.environment},
        ).stdout.split()
        for prefix in ([], unshare)
    ]

    assert outputs == [["1", str(GIB)], ["0", str(GIB)]]


def test_utilisation_is_of_the_processes_that_have_samples(driver: FalseDriver) -> None:
    gpu = driver.gpus[0]
    driver.add_process(gpu, 1, MIB)
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{gpu}')")
        assert nvml.code("nvmlDeviceGetProcessUtilization(h, 0)") == NOT_FOUND
        driver.add_process(gpu, 2, MIB, sm_percent=60, memory_percent=5)
        driver.add_process(gpu, 3, MIB, sm_percent=30)
        samples = nvml("nvmlDeviceGetProcessUtilization(h, 0)")
        assert [(sample["pid"], sample["smUtil"], sample["memUtil"]) for sample in samples] == [(2, 60, 5), (3, 30, 0)]
        assert nvml.code(f"nvmlDeviceGetProcessUtilization(h, {2**62})") == NOT_FOUND


# ---- accounting -------------------------------------------------------------------------------------------------------


@needs_root
def test_accounting_remembers_the_most_memory_of_a_process_after_its_end(driver: FalseDriver) -> None:
    gpu = driver.gpus[0]
    driver.add_process(gpu, 1, MIB)
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{gpu}')")
        assert nvml("nvmlDeviceGetAccountingMode(h)") == 0
        assert nvml.code("nvmlDeviceGetAccountingStats(h, 1)") == NOT_SUPPORTED
        nvml("nvmlDeviceSetAccountingMode(h, 1)")
        driver.add_process(gpu, 2, 3 * GIB)
        driver.add_process(gpu, 2, GIB)
        assert nvml("nvmlDeviceGetAccountingPids(h)") == [2]
        stats = nvml("nvmlDeviceGetAccountingStats(h, 2)")
        assert (stats["maxMemoryUsage"], stats["isRunning"], stats["time"]) == (3 * GIB, 1, 0)
        driver.remove_process(gpu, 2)
        stats = nvml("nvmlDeviceGetAccountingStats(h, 2)")
        assert (stats["maxMemoryUsage"], stats["isRunning"]) == (3 * GIB, 0)
        assert [entry["pid"] for entry in nvml("nvmlDeviceGetComputeRunningProcesses(h)")] == [1]
        assert nvml("nvmlDeviceGetMemoryInfo(h, version=nvmlMemory_v2).used") == MIB
        assert nvml.code("nvmlDeviceGetAccountingStats(h, 99)") == NOT_FOUND


# ---- topology ---------------------------------------------------------------------------------------------------------


def test_processors_and_memory_near_a_gpu_are_bit_masks(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        nvml(f"near, far = gpu('{driver.gpus[0]}'), gpu('{driver.gpus[7]}')")
        masks = nvml("nvmlDeviceGetCpuAffinity(near, 3), nvmlDeviceGetCpuAffinityWithinScope(far, 3, 0)")
        cpus = [{cpu for cpu in range(192) if mask[cpu // 64] >> cpu % 64 & 1} for mask in masks]
        assert cpus == [{*range(48), *range(96, 144)}, {*range(48, 96), *range(144, 192)}]
        assert nvml("nvmlDeviceGetCpuAffinity(near, 1)") == [2**48 - 1]
        assert nvml("nvmlDeviceGetMemoryAffinity(near, 1, 0), nvmlDeviceGetMemoryAffinity(far, 1, 0)") == [[1], [2]]
        assert nvml.code("nvmlDeviceGetCpuAffinity(near, 0)") == INVALID
        assert nvml.code("nvmlDeviceGetNumaNodeId(near)") == NOT_SUPPORTED
    nodes = {path.name: (path / "numa_node").read_text().strip() for path in driver.pci_devices.iterdir()}
    assert (nodes["0000:1b:00.0"], nodes["0000:df:00.0"]) == ("0", "1")


def test_eight_gpus_reach_each_other_through_nvswitches(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        nvml(f"a, b, c = [gpu(u) for u in {[driver.gpus[i] for i in (0, 1, 7)]}]")
        assert nvml("[nvmlDeviceGetNvLinkState(a, link) for link in range(18)]") == [1] * 18
        assert nvml.code("nvmlDeviceGetNvLinkState(a, 18)") == INVALID
        assert nvml("nvmlDeviceGetNvLinkRemoteDeviceType(a, 0) == NVML_NVLINK_DEVICE_TYPE_SWITCH") is True
        remotes = nvml("sorted({nvmlDeviceGetNvLinkRemotePciInfo(a, link).busId for link in range(18)})")
        assert remotes == [f"00000000:E{number}:00.0" for number in (1, 2, 3, 4)]
        assert nvml("nvmlDeviceGetTopologyCommonAncestor(a, b) == NVML_TOPOLOGY_NODE") is True
        assert nvml("nvmlDeviceGetTopologyCommonAncestor(a, c) == NVML_TOPOLOGY_SYSTEM") is True
        assert nvml("[nvmlDeviceGetP2PStatus(a, c, index) for index in (0, 1, 2)]") == [0, 0, 0]
        assert nvml.code("nvmlDeviceGetP2PStatus(a, c, 9)") == INVALID
        nvml("f = c_nvmlGpuFabricInfo_v3_t()")
        assert nvml("(nvmlDeviceGetGpuFabricInfoV(a, ctypes.byref(f)), f.state)[1]") == 3


def test_a_link_that_is_down_tells_no_remote(driver: FalseDriver) -> None:
    driver.set_nvlink(driver.gpus[0], 5, None)
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}')")
        assert nvml("[nvmlDeviceGetNvLinkState(h, link) for link in (4, 5)]") == [1, 0]
        assert nvml.code("nvmlDeviceGetNvLinkRemotePciInfo(h, 5)") == NOT_SUPPORTED


def test_gpus_without_links_reach_each_other_over_pcie_within_a_node(false_driver: Build) -> None:
    driver = false_driver("t4x4")
    with Caller(driver) as nvml:
        nvml(f"a, b, c = [gpu(u) for u in {driver.gpus[:3]}]")
        assert nvml.code("nvmlDeviceGetNvLinkState(a, 0)") == NOT_SUPPORTED
        assert nvml("[nvmlDeviceGetP2PStatus(a, b, index) for index in (0, 2)]") == [0, 5]
        assert nvml("nvmlDeviceGetP2PStatus(a, c, 0)") == 1


# ---- events -----------------------------------------------------------------------------------------------------------

REGISTER = "s = nvmlEventSetCreate(); nvmlDeviceRegisterEvents(h, nvmlEventTypeXidCriticalError, s)"


def test_an_xid_is_delivered_once_to_each_event_set_that_registered_before(driver: FalseDriver) -> None:
    first, second = driver.gpus[:2]
    driver.xid(first, 13)
    with Caller(driver) as one, Caller(driver) as two:
        for nvml in (one, two):
            nvml(f"h = gpu('{first}'); {REGISTER}; nvmlDeviceRegisterEvents(gpu('{second}'), 8, s)")
            assert nvml.code("nvmlEventSetWait(s, 0)") == TIMEOUT
        driver.xid(second, 48, gpu_instance=3, compute_instance=0)
        driver.xid(first, 79)
        for nvml in (one, two):
            events = [nvml("(e := nvmlEventSetWait(s, 0), nvmlDeviceGetUUID(e.device))") for _ in range(2)]
            assert [(event["eventType"], event["eventData"], uuid) for event, uuid in events] == [
                (8, 48, second),
                (8, 79, first),
            ]
            instances = [(event["gpuInstanceId"], event["computeInstanceId"]) for event, _ in events]
            assert instances == [(3, 0), (NO_INSTANCE, NO_INSTANCE)]
            assert nvml.code("nvmlEventSetWait(s, 0)") == TIMEOUT


def test_a_wait_ends_when_the_event_comes(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}'); {REGISTER}")
        nvml.send("nvmlEventSetWait(s, 60000)")
        assert not nvml.has_answered(0.05)
        driver.xid(driver.gpus[0], 79)
        assert nvml.answer()["eventData"] == 79


def test_a_wait_blocks_no_other_thread(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}'); {REGISTER}; got = []")
        nvml("t = threading.Thread(target=lambda: got.append(nvmlEventSetWait(s, 60000).eventData)); t.start()")
        assert nvml("nvmlDeviceGetCount(), got") == [8, []]
        driver.xid(driver.gpus[0], 31)
        assert nvml("(t.join(30), got)[1]") == [31]


def test_after_what_was_recorded_a_lost_gpu_ends_every_wait(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}'); {REGISTER}")
        driver.xid(driver.gpus[0], 79)
        driver.lose(driver.gpus[0])
        assert nvml("nvmlEventSetWait(s, 60000).eventData") == 79
        assert nvml.code("nvmlEventSetWait(s, 60000)") == GPU_IS_LOST


def test_unsupported_event_types_register_nothing_and_unknown_ones_are_invalid(driver: FalseDriver) -> None:
    driver.set(driver.gpus[0], supported_events=0x18)
    with Caller(driver) as nvml:
        nvml(f"h = gpu('{driver.gpus[0]}'); s = nvmlEventSetCreate()")
        assert nvml("nvmlDeviceGetSupportedEventTypes(h)") == 0x18
        assert nvml.code("nvmlDeviceRegisterEvents(h, 0x0A, s)") == NOT_SUPPORTED
        assert nvml.code("nvmlDeviceRegisterEvents(h, 1 << 40, s)") == INVALID
        driver.xid(driver.gpus[0], 79)
        assert nvml.code("nvmlEventSetWait(s, 0)") == TIMEOUT
        nvml("nvmlDeviceRegisterEvents(h, nvmlDeviceGetSupportedEventTypes(h), s)")
        driver.xid(driver.gpus[0], 48)
        assert nvml("nvmlEventSetWait(s, 0).eventData") == 48


def test_a_freed_event_set_is_invalid_and_its_place_is_used_again(driver: FalseDriver) -> None:
    with Caller(driver) as nvml:
        nvml("s = nvmlEventSetCreate(); nvmlEventSetFree(s)")
        assert nvml.code("nvmlEventSetWait(s, 0)") == INVALID
        assert nvml("len([nvmlEventSetFree(nvmlEventSetCreate()) for _ in range(200)])") == 200


# ---- memory limits, since R615 ----------------------------------------------------------------------------------------


@pytest.fixture
def limited(false_driver: Build) -> FalseDriver:
    return false_driver("r615")


SET = "nvmlDeviceSetMemoryLimits_v1(h, c_nvmlSetMemoryLimits_v1_t({path!r}.encode(), {soft}, {hard}))"
GET = "(x := c_nvmlGetMemoryLimits_v1_t({path!r}.encode()), nvmlDeviceGetMemoryLimits_v1(h, x), x)[2]"


def limits(nvml: Caller, path: Path) -> tuple[int, int, int]:
    found = nvml(GET.format(path=str(path)))
    return found["softLimit"], found["hardLimit"], found["currentUsed"]


@needs_root
def test_memory_limits_are_kept_for_each_cgroup_and_read_back(limited: FalseDriver, tmp_path: Path) -> None:
    first, second = limited.gpus
    leaf = tmp_path / "a cgroup" / "leaf"
    (leaf / "below").mkdir(parents=True)
    limited.add_process(first, 1, 3 * GIB, cgroup=str(leaf / "below"))
    limited.add_process(first, 2, 5 * GIB, cgroup=str(tmp_path / "a cgroup" / "leaf2"))
    with Caller(limited) as nvml, Caller(limited) as other:
        nvml(f"h = gpu('{first}')")
        other(f"h = gpu('{first}')")
        assert limits(nvml, leaf) == (0, UNLIMITED, 3 * GIB)
        nvml(SET.format(path=str(leaf), soft=4 * GIB, hard=8 * GIB))
        assert limits(other, leaf) == (4 * GIB, 8 * GIB, 3 * GIB)
        assert limits(other, leaf / "below") == (4 * GIB, 8 * GIB, 3 * GIB)
        assert limits(other, leaf.parent) == (0, UNLIMITED, 8 * GIB)
        assert limited.memory_limits(first) == {str(leaf): (4 * GIB, 8 * GIB)}
        assert limited.memory_limits(second) == {}
        nvml(SET.format(path=str(leaf), soft=0, hard=UNLIMITED))
        assert limited.memory_limits(first) == {}


@needs_root
def test_memory_limits_are_refused_where_the_driver_refuses_them(readable: Build, tmp_path: Path) -> None:
    limited = readable("r615")
    with Caller(limited) as nvml:
        nvml(f"h = gpu('{limited.gpus[0]}')")
        assert nvml.code(SET.format(path=str(tmp_path / "nowhere"), soft=0, hard=1)) == NOT_FOUND
        assert nvml.code(SET.format(path="relative", soft=0, hard=1)) == INVALID
        assert nvml.code(SET.format(path=str(tmp_path), soft=2, hard=1)) == INVALID
        limited.set_mig(limited.gpus[0], {0: "3g.71gb"})
        assert nvml.code(SET.format(path=str(tmp_path), soft=0, hard=1)) == NOT_SUPPORTED
        limited.set_mig(limited.gpus[0], None)
        nvml("os.seteuid(65534)")
        assert nvml.code(SET.format(path="/", soft=0, hard=1)) == NO_PERMISSION


@needs_root
def test_a_caller_in_a_limited_cgroup_is_told_of_its_share(limited: FalseDriver) -> None:
    own = next(
        line.strip()[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")
    )
    mounts = [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")]
    here = next(path for path in (mount / own.lstrip("/") for mount in mounts) if path.is_dir())
    with Caller(limited) as nvml:
        nvml(f"h = gpu('{limited.gpus[0]}')")
        limited.add_process(limited.gpus[0], nvml.pid, 2 * GIB)
        nvml(SET.format(path=str(here), soft=0, hard=8 * GIB))
        assert limits(nvml, here) == (0, 8 * GIB, 2 * GIB)
        memory = nvml("nvmlDeviceGetMemoryInfo(h, version=nvmlMemory_v2)")
        assert (memory["total"], memory["used"], memory["free"]) == (8 * GIB, 2 * GIB, 6 * GIB)
        assert nvml("nvmlDeviceGetMemoryInfo(h).total") == 143771 * MIB
