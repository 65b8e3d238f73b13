"""The script of the fake runtime: what tests of the lifecycle make it do."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from nodeservice.core.model import MIB, PullPolicy
from nodeservice.errors import TransientError
from nodeservice.ports import ContainerSpec
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime

SPEC = ContainerSpec(
    name="nodeservice.t.1",
    image="demo",
    argv=None,
    shell=None,
    env=(),
    labels={},
    cpu_milli=1,
    memory_bytes=MIB,
    pids_limit=1,
    mounts=(),
    gpu_uuids=(),
    log_max_bytes=MIB,
    grace_seconds=1,
)


async def test_many_waiters_for_one_image_make_one_pull_and_the_last_to_leave_ends_it() -> None:
    runtime = FakeRuntime(images={"demo": FakeImage(is_local=False, pull_holds=True)})
    waiters = [asyncio.create_task(runtime.pull("demo", policy=PullPolicy.IF_NOT_PRESENT)) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiters[0].cancel()
    runtime.release_pulls()
    done = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert done[1] == done[2]
    assert runtime.pull_counts["demo"] == 1


async def test_a_failure_is_raised_once_by_the_method_it_is_meant_for() -> None:
    runtime = FakeRuntime()
    runtime.fail_next("create", TransientError("no", reason="ENGINE_UNAVAILABLE"))
    with pytest.raises(TransientError):
        await runtime.create(SPEC)
    assert await runtime.create(SPEC)
    assert [method for method, _ in runtime.calls] == ["create", "create"]


async def test_a_log_that_is_made_to_break_gives_its_first_half() -> None:
    runtime = FakeRuntime(images={"demo": FakeImage(output=b"0123456789")})
    container_id = await runtime.create(SPEC)
    await runtime.start(container_id)
    runtime.fail_next("read_log", TransientError("cut", reason="LOG_STREAM_BROKEN"))
    pieces = runtime.read_log(container_id, follow=True)
    assert await anext(pieces) == b"01234"
    with pytest.raises(TransientError):
        await anext(pieces)


async def test_a_wait_outlasts_an_engine_that_is_away() -> None:
    runtime = FakeRuntime(images={"demo": FakeImage(holds=True)})
    container_id = await runtime.create(SPEC)
    await runtime.start(container_id)
    waiter = asyncio.create_task(runtime.wait_exited(container_id))
    await asyncio.sleep(0)
    runtime.unavailable = True
    with pytest.raises(TransientError):
        await runtime.find(container_id)
    runtime.finish(container_id, 9, oom_killed=True)
    await asyncio.sleep(0)
    assert not waiter.done()
    runtime.unavailable = False
    state = await waiter
    assert state is not None
    assert (state.exit_code, state.oom_killed) == (9, True)


async def test_output_written_while_it_runs_reaches_every_follower() -> None:
    runtime = FakeRuntime(images={"demo": FakeImage(holds=True, output=b"a")})
    container_id = await runtime.create(replace(SPEC, name="nodeservice.u.1"))
    await runtime.start(container_id)

    async def follow() -> bytes:
        return b"".join([piece async for piece in runtime.read_log(container_id, follow=True)])

    followers = [asyncio.create_task(follow()) for _ in range(2)]
    await asyncio.sleep(0)
    runtime.write(container_id, b"b")
    await asyncio.sleep(0)
    runtime.finish(container_id)
    assert await asyncio.gather(*followers) == [b"ab", b"ab"]
