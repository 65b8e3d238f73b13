"""Whether every attempt of every task ended as it should, with its own GPUs alone: what is wrong, in words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gpu_demo.batch import Expected
from gpu_demo.machines import FALLEN_OFF, Machines
from nodeservice.testing.false_driver.hook import HookCall
from nodeservice.wire import master_worker_pb2 as pb

_UUID = re.compile(r"GPU-[0-9a-f-]{36}")


@dataclass(frozen=True, slots=True)
class Attempt:
    """What the master tells of one attempt. `given` are the calls of the hook for its containers."""

    item: Expected
    number: int
    result: pb.TaskResult
    given: Sequence[HookCall]

    @property
    def reason(self) -> str:
        """Why it should have ended."""
        return self.item.reasons[self.number - 1] if self.number <= len(self.item.reasons) else "nothing"


def of_task(attempts: Sequence[Attempt], machines: Machines) -> str:
    """Of all attempts of one task, in their order. Where one follows another, it ran on another node."""
    wanted = len(attempts[0].item.reasons)
    workers = [attempt.result.worker_id for attempt in attempts]
    wrongs = [_of_attempt(attempt, machines) for attempt in attempts]
    if len(attempts) != wanted:
        wrongs.append(f"was tried {len(attempts)} times, expected {wanted}")
    if len(set(workers)) != len(workers):
        wrongs.append(f"was tried again on the same node: {', '.join(workers)}")
    return "; ".join(filter(None, wrongs))


def _of_attempt(attempt: Attempt, machines: Machines) -> str:
    item, result, given = attempt.item, attempt.result, attempt.given
    leased = sorted(result.gpu_uuids)
    wanted = 1 if item.is_part else int(item.task.req_gpu)
    limits = json.loads(result.limits_json or "{}")
    held = limits.get("effective", {})
    nodes = {word for word in str(held.get("devices", "")).split() if re.match(r"nvidia\d", word)}
    own = {f"nvidia{number}=195:{number}" for number in (machines.places[gpu][1] for gpu in leased)}
    billed = {gpu.uuid: gpu for gpu in result.usage.gpus}
    wrongs = {
        f"ended as {result.reason} ({result.message}), expected {attempt.reason}": result.reason != attempt.reason,
        f"has {len(leased)} GPUs, asked for {wanted}": len(leased) != wanted,
        f"the hook was called {len(given)} times": len(given) != (1 if leased else 0),
        "the hook gave other GPUs than were leased": any(sorted(call.uuids) != leased for call in given),
        f"its receipt says: {'; '.join(limits.get('mismatches', []))}": bool(limits.get("mismatches")),
        f"its container has {' '.join(sorted(nodes)) or 'no GPU'}": nodes != own,
        "the driver showed it other GPUs than were leased": sorted(str(held.get("gpu_uuids", "")).split()) != leased,
        "saw other GPUs than were leased": sorted(_UUID.findall(result.logs)) != leased,
        "its bill lacks a GPU": sorted(billed) != leased or any(not gpu.seconds for gpu in billed.values()),
        "its bill does not tell of the error": attempt.reason == "GPU_FAULT"
        and not any(FALLEN_OFF in gpu.xids for gpu in billed.values()),
    }
    which = f"attempt {attempt.number} " if len(item.reasons) > 1 else ""
    return "; ".join(f"{which}{words}" for words, is_so in wrongs.items() if is_so)


def held_twice(attempts: Sequence[Attempt]) -> list[str]:
    """GPUs that a task had whole while another had it too, from the creation of the container to the end of its run."""
    spans: dict[str, list[tuple[int, int, Expected]]] = {}
    for attempt in attempts:
        item, result = attempt.item, attempt.result
        phases = {phase.name: phase for phase in result.phases}
        if "create" in phases and "run" in phases:
            end = phases["run"].started_at_unix_ns + phases["run"].duration_ns
            for gpu in result.gpu_uuids:
                spans.setdefault(gpu, []).append((phases["create"].started_at_unix_ns, end, item))
    found: list[str] = []
    for gpu, runs in spans.items():
        runs.sort(key=lambda run: run[:2])
        for (_, end, one), (begin, _, other) in pairwise(runs):
            if begin < end and not (one.is_part and other.is_part):
                found.append(f"{gpu} was held by {one.name} and by {other.name} at the same time")
    return found
