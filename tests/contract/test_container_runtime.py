"""What every ContainerRuntime must do, over the fake and the real engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from nodeservice.core.model import MIB, PullPolicy
from nodeservice.errors import NodeFaultError, RequestError
from nodeservice.ports import ContainerRuntime, ContainerSpec
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime

OUTPUT = b"first\nbad \xff\xfe bytes\nno newline at the end"
SOON_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A runtime, and containers with known behaviour: by the fake's script, or by what a real shell does."""

    runtime: ContainerRuntime
    node_id: str
    images: dict[str, str]
    shells: dict[str, str | None]

    def spec(self, behaviour: str) -> ContainerSpec:
        shell = self.shells[behaviour]
        return ContainerSpec(
            name=f"nodeservice.{behaviour}-{uuid.uuid4().hex[:8]}.1",
            image=self.images[behaviour],
            argv=("/no/such/program",) if shell is None else None,
            shell=shell,
            env=(("GREETING", "hello"),),
            labels={"nodeservice.spec": uuid.uuid4().hex, "nodeservice.task_id": "t"},
            cpu_milli=500,
            memory_bytes=64 * MIB,
            pids_limit=64,
            mounts=(),
            gpu_uuids=(),
            log_max_bytes=MIB,
            grace_seconds=1,
        )

    async def created(self, behaviour: str) -> str:
        return await self.runtime.create(self.spec(behaviour))

    async def started(self, behaviour: str) -> str:
        container_id = await self.created(behaviour)
        await self.runtime.start(container_id)
        return container_id

    async def log(self, container_id: str, *, follow: bool) -> bytes:
        return b"".join([piece async for piece in self.runtime.read_log(container_id, follow=follow)])


SHELLS: dict[str, str | None] = {
    "writes": r"printf 'first\nbad \377\376 bytes\nno newline at the end'",
    "fails": "exit 3",
    "holds": "exec sleep 300",
    "ignores-term": "trap '' TERM; while :; do sleep 0.1; done",
    "no-command": None,
}
FAKE_IMAGES = {
    "writes": FakeImage(output=OUTPUT),
    "fails": FakeImage(exit_code=3),
    "holds": FakeImage(holds=True, inside={("echo", "a b"): "a b\n", ("true",): ""}),
    "ignores-term": FakeImage(holds=True, ignores_term=True),
    "no-command": FakeImage(has_command=False),
}


@pytest.fixture(params=["fake", pytest.param("docker", marks=pytest.mark.engine)])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    runtime: ContainerRuntime
    if request.param == "fake":
        node_id = "node"
        runtime = FakeRuntime(images=FAKE_IMAGES, node_id=node_id)
        images = {name: name for name in SHELLS}
    else:
        from nodeservice.runtime.docker import DockerRuntime

        node_id = request.getfixturevalue("node_id")
        image = request.getfixturevalue("demo_image")
        runtime = DockerRuntime(node_id=node_id, base_url=request.getfixturevalue("engine"), relist_seconds=2)
        images = dict.fromkeys(SHELLS, image)
    yield Bench(runtime=runtime, node_id=node_id, images=images, shells=SHELLS)
    await runtime.close()


async def test_the_facts_name_the_engine_and_its_size(bench: Bench) -> None:
    facts = await bench.runtime.facts()
    assert facts.name
    assert facts.version
    assert facts.cpu_count > 0
    assert facts.memory_bytes > 0


async def test_a_container_runs_from_created_to_exited(bench: Bench) -> None:
    container_id = await bench.created("fails")
    created = await bench.runtime.find(container_id)
    assert created is not None
    assert (created.status, created.has_run, created.exit_code) == ("created", False, None)
    started = await bench.runtime.start(container_id)
    assert started.has_run
    async with asyncio.timeout(SOON_SECONDS):
        ended = await bench.runtime.wait_exited(container_id)
    assert ended is not None
    assert (ended.status, ended.exit_code, ended.oom_killed, ended.error) == ("exited", 3, False, "")
    assert ended.started_at is not None
    assert ended.finished_at is not None
    assert ended.finished_at >= ended.started_at
    assert ended.started_at.tzinfo is not None


async def test_a_container_carries_its_labels_its_node_and_its_limits(bench: Bench) -> None:
    spec = bench.spec("fails")
    state = await bench.runtime.find(await bench.runtime.create(spec))
    assert state is not None
    assert state.name == spec.name
    assert state.labels.items() >= {**spec.labels, "nodeservice.node": bench.node_id}.items()
    assert dict(state.limits) == {
        "cpu_milli": 500,
        "memory_bytes": 64 * MIB,
        "memory_swap_bytes": 64 * MIB,
        "pids_limit": 64,
    }


async def test_a_container_is_found_by_name_and_by_id_and_not_by_a_part_of_either(bench: Bench) -> None:
    spec = bench.spec("fails")
    container_id = await bench.runtime.create(spec)
    for known in (spec.name, container_id):
        found = await bench.runtime.find(known)
        assert found is not None
        assert found.id == container_id
    for unknown in (container_id[:6], spec.name[:-1], "nodeservice.nobody.1", "../x", ""):
        assert await bench.runtime.find(unknown) is None


async def test_a_repeated_create_gives_the_same_container(bench: Bench) -> None:
    spec = bench.spec("fails")
    first, second, third = await asyncio.gather(*(bench.runtime.create(spec) for _ in range(3)))
    assert first == second == third
    assert len(await bench.runtime.list_owned(bench.node_id)) == 1


async def test_a_repeated_create_after_the_run_does_not_let_it_run_again(bench: Bench) -> None:
    spec = bench.spec("fails")
    container_id = await bench.runtime.create(spec)
    await bench.runtime.start(container_id)
    ended = await bench.runtime.wait_exited(container_id)
    assert await bench.runtime.create(spec) == container_id
    again = await bench.runtime.start(container_id)
    assert ended is not None
    assert (again.started_at, again.status) == (ended.started_at, "exited")


async def test_a_name_taken_by_another_request_is_refused(bench: Bench) -> None:
    spec = bench.spec("fails")
    await bench.runtime.create(spec)
    with pytest.raises(RequestError) as caught:
        await bench.runtime.create(replace(spec, labels={"nodeservice.spec": "another"}))
    assert caught.value.reason == "CREATE_FAILED"


async def test_creating_from_an_image_that_is_not_here_is_refused(bench: Bench) -> None:
    with pytest.raises(RequestError) as caught:
        await bench.runtime.create(replace(bench.spec("fails"), image="nodeservice/nowhere:1"))
    assert caught.value.reason == "IMAGE_NOT_FOUND"
    assert await bench.runtime.list_owned(bench.node_id) == []


async def test_a_command_that_does_not_exist_is_told_at_the_start_or_in_the_final_state(bench: Bench) -> None:
    container_id = await bench.created("no-command")
    reason, said = "", ""
    try:
        await bench.runtime.start(container_id)
    except RequestError as error:
        reason = error.reason
    else:
        ended = await bench.runtime.wait_exited(container_id)
        assert ended is not None
        reason, said = f"exit {ended.exit_code}", ended.error
    assert reason == "COMMAND_NOT_FOUND" or (reason == "exit 127" and "/no/such/program" in said)


async def test_starting_a_container_that_is_not_there_is_a_lost_container(bench: Bench) -> None:
    with pytest.raises(NodeFaultError) as caught:
        await bench.runtime.start("0" * 64)
    assert caught.value.reason == "CONTAINER_LOST"


async def test_the_log_has_every_byte_whether_followed_or_read_afterwards(bench: Bench) -> None:
    container_id = await bench.started("writes")
    async with asyncio.timeout(SOON_SECONDS):
        assert await bench.log(container_id, follow=True) == OUTPUT
        await bench.runtime.wait_exited(container_id)
        assert await bench.log(container_id, follow=True) == OUTPUT
        assert await bench.log(container_id, follow=False) == OUTPUT


async def test_reading_the_log_of_a_running_container_without_following_ends(bench: Bench) -> None:
    container_id = await bench.started("holds")
    async with asyncio.timeout(SOON_SECONDS):
        assert await bench.log(container_id, follow=False) == b""


async def test_a_follower_that_is_cancelled_goes_and_another_ends_with_the_container(bench: Bench) -> None:
    container_id = await bench.started("holds")
    cancelled = asyncio.create_task(bench.log(container_id, follow=True))
    staying = asyncio.create_task(bench.log(container_id, follow=True))
    await asyncio.sleep(0.05)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await bench.runtime.kill(container_id)
    async with asyncio.timeout(SOON_SECONDS):
        assert await staying == b""


async def test_the_log_of_a_container_that_is_not_there_is_a_lost_container(bench: Bench) -> None:
    with pytest.raises(NodeFaultError) as caught:
        await bench.log("0" * 64, follow=True)
    assert caught.value.reason == "CONTAINER_LOST"


async def test_a_program_runs_inside_and_its_output_comes_back(bench: Bench) -> None:
    container_id = await bench.started("holds")
    assert await bench.runtime.run_inside(container_id, ("echo", "a b"), timeout_seconds=SOON_SECONDS) == "a b\n"
    assert await bench.runtime.run_inside(container_id, ("true",), timeout_seconds=SOON_SECONDS) == ""


@pytest.mark.parametrize("argv", [("/no/such/program",), ("false",)])
async def test_a_program_that_is_not_there_or_fails_is_told_and_the_container_runs_on(
    bench: Bench, argv: tuple[str, ...]
) -> None:
    container_id = await bench.started("holds")
    with pytest.raises(RequestError) as caught:
        await bench.runtime.run_inside(container_id, argv, timeout_seconds=SOON_SECONDS)
    assert caught.value.reason == "EXEC_FAILED"
    state = await bench.runtime.find(container_id)
    assert state is not None
    assert state.is_running


async def test_nothing_runs_inside_a_container_that_does_not_run(bench: Bench) -> None:
    ended = await bench.started("fails")
    await bench.runtime.wait_exited(ended)
    for container_id in (ended, "0" * 64):
        with pytest.raises(NodeFaultError) as caught:
            await bench.runtime.run_inside(container_id, ("true",), timeout_seconds=SOON_SECONDS)
        assert caught.value.reason == "CONTAINER_LOST"


async def test_many_waiters_all_learn_of_one_exit(bench: Bench) -> None:
    container_id = await bench.started("holds")
    waiters = [asyncio.create_task(bench.runtime.wait_exited(container_id)) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert not any(waiter.done() for waiter in waiters)
    await bench.runtime.kill(container_id)
    async with asyncio.timeout(SOON_SECONDS):
        states = await asyncio.gather(*waiters)
    assert [state and state.exit_code for state in states] == [137] * 5
    assert not any(state.oom_killed for state in states if state)


async def test_a_waiter_of_a_container_that_is_removed_gets_its_end_or_none(bench: Bench) -> None:
    container_id = await bench.started("holds")
    waiter = asyncio.create_task(bench.runtime.wait_exited(container_id))
    await asyncio.sleep(0.05)
    await bench.runtime.remove(container_id)
    async with asyncio.timeout(SOON_SECONDS):
        state = await waiter
    assert state is None or not state.is_running
    assert await bench.runtime.wait_exited(container_id) is None


async def test_a_stop_lets_the_task_end_within_its_grace_period(bench: Bench) -> None:
    container_id = await bench.started("holds")
    async with asyncio.timeout(SOON_SECONDS):
        await bench.runtime.stop(container_id, grace_seconds=20)
    state = await bench.runtime.find(container_id)
    assert state is not None
    assert (state.status, state.exit_code) == ("exited", 143)


async def test_a_task_that_ignores_the_signal_is_killed_after_its_grace_period(bench: Bench) -> None:
    container_id = await bench.started("ignores-term")
    async with asyncio.timeout(SOON_SECONDS):
        await bench.runtime.stop(container_id, grace_seconds=0.5)
    state = await bench.runtime.find(container_id)
    assert state is not None
    assert (state.status, state.exit_code) == ("exited", 137)


async def test_stop_kill_and_remove_of_what_has_ended_or_gone_are_success(bench: Bench) -> None:
    container_id = await bench.started("fails")
    await bench.runtime.wait_exited(container_id)
    await bench.runtime.stop(container_id, grace_seconds=1)
    await bench.runtime.kill(container_id)
    await bench.runtime.remove(container_id)
    await bench.runtime.remove(container_id)
    await bench.runtime.stop(container_id, grace_seconds=1)
    await bench.runtime.kill(container_id)
    assert await bench.runtime.find(container_id) is None


async def test_stop_and_remove_of_one_that_never_started_are_success(bench: Bench) -> None:
    container_id = await bench.created("holds")
    await bench.runtime.stop(container_id, grace_seconds=1)
    await bench.runtime.remove(container_id)
    assert await bench.runtime.find(container_id) is None


async def test_only_containers_of_the_node_are_listed(bench: Bench) -> None:
    running = await bench.started("holds")
    created = await bench.created("fails")
    listed = await bench.runtime.list_owned(bench.node_id)
    assert {state.id: state.status for state in listed} == {running: "running", created: "created"}
    assert await bench.runtime.list_owned("another-node") == []


async def test_an_image_that_is_here_is_not_pulled_and_can_be_created_from_by_its_digest(bench: Bench) -> None:
    spec = bench.spec("fails")
    for policy in (PullPolicy.NEVER, PullPolicy.IF_NOT_PRESENT):
        pulled = await bench.runtime.pull(spec.image, policy=policy)
        assert "sha256:" in pulled.digest
        assert pulled.image_id.startswith("sha256:")
        assert pulled.size_bytes > 0
    assert await bench.runtime.create(replace(spec, image=pulled.digest))


async def test_an_image_is_listed_with_its_name_and_whether_a_container_was_made_from_it(bench: Bench) -> None:
    spec = bench.spec("fails")
    pulled = await bench.runtime.pull(spec.image, policy=PullPolicy.NEVER)
    assert not pulled.is_new
    await bench.runtime.create(spec)
    listed = {image.image_id: image for image in await bench.runtime.list_images()}
    image = listed[pulled.image_id]
    assert pulled.name in image.tags
    assert (image.is_used, image.size_bytes) == (True, pulled.size_bytes)


async def test_removing_an_image_that_is_not_here_is_success(bench: Bench) -> None:
    assert await bench.runtime.remove_image("docker.io/nodeservice/nowhere:1")


async def test_an_image_that_is_not_here_and_must_not_be_pulled_is_not_found(bench: Bench) -> None:
    with pytest.raises(RequestError) as caught:
        await bench.runtime.pull("nodeservice/nowhere:1", policy=PullPolicy.NEVER)
    assert caught.value.reason == "IMAGE_NOT_FOUND"


@pytest.mark.parametrize(
    "image", ["", "UPPER/case", "a b", "x:", "../../etc", "-", "x@sha256:12", "ä", "x" * 10_000_000]
)
async def test_a_name_that_is_no_image_name_is_refused(bench: Bench, image: str) -> None:
    with pytest.raises(RequestError) as caught:
        await bench.runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT)
    assert caught.value.reason == "IMAGE_NOT_FOUND"
    assert len(str(caught.value)) < 1000
