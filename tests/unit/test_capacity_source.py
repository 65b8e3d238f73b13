"""HostCapacity: reserve, allocatable, the engine's smaller view, faults that are facts; and how it is shown."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nodeservice.capacity.reserve import Reserve, allocatable_of, reserved_for_host
from nodeservice.capacity.source import HostCapacity
from nodeservice.cli.inspect_view import human_bytes, human_cores, render_seen, seen_as_dict
from nodeservice.core.gpus import GpuUnit
from nodeservice.core.model import GIB, MIB, Resources
from nodeservice.daemon.look import Seen
from nodeservice.daemon.told import Told
from nodeservice.errors import TransientError
from nodeservice.gpu.units import SharingPolicy, units_of
from nodeservice.ports import CapacitySource, EngineFacts, GpuInventory, GpuProvider, NodeCapacity
from nodeservice.testing.fake_gpu import FakeGpuProvider, fake_gpu

ENGINE = EngineFacts(
    name="docker",
    version="28.0",
    api_version="1.48",
    root_dir=Path("/no/such/root"),
    storage_driver="overlay2",
    cgroup_driver="cgroupfs",
    cgroup_version=1,
    cpu_count=4096,
    memory_bytes=1 << 60,
)


def healthy(inventory: GpuInventory) -> tuple[GpuUnit, ...]:
    return units_of(inventory, {}, SharingPolicy())


def engine(facts: EngineFacts = ENGINE) -> Callable[[], Awaitable[EngineFacts]]:
    async def answer() -> EngineFacts:
        return facts

    return answer


async def no_engine() -> EngineFacts:
    raise TransientError("no engine at /run/none.sock", reason="ENGINE_UNREACHABLE", hint="start it")


def known_once(facts: EngineFacts, state_dir: Path, *, root: Path = Path("/")) -> HostCapacity:
    """Beside an engine that answers once."""
    answers = [facts]

    async def ask() -> EngineFacts:
        return answers.pop() if answers else await no_engine()

    return HostCapacity(
        state_dir=state_dir, engine=ask, gpus=FakeGpuProvider(), units=healthy, reserve=Reserve(), root=root
    )


async def read(
    state_dir: Path,
    *,
    ask_engine: Callable[[], Awaitable[EngineFacts]] = no_engine,
    gpus: GpuProvider | None = None,
    reserve: Reserve | None = None,
    root: Path = Path("/"),
) -> NodeCapacity:
    source = HostCapacity(
        state_dir=state_dir,
        engine=ask_engine,
        gpus=gpus or FakeGpuProvider(),
        units=healthy,
        reserve=reserve or Reserve(),
        root=root,
    )
    try:
        return await source.read()
    finally:
        await source.close()


def test_the_default_reserve_of_a_large_host_is_bounded() -> None:
    kept = reserved_for_host(
        Reserve(), Resources(cpu_milli=64_000, memory_bytes=512 * GIB, disk_bytes=4096 * GIB, gpu_count=8)
    )

    assert kept == Resources(cpu_milli=739, memory_bytes=2 * GIB, disk_bytes=20 * GIB)


def test_the_default_reserve_of_a_small_host_leaves_it_room_to_live() -> None:
    kept = reserved_for_host(Reserve(), Resources(cpu_milli=1_000, memory_bytes=GIB, disk_bytes=8 * GIB))

    assert kept == Resources(cpu_milli=109, memory_bytes=256 * MIB, disk_bytes=GIB)


def test_a_configured_reserve_is_taken_as_it_is_and_zero_is_a_value() -> None:
    capacity = Resources(cpu_milli=4_000, memory_bytes=8 * GIB, disk_bytes=100 * GIB)

    for memory_bytes in (0, 3 * GIB):
        kept = reserved_for_host(Reserve(cpu_milli=0, memory_bytes=memory_bytes, disk_bytes=0), capacity)
        assert kept == Resources(memory_bytes=memory_bytes)


def test_more_is_never_reserved_than_there_is() -> None:
    capacity = Resources(cpu_milli=50, memory_bytes=100 * MIB, disk_bytes=10 * MIB, gpu_count=1)

    left = allocatable_of(capacity, reserve=Reserve(), disk_free_bytes=10 * MIB, gpu_count=1)

    assert left == Resources(gpu_count=1)


def test_only_free_disk_is_given_to_tasks() -> None:
    capacity = Resources(cpu_milli=1_000, memory_bytes=GIB, disk_bytes=100 * GIB)

    def left(free: int) -> int:
        return allocatable_of(capacity, reserve=Reserve(), disk_free_bytes=free, gpu_count=0).disk_bytes

    assert left(40 * GIB) == 35 * GIB
    assert left(2 * GIB) == 0


async def test_capacity_is_reserved_and_allocatable_together(tmp_path: Path) -> None:
    found = await read(tmp_path, gpus=FakeGpuProvider(fake_gpu()))

    assert found.capacity == found.reserved.plus(found.allocatable)
    assert found.capacity.cpu_milli == found.host.cpu_usable_milli > 0
    assert found.capacity.memory_bytes == found.host.memory_limit_bytes
    assert found.allocatable.cpu_milli < found.capacity.cpu_milli
    assert found.allocatable.memory_bytes < found.capacity.memory_bytes
    assert found.allocatable.disk_bytes <= found.host.disk.free_bytes
    assert found.allocatable.gpu_count == 1


async def test_an_engine_in_a_smaller_place_limits_the_capacity(tmp_path: Path) -> None:
    small = replace(ENGINE, cpu_count=1, memory_bytes=300 * MIB)

    found = await read(tmp_path, ask_engine=engine(small))

    assert (found.capacity.cpu_milli, found.capacity.memory_bytes) == (1_000, 300 * MIB)
    assert found.host.cpu_usable_milli >= 1_000


async def test_an_engine_with_a_larger_view_changes_nothing(tmp_path: Path) -> None:
    found = await read(tmp_path, ask_engine=engine())

    assert found.capacity.cpu_milli == found.host.cpu_usable_milli
    assert found.capacity.memory_bytes == found.host.memory_limit_bytes
    assert found.host.engine == ENGINE


@pytest.mark.parametrize(
    ("uid", "driver", "version", "name", "limited"),
    [
        (0, "systemd", 2, "docker", "nodeservice.slice"),
        (0, "cgroupfs", 2, "docker", "nodeservice"),
        (0, "systemd", 1, "docker", "system.slice"),
        (0, "systemd", 1, "podman", "machine.slice"),
        (0, "none", 2, "docker", ""),
        (1000, "cgroupfs", 2, "docker", "nodeserviced.slice/nodeservice.service"),
    ],
)
async def test_the_capacity_is_what_tasks_can_have_where_the_engine_puts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, driver: str, version: int, name: str, limited: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    (tmp_path / "proc/self/mountinfo").write_text("31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/nodeserviced.slice/nodeservice.service\n")
    for place in (
        "nodeserviced.slice/nodeservice.service",
        "nodeservice.slice",
        "nodeservice",
        "system.slice",
        "machine.slice",
    ):
        (tmp_path / "sys/fs/cgroup" / place).mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup" / place / "memory.max").write_text(f"{300 * MIB}\n")
        (tmp_path / "sys/fs/cgroup" / place / "cpu.max").write_text("30000 100000\n")
    (tmp_path / "sys/fs/cgroup" / limited / "memory.max").write_text(f"{700 * MIB}\n")
    (tmp_path / "sys/fs/cgroup" / limited / "cpu.max").write_text("70000 100000\n")
    where = replace(ENGINE, name=name, cgroup_driver=driver, cgroup_version=version)
    source = known_once(where, tmp_path, root=tmp_path)

    for _ in range(2):
        capacity = (await source.read()).capacity
        assert (capacity.cpu_milli, capacity.memory_bytes) == (700, 700 * MIB)
    await source.close()


async def test_an_engine_that_is_being_started_anew_is_where_it_was(tmp_path: Path) -> None:
    source = known_once(replace(ENGINE, cpu_count=1, memory_bytes=300 * MIB), tmp_path)

    before, after = await source.read(), await source.read()

    assert after.host.engine is None
    assert after.capacity.minus(before.capacity) == Resources()
    await source.close()


async def test_the_engines_disk_is_told_only_where_it_can_be_seen(tmp_path: Path) -> None:
    hidden = await read(tmp_path, ask_engine=engine())
    untold = await read(tmp_path, ask_engine=engine(replace(ENGINE, root_dir=Path())))
    seen = await read(tmp_path, ask_engine=engine(replace(ENGINE, root_dir=tmp_path)))

    assert hidden.host.engine_disk is untold.host.engine_disk is None
    assert seen.host.engine_disk is not None
    assert seen.host.engine_disk.path == tmp_path


async def test_an_engine_that_does_not_answer_is_a_fact(tmp_path: Path) -> None:
    found = await read(tmp_path, ask_engine=no_engine)

    assert found.host.engine is None
    assert found.host.engine_error == "no engine at /run/none.sock (start it)"
    assert found.allocatable.cpu_milli > 0


async def test_gpus_of_a_faulty_driver_are_shown_and_not_promised(tmp_path: Path) -> None:
    found = await read(tmp_path, gpus=FakeGpuProvider(fake_gpu(0), fake_gpu(1), error="GPU 1: lost"))

    assert (found.capacity.gpu_count, found.allocatable.gpu_count) == (2, 0)


async def test_a_sample_is_in_percent_and_may_be_taken_at_any_time(tmp_path: Path) -> None:
    source: CapacitySource = HostCapacity(
        state_dir=tmp_path / "later",
        engine=no_engine,
        gpus=FakeGpuProvider(fake_gpu(utilization_percent=42.0)),
        units=healthy,
        reserve=Reserve(),
    )

    for _ in range(2):
        sample = await source.sample()
        assert 0 <= sample.cpu_percent <= 100
        assert 0 < sample.memory_percent < 100
        assert 0 < sample.disk_percent <= 100
        assert sample.gpu_percent == 42.0


async def test_a_sample_that_cannot_read_the_host_keeps_the_last_values(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 250 kB\n")
    source = HostCapacity(
        state_dir=tmp_path, engine=no_engine, gpus=FakeGpuProvider(), units=healthy, reserve=Reserve(), root=tmp_path
    )
    first = await source.sample()
    (tmp_path / "proc/meminfo").unlink()

    second = await source.sample()

    assert first.memory_percent == second.memory_percent == 75.0
    await source.close()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1 MiB"),
        (64 * MIB, "64 MiB"),
        (int(23.54 * GIB), "23.5 GiB"),
        (252 * GIB, "252 GiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_bytes_are_shown_short(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("milli", "text"), [(2000, "2"), (1881, "1.881"), (500, "0.5"), (0, "0"), (10_000, "10")])
def test_cores_are_shown_without_idle_zeros(milli: int, text: str) -> None:
    assert human_cores(milli) == text


async def test_the_dict_is_json_with_exact_values(tmp_path: Path) -> None:
    found = await read(
        tmp_path, ask_engine=engine(replace(ENGINE, root_dir=tmp_path)), gpus=FakeGpuProvider(fake_gpu(3))
    )
    free = found.allocatable.minus(Resources(cpu_milli=100))

    shown = json.loads(json.dumps(seen_as_dict(Seen(capacity=found, free=free, degraded=("no init program",)))))

    assert shown["capacity"]["memory_bytes"] == found.capacity.memory_bytes
    assert shown["free"]["cpu_milli"] == found.allocatable.cpu_milli - 100
    assert shown["host"]["cpu"]["usable_milli"] == found.host.cpu_usable_milli
    assert shown["host"]["disk"]["path"] == str(tmp_path)
    assert shown["engine"]["disk"]["filesystem"] == found.host.disk.filesystem
    assert shown["engine"]["degraded"] == ["no init program"]
    assert shown["gpus"][0]["uuid"] == fake_gpu(3).uuid
    assert (shown["engine_error"], shown["gpu_error"]) == (None, None)


def printed(found: NodeCapacity, *degraded: str) -> str:
    out = io.StringIO()
    render_seen(Seen(capacity=found, free=found.allocatable, degraded=degraded), Console(file=out, width=120))
    return out.getvalue()


async def test_a_person_sees_that_there_is_no_driver_and_why_there_is_no_engine(tmp_path: Path) -> None:
    text = printed(await read(tmp_path))

    assert "no NVIDIA driver" in text
    assert "no engine at /run/none.sock (start it)" in text
    assert "allocatable" in text


async def test_a_person_sees_the_gpus_and_their_fault(tmp_path: Path) -> None:
    text = printed(await read(tmp_path, ask_engine=engine(), gpus=FakeGpuProvider(fake_gpu(0), error="GPU 1: lost")))

    assert fake_gpu(0).uuid in text
    assert "GPU fault: GPU 1: lost" in text
    assert "docker 28.0" in text


async def test_the_daemon_that_runs_here_is_shown_with_its_conditions_and_warnings(tmp_path: Path) -> None:
    found = await read(tmp_path)
    daemon = Told(
        pid=7, version="0.1.0", mode="CORDONED", status="takes no tasks", conditions=["DISK_LOW: 1"], warnings=["W: 2"]
    )

    def shown(**said: Any) -> tuple[str, Any]:
        out, seen = io.StringIO(), Seen(capacity=found, free=found.allocatable, **said)
        render_seen(seen, Console(file=out, width=120))
        told = json.loads(json.dumps(seen_as_dict(seen)))
        return out.getvalue(), (told["daemon"], told["daemon_error"])

    text, told = shown(daemon=daemon)
    assert all(words in text for words in ("pid 7, CORDONED", "takes no tasks", "DISK_LOW: 1", "W: 2"))
    assert told == (asdict(daemon), None)
    assert "no: nothing takes tasks here" in shown()[0]
    text, told = shown(daemon_error="it hangs")
    assert "it hangs" in text
    assert told == (None, "it hangs")


async def test_a_person_sees_what_tasks_do_without_on_this_engine(tmp_path: Path) -> None:
    text = printed(await read(tmp_path, ask_engine=engine()), "no init program", "no [network]")

    rows = [line.strip("│ ").split("│") for line in text.splitlines() if "degraded" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["degraded", "no init program"],
        ["degraded", "no [network]"],
    ]


async def test_text_of_the_engine_is_not_read_as_markup(tmp_path: Path) -> None:
    hostile = replace(ENGINE, version="[bold]28[/nonsense]")

    assert "[bold]28[/nonsense]" in printed(await read(tmp_path, ask_engine=engine(hostile)))
