"""A master whose disk is full or read-only says so, tells nobody anything wrong, and goes on when there is room again."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from nodeservice.wire import master_worker_pb2 as pb
from tests.integration.master_process import MasterProcess
from tests.integration.scripted_node import ScriptedNode, eventually
from tests.integration.test_master_cli import run
from tests.integration.test_master_service import Client

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root"),
    pytest.mark.timeout(120),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
async def master(disk: Path, tmp_path: Path) -> AsyncIterator[MasterProcess]:
    running = await MasterProcess(tmp_path, "--state-dir", str(disk)).start()
    yield running
    assert await running.end() == 0


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):
            while True:
                os.write(fd, bytes(4096))
    finally:
        os.close(fd)
    return filler


async def test_a_full_disk_refuses_what_it_cannot_keep_and_loses_nothing(master: MasterProcess, disk: Path) -> None:
    client = Client(master.address)
    async with ScriptedNode(master.address) as node:
        await node.register()
        await node.beat()
        assert (await client.submit("before")).success
        await node.got("before")
        await eventually(lambda: _is_answered(client))
        filler = fill(disk)
        refused = None
        for number in range(200):  # what was allocated already may hold some
            try:
                await client.submit(f"t{number}", env=[], command="x" * 4000)
            except grpc.aio.AioRpcError as error:
                refused = error
                break
        assert refused is not None
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert "full" in (refused.details() or "")
        unknown = f"t{number}"
        ack = await node.report("before", logs="y" * 8000)
        assert (ack.success, "full" in ack.message) == (False, True)
        assert (await client.get("before")).state in ("ASSIGNED", "RUNNING")
        assert await node.beat(), "the node is not sent away"
        filler.unlink()
        assert (await node.report("before", logs="y" * 8000)).success
        assert (await client.get("before")).state == "SUCCEEDED"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.get(unknown)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert (await client.submit(unknown, command="x" * 4000)).success
        await client.channel.close(None)


async def test_results_leave_the_database_room_on_the_disk(master: MasterProcess, disk: Path) -> None:
    client = Client(master.address)
    block = bytes(50_000)

    async def files(count: int) -> AsyncIterator[pb.FileChunk]:
        for number in range(count):
            end = number == count - 1
            yield pb.FileChunk(
                task_id="t", file_path=str(number), data=block, is_last_chunk=True, is_last_file=end, worker_id="w"
            )

    ack = await client.stub.UploadTaskFiles(files(60), timeout=60)
    assert (ack.success, "are kept free" in ack.message) == (False, True), ack.message
    assert (await client.submit("after")).success
    assert (await client.stub.UploadTaskFiles(files(2), timeout=60)).success, "nothing stayed of what was refused"
    await client.channel.close(None)


async def _is_answered(client: Client) -> bool:
    return (await client.get("before")).state != "QUEUED"


async def test_a_read_only_state_directory_is_told_at_start(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = await run("master", "--listen", "127.0.0.1:0", "--insecure", "--state-dir", str(disk / "state"))
    assert done.code == 78
    assert "Read-only file system" in done.err


async def test_a_read_only_database_is_told_at_start(disk: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{disk}/master.sqlite"
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    options = ("--listen", "127.0.0.1:0", "--insecure", "--state-dir", str(tmp_path / "state"), "--database-url", url)
    done = await run("master", *options)
    assert done.code == 69
    assert "unable to open database file" in done.err
