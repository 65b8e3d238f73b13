"""Whether every task ended as it should, with its own GPUs alone: what is wrong, in words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from gpu_demo.batch import FAULTY, Expected
from gpu_demo.machines import FALLEN_OFF, Machines
from nodeservice.testing.false_driver.hook import HookCall
from nodeservice.wire import master_worker_pb2 as pb

_UUID = re.compile(r"GPU-[0-9a-f-]{36}")


def of_task(item: Expected, result: pb.TaskResult, given: Sequence[HookCall], machines: Machines) -> str:
    """`given` are the calls of the hook for containers of this task."""
    leased = sorted(result.gpu_uuids)
    wanted = 1 if item.is_part else int(item.task.req_gpu)
    limits = json.loads(result.limits_json or "{}")
    held = limits.get("effective", {})
    nodes = {word for word in str(held.get("devices", "")).split() if re.match(r"nvidia\d", word)}
    own = {f"nvidia{number}=195:{number}" for number in (machines.places[gpu][1] for gpu in leased)}
    billed = {gpu.uuid: gpu for gpu in result.usage.gpus}
    wrongs = {
        f"ended as {result.reason} ({result.message}), expected {item.reason}": result.reason != item.reason,
        f"has {len(leased)} GPUs, asked for {wanted}": len(leased) != wanted,
        f"the hook was called {len(given)} times": len(given) != (1 if leased else 0),
        "the hook gave other GPUs than were leased": any(sorted(call.uuids) != leased for call in given),
        f"its receipt says: {'; '.join(limits.get('mismatches', []))}": bool(limits.get("mismatches")),
        f"its container has {' '.join(sorted(nodes)) or 'no GPU'}": nodes != own,
        "the driver showed it other GPUs than were leased": sorted(str(held.get("gpu_uuids", "")).split()) != leased,
        "saw other GPUs than were leased": sorted(_UUID.findall(result.logs)) != leased,
        "its bill lacks a GPU": sorted(billed) != leased or any(not gpu.seconds for gpu in billed.values()),
        "its bill does not tell of the error": item.name == FAULTY
        and not any(FALLEN_OFF in gpu.xids for gpu in billed.values()),
    }
    return "; ".join(words for words, is_so in wrongs.items() if is_so)


def held_twice(expected: Sequence[Expected], results: Mapping[str, pb.TaskResult]) -> list[str]:
    """GPUs that a task had whole while another had it too, from the creation of the container to the end of its run."""
    spans: dict[str, list[tuple[int, int, Expected]]] = {}
    for item in expected:
        result = results[item.name]
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
