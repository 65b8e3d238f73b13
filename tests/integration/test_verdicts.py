"""Why it died, as a matrix on the real engine: each cause is brought about, and told as what it was.

`TEST_VERDICT_REPEATS` repeats the whole.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import docker
import pytest

from nodeservice.limits.hierarchy import host_cgroup_version
from nodeservice.wire import master_worker_pb2 as pb
from tests.integration.attack_bench import MIB, PATIENCE_SECONDS, Bench, nothing_left, receipt

REPEATS = int(os.environ.get("TEST_VERDICT_REPEATS", "1"))
pytestmark = [
    pytest.mark.engine,
    pytest.mark.unseen,
    pytest.mark.timeout(max(1400, 5 * PATIENCE_SECONDS) + 60 * REPEATS),
]
ENDS_TOGETHER = host_cgroup_version() == 2
"""There the kernel ends all of a task that runs out of memory."""
_AT_ONCE = 1 if "TEST_PATIENCE_SECONDS" in os.environ else 5
"""An engine in an emulated machine takes longer to kill one of several than the service waits before it calls that stuck."""
_REPEATS_TOGETHER = 5
_CPU_MILLI = 300
"""Of each: with less, a container's start alone takes seconds."""
SETTLED = "sleep 10; " if ENDS_TOGETHER else ""
"""systemd takes that away at the start, until the service has looked (ADR 12)."""
HOG = "dd if=/dev/zero of=/dev/null bs=300M count=1"


@dataclass(frozen=True, kw_only=True)
class Case:
    """`act` is done to it from outside once it runs. `exit_code` None is any."""

    command: str
    outcome: str
    reason: str
    exit_code: int | None = None
    act: str = ""
    remark: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "own exit 0": Case(command="exit 0", outcome="SUCCEEDED", reason="COMPLETED", exit_code=0),
    "own exit 3": Case(command="exit 3", outcome="FAILED", reason="EXIT_NONZERO", exit_code=3),
    "own exit 137": Case(command="exit 137", outcome="FAILED", reason="EXIT_NONZERO", exit_code=137),
    "own SIGKILL": Case(command="kill -9 $$", outcome="FAILED", reason="EXIT_NONZERO", exit_code=137),
    "foreign SIGKILL": Case(
        command="sleep 600", act="kill", outcome="FAILED", reason="EXIT_NONZERO", exit_code=137
    ),
    "deadline, obeyed": Case(
        command="trap 'exit 0' TERM; while :; do sleep 0.1; done",
        outcome="FAILED", reason="DEADLINE", exit_code=0, fields={"timeout_seconds": 1.0, "grace_seconds": 20.0},
    ),
    "deadline, ignored": Case(
        command="trap '' TERM; while :; do sleep 0.1; done",
        outcome="FAILED", reason="DEADLINE", exit_code=137, fields={"timeout_seconds": 1.0},
    ),
    "cancel": Case(command="sleep 600", act="cancel", outcome="CANCELLED", reason="CANCELLED"),
    "disk": Case(
        command="dd if=/dev/zero of=/f bs=1M count=40 && sleep 600; exit 5", outcome="FAILED", reason="DISK_LIMIT"
    ),
    "own memory": Case(command=f"exec {HOG}", outcome="FAILED", reason="MEMORY_LIMIT", exit_code=137),
    "child's memory, parent succeeds": Case(
        command=f"({HOG}); exit 0", outcome="SUCCEEDED", reason="COMPLETED", exit_code=0, remark="at the memory limit"
    ) if not ENDS_TOGETHER else Case(
        command=f"{SETTLED}({HOG}); exit 0", outcome="FAILED", reason="MEMORY_LIMIT", exit_code=137
    ),
    "child's memory, parent fails": Case(
        command=f"{SETTLED}({HOG}) || exit 7", outcome="FAILED", reason="MEMORY_LIMIT",
        exit_code=137 if ENDS_TOGETHER else 7,
    ),
    "no such command": Case(
        command="", outcome="FAILED", reason="COMMAND_NOT_FOUND", fields={"argv": ["/no/such/program"]}
    ),
}  # fmt: skip


async def test_each_cause_of_death_is_told_as_what_it_was(bench: Bench) -> None:
    agreed: Counter[str] = Counter()
    some = asyncio.Semaphore(_AT_ONCE)

    async def one(name: str) -> str:
        async with some:
            return await play(bench, CASES[name])

    for begun in range(0, REPEATS, _REPEATS_TOGETHER):
        names = [*CASES] * min(_REPEATS_TOGETHER, REPEATS - begun)
        told = await asyncio.gather(*(one(name) for name in names))
        differing = [f"{name}: {words}" for name, words in zip(names, told, strict=True) if words]
        assert differing == []
        agreed.update(names)
        print(f"{begun + len(names) // len(CASES)} of {REPEATS}", flush=True)
    print("\n".join(f"| {name} | {count} of {REPEATS} |" for name, count in agreed.items()))


async def play(bench: Bench, case: Case) -> str:
    """What differs from the case, in words."""
    task_id = await bench.assign(case.command, **({"cpu_milli": _CPU_MILLI} | dict(case.fields)))
    if case.act:
        await bench.running(task_id)
        await act(bench, case.act, task_id)
    result = await bench.end_of(task_id)
    if case is CASES["disk"] and receipt(result)["enforcement"]["disk_bytes"] == "hard":
        case = replace(case, reason="EXIT_NONZERO", exit_code=5)  # it met an error instead
    told = (result.outcome, result.reason, *(() if case.exit_code is None else (result.exit_code,)))
    wanted = (case.outcome, case.reason, *(() if case.exit_code is None else (case.exit_code,)))
    remarked = not case.remark or any(case.remark in remark for remark in result.remarks)
    return "" if told == wanted and remarked else f"{told} {list(result.remarks)} {result.message}"


async def act(bench: Bench, what: str, task_id: str) -> None:
    container = f"nodeservice.{task_id}.1"
    match what:
        case "cancel":
            await bench.stub.CancelTask(pb.TaskID(task_id=task_id), timeout=30)
        case "kill":
            await asyncio.to_thread(bench.engine.kill, container, "SIGKILL")


async def test_a_kill_because_others_left_no_memory_is_not_called_the_tasks_own(
    bench: Bench, docker_client: docker.APIClient
) -> None:
    """The cgroup above the task is shrunk while it runs: as on a host that runs out, the task is within its own limit."""
    for _ in range(REPEATS):
        task_id = await bench.assign("sleep 2; dd if=/dev/zero of=/dev/null bs=48M count=1", memory_bytes=64 * MIB)
        await bench.running(task_id)
        shrink_above(docker_client.inspect_container(f"nodeservice.{task_id}.1")["State"]["Pid"], 20 * MIB)
        result = await bench.end_of(task_id)
        assert (result.outcome, result.reason, result.retryable) == ("FAILED", "HOST_OUT_OF_MEMORY", True)
        await nothing_left(docker_client, bench.node)


def shrink_above(pid: int, memory_bytes: int) -> None:
    """Of the container, the task and the node, the last."""
    places = dict(line.split(":", 2)[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    top, name = (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if "memory" in places else ("/sys/fs/cgroup", "memory.max")
    )
    above = Path(f"{top}{places.get('memory', places.get(''))}").parent.parent
    (above / name).write_text(str(memory_bytes))
