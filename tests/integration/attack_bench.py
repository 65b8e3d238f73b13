"""A real node for hostile tasks, and an independent eye on the kernel while they run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker

from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldMaster

MIB = 1024**2
PATIENCE_SECONDS = float(os.environ.get("TEST_PATIENCE_SECONDS", "120"))
"""For one task to end; an emulated machine needs more."""
SLOWNESS = PATIENCE_SECONDS / 120
"""For time that a task itself needs, to do what it is tried with."""
LOOK_AFTER_SECONDS = 10.0
"""For a look that is under way when its report comes."""


@dataclass
class Bench:
    """A real node, and the master that hears of it."""

    node: NodeProcess
    master: OldMaster
    stub: pb_grpc.MasterWorkerStub
    engine: docker.APIClient
    compared: list[str] = field(default_factory=list)
    """Tasks whose receipts were compared with the kernel's files."""
    _looking: dict[str, asyncio.Task[dict[str, object] | None]] = field(default_factory=dict)

    async def assign(self, command: str, **fields: Any) -> str:
        task_id = f"attack-{uuid.uuid4().hex[:8]}"
        wanted: dict[str, Any] = {
            "docker_image": "nodeservice/demo",
            "cpu_milli": 100,
            "memory_bytes": 32 * MIB,
            "disk_bytes": 8 * MIB,
            "pids_limit": 64,
            "grace_seconds": 0.5,
        }
        ack = await self.stub.AssignTask(pb.Task(task_id=task_id, command=command, **(wanted | fields)), timeout=30)
        assert ack.success, ack.message
        self._looking[task_id] = asyncio.create_task(self._look(task_id))
        return task_id

    async def end_of(self, task_id: str) -> pb.TaskResult:
        """Its report, of which the receipt was compared with what the kernel showed here."""
        report = await self.master.report_of(task_id, PATIENCE_SECONDS)
        # The old master parsed it; what it does not know came along.
        result = pb.TaskResult.FromString(report.SerializeToString())
        looking = self._looking.pop(task_id, None)
        if looking is not None:  # what was not seen by now may be gone for ever
            has_run = result.reason not in ("CREATE_FAILED", "COMMAND_NOT_FOUND")
            await asyncio.wait({looking}, timeout=LOOK_AFTER_SECONDS if has_run else 0)
            looking.cancel()
            await asyncio.wait({looking})
        seen = looking.result() if looking is not None and not looking.cancelled() else None
        if result.reason == "COMMAND_NOT_FOUND":
            return result  # it never was what was asked for, so there is no receipt
        if seen is not None:
            told = receipt(result)
            task, of_task = seen.pop("task", None), seen.pop("task_pids_limit", None)
            if Path(told["read_from"]["pids_limit"]).parent == task:
                # The container's own cgroup had gone when the service looked, and it says where it read.
                seen["pids_limit"] = of_task
            held = {name: value for name, value in told["effective"].items() if name in seen}
            # Of the process, unlike its cgroup, the service may have come too late; then it says so.
            assert held == {name: value for name, value in seen.items() if name in held}
            assert seen.keys() - held.keys() <= told["unread"].keys()
            assert held.keys() >= {"cpu_milli", "memory_bytes", "memory_swap_bytes", "pids_limit"}
            assert told["mismatches"] == []
            self.compared.append(task_id)
        return result

    async def _look(self, task_id: str) -> dict[str, object] | None:
        """What the kernel holds for it while it runs; None where it had ended before that could be read."""
        for _ in range(int(PATIENCE_SECONDS * 10)):
            with contextlib.suppress(docker.errors.NotFound):
                state = (await asyncio.to_thread(self.engine.inspect_container, f"nodeservice.{task_id}.1"))["State"]
                if state["Pid"]:
                    with contextlib.suppress(OSError, KeyError, ValueError):
                        return look(state["Pid"])
                if state["FinishedAt"][:4] != "0001":
                    return None
            await asyncio.sleep(0.1)
        return None

    async def run(self, command: str, **fields: Any) -> pb.TaskResult:
        return await self.end_of(await self.assign(command, **fields))

    async def running(self, task_id: str) -> None:
        await self.master.until(
            lambda: any(
                task.task_id == task_id and task.status == "running"
                for beat in self.master.heartbeats[-1:]
                for task in beat.running_tasks
            ),
            PATIENCE_SECONDS,
        )


def receipt(result: pb.TaskResult) -> dict[str, Any]:
    return dict(json.loads(result.limits_json))


def look(pid: int) -> dict[str, object]:
    """The limits of a process, read here from the kernel without any of the service's code."""
    own = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    rows = {line[:25].strip(): line[26:].split()[0] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    facts: dict[str, object] = {"open_files_limit": int(rows["Max open files"])}
    if "memory" in own:
        memory, cpu, pids = (Path(f"/sys/fs/cgroup/{name}{own[name]}") for name in ("memory", "cpu", "pids"))
        quota, period = (int((cpu / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        facts |= {
            "memory_bytes": int((memory / "memory.limit_in_bytes").read_text()),
            "memory_swap_bytes": int((memory / "memory.memsw.limit_in_bytes").read_text()),
            "pids_limit": int((pids / "pids.max").read_text()),
        }
    else:
        container = Path(f"/sys/fs/cgroup{own['']}")
        places = (container, container.parent)  # the task's own above it: whichever is met first
        quota, period = min(
            (tuple(int(word) for word in (place / "cpu.max").read_text().split()) for place in places),
            key=lambda pair: pair[0] / pair[1],
        )
        memory_bytes = min(int((place / "memory.max").read_text()) for place in places)
        swap_bytes = min(int((place / "memory.swap.max").read_text()) for place in places)
        facts |= {
            "memory_bytes": memory_bytes,
            "memory_swap_bytes": memory_bytes + swap_bytes,
            "pids_limit": min(int((place / "pids.max").read_text()) for place in places),
            "task": container.parent,
            "task_pids_limit": int((container.parent / "pids.max").read_text()),
        }
    return facts | {"cpu_milli": round(quota * 1000 / period)}


def escaped(node_id: str) -> str:
    """What shows of it in a path, be it a directory of its name or a slice, which has no dash."""
    return node_id.rpartition("-")[2]


def left_behind(docker_client: docker.APIClient, node: NodeProcess) -> list[str]:
    containers = docker_client.containers(all=True, filters={"label": [f"nodeservice.node={node.worker_id}"]})
    # os.walk, since others' cgroups vanish under it.
    found = (directory for directory, _, _ in os.walk("/sys/fs/cgroup") if escaped(node.worker_id) in directory)
    cgroups = [directory for directory in found if "attack" in Path(directory).name]
    work = [str(path) for path in (node.path / "state/tasks").glob("*")]
    return [entry["Id"] for entry in containers] + cgroups + work


async def nothing_left(docker_client: docker.APIClient, node: NodeProcess) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while left := left_behind(docker_client, node):
            await asyncio.sleep(0.2)
    assert left == []
