"""A mixed batch on two nodes with eight pretended H200 each, live, and everything promised about GPUs is checked.

Tasks ask for 1, 2, 4 and 8 GPUs, for a part of one, or for none. One takes more GPU memory than its part; under another, the
GPU falls off the bus: the master has it tried again on the other node, and the GPU comes back into service later. Master,
nodes, engine, containers and limits are real; the NVIDIA driver is a false one. Exit 0 only if every attempt ended as it
should, no GPU was ever held twice, and what the stand-in for NVIDIA's hook gave to each container is what the node had
leased. Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import grpc  # noqa: E402
from demo_processes import ENDED, START_SECONDS, running  # noqa: E402
from gpu_demo import checks, view  # noqa: E402
from gpu_demo.batch import AGAIN, NODES, SHARING_NODE, Expected, after_the_repair, first_wave  # noqa: E402
from gpu_demo.machines import Machines, Play, machines  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.live import Live  # noqa: E402
from rich.text import Text  # noqa: E402

from nodeservice.testing.false_driver.build import compiler  # noqa: E402
from nodeservice.testing.false_driver.hook import HookCall  # noqa: E402
from nodeservice.wire import master_worker_pb2 as pb  # noqa: E402
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc  # noqa: E402
from tests.conftest import remove_cgroup  # noqa: E402
from tests.integration.docker_daemon import require_docker_daemon  # noqa: E402

BATCH_SECONDS = 150.0
SETTINGS = {
    "NODESERVICE_HEARTBEAT_SECONDS": "0.5",
    "NODESERVICE_GPU_POLL_SECONDS": "0.5",
    "NODESERVICE_GPU_QUARANTINE_SECONDS": "3",
}
GPU_COUNT = 16


@dataclass
class Sight:
    """What a client of the master saw. Instants are seconds since the start of the watch."""

    expected: list[Expected]
    views: dict[str, pb.TaskView] = field(default_factory=dict)
    results: dict[tuple[str, int], pb.TaskResult] = field(default_factory=dict)
    """By task and attempt."""
    out_of_service_at: float | None = None
    back_at: float | None = None


def main() -> int:
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if why := missing():
        console.print(Text(f"this demo cannot run here: {why}", style="red"))
        return 1
    console.print(view.notice())
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(remove_cgroups)  # when the daemon has removed the containers
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-gpu-")))
        world = stack.enter_context(machines())
        client = stack.enter_context(cluster(home, world))
        await_gpus(console, client)
        play = stack.enter_context(Play(world))
        sight = watch(console, client, world, play)
        given = world.hook_calls()
    good, wrongs = judge(console, sight, play, given, world)
    told = (
        "no GPU was held twice, and the hook gave what was leased" if not wrongs else f"{len(wrongs)} things are wrong"
    )
    console.print(
        f"\n{good} of {len(sight.expected)} tasks ended as they should; {told}; {time.monotonic() - began:.0f} s"
    )
    console.print(Text(view.PRETENDED, style="bold"))
    return 1 if wrongs else 0


def missing() -> str:
    """What this host lacks, in words; empty where it lacks nothing."""
    if compiler() is None:
        return "the false driver needs a C compiler; install gcc"
    try:
        require_docker_daemon()
    except pytest.skip.Exception as lack:
        return str(lack)
    return ""


# ---- the cluster ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(home: Path, world: Machines) -> Iterator[pb_grpc.MasterWorkerStub]:
    """A master and a node for each machine, on the daemon with the stand-in hook."""
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(running(home, "master", "--listen", "127.0.0.1:0", "--insecure"))
        for node, driver in world.drivers.items():
            sharing = "watched" if node == SHARING_NODE else "enforced"
            env = SETTINGS | driver.environment | {"DOCKER_HOST": world.daemon.url, "NODESERVICE_GPU_SHARING": sharing}
            options = ("--worker-id", node, "--listen", "127.0.0.1:0", "--insecure", "--master", f"127.0.0.1:{port}")
            stack.enter_context(running(home, "serve", *options, name=node, env=env))
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
        yield pb_grpc.MasterWorkerStub(channel)


def remove_cgroups() -> None:
    """Those of the nodes; the tasks' own are gone by then."""
    for node in NODES:
        for pattern in (f"*/nodeservice/{node}.node", f"nodeservice/{node}.node"):
            for cgroup in Path("/sys/fs/cgroup").glob(pattern):
                remove_cgroup(cgroup)


def await_gpus(console: Console, client: pb_grpc.MasterWorkerStub) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        nodes = client.ListNodes(pb.ListNodesRequest(), timeout=10).nodes
        if sum(node.allocatable.gpu_count for node in nodes) == GPU_COUNT:
            for node in sorted(nodes, key=lambda node: node.worker_id):
                names = {gpu.name for gpu in node.gpus}
                parts = "watched parts too" if node.worker_id == SHARING_NODE else "whole GPUs only"
                console.print(f"{node.worker_id}: {node.allocatable.gpu_count} {', '.join(names)}, {parts}")
            console.print()
            return
        time.sleep(0.1)
    raise SystemExit("the nodes did not tell of their GPUs")


# ---- the batch --------------------------------------------------------------------------------------------------------


def watch(console: Console, client: pb_grpc.MasterWorkerStub, world: Machines, play: Play) -> Sight:
    """Submit, and show live who is where, until all have ended and the GPU that failed is back."""
    sight = Sight([])
    began = time.monotonic()
    for item in first_wave():
        submit(client, item, sight, play)
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        while True:
            now = time.monotonic() - began
            nodes = client.ListNodes(pb.ListNodesRequest(), timeout=10).nodes
            sight.views = {one.task.task_id: one for one in client.ListTasks(pb.ListTasksRequest(), timeout=10).tasks}
            look_at_fault(sight, nodes, play.fault.gpu, now)
            if play.fault.gpu and AGAIN not in play.expected:
                submit(client, after_the_repair(world.places[play.fault.gpu][0]), sight, play)
            live.update(view.progress(now, nodes, sight.expected, sight.views, world))
            if AGAIN in sight.views and all(one.state in ENDED for one in sight.views.values()):
                break
            if now > BATCH_SECONDS or play.failed is not None:
                raise SystemExit(f"the batch did not end in {BATCH_SECONDS:g} s; {play.failed or ''}")
            time.sleep(0.15)
    for item in sight.expected:
        for one in client.GetTask(pb.TaskID(task_id=item.name), timeout=10).attempts:
            which = pb.TaskID(task_id=item.name, attempt=one.attempt)
            sight.results[item.name, one.attempt] = client.GetTask(which, timeout=10).result
    return sight


def submit(client: pb_grpc.MasterWorkerStub, item: Expected, sight: Sight, play: Play) -> None:
    play.expected[item.name] = item
    ack = client.SubmitTask(item.task, timeout=10)
    if not ack.success:
        raise SystemExit(f"{item.name} was refused: {ack.message}")
    sight.expected.append(item)


def look_at_fault(sight: Sight, nodes: Iterable[pb.NodeView], gpu: str, now: float) -> None:
    """Note when the GPU left service, and when it was back."""
    state = next((one.state for node in nodes for one in node.gpus if one.uuid == gpu), "")
    if state == "FAULTY" and sight.out_of_service_at is None:
        sight.out_of_service_at = now
    elif state == "WELL" and sight.out_of_service_at is not None and sight.back_at is None:
        sight.back_at = now


# ---- the end ----------------------------------------------------------------------------------------------------------


def judge(
    console: Console, sight: Sight, play: Play, given: Mapping[str, HookCall], world: Machines
) -> tuple[int, list[str]]:
    """Show how all went; how many tasks ended as they should, and whatever is wrong."""
    calls: dict[tuple[str, int], list[HookCall]] = {}
    for id_, call in given.items():
        calls.setdefault(play.containers.get(id_, ("", 0)), []).append(call)
    attempts = {
        item.name: [
            checks.Attempt(item, number, result, calls.pop((name, number), []))
            for (name, number), result in sight.results.items()
            if name == item.name
        ]
        for item in sight.expected
    }
    everything = [attempt for of_one in attempts.values() for attempt in of_one]
    faults = {name: checks.of_task(of_one, world) for name, of_one in attempts.items()}
    console.print(view.results(everything, faults, world))
    console.print()
    for attempt in everything:
        if attempt.reason != "COMPLETED":
            console.print(Text(f"{attempt.item.name}: {world.named(attempt.result.message)}", style="yellow"))
    again = attempts[AGAIN][-1].result
    console.print(story(sight, play, again, world))
    wrongs = [f"{name}: {fault}" for name, fault in faults.items() if fault]
    wrongs += checks.held_twice(everything)
    if calls:
        wrongs.append("the hook was called for a container of no task")
    if sight.back_at is None or play.fault.gpu not in again.gpu_uuids:
        wrongs.append("the GPU that failed did not come back into service")
    for wrong in wrongs:
        console.print(Text(wrong, style="red"))
    return sum(not fault for fault in faults.values()), wrongs


def story(sight: Sight, play: Play, again: pb.TaskResult, world: Machines) -> Text:
    gpu, left, back = play.fault.gpu, sight.out_of_service_at, sight.back_at
    if not gpu or left is None or back is None:
        return Text("The GPU that was to fail did not leave service and come back.", style="red")
    took = f", then {AGAIN} got it" if gpu in again.gpu_uuids else ""
    return Text(f"{world.named(gpu)} left service after {left:.1f} s and was back {back - left:.1f} s later{took}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # by then all that was started has ended
