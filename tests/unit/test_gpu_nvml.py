"""NvmlGpuProvider with the false driver beneath it, in this very process: what it reads, and every fault it can meet.

It proves our way through the binding and our handling of errors, not NVIDIA's behaviour.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pynvml
import pytest

from nodeservice.core.gpus import ShareMethod
from nodeservice.core.model import GIB, MIB
from nodeservice.errors import NodeFaultError
from nodeservice.gpu import events, faults
from nodeservice.gpu.nvml import NvmlGpuProvider
from nodeservice.gpu.session import NvmlSession
from nodeservice.gpu.units import SharingPolicy, units_of
from nodeservice.ports import GpuInventory, GpuProvider
from nodeservice.testing.fake_gpu import FakeGpuProvider, fake_gpu
from nodeservice.testing.false_driver import FalseDriver, Machine

Build = Callable[[str | Machine], FalseDriver]
POLL_SECONDS = 0.02


@pytest.fixture
def machine(false_driver: Build, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """A false driver that the binding in this process calls."""

    def build(name: str | Machine) -> FalseDriver:
        driver = false_driver(name)
        for key, value in driver.environment.items():
            if key != "LD_LIBRARY_PATH":
                monkeypatch.setenv(key, value)
        monkeypatch.setattr(events, "_WAIT_MILLISECONDS", 20)
        monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(driver.library)))
        pynvml._nvmlGetFunctionPointer_cache.clear()
        return driver

    yield build
    for thread in threading.enumerate():  # nobody may be left in a library that the next test replaces
        if thread.name.startswith("nodeservice-nvml"):
            thread.join(10)
            assert not thread.is_alive(), thread.name
    pynvml._nvmlGetFunctionPointer_cache.clear()


@contextmanager
def session_of(driver: FalseDriver, *, slow_every: int = 1) -> Iterator[NvmlSession]:
    """In this thread, so that a test says when it looks."""
    session = NvmlSession(pci_devices=driver.pci_devices, slow_every=slow_every, open_again_seconds=0)
    try:
        yield session
    finally:
        session.end()


@asynccontextmanager
async def looking(
    driver: FalseDriver, *, timeout_seconds: float = 5.0, poll_seconds: float = POLL_SECONDS
) -> AsyncIterator[NvmlGpuProvider]:
    provider = NvmlGpuProvider(
        library=str(driver.library),
        pci_devices=driver.pci_devices,
        poll_seconds=poll_seconds,
        timeout_seconds=timeout_seconds,
    )
    try:
        yield provider
    finally:
        driver.unhang()
        await provider.close()


async def until(check: Callable[[], Awaitable[object]], seconds: float = 20.0) -> Any:
    """What `check` gives, once it is true."""
    async with asyncio.timeout(seconds):
        while not (found := await check()):
            await asyncio.sleep(POLL_SECONDS / 2)
    return found


# ---- what there is ----------------------------------------------------------------------------------------------------


def test_the_numbers_of_errors_are_those_of_nvidia_s_binding() -> None:
    numbers = {name: number for name, number in vars(faults).items() if isinstance(number, int)}
    assert numbers == {name: getattr(pynvml, f"NVML_ERROR_{name}") for name in numbers}


async def test_eight_gpus_are_read_with_all_that_the_driver_tells_in_the_order_of_the_bus(machine: Build) -> None:
    driver = machine("h200x8")
    driver.set(
        driver.gpus[2], utilization_percent=37, power_milliwatts=512_000, temperature_celsius=61, throttle_reasons=0x44
    )
    driver.add_process(driver.gpus[2], 4242, 3 * GIB)
    async with looking(driver) as provider:
        found = await provider.inventory()
    assert (found.error, found.driver_version, found.cuda_version, found.unreachable) == (None, "580.95.05", "13.0", ())
    assert [gpu.uuid for gpu in found.gpus] == driver.gpus
    assert [gpu.pci_address for gpu in found.gpus] == sorted(str(gpu.pci_address) for gpu in found.gpus)
    gpu = found.gpus[2]
    assert (gpu.name, gpu.compute_capability, gpu.minor, gpu.mig_enabled) == ("NVIDIA H200", (9, 0), 2, False)
    assert gpu.memory_total_bytes == 143771 * MIB
    assert (gpu.memory_used_bytes, gpu.memory_reserved_bytes) == (3 * GIB, 609 * MIB)
    assert (gpu.utilization_percent, gpu.power_watts, gpu.power_limit_watts) == (37.0, 512.0, 700.0)
    assert (gpu.temperature_celsius, gpu.throttle_reasons, gpu.energy_millijoules) == (61.0, 0x44, 1_000_000)
    assert (gpu.ecc_enabled, gpu.ecc_uncorrected_count, gpu.remap_pending, gpu.remap_failed) == (True, 0, False, False)
    assert (gpu.recovery_action, gpu.compute_mode, gpu.memory_limits) == (0, 0, False)
    assert [(process.pid, process.memory_bytes, process.gpu_instance_id) for process in gpu.processes] == [
        (4242, 3 * GIB, None)
    ]


async def test_a_look_that_is_asked_for_sees_what_changes_slowly_too(machine: Build) -> None:
    """What a task used of energy is the counter's word at its end, not that of some seconds before."""
    driver = machine("h200x8")
    async with looking(driver, poll_seconds=3600) as provider:
        await provider.inventory()
        for energy in (1_100_000, 1_250_000):
            driver.set(driver.gpus[0], energy_millijoules=energy)
            assert (await provider.refresh()).gpus[0].energy_millijoules == energy


async def test_gpus_behind_switches_are_equally_close_but_for_the_way_over_the_bus(machine: Build) -> None:
    driver = machine("h200x8")
    async with looking(driver) as provider:
        first, *others = (await provider.inventory()).gpus
    assert first.nvlink_count == 18
    near = [first.closeness[other.uuid] // 1000 for other in others]
    assert near == [18] * 7
    same_node = {first.closeness[other.uuid] % 1000 for other in others[:3]}
    other_node = {first.closeness[other.uuid] % 1000 for other in others[3:]}
    assert min(same_node) > max(other_node)


async def test_a_gpu_that_is_split_is_told_with_its_instances_although_the_indices_have_holes(machine: Build) -> None:
    driver = machine("h200-mig")
    (split,) = set(driver.migs.values())
    uuids = [uuid for uuid, gpu in driver.migs.items() if gpu == split]
    driver.add_process(uuids[0], 77, GIB)
    async with looking(driver) as provider:
        found = await provider.inventory()
    by_uuid = {gpu.uuid: gpu for gpu in found.gpus}
    gpu = by_uuid[split]
    assert gpu.mig_enabled
    assert [instance.uuid for instance in gpu.mig_instances] == uuids
    assert sorted(instance.profile for instance in gpu.mig_instances) == ["1g.18gb", "1g.18gb", "2g.35gb", "3g.71gb"]
    used = {instance.uuid: instance.memory_used_bytes for instance in gpu.mig_instances}
    assert used[uuids[0]] == GIB
    (process,) = gpu.processes
    assert process.gpu_instance_id == gpu.mig_instances[0].gpu_instance_id
    units = {unit.uuid: unit for unit in units_of(found, {}, SharingPolicy())}
    assert split not in units, "a GPU that is split can't be leased whole"
    largest = next(unit for unit in units.values() if unit.mig_profile == "3g.71gb")
    assert (largest.parent_uuid, largest.counts, largest.compute_milli) == (split, False, 428)


async def test_a_new_layout_of_mig_is_seen_while_it_runs(machine: Build) -> None:
    driver = machine("h200-mig")
    (split,) = set(driver.migs.values())
    async with looking(driver) as provider:
        await provider.inventory()
        (whole,) = driver.set_mig(split, {0: "7g.141gb"})

        async def seen() -> bool:
            gpus = {gpu.uuid: gpu for gpu in (await provider.inventory()).gpus}
            return [instance.uuid for instance in gpus[split].mig_instances] == [whole]

        await until(seen)
        driver.set_mig(split, None)

        async def is_whole() -> bool:
            gpus = {gpu.uuid: gpu for gpu in (await provider.inventory()).gpus}
            return not gpus[split].mig_enabled and not gpus[split].lost

        await until(is_whole)


@pytest.mark.parametrize("call", ["nvmlDeviceGetNvLinkState", "nvmlDeviceGetTopologyCommonAncestor"])
def test_a_gpu_that_cannot_tell_how_near_it_is_takes_nothing_from_the_node(machine: Build, call: str) -> None:
    driver = machine("h200x8")
    driver.fail(call, 999, device=driver.gpus[2])
    with session_of(driver) as session:
        found = session.look()
    assert (found.error, found.unreachable) == (None, ())
    assert [gpu.lost for gpu in found.gpus] == [""] * 8
    first = found.gpus[0].uuid
    assert found.gpus[2].closeness[first] < found.gpus[1].closeness[first]


def test_the_device_node_of_a_gpu_is_the_present_one_after_a_change_of_the_mig_mode(machine: Build) -> None:
    """Else its tasks would be taken for such as see another's GPU."""
    driver = machine("h200x8")
    with session_of(driver) as session:
        assert [gpu.minor for gpu in session.look().gpus[:2]] == [0, 1]
        driver.set(driver.gpus[0], minor=8)
        driver.set_mig(driver.gpus[0], {0: "7g.141gb"})
        assert [gpu.minor for gpu in session.look().gpus[:2]] == [8, 1]


def test_an_instance_that_is_destroyed_takes_neither_its_gpu_nor_its_siblings_along(machine: Build) -> None:
    driver = machine("h200-mig")
    (split,) = set(driver.migs.values())
    layout = {int(driver.facts(uuid)["index"]): driver.facts(uuid)["profile"] for uuid in driver.migs}
    with session_of(driver, slow_every=1000) as session:
        before = {gpu.uuid: gpu for gpu in session.look().gpus}[split].mig_instances
        del layout[max(layout)]
        kept = driver.set_mig(split, layout)
        gpu = {gpu.uuid: gpu for gpu in session.look().gpus}[split]
    assert gpu.lost == ""
    assert [instance.uuid for instance in gpu.mig_instances] == kept
    assert len(kept) == len(before) - 1


@pytest.mark.slow
async def test_an_old_driver_tells_less_and_is_no_fault(machine: Build) -> None:
    driver = machine("old")
    driver.add_process(driver.gpus[0], 99, GIB)
    async with looking(driver) as provider:
        found = await provider.inventory()
    assert (found.error, len(found.gpus)) == (None, 2)
    gpu = found.gpus[0]
    assert gpu.recovery_action is None
    assert gpu.memory_reserved_bytes == 0
    assert [(process.pid, process.memory_bytes) for process in gpu.processes] == [(99, GIB)]
    assert gpu.throttle_reasons == 1


async def test_each_kind_of_gpu_in_one_machine_is_told_as_it_is(machine: Build) -> None:
    driver = machine("mixed")
    async with looking(driver) as provider:
        found = await provider.inventory()
    capabilities = {gpu.name: gpu.compute_capability for gpu in found.gpus}
    assert set(capabilities.values()) == {(9, 0), (8, 0), (7, 5)}
    t4 = next(gpu for gpu in found.gpus if "T4" in gpu.name)
    assert (t4.nvlink_count, t4.remap_pending, t4.remap_failed) == (0, False, None)


def test_memory_pages_that_wait_to_be_retired_are_told_of_gpus_that_remap_no_rows(machine: Build) -> None:
    driver = machine("t4x4")
    driver.set(driver.gpus[1], retired_pending=1)
    with session_of(driver) as session:
        assert [gpu.remap_pending for gpu in session.look().gpus] == [False, True, False, False]


async def test_what_the_driver_does_not_tell_is_unknown(machine: Build) -> None:
    driver = machine("t4x4")
    driver.set(driver.gpus[0], utilization_percent=None, energy_millijoules=None, power_milliwatts=None)
    async with looking(driver) as provider:
        gpu = (await provider.inventory()).gpus[0]
    assert (gpu.utilization_percent, gpu.energy_millijoules, gpu.power_watts) == (None, None, None)


# ---- no driver, broken driver -----------------------------------------------------------------------------------------


async def test_without_the_library_there_are_no_gpus_and_no_thread_is_started() -> None:
    provider = NvmlGpuProvider(library="libnvidia-ml-that-nobody-has.so.1")
    assert await provider.inventory() == GpuInventory()
    assert await provider.refresh() == GpuInventory()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nodeservice-nvml")]
    await provider.close()


async def test_a_library_without_driver_and_hardware_is_no_gpu_and_no_error(machine: Build) -> None:
    async with looking(machine("library-only")) as provider:
        found = await provider.inventory()
    assert (found.gpus, found.error) == ((), None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("driver-not-loaded", "modprobe nvidia"),
        ("no-permission", "run the node with access to /dev/nvidiactl"),
        ("version-mismatch", "restart the machine after a driver update"),
        ("blocked", "unknown error"),
    ],
)
async def test_a_broken_driver_is_an_error_with_its_remedy_and_not_a_host_without_gpus(
    machine: Build, name: str, words: str
) -> None:
    async with looking(machine(name)) as provider:
        found = await provider.inventory()
    assert found.error is not None
    assert words in found.error


def test_a_driver_that_lists_none_of_the_hosts_gpus_is_told_as_such_until_it_does(
    machine: Build, false_driver: Build
) -> None:
    """So it is where every GPU fails to be initialised: nvidia-smi says "No devices were found"."""
    driver = machine(Machine(name="none", about="a driver without GPUs"))
    with session_of(driver) as session:
        assert session.look().unreachable == ()
    device = driver.pci_devices / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    with session_of(driver) as session:
        (words,) = session.look().unreachable
        assert "lists no GPU though this host has one" in words
        false_driver("t4x4")
        found = session.look()
    assert (found.unreachable, len(found.gpus)) == ((), 4)


def test_a_driver_that_is_updated_under_the_service_takes_no_new_tasks_and_is_read_on(machine: Build) -> None:
    """The file that is loaded stays in use, and fits the kernel's part; containers get the new one, which does not."""
    driver = machine("t4x4")
    with session_of(driver) as session:
        assert session.look().outdated == ""
        away = driver.library.rename(driver.library.with_name("away"))
        driver.set(driver.gpus[0], utilization_percent=55)
        found = session.look()
        assert (found.error, found.gpus[0].utilization_percent) == (None, 55.0)
        assert found.complaints == (found.outdated,)
        assert f"{driver.library} is there no more" in found.outdated
        assert {unit.unwell for unit in units_of(found, {}, SharingPolicy())} == {found.outdated}
        away.rename(driver.library)
        assert session.look().complaints == ()


def test_an_answer_that_the_binding_fails_at_is_an_error_at_every_look(
    machine: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = machine("t4x4")
    with session_of(driver) as session:
        with monkeypatch.context() as broken:
            broken.setattr(pynvml, "nvmlDeviceGetName", lambda _: b"\xff".decode())
            for _ in range(3):
                assert "UnicodeDecodeError" in str(session.look().error)
        found = session.look()
    assert (found.error, len(found.gpus)) == (None, 4)


async def test_a_driver_that_breaks_later_keeps_its_gpus_out_of_service_and_one_that_recovers_is_used_again(
    machine: Build,
) -> None:
    driver = machine("t4x4")
    async with looking(driver) as provider:
        assert (await provider.inventory()).error is None
        driver.fail("nvmlDeviceGetCount", 9)
        broken: GpuInventory = await until(lambda: error_of(provider))
        assert len(broken.gpus) == 4
        assert all(unit.unwell for unit in units_of(broken, {}, SharingPolicy()))
        driver.heal("nvmlDeviceGetCount")
        await until(lambda: well(provider))
        assert not any(unit.unwell for unit in units_of(await provider.inventory(), {}, SharingPolicy()))


async def error_of(provider: NvmlGpuProvider) -> GpuInventory | None:
    found = await provider.inventory()
    return found if found.error is not None else None


async def well(provider: NvmlGpuProvider) -> bool:
    found = await provider.inventory()
    return found.error is None and not any(gpu.lost for gpu in found.gpus)


# ---- one GPU ----------------------------------------------------------------------------------------------------------


async def test_a_lost_gpu_is_told_as_lost_and_the_others_are_read_on(machine: Build) -> None:
    driver = machine("t4x4")
    lost = driver.gpus[1]
    async with looking(driver) as provider:
        await provider.inventory()
        driver.lose(lost)
        driver.set(driver.gpus[0], utilization_percent=55)

        async def seen() -> bool:
            gpus = {gpu.uuid: gpu for gpu in (await provider.inventory()).gpus}
            return "Xid 79" in gpus[lost].lost and gpus[driver.gpus[0]].utilization_percent == 55.0

        await until(seen)
        assert (await provider.inventory()).error is None
        driver.restore(lost)
        await until(lambda: well(provider))


async def test_a_gpu_that_is_dead_from_the_start_takes_nothing_from_the_others(machine: Build) -> None:
    driver = machine("t4x4")
    driver.lose(driver.gpus[0])
    async with looking(driver) as provider:
        found = await provider.inventory()
    assert found.error is None
    assert [gpu.uuid for gpu in found.gpus] == driver.gpus[1:]
    (words,) = found.unreachable
    assert "fallen off the bus" in words


def test_nothing_is_told_as_measured_of_a_gpu_that_is_lost(machine: Build) -> None:
    driver = machine("h200-mig")
    (split,) = set(driver.migs.values())
    driver.set(driver.gpus[0], utilization_percent=97, throttle_reasons=0x40)
    driver.add_process(driver.gpus[0], 4242, GIB)
    with session_of(driver) as session:
        session.look()
        for gpu in driver.gpus:
            driver.lose(gpu)
        lost = {gpu.uuid: gpu for gpu in session.look().gpus}
    gpu = lost[driver.gpus[0]]
    assert (gpu.memory_used_bytes, gpu.utilization_percent, gpu.power_watts, gpu.temperature_celsius) == (None,) * 4
    assert (gpu.processes, gpu.throttle_reasons) == ((), 0)
    assert {instance.memory_used_bytes for instance in lost[split].mig_instances} == {None}


async def test_error_events_of_other_gpus_are_waited_for_without_one_that_is_lost_and_with_it_once_it_is_back(
    machine: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost GPU ends every wait at once."""
    monkeypatch.setattr(events, "_PAUSE_SECONDS", 0.01)
    registered: list[set[str]] = []
    create, register = pynvml.nvmlEventSetCreate, pynvml.nvmlDeviceRegisterEvents

    def created() -> Any:
        registered.append(set())
        return create()

    def registers(handle: Any, *rest: Any) -> Any:
        registered[-1].add(pynvml.nvmlDeviceGetUUID(handle))
        return register(handle, *rest)

    monkeypatch.setattr(pynvml, "nvmlEventSetCreate", created)
    monkeypatch.setattr(pynvml, "nvmlDeviceRegisterEvents", registers)
    driver = machine("t4x4")
    all_of_them, lost = set(driver.gpus), driver.gpus[1]

    async def waits_for(uuids: set[str]) -> bool:
        return bool(registered) and registered[-1] == uuids

    async with looking(driver) as provider:
        await provider.inventory()
        await until(lambda: waits_for(all_of_them))
        driver.lose(lost)
        await until(lambda: waits_for(all_of_them - {lost}))
        driver.restore(lost)
        await until(lambda: waits_for(all_of_them))
    assert len(registered) == 3


def test_a_gpu_that_was_dead_at_the_start_is_taken_up_once_it_was_reset(machine: Build) -> None:
    driver = machine("h200x8")
    driver.lose(driver.gpus[0])
    with session_of(driver) as session:
        assert len(session.look().unreachable) == 1
        driver.restore(driver.gpus[0])
        for _ in range(1000):
            found = session.look()
            if not found.unreachable:
                break
            time.sleep(0.01)
    assert (found.error, found.unreachable) == (None, ())
    assert [gpu.uuid for gpu in found.gpus] == driver.gpus
    assert {len(gpu.closeness) for gpu in found.gpus} == {7}


async def test_a_gpu_that_may_not_be_opened_is_not_ours_and_no_error(machine: Build) -> None:
    driver = machine("t4x4")
    driver.deny(driver.gpus[3])
    async with looking(driver) as provider:
        found = await provider.inventory()
    assert (found.error, found.unreachable) == (None, ())
    assert [gpu.uuid for gpu in found.gpus] == driver.gpus[:3]


async def test_an_error_event_is_delivered_once_with_its_gpu_and_instance(machine: Build) -> None:
    driver = machine("h200-mig")
    (split,) = set(driver.migs.values())
    async with looking(driver) as provider:
        await provider.inventory()
        taken = []

        async def came() -> bool:
            # One that was sent before the registration is never told: so it is sent until it comes.
            driver.xid(split, 94, gpu_instance=1)
            taken.extend(provider.take_xids())
            return bool(taken)

        await until(came)
        assert (taken[0].uuid, taken[0].code, taken[0].gpu_instance_id) == (split, 94, 1)
        await asyncio.sleep(0)
        driver.xid(split, 79)

        async def whole() -> bool:
            taken.extend(provider.take_xids())
            return taken[-1].code == 79

        await until(whole)
        assert taken[-1].gpu_instance_id is None
        assert [xid.code for xid in taken].count(79) == 1


async def test_the_error_event_of_a_gpu_that_has_fallen_off_the_bus_still_names_it(machine: Build) -> None:
    driver = machine("h200x8")
    gpu = driver.gpus[5]
    async with looking(driver) as provider:
        await provider.inventory()
        taken: list[Any] = []

        async def came(code: int) -> bool:
            driver.xid(gpu, code)
            taken.extend(provider.take_xids())
            return any(xid.code == code for xid in taken)

        await until(lambda: came(13))  # it is registered now
        driver.fail("nvmlDeviceGetUUID", 15)
        await until(lambda: came(79))
    assert {xid.uuid for xid in taken} == {gpu}


# ---- time -------------------------------------------------------------------------------------------------------------


async def test_a_driver_that_hangs_blocks_nobody_and_is_told_as_such_until_it_answers(machine: Build) -> None:
    driver = machine("h200x8")
    async with looking(driver, timeout_seconds=0.2) as provider:
        await until(lambda: well(provider))
        driver.hang(3600)
        broken: GpuInventory = await until(lambda: error_of(provider))
        assert "has not answered for 0.2 s" in str(broken.error)
        assert len(broken.gpus) == 8
        began = time.monotonic()
        for _ in range(50):
            await provider.inventory()
            await provider.refresh()
        assert time.monotonic() - began < 5.0, "nobody waits for a driver that hangs"
        driver.unhang()
        await until(lambda: well(provider))


async def test_a_driver_that_hangs_at_the_first_look_is_waited_for_within_a_bound(machine: Build) -> None:
    driver = machine("t4x4")
    driver.hang(3600, "nvmlInitWithFlags")
    async with looking(driver, timeout_seconds=0.1) as provider:
        found = await provider.inventory()
        assert found.gpus == ()
        assert "has not answered" in str(found.error)
        driver.unhang()
        await until(lambda: well(provider))
        assert len((await provider.inventory()).gpus) == 4


async def test_a_refresh_sees_what_has_just_changed(machine: Build) -> None:
    driver = machine("t4x4")
    provider = NvmlGpuProvider(library=str(driver.library), pci_devices=driver.pci_devices, poll_seconds=3600)
    try:
        await provider.inventory()
        driver.add_process(driver.gpus[0], 5, GIB)
        assert (await provider.inventory()).gpus[0].processes == ()
        assert [process.pid for process in (await provider.refresh()).gpus[0].processes] == [5]
    finally:
        await provider.close()


async def test_nvml_is_begun_once_and_given_back_at_the_end(machine: Build) -> None:
    driver = machine("t4x4")
    async with looking(driver) as provider:
        for _ in range(5):
            await provider.refresh()
    for thread in threading.enumerate():
        if thread.name.startswith("nodeservice-nvml"):
            thread.join(10)
    with pytest.raises(pynvml.NVMLError) as caught:
        pynvml.nvmlDeviceGetCount()
    assert int(caught.value.value) == 1, "NVML is shut down: as many shutdowns as inits"


# ---- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_driver_that_can_limit_memory_does_and_the_limit_is_read_back(machine: Build, tmp_path: Path) -> None:
    driver = machine("r615")
    async with looking(driver) as provider:
        found = await provider.inventory()
        assert all(gpu.memory_limits for gpu in found.gpus)
        unit = units_of(found, {}, SharingPolicy(driver_limits=True))[0]
        assert unit.share_methods == (ShareMethod.DRIVER, ShareMethod.WATCHED)
        assert await provider.limit_memory(driver.gpus[0], str(tmp_path), 7 * GIB) == 7 * GIB
        with pytest.raises(NodeFaultError, match="NVML error 6"):
            await provider.limit_memory(driver.gpus[0], str(tmp_path / "gone"), 7 * GIB)


async def test_a_driver_that_cannot_limit_memory_says_so(machine: Build) -> None:
    driver = machine("t4x4")
    async with looking(driver) as provider:
        await provider.inventory()
        with pytest.raises(NodeFaultError, match="does not limit") as caught:
            await provider.limit_memory(driver.gpus[0], "/sys/fs/cgroup/t", GIB)
    assert caught.value.reason == "LIMIT_NOT_ENFORCED"


# ---- the fake ---------------------------------------------------------------------------------------------------------


async def test_the_shipped_fake_keeps_the_contract() -> None:
    provider: GpuProvider = FakeGpuProvider(fake_gpu(1), fake_gpu(2))
    assert len((await provider.inventory()).gpus) == 2
    assert await provider.refresh() == await provider.inventory()
    assert provider.take_xids() == []
    assert await provider.limit_memory(fake_gpu(1).uuid, "/c", 5) == 5
    await provider.close()
