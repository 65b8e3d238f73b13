"""Containers on the real engine: limits that hold, exits that are found, logs that are whole, faults that pass."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest

from nodeservice.core.model import MIB, AttemptId
from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.lifecycle.logs import LogBook
from nodeservice.lifecycle.recovery import identity
from nodeservice.ports import ContainerSpec, ContainerState, Mount, labels
from nodeservice.runtime.docker import DockerRuntime
from tests.busy_threads import busy_threads
from tests.integration.engine_proxy import EngineProxy

pytestmark = pytest.mark.engine
SOON_SECONDS = 30
NEVER_SECONDS = 3600


@pytest.fixture
async def runtime(engine: str, node_id: str) -> AsyncIterator[DockerRuntime]:
    """Its list is never looked at: what it learns of exits comes from events."""
    made = DockerRuntime(node_id=node_id, base_url=engine, relist_seconds=NEVER_SECONDS)
    yield made
    await made.close()


@pytest.fixture
async def behind_proxy(proxy: EngineProxy, node_id: str) -> AsyncIterator[DockerRuntime]:
    made = DockerRuntime(node_id=node_id, base_url=proxy.url, relist_seconds=NEVER_SECONDS)
    yield made
    await made.close()


@pytest.fixture
def spec(demo_image: str) -> ContainerSpec:
    return ContainerSpec(
        name=f"nodeservice.it-{uuid.uuid4().hex[:8]}.1",
        image=demo_image,
        argv=None,
        shell="true",
        env=(),
        labels={"nodeservice.spec": uuid.uuid4().hex},
        cpu_milli=1000,
        memory_bytes=64 * MIB,
        pids_limit=64,
        mounts=(),
        gpu_uuids=(),
        log_max_bytes=32 * MIB,
        grace_seconds=1,
    )


@pytest.fixture
def is_podman(docker_client: docker.APIClient) -> bool:
    """Whether the engine is Podman behind its Docker-compatible socket, which tells less of what it does."""
    return any(part["Name"] == "Podman Engine" for part in docker_client.version()["Components"])


async def run(runtime: DockerRuntime, spec: ContainerSpec) -> str:
    container_id = await runtime.create(spec)
    await runtime.start(container_id)
    return container_id


async def read(runtime: DockerRuntime, container_id: str, *, follow: bool) -> bytes:
    return b"".join([piece async for piece in runtime.read_log(container_id, follow=follow)])


async def output_of(runtime: DockerRuntime, spec: ContainerSpec) -> str:
    container_id = await run(runtime, spec)
    await runtime.wait_exited(container_id)
    return (await read(runtime, container_id, follow=False)).decode()


# ---- programs run inside ----


async def test_a_program_that_takes_too_long_is_given_up_and_the_task_runs_on(
    runtime: DockerRuntime, spec: ContainerSpec
) -> None:
    container_id = await run(runtime, replace(spec, shell="exec sleep 300"))
    with pytest.raises(TransientError) as caught:
        await runtime.run_inside(container_id, ("sleep", "300"), timeout_seconds=0.5)
    assert caught.value.reason == "EXEC_TIMEOUT"
    assert (
        await runtime.run_inside(container_id, ("echo", "still here"), timeout_seconds=SOON_SECONDS) == "still here\n"
    )


async def test_a_program_that_writes_without_end_is_cut_off(runtime: DockerRuntime, spec: ContainerSpec) -> None:
    container_id = await run(runtime, replace(spec, shell="exec sleep 300"))
    with pytest.raises(RequestError, match="more than 65536 bytes"):
        await runtime.run_inside(container_id, ("yes",), timeout_seconds=SOON_SECONDS)


# ---- what a container is made with ----


async def test_every_limit_and_safeguard_stands_in_the_container(
    runtime: DockerRuntime, spec: ContainerSpec, docker_client: docker.APIClient, is_podman: bool
) -> None:
    container_id = await runtime.create(replace(spec, cpu_milli=250, memory_bytes=256 * MIB, log_max_bytes=4 * MIB))
    host: dict[str, Any] = docker_client.inspect_container(container_id)["HostConfig"]
    assert (host["CpuQuota"], host["CpuPeriod"]) == (25_000, 100_000)
    assert host["Memory"] == host["MemorySwap"] == 256 * MIB
    assert host["ShmSize"] == 128 * MIB
    assert host["PidsLimit"] == 64
    assert host["Init"] is True
    assert host["Privileged"] is False
    assert "no-new-privileges" in host["SecurityOpt"]
    assert {name.removeprefix("CAP_") for name in host["CapDrop"]} == {"NET_RAW", "MKNOD", "AUDIT_WRITE"}
    if not is_podman:  # its answer leaves the options out; that the log is bounded is tried further below
        assert host["LogConfig"]["Config"]["max-size"] == str(16 * MIB)


async def test_past_its_memory_a_task_is_killed_and_flagged(
    runtime: DockerRuntime, spec: ContainerSpec, is_podman: bool
) -> None:
    container_id = await run(runtime, replace(spec, shell="exec dd if=/dev/zero of=/dev/null bs=300M count=1"))
    async with asyncio.timeout(SOON_SECONDS):
        ended = await runtime.wait_exited(container_id)
    assert ended is not None
    assert ended.exit_code == 137
    # Podman's conmon sees no such kill on cgroup v1; there the count in the task's own cgroup tells (test_podman.py).
    assert ended.oom_killed or (is_podman and (await runtime.facts()).cgroup_version == 1)


async def test_a_kill_for_memory_that_the_engine_notes_after_the_exit_is_flagged_all_the_same(
    runtime: DockerRuntime, spec: ContainerSpec, is_podman: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_podman:
        pytest.skip("Podman's conmon sees no such kill on cgroup v1")
    look_at = runtime._look_at

    async def early(container_id: str) -> ContainerState | None:
        state = await look_at(container_id)
        return state and replace(state, oom_killed=False)

    monkeypatch.setattr(runtime, "_look_at", early)
    container_id = await run(runtime, replace(spec, shell="exec dd if=/dev/zero of=/dev/null bs=300M count=1"))
    ended = await runtime.wait_exited(container_id)
    assert ended is not None
    assert ended.oom_killed


async def test_the_volumes_that_an_image_declares_go_with_the_container(
    runtime: DockerRuntime, spec: ContainerSpec, docker_client: docker.APIClient
) -> None:
    image = f"nodeservice/volume-{uuid.uuid4().hex[:8]}"
    for _line in docker_client.build(fileobj=io.BytesIO(b"FROM nodeservice/demo\nVOLUME /data\n"), tag=image, rm=True):
        pass
    try:
        container_id = await runtime.create(replace(spec, image=image))
        (volume,) = (mount["Name"] for mount in docker_client.inspect_container(container_id)["Mounts"])
        docker_client.inspect_volume(volume)
        await runtime.remove(container_id)
        with pytest.raises(docker.errors.NotFound):
            docker_client.inspect_volume(volume)
    finally:
        docker_client.remove_image(image, force=True)


async def test_a_fork_bomb_meets_its_pids_limit(runtime: DockerRuntime, spec: ContainerSpec) -> None:
    shell = "for i in $(seq 40); do sleep 5 & done; echo all-started"
    output = await output_of(runtime, replace(spec, shell=shell, pids_limit=16))
    assert "can't fork" in output
    assert "all-started" not in output


async def test_a_task_without_gpus_cannot_ask_for_one_through_its_environment(
    runtime: DockerRuntime, spec: ContainerSpec
) -> None:
    env = (("NVIDIA_VISIBLE_DEVICES", "all"), ("CUDA_MPS_PIPE_DIRECTORY", "/tmp"), ("GREETING", "a=b c"))
    lines = (await output_of(runtime, replace(spec, env=env, shell="env"))).splitlines()
    assert "GREETING=a=b c" in lines
    assert [line for line in lines if line.startswith(("NVIDIA", "CUDA"))] == ["NVIDIA_VISIBLE_DEVICES=void"]


async def test_a_gpu_that_this_engine_cannot_give_is_a_fault_of_the_node(
    runtime: DockerRuntime, spec: ContainerSpec, docker_client: docker.APIClient
) -> None:
    if "nvidia" in docker_client.info().get("Runtimes", {}):
        pytest.skip("this engine has an NVIDIA runtime")
    with pytest.raises(NodeFaultError) as caught:
        await run(runtime, replace(spec, gpu_uuids=("GPU-00000000-0000-0000-0000-000000000000",)))
    assert caught.value.reason == "NODE_FAULT"


async def test_a_mounted_directory_is_the_same_inside_and_read_only_when_asked(
    runtime: DockerRuntime, spec: ContainerSpec, tmp_path: Path
) -> None:
    mounts = (
        Mount(source=tmp_path, target="/results"),
        Mount(source=tmp_path, target="/input", read_only=True),
    )
    shell = "echo hi > /results/a; cat /input/a; echo no > /input/b || echo refused"
    assert "hi\n" in (text := await output_of(runtime, replace(spec, mounts=mounts, shell=shell)))
    assert "refused" in text
    assert (tmp_path / "a").read_text() == "hi\n"


async def test_a_mount_whose_source_is_missing_is_refused_and_not_made(
    runtime: DockerRuntime, spec: ContainerSpec, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(RequestError) as caught:
        await runtime.create(replace(spec, mounts=(Mount(source=missing, target="/x"),)))
    assert caught.value.reason == "CREATE_FAILED"
    assert not missing.exists()


async def test_an_argv_keeps_each_argument_as_it_is(runtime: DockerRuntime, spec: ContainerSpec) -> None:
    argv = ("printf", "[%s]", "a b", "$HOME", "", "ü")
    assert await output_of(runtime, replace(spec, shell=None, argv=argv)) == "[a b][$HOME][][ü]"


async def test_a_shell_that_exits_127_by_itself_is_not_a_command_that_was_not_found(
    runtime: DockerRuntime, spec: ContainerSpec
) -> None:
    container_id = await run(runtime, replace(spec, shell="no-such-program"))
    ended = await runtime.wait_exited(container_id)
    assert ended is not None
    assert (ended.exit_code, ended.error) == (127, "")


async def test_the_engine_describes_itself_in_full(runtime: DockerRuntime, docker_client: docker.APIClient) -> None:
    facts = await runtime.facts()
    info = docker_client.info()
    assert facts.root_dir == Path(info["DockerRootDir"])
    assert facts.memory_bytes == info["MemTotal"]
    assert facts.cgroup_version in {1, 2}


# ---- logs ----


async def test_twenty_megabytes_of_log_come_whole_while_they_are_written(
    runtime: DockerRuntime, spec: ContainerSpec
) -> None:
    line = b"0123456789abcdef" * 6 + b"\n"
    expected = (line * (20_000_000 // len(line) + 1))[:20_000_000]
    container_id = await run(runtime, replace(spec, shell=f"yes {line.decode().strip()} | head -c 20000000"))
    async with asyncio.timeout(60):
        followed = await read(runtime, container_id, follow=True)
        again = await read(runtime, container_id, follow=False)
    assert len(followed) == len(again) == len(expected)
    assert hashlib.sha256(followed).digest() == hashlib.sha256(expected).digest()
    assert followed == again


async def test_a_log_past_its_bound_is_bounded_in_the_engine_and_its_follower_ends(
    runtime: DockerRuntime, spec: ContainerSpec
) -> None:
    shell = "yes 0123456789012345678901234567890123456789 | head -c 12000000; echo last-line"
    container_id = await run(runtime, replace(spec, shell=shell, log_max_bytes=MIB))
    async with asyncio.timeout(60):
        followed = await read(runtime, container_id, follow=True)
        await runtime.wait_exited(container_id)
        kept = await read(runtime, container_id, follow=False)
    assert followed[:82] == b"0123456789012345678901234567890123456789\n" * 2
    assert len(kept) <= 8 * MIB
    assert kept.endswith(b"last-line\n")


async def test_a_log_that_its_engine_threw_away_before_it_was_read_says_so(
    runtime: DockerRuntime, spec: ContainerSpec, tmp_path: Path, is_podman: bool
) -> None:
    if is_podman:
        pytest.skip("Podman keeps one file, and what it threw away before the first reading leaves no trace")
    logs = LogBook(runtime, max_bytes=32 * MIB, tail_bytes=100)
    for count, is_whole in ((20_000, True), (120_000, False)):  # a file of 1 MiB, the smallest, takes some 30,000
        id_, path = AttemptId(f"t{count}"), tmp_path / f"{count}.log"
        made = replace(spec, name=f"{spec.name}{count}", shell=f"seq {count}", log_max_bytes=1)
        container_id = await run(runtime, made)
        await runtime.wait_exited(container_id)
        await logs.capture(id_, container_id, path, follow=False)
        lines = path.read_text().splitlines()
        assert logs.has_gap(id_) is not is_whole
        assert (lines == [str(number) for number in range(1, count + 1)]) is is_whole
        assert any("lines may be missing" in line for line in lines) is not is_whole


async def test_a_log_that_outruns_its_follower_repeats_no_line_and_says_what_it_may_lack(
    runtime: DockerRuntime, spec: ContainerSpec, tmp_path: Path, is_podman: bool
) -> None:
    if is_podman:
        pytest.skip("Podman's log is followed in its file")
    shell = "for i in $(seq 20); do seq $((i * 10000 + 100000)) $((i * 10000 + 109999)); sleep 0.1; done"
    container_id = await run(runtime, replace(spec, shell=shell, log_max_bytes=1))
    logs = LogBook(runtime, max_bytes=32 * MIB, tail_bytes=100)
    async with asyncio.timeout(60):
        await logs.capture(AttemptId("t"), container_id, tmp_path / "log", follow=True)
    numbers = [int(line) for line in (tmp_path / "log").read_text().splitlines() if line.isdigit()]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 309_999
    assert len(numbers) == 200_000 or logs.has_gap(AttemptId("t"))


async def test_a_log_is_read_on_from_a_position_also_when_its_beginning_is_gone(
    runtime: DockerRuntime, spec: ContainerSpec, tmp_path: Path, is_podman: bool
) -> None:
    """Two captures of one file, by two processes: the first reads little, and 2 MiB of the engine's log are gone then."""
    if is_podman:
        pytest.skip("Podman's log is read from its file")
    shell = "seq 100; while [ ! -e /results/go ]; do sleep 0.05; done; seq 101 120000"
    mount = Mount(source=tmp_path, target="/results")
    container_id = await run(runtime, replace(spec, shell=shell, log_max_bytes=1, mounts=(mount,)))
    path, id_ = tmp_path / "log", AttemptId("t")
    async with asyncio.timeout(SOON_SECONDS):
        while not path.exists() or not path.read_bytes().endswith(b"\n100\n"):
            first = LogBook(runtime, max_bytes=32 * MIB, tail_bytes=100)
            await first.capture(id_, container_id, path, follow=False)
            await asyncio.sleep(0.05)
        (tmp_path / "go").touch()
        await runtime.wait_exited(container_id)
        await first.capture(id_, container_id, path, follow=False)
    lines = path.read_text().splitlines()
    assert lines[:100] == [str(number) for number in range(1, 101)]
    assert "lines may be missing here" in lines[101]
    assert [int(line) for line in lines[102:]] == list(range(int(lines[102]), 120_001))
    assert first.has_gap(id_)


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("head -c 16383 /dev/zero; echo; echo x", bytes(16383) + b"\nx\n"),
        ("head -c 16384 /dev/zero; echo; echo x", bytes(16384) + b"\nx\n"),
        ("head -c 16385 /dev/zero; echo; echo x", bytes(16385) + b"\nx\n"),
        ("head -c 16384 /dev/zero; echo", bytes(16384) + b"\n"),
        ("head -c 16384 /dev/zero", bytes(16384)),
        ("head -c 70000 /dev/zero; echo; printf end", bytes(70000) + b"\nend"),
        ("echo out; sleep 0.2; echo err >&2; sleep 0.2; printf '\\n\\nend'", b"out\nerr\n\n\nend"),
    ],
)
async def test_lines_of_any_length_from_both_streams_keep_every_byte(
    runtime: DockerRuntime, spec: ContainerSpec, shell: str, expected: bytes
) -> None:
    container_id = await run(runtime, replace(spec, shell=shell))
    assert await read(runtime, container_id, follow=True) == expected
    assert await read(runtime, container_id, follow=False) == expected


async def test_no_thread_stays_when_followers_are_dropped(runtime: DockerRuntime, spec: ContainerSpec) -> None:
    container_id = await run(runtime, replace(spec, shell="while :; do echo x; sleep 0.05; done"))
    for _ in range(5):
        async for _piece in (pieces := runtime.read_log(container_id, follow=True)):
            break
        await pieces.aclose()
    async with asyncio.timeout(SOON_SECONDS):
        while busy_threads("engine-log"):
            await asyncio.sleep(0.02)


# ---- exits and faults of the engine ----


async def test_an_exit_is_learnt_from_the_event_stream_by_one_thread(
    runtime: DockerRuntime, spec: ContainerSpec
) -> None:
    ids = [await run(runtime, replace(spec, name=f"{spec.name}{n}", shell="sleep 0.5; exit 4")) for n in range(3)]
    async with asyncio.timeout(SOON_SECONDS):
        ended = await asyncio.gather(*(runtime.wait_exited(id_) for id_ in ids))
    assert [state and state.exit_code for state in ended] == [4, 4, 4]
    assert [thread.name for thread in threading.enumerate()].count("engine-events") == 1


async def test_an_exit_that_no_event_tells_is_found_in_the_list(
    proxy: EngineProxy, node_id: str, spec: ContainerSpec
) -> None:
    proxy.hides_events = True
    runtime = DockerRuntime(node_id=node_id, base_url=proxy.url, relist_seconds=0.2)
    try:
        container_id = await run(runtime, replace(spec, shell="sleep 0.5; exit 5"))
        async with asyncio.timeout(SOON_SECONDS):
            ended = await runtime.wait_exited(container_id)
        assert ended is not None
        assert ended.exit_code == 5
        assert proxy.events_count > 0
    finally:
        await runtime.close()


async def test_an_exit_while_the_event_stream_is_broken_is_learnt_when_it_is_back(
    proxy: EngineProxy, behind_proxy: DockerRuntime, spec: ContainerSpec, docker_client: docker.APIClient
) -> None:
    container_id = await run(behind_proxy, replace(spec, shell="exec sleep 300"))
    waiter = asyncio.create_task(behind_proxy.wait_exited(container_id))
    async with asyncio.timeout(SOON_SECONDS):
        while not proxy.events_count:
            await asyncio.sleep(0.01)
        await proxy.down()
        with pytest.raises(TransientError) as caught:
            await behind_proxy.find(container_id)
        assert caught.value.reason == "ENGINE_UNAVAILABLE"
        docker_client.kill(container_id)
        await proxy.up()
        ended = await waiter
    assert ended is not None
    assert ended.exit_code == 137


async def test_a_log_cut_in_the_middle_is_an_error_and_not_an_end(
    proxy: EngineProxy, behind_proxy: DockerRuntime, spec: ContainerSpec, is_podman: bool
) -> None:
    if is_podman:
        pytest.skip("Podman's log is read from its file: there is no stream that could be cut")
    container_id = await run(behind_proxy, replace(spec, shell="echo begun; exec sleep 300"))
    pieces = behind_proxy.read_log(container_id, follow=True)
    async with asyncio.timeout(SOON_SECONDS):
        assert await anext(pieces) == b"begun\n"
        proxy.cut()
        with pytest.raises(TransientError):
            await anext(pieces)


async def test_a_create_whose_answer_was_lost_gives_the_container_that_was_made(
    proxy: EngineProxy, behind_proxy: DockerRuntime, spec: ContainerSpec, node_id: str
) -> None:
    await behind_proxy.facts()
    proxy.loses_next_create = True
    container_id = await behind_proxy.create(spec)
    assert [state.id for state in await behind_proxy.list_owned(node_id)] == [container_id]
    assert not proxy.loses_next_create


async def test_a_container_that_the_engine_cannot_describe_is_listed_with_its_owner(
    proxy: EngineProxy, behind_proxy: DockerRuntime, spec: ContainerSpec, node_id: str
) -> None:
    task_id = spec.name.split(".")[1]
    named = replace(spec, labels={**spec.labels, labels.TASK_ID: task_id, labels.ATTEMPT: "1"})
    broken = await behind_proxy.create(named)
    whole = await behind_proxy.create(replace(spec, name=f"{spec.name}0"))
    proxy.cannot_describe = broken
    with pytest.raises(NodeFaultError):
        await behind_proxy.find(broken)
    listed = {state.id: state for state in await behind_proxy.list_owned(node_id)}
    assert set(listed) == {broken, whole}
    assert (listed[broken].name, listed[broken].status) == (named.name, "created")
    assert identity(listed[broken]) == AttemptId(task_id)


async def test_without_an_engine_every_call_is_transient_and_works_once_there_is_one(
    proxy: EngineProxy, behind_proxy: DockerRuntime, spec: ContainerSpec, node_id: str
) -> None:
    await proxy.down()
    for call in (
        behind_proxy.facts(),
        behind_proxy.create(spec),
        behind_proxy.start("0" * 64),
        behind_proxy.find("x1"),
        behind_proxy.stop("0" * 64, grace_seconds=0),
        behind_proxy.kill("0" * 64),
        behind_proxy.remove("0" * 64),
        behind_proxy.list_owned(node_id),
        read(behind_proxy, "0" * 64, follow=True),
    ):
        with pytest.raises(TransientError) as caught:
            await call
        assert caught.value.reason == "ENGINE_UNAVAILABLE"
    await proxy.up()
    assert (await behind_proxy.facts()).name
