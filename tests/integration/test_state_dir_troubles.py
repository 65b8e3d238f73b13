"""A real node whose state directory is full, read-only or damaged, whose descriptors run out, or whose clock is set."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import sqlite3
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest

from nodeservice.cli.exit_codes import ExitCode
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldClient, OldMaster

pytestmark = [pytest.mark.engine, pytest.mark.crash, pytest.mark.timeout(120)]

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
COUNTS = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo line $i; sleep 0.05; done; exit 3"
WHOLE_LOG = [f"line {number}" for number in range(1, 41)]
ENV = {
    "NODESERVICE_KEEP_FREE_DISK_BYTES": "0",
    "NODESERVICE_RESERVE_DISK_BYTES": "0",
    "NODESERVICE_REPORT_BACKOFF_MAX_SECONDS": "1",
    "NODESERVICE_CONNECT_BACKOFF_MAX_SECONDS": "1",
    "NODESERVICE_RELIST_SECONDS": "1",
}


@pytest.fixture
async def node(tmp_path: Path, node_id: str, demo_image: str, master: OldMaster) -> AsyncIterator[NodeProcess]:
    """Not started yet."""
    made = NodeProcess(tmp_path / "node", node_id, ("--master", f"127.0.0.1:{master.port}"), dict(ENV))
    made.path.mkdir()
    yield made
    if made.process is not None and made.process.returncode is None:
        await made.stop()


@pytest.fixture
def small_state(node: NodeProcess) -> Iterator[Path]:
    """The state directory is a file system of 4 MB."""
    place = node.path / "state"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=4m", "none"):
        yield place


class mounted:  # noqa: N801 (a context manager)
    """A mount that goes at the end, though somebody may still be in it. A skip where none can be made."""

    def __init__(self, place: Path, *arguments: str | Path) -> None:
        self._place = place
        self._arguments = arguments

    def __enter__(self) -> Path:
        if os.geteuid() != 0:
            pytest.skip("a file system of the test's own needs root")
        done = subprocess.run(["mount", *self._arguments, self._place], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return self._place

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self._place], check=True)


def unique(*names: str) -> list[str]:
    """Ids of tasks that no other test on this engine has: containers are called by them."""
    return [f"{name}-{uuid.uuid4().hex[:8]}" for name in names]


async def assign(client: OldClient, task_id: str, command: str) -> Any:
    return await client.assign(task_id=task_id, command=command, req_storage=0.001)


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(b"x" * 4096)


async def running(node: NodeProcess, task_id: str) -> None:
    """Its first output is here."""
    log = node.path / f"state/logs/{task_id}.1.log"
    async with asyncio.timeout(30):
        while not (log.exists() and log.stat().st_size):
            await asyncio.sleep(0.02)


async def finished(node: NodeProcess, task_id: str) -> dict[str, Any]:
    """The last line on it."""
    async with asyncio.timeout(30):
        while True:
            for event in node.events():
                if event["event"] == "task.finished" and event["task_id"] == task_id:
                    return event
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_results_wait_for_the_share_that_they_belong_on(
    node: NodeProcess, master: OldMaster, is_restarted: bool
) -> None:
    """What lies beneath its mount is another disk, and out of sight once the share is back."""
    (task,) = unique("t")
    share = node.path / "results"
    share.mkdir()
    with mounted(share, "-t", "tmpfs", "-o", "size=4m", "none"):
        await node.start()
        async with OldClient(node.address) as client:
            assert (await assign(client, task, "echo it runs; sleep 2; echo mine > /results/a")).success
        await running(node, task)
    if is_restarted:
        await node.kill()
        await node.start()
    async with asyncio.timeout(30):
        while not [event for event in node.events() if event["event"] == "results.not_stored"]:
            await asyncio.sleep(0.05)
    assert list(share.iterdir()) == []
    assert master.count(task) == 0
    with mounted(share, "-t", "tmpfs", "-o", "size=4m", "none"):
        assert (await master.report_of(task, 40)).status == "success"
        assert (share / task / "1" / "a").read_text() == "mine\n"


async def test_a_full_state_directory_loses_nothing_and_takes_nothing(
    node: NodeProcess, small_state: Path, master: OldMaster
) -> None:
    task, early, later = unique("t", "early", "later")
    await node.start()
    async with OldClient(node.address) as client:
        assert (await assign(client, task, COUNTS)).success
        await running(node, task)
        filler = small_state / "filler"
        fill(filler)
        await asyncio.sleep(3)  # it ends meanwhile
        assert master.count(task) == 0
        beats = len(master.heartbeats)
        refused = await assign(client, early, "true")
        assert not refused.success
        await master.until(lambda: len(master.heartbeats) >= beats + 4, 20)
        filler.unlink()
        report = await master.report_of(task, 40)
        async with asyncio.timeout(40):
            while not (await assign(client, later, "true")).success:
                await asyncio.sleep(0.2)
        assert (await master.report_of(later, 30)).status == "success"
    assert (report.status, (await finished(node, task))["exit_code"]) == ("failed", 3)
    assert report.logs.split("\n")[:-1] == WHOLE_LOG
    assert master.count(task) == 1
    assert any(word in refused.message for word in ("journal", "disk"))


async def test_a_state_directory_that_turns_read_only_stops_reports_and_work_until_it_is_repaired(
    node: NodeProcess, master: OldMaster, tmp_path: Path, docker_client: docker.APIClient
) -> None:
    """As the kernel does with a file system in which it has found an error."""
    task, early = unique("t", "early")
    if shutil.which("mke2fs") is None:
        pytest.skip("NO mke2fs here, no file system can be made: install e2fsprogs (make test-deps)")
    image, place = tmp_path / "image", node.path / "state"
    place.mkdir()
    with image.open("wb") as stream:
        stream.truncate(32 * 1024**2)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
    with mounted(place, "-t", "ext4", "-o", "loop,errors=remount-ro", image):
        await node.start()
        async with OldClient(node.address) as client:
            assert (await assign(client, task, COUNTS)).success
            await running(node, task)
            subprocess.run(["mount", "-o", "remount,abort", place], check=False, capture_output=True)
            with pytest.raises(OSError, match="Read-only"):
                (place / "probe").write_text("x")
            async with asyncio.timeout(60):
                while docker_client.inspect_container(f"nodeservice.{task}.1")["State"]["Running"]:
                    await asyncio.sleep(0.1)
            assert not (await assign(client, early, "true")).success
            beats = len(master.heartbeats)
            await master.until(lambda: len(master.heartbeats) >= beats + 4, 20)
        assert master.count(task) == 0
        await node.kill()
    async with asyncio.timeout(
        60
    ):  # a container's namespace may hold it still: mounted again, it would be the same one
        while subprocess.run(["losetup", "-j", image], capture_output=True, check=True).stdout:
            await asyncio.sleep(0.1)
    subprocess.run(["e2fsck", "-p", image], check=False, capture_output=True)
    with mounted(place, "-t", "ext4", "-o", "loop", image):
        await node.start()
        report = await master.report_of(task, 40)
        await node.stop()
    assert (report.status, report.logs.split("\n")[:-1]) == ("failed", WHOLE_LOG)
    assert master.count(task) == 1


async def test_a_node_does_not_start_on_a_read_only_state_directory(node: NodeProcess) -> None:
    place = node.path / "state"
    place.mkdir()
    refused = pytest.raises(AssertionError, match=f"ended with {ExitCode.CONFIG.value}")
    with mounted(place, "-t", "tmpfs", "-o", "size=4m,ro", "none"), refused:
        await node.start()
    assert "cannot be written: Read-only file system" in node.log.read_text()


async def test_a_node_out_of_descriptors_reports_nothing_wrong_and_goes_on_when_it_has_some_again(
    node: NodeProcess, master: OldMaster
) -> None:
    before, after, *during = unique("before", "after", "during-0", "during-1", "during-2")
    await node.start()
    assert node.process is not None
    process = psutil.Process(node.process.pid)
    async with OldClient(node.address) as client:
        assert (await assign(client, before, COUNTS)).success
        await running(node, before)
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds(), hard))
        answers = await asyncio.gather(
            *(assign(client, task_id, "exit 3") for task_id in during), return_exceptions=True
        )
        accepted = [
            task_id for task_id, answer in zip(during, answers, strict=True) if getattr(answer, "success", False)
        ]
        await asyncio.sleep(4)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert process.is_running()
        report = await master.report_of(before, 40)
        ends = [(await master.report_of(task_id, 60)).status for task_id in accepted]
        assert (await assign(client, after, "true")).success
        assert (await master.report_of(after, 30)).status == "success"
    assert (report.status, (await finished(node, before))["exit_code"]) == ("failed", 3)
    assert report.logs.split("\n")[:-1] == WHOLE_LOG
    assert set(ends) <= {"failed"}
    assert {(await finished(node, task_id))["reason"] for task_id in accepted} <= {"EXIT_NONZERO", "NODE_FAULT"}


@pytest.mark.parametrize("jump", ["+90d", "-90d"])
async def test_a_clock_that_is_set_ends_no_task_early_and_none_late(
    jump: str, node: NodeProcess, master: OldMaster, tmp_path: Path
) -> None:
    if not FAKETIME.exists():
        pytest.skip("NO FAKETIME here, a set clock is not tried: apt-get install faketime (make test-deps)")
    faked = tmp_path / "faked"
    faked.write_text("+0d")
    node.env |= {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(faked), "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NODESERVICE_DEFAULT_TIMEOUT_SECONDS": "6",
    }  # fmt: skip
    ends, too_long, after, long_after = unique("ends", "too-long", "after", "long-after")
    await node.start()
    async with OldClient(node.address) as client:
        assert (await assign(client, ends, COUNTS)).success
        assert (await assign(client, too_long, "echo; exec sleep 60")).success
        await running(node, ends)
        await running(node, too_long)
        begun = time.monotonic()
        faked.write_text(jump)
        ended = await master.report_of(ends, 30)
        late = await master.report_of(too_long, 30)
        took_seconds = time.monotonic() - begun
        again = await assign(client, ends, COUNTS)
        assert (await assign(client, long_after, "exec sleep 60")).success
        assert (await assign(client, after, "true")).success
        next_status = (await master.report_of(after, 30)).status
        await master.report_of(long_after, 30)
    assert again.success, "it is remembered, however old it seems"
    assert next_status == "success", "though the engine's clock is not set"
    assert [master.count(task_id) for task_id in (ends, too_long)] == [1, 1]
    assert (ended.status, ended.logs.split("\n")[:-1]) == ("failed", WHOLE_LOG)
    assert late.status == "failed"
    assert (await finished(node, long_after))["seconds"]["run"] > 5
    story = await finished(node, too_long)
    assert story["reason"] == "DEADLINE"
    assert 5 < story["seconds"]["run"] < 20
    assert 3 < took_seconds < 20


async def test_a_damaged_journal_is_refused_with_the_remedy_and_after_it_running_tasks_are_taken_up(
    node: NodeProcess, master: OldMaster
) -> None:
    runs, *done = unique("runs", "done-0", "done-1", "done-2")
    await node.start()
    async with OldClient(node.address) as client:
        for task_id in done:
            assert (await assign(client, task_id, "exit 3")).success
            await master.report_of(task_id)
        assert (await assign(client, runs, "echo; sleep 6; exit 5")).success
        await running(node, runs)
    await node.kill()
    journal = node.path / "state/journal.sqlite"
    with closing(sqlite3.connect(journal)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(journal.read_bytes())
    place = content.index(b'"exit_code":3') + len(b'"exit_code":')
    content[place] ^= 1  # 3 becomes 2
    journal.write_bytes(content)
    known = len(master.reports)
    with pytest.raises(AssertionError, match=f"ended with {ExitCode.CONFIG.value}"):
        await node.start()
    said = node.log.read_text()
    assert "JOURNAL_CORRUPT" in said or "is corrupted" in said
    assert "move journal files out of the state directory" in said
    assert len(master.reports) == known, "nothing is reported from it"
    for path in journal.parent.glob("journal.sqlite*"):
        path.rename(path.with_name(f"kept-{path.name}"))
    await node.start()
    assert (await master.report_of(runs, 40)).status == "failed"
    assert (await finished(node, runs))["exit_code"] == 5
    assert [master.count(task_id) for task_id in (*done, runs)] == [1, 1, 1, 1]
