"""An engine that is restarted, killed, frozen or cut off from power under a real node: what is told of the tasks is true."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nodeservice.journal.sqlite import JOURNAL_NAME, SqliteJournal
from tests.conftest import remove_cgroup
from tests.integration.docker_daemon import IMAGE, require_docker_daemon
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldClient, OldMaster
from tests.integration.own_engine import OwnEngine, own_engine

pytestmark = [pytest.mark.engine, pytest.mark.crash, pytest.mark.timeout(120)]

SLEEPS = "exec sleep 600"
OBEYS = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
IS_DEAF = "trap '' TERM; while :; do sleep 0.05; done"
COUNTS = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line $i; sleep 0.05; done; exit 3"
WAITS = "while [ ! -e /results/go ]; do sleep 0.05; done; touch /results/gone"
"""Until `Bench.let_go`."""
SLOW_RUNC = """#!/bin/sh
{runc} "$@"
code=$?
for word in "$@"; do
    if [ "$word" = start ]; then
        tries=0
        while [ ! -e {goes_on} ] && [ $tries -lt 600 ]; do sleep 0.05; tries=$((tries + 1)); done
    fi
done
exit $code
"""
"""The command runs, and who asked for that hears of it late."""
QUICK = {
    "NODESERVICE_RELIST_SECONDS": "1",
    "NODESERVICE_DEFAULT_GRACE_SECONDS": "1",
    "NODESERVICE_CONNECT_BACKOFF_MAX_SECONDS": "1",
    "NODESERVICE_REPORT_BACKOFF_MAX_SECONDS": "1",
}


class Bench:
    """A node on an engine of the test's own, and the master that it reports to."""

    def __init__(self, engine: OwnEngine, node: NodeProcess, master: OldMaster) -> None:
        self.engine = engine
        self.node = node
        self.master = master

    async def begin(self, **commands: str) -> None:
        """Assign tasks of these names, and wait until each container runs."""
        await self.assign(**commands)
        await self.until_running(*commands)

    async def assign(self, **commands: str) -> None:
        async with OldClient(self.node.address) as client:
            for name, command in commands.items():
                assert (await client.assign(task_id=name, docker_image=IMAGE, command=command)).success

    async def until_running(self, *names: str) -> None:
        """Or have ended already: a busy machine may bring one to its end before it starts another."""
        async with asyncio.timeout(30):
            while True:
                running = await asyncio.to_thread(self._running)
                ended = {event["task_id"] for event in self.finished()}
                if all(f"/nodeservice.{name}.1" in running or name in ended for name in names):
                    return
                await asyncio.sleep(0.05)

    async def let_go(self, *names: str) -> None:
        """Let tasks that wait go on; returns when they have."""
        results = [self.node.path / "state" / "tasks" / f"{name}.1" / "results" for name in names]
        for one in results:
            (one / "go").touch()
        async with asyncio.timeout(30):
            while not all((one / "gone").exists() for one in results):
                await asyncio.sleep(0.02)

    async def until_stopped(self, *names: str) -> None:
        """Until the engine itself has noted that each has ended."""
        async with asyncio.timeout(30):
            while any([(await asyncio.to_thread(self.state, name))["Running"] for name in names]):
                await asyncio.sleep(0.05)

    def _running(self) -> set[str]:
        with self.engine.client() as client:
            return {name for entry in client.containers() for name in entry["Names"]}

    def state(self, name: str) -> Mapping[str, Any]:
        with self.engine.client() as client:
            found: Mapping[str, Any] = client.inspect_container(f"nodeservice.{name}.1")["State"]
            return found

    async def ended(self, *names: str) -> dict[str, tuple[str, str, int | None]]:
        """Status reported, reason and exit code of each; each was reported once."""
        found = {}
        for name in names:
            report = await self.master.report_of(name, 60)
            async with asyncio.timeout(30):
                while not (told := [event for event in self.finished() if event["task_id"] == name]):
                    await asyncio.sleep(0.02)
            found[name] = (report.status, str(told[0]["reason"]), told[0].get("exit_code"))
            assert self.master.count(name) == 1
        return found

    def finished(self) -> list[dict[str, Any]]:
        return [event for event in self.node.events() if event.get("event") == "task.finished"]


@contextlib.asynccontextmanager
async def bench(
    path: Path, *, home: Path | None = None, env: Mapping[str, str] | None = None, **config: Any
) -> AsyncIterator[Bench]:
    """`home` is where the engine's folder is made; `config` goes to the engine."""
    require_docker_daemon()
    node_id = f"own-{uuid.uuid4().hex[:8]}"
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(_remove_cgroups, node_id)
        engine = await stack.enter_async_context(own_engine(home, **config))
        master = await OldMaster().start()
        stack.push_async_callback(master.stop)
        node = NodeProcess(path / "node", node_id, ("--master", f"127.0.0.1:{master.port}"))
        node.env |= {"NODESERVICE_DOCKER_HOST": engine.url, **QUICK, **(env or {})}
        await node.start()
        stack.push_async_callback(node.stop)
        yield Bench(engine, node, master)


def _remove_cgroups(node_id: str) -> None:
    for cgroup in Path("/sys/fs/cgroup").glob(f"*/nodeservice/{node_id}.node"):
        remove_cgroup(cgroup)


@pytest.mark.parametrize("crash", [False, True], ids=["shut down", "killed"])
async def test_with_live_restore_tasks_go_on_with_a_whole_log_and_their_own_exit(tmp_path: Path, crash: bool) -> None:
    async with bench(tmp_path, live_restore=True) as on:
        # What is printed last before a task's end is lost by the engine itself if it is away then.
        counts = f"i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line $i; sleep 0.05; done; {WAITS}; echo end; exit 3"
        await on.begin(counts=counts, short="sleep 0.7; exit 4", killed="sleep 1; kill -9 $$")
        await asyncio.to_thread(on.engine.crash if crash else on.engine.stop)
        await asyncio.sleep(1)
        await asyncio.to_thread(on.engine.start)
        await on.let_go("counts")
        ended = await on.ended("counts", "short", "killed")
        log = (await on.master.report_of("counts")).logs
    assert ended == {
        "counts": ("failed", "EXIT_NONZERO", 3),
        "short": ("failed", "EXIT_NONZERO", 4),
        "killed": ("failed", "EXIT_NONZERO", 137),
    }
    assert log.split("\n")[:-1] == [*(f"line {number}" for number in range(1, 61)), "end"]


async def test_tasks_that_a_shut_down_engine_ended_are_its_fault_whatever_their_exit_code(tmp_path: Path) -> None:
    async with bench(tmp_path) as on:
        await on.begin(sleeps=SLEEPS, obeys=OBEYS, deaf=IS_DEAF)
        await on.assign(before="exit 137")
        assert await on.ended("before") == {"before": ("failed", "EXIT_NONZERO", 137)}
        await on.engine.restart()
        ended = await on.ended("sleeps", "obeys", "deaf")
        assert ended == {
            "sleeps": ("failed", "ENGINE_FAULT", 143),
            "obeys": ("failed", "ENGINE_FAULT", 0),
            "deaf": ("failed", "ENGINE_FAULT", 137),
        }
        await on.assign(after="sleep 0.1; exit 143")
        assert await on.ended("after") == {"after": ("failed", "EXIT_NONZERO", 143)}


async def test_after_a_killed_engine_only_what_the_next_one_ended_is_its_fault(tmp_path: Path) -> None:
    async with bench(tmp_path) as on:
        await on.begin(sleeps=SLEEPS, obeys=OBEYS, ends=f"{WAITS}; exit 3", well=WAITS, killed=f"{WAITS}; kill -9 $$")
        await asyncio.to_thread(on.engine.crash)
        await asyncio.sleep(0.5)
        await on.let_go("ends", "well", "killed")
        await asyncio.sleep(2)
        await asyncio.to_thread(on.engine.start)
        ended = await on.ended("sleeps", "obeys", "ends", "well", "killed")
    assert ended == {
        "sleeps": ("failed", "ENGINE_FAULT", 143),
        "obeys": ("failed", "ENGINE_FAULT", 0),
        "ends": ("failed", "EXIT_NONZERO", 3),
        "well": ("success", "COMPLETED", 0),
        "killed": ("failed", "EXIT_NONZERO", 137),
    }


@pytest.mark.parametrize("live_restore", [False, True], ids=["", "live restore"])
async def test_what_a_power_cut_ended_is_not_the_tasks_own_exit(tmp_path: Path, live_restore: bool) -> None:
    async with bench(tmp_path, live_restore=live_restore) as on:
        await on.begin(sleeps=SLEEPS)
        await asyncio.to_thread(on.engine.crash, everything=True)
        await asyncio.to_thread(on.engine.start)
        assert await on.ended("sleeps") == {"sleeps": ("failed", "ENGINE_FAULT", 255)}


async def test_what_a_new_engine_finds_gone_without_a_trace_is_no_success(tmp_path: Path) -> None:
    async with bench(tmp_path, live_restore=True) as on:
        await on.begin(sleeps=SLEEPS)
        await asyncio.to_thread(on.engine.crash, everything=True)
        # As after a daemon that was killed when containerd had forgotten the container on its request.
        shutil.rmtree(on.engine.data_root / "containerd")
        await asyncio.to_thread(on.engine.start)
        assert on.state("sleeps")["ExitCode"] == 0
        assert await on.ended("sleeps") == {"sleeps": ("failed", "ENGINE_FAULT", 0)}


async def test_a_node_that_was_away_as_well_tells_the_same(tmp_path: Path) -> None:
    async with bench(tmp_path) as on:
        await on.begin(sleeps=SLEEPS, deaf=IS_DEAF, ends=f"{WAITS}; exit 3", well=WAITS)
        await on.node.kill()
        await on.let_go("ends", "well")
        await on.until_stopped("ends", "well")
        await on.engine.restart()
        await on.node.start()
        ended = await on.ended("sleeps", "deaf", "ends", "well")
    assert ended == {
        "sleeps": ("failed", "ENGINE_FAULT", 143),
        "deaf": ("failed", "ENGINE_FAULT", 137),
        "ends": ("failed", "EXIT_NONZERO", 3),
        "well": ("success", "COMPLETED", 0),
    }


async def test_tasks_that_ran_when_the_host_was_shut_down_have_not_ended_by_themselves(tmp_path: Path) -> None:
    """The node goes first, so it does not see how the engine ends them: one that obeys leaves the code of a success."""
    systemctl = tmp_path / "bin/systemctl"
    systemctl.parent.mkdir()
    async with bench(tmp_path, env={"PATH": f"{systemctl.parent}:{os.environ['PATH']}"}) as on:
        await on.begin(sleeps=SLEEPS, obeys=OBEYS)
        await on.assign(before="exit 3")
        assert await on.ended("before") == {"before": ("failed", "EXIT_NONZERO", 3)}
        systemctl.write_text("#!/bin/sh\ntest $1 = is-system-running && echo stopping\nexit 1\n")
        systemctl.chmod(0o755)
        assert await on.node.stop() == 0
        await asyncio.to_thread(on.engine.stop)
        systemctl.unlink()
        await _as_of_another_boot(tmp_path / "node/state")
        await asyncio.to_thread(on.engine.start)
        await on.node.start()
        ended = await on.ended("sleeps", "obeys")
        assert ended == {"sleeps": ("failed", "ENGINE_FAULT", 143), "obeys": ("failed", "ENGINE_FAULT", 0)}
        await on.begin(after="sleep 2")
        assert await on.node.stop() == 0
        await on.node.start()
        assert await on.ended("after") == {"after": ("success", "COMPLETED", 0)}


async def _as_of_another_boot(state_dir: Path) -> None:
    """What the node noted when it stopped with the host."""
    journal = SqliteJournal(state_dir / JOURNAL_NAME)
    try:
        (stop,) = json.loads(await journal.get_note("host_stops") or "[]")
        await journal.set_note("host_stops", json.dumps([stop | {"boot_id": "of another boot"}]))
    finally:
        await journal.close()


@pytest.mark.parametrize("then", ["true", "sleep 600"], ids=["ended", "still there"])
@pytest.mark.parametrize("node_too", [False, True], ids=["engine", "engine and node"])
async def test_a_task_whose_engine_was_killed_in_the_middle_of_its_start_is_not_run_twice(
    tmp_path: Path, then: str, node_too: bool
) -> None:
    async with bench(tmp_path) as on:
        goes_on = tmp_path / "goes-on"
        on.engine.programs.mkdir()
        slow = on.engine.programs / "runc"
        slow.write_text(SLOW_RUNC.format(goes_on=goes_on, runc=shutil.which("runc")))
        slow.chmod(0o755)
        await on.assign(begun=f"echo ran >> /results/ran; {then}")
        async with asyncio.timeout(30):
            while not [*(tmp_path / "node/state").rglob("ran")]:
                await asyncio.sleep(0.02)
        await asyncio.to_thread(on.engine.crash)
        if node_too:
            await on.node.kill()
        goes_on.touch()
        await asyncio.to_thread(on.engine.start)
        if node_too:
            await on.node.start()
        assert (await on.ended("begun"))["begun"][:2] == ("failed", "ENGINE_FAULT")
        assert (tmp_path / "node/results/begun/1/ran").read_text() == "ran\n"
        # What ends later finds nothing of the one before in its way.
        await on.assign(after="exit 3")
        assert await on.ended("after") == {"after": ("failed", "EXIT_NONZERO", 3)}
        with on.engine.client() as client:
            assert not client.containers(all=True)


async def test_a_task_whose_start_is_not_answered_has_no_more_time_than_others(tmp_path: Path) -> None:
    async with bench(tmp_path, env={"NODESERVICE_DEFAULT_TIMEOUT_SECONDS": "2"}) as on:
        goes_on = tmp_path / "goes-on"
        on.engine.programs.mkdir()
        slow = on.engine.programs / "runc"
        slow.write_text(SLOW_RUNC.format(goes_on=goes_on, runc=shutil.which("runc")))
        slow.chmod(0o755)
        await on.assign(begun="while echo tick >> /results/ticks; do sleep 0.05; done")
        ticks = tmp_path / "node/state/tasks/begun.1/results/ticks"
        async with asyncio.timeout(30):
            while not ticks.exists():
                await asyncio.sleep(0.02)
        async with asyncio.timeout(25):
            size = -1
            while size != (size := ticks.stat().st_size):
                await asyncio.sleep(0.5)
        goes_on.touch()
        assert (await on.ended("begun"))["begun"][:2] == ("failed", "DEADLINE")


async def test_while_the_engine_hangs_the_node_beats_takes_work_and_loses_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path, env={"NODESERVICE_DEFAULT_TIMEOUT_SECONDS": "60"}) as on:
        await on.begin(counts=COUNTS, cancelled=SLEEPS)
        on.engine.freeze()
        beats = len(on.master.heartbeats)
        async with OldClient(on.node.address) as client:
            assert (await client.cancel("cancelled")).success
            begun = time.monotonic()
            assert (await client.assign(task_id="later", docker_image=IMAGE, command="echo later")).success
            assert time.monotonic() - begun < 5
        await on.master.until(lambda: len(on.master.heartbeats) >= beats + 10, 30)
        await asyncio.sleep(4)  # the task that counts ends meanwhile
        on.engine.thaw()
        ended = await on.ended("counts", "cancelled", "later")
        log = (await on.master.report_of("counts")).logs
    assert ended["counts"] == ("failed", "EXIT_NONZERO", 3)
    assert ended["cancelled"][:2] == ("cancelled", "CANCELLED")
    assert ended["later"] == ("success", "COMPLETED", 0)
    assert log.split("\n")[:-1] == [f"line {number}" for number in range(1, 61)]


async def test_a_node_stops_in_time_while_the_engine_hangs_and_takes_the_task_up_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as on:
        await on.begin(counts=COUNTS)
        on.engine.freeze()
        await asyncio.sleep(1.5)
        begun = time.monotonic()
        assert await on.node.stop() == 0
        stopped_seconds = time.monotonic() - begun
        on.engine.thaw()
        await on.node.start()
        assert await on.ended("counts") == {"counts": ("failed", "EXIT_NONZERO", 3)}
    assert stopped_seconds < 20
