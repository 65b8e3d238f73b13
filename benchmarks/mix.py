"""A day of a GPU cluster's tasks packed onto nodes of eight GPUs: what part of the GPUs is at work, beside the ideal.

A simulation: the real ledger and its choice of GPUs (`core.ledger`, `core.gpu_pool`) in simulated time, no container. The
facts of the load are taken from published traces:

* GPUs asked for: Alibaba's cluster trace of 2023 (Weng et al., "Beware of Fragmentation", USENIX ATC 2023, table 1): of all
  tasks 13.3 % none, 37.8 % a part of one, 48.0 % one, 0.2 % two, 0.2 % four, 0.5 % eight.
* Running time: Alibaba PAI's trace of 2020 (Weng et al., "MLaaS in the Wild", USENIX NSDI 2022): median 23 minutes, 90th
  percentile 4.5 hours; here a log-normal distribution through both, cut at a day.
* How they end: Microsoft's Philly trace (Jeon et al., USENIX ATC 2019, table 6): 69.3 % passed, 13.5 % killed, 17.2 %
  unsuccessful; here one that is killed or fails ends at a moment drawn evenly from its running time.

Which part of a GPU a task asks for is not in these: a quarter, a half or three quarters, with equal shares.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from benchmarks.rig.finding import Finding, median
from benchmarks.rig.scale import Scale
from nodeservice.core.gpus import GpuRequest, GpuShare, GpuUnit, ShareMethod
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import GIB, AttemptId, Resources

NODE_COUNT = 8
GPU_COUNT = 8
"""Of each node."""
SIZES = ((0.0, 13.3), (0.5, 37.8), (1, 48.0), (2, 0.2), (4, 0.2), (8, 0.5))
PARTS_MILLI = (250, 500, 750)
MEDIAN_MINUTES, P90_MINUTES = 23.0, 270.0
ENDS = (("passed", 69.3), ("killed", 13.5), ("unsuccessful", 17.2))
DAY_MINUTES = 1440.0
PATIENCE_MINUTES = 60.0
WINDOW = 128
"""So many tasks wait, while there are more to come."""
ABOUT = (
    "Simulated (see benchmarks/mix.py for the sources of sizes, running times and ends): a queue that always has work, "
    f"{NODE_COUNT} nodes of {GPU_COUNT} GPUs, each with the node's real ledger. packed: tasks in order, each on the node "
    "with the least room left; those that don't fit are overtaken, and one that waited an hour gets a node kept for it, as "
    "the reference master does it. in order: nothing is overtaken. whole: as packed, but every part of a GPU is given a "
    "whole one, as by nodes that can't share. The ideal is 1: no GPU ever idle while there is work."
)


@dataclass(frozen=True, kw_only=True)
class _Task:
    name: str
    gpus: float
    minutes: float
    part_milli: int = 0

    @property
    def held(self) -> float:
        """GPUs."""
        return self.part_milli / 1000 if self.part_milli else self.gpus


async def measure(scale: Scale) -> Finding:
    found = Finding(about=ABOUT)
    utilisation: dict[str, list[float]] = {"packed": [], "in order": [], "whole": []}
    for seed in range(scale.pick(2, 15)):
        tasks = _draw(random.Random(seed), scale.pick(1_200, 10_000))
        for arm, samples in utilisation.items():
            samples.append(_simulate(tasks, overtakes=arm != "in order", shares=arm != "whole"))
    for arm, samples in utilisation.items():
        found.add("GPU utilisation", "of 1", "a queue without end", arm, samples, more_is_better=True)
    found.ratios["gpu_utilisation_packed_vs_ideal"] = median(utilisation["packed"])
    found.ratios["gpu_utilisation_packed_vs_in_order"] = median(utilisation["packed"]) / median(utilisation["in order"])
    found.ratios["gpu_utilisation_packed_vs_whole"] = median(utilisation["packed"]) / median(utilisation["whole"])
    return found


def _draw(chance: random.Random, count: int) -> list[_Task]:
    sigma = math.log(P90_MINUTES / MEDIAN_MINUTES) / 1.2816  # the 90th percentile of the normal distribution
    sizes, size_weights = [size for size, _ in SIZES], [share for _, share in SIZES]
    ends, end_weights = [end for end, _ in ENDS], [share for _, share in ENDS]
    tasks = []
    for number in range(count):
        minutes = min(DAY_MINUTES, chance.lognormvariate(math.log(MEDIAN_MINUTES), sigma))
        if chance.choices(ends, end_weights)[0] != "passed":
            minutes *= chance.random()
        gpus = chance.choices(sizes, size_weights)[0]
        part = chance.choice(PARTS_MILLI) if gpus == 0.5 else 0
        tasks.append(_Task(name=f"x{number}", gpus=gpus, minutes=max(0.1, minutes), part_milli=part))
    return tasks


def _simulate(tasks: list[_Task], *, overtakes: bool, shares: bool) -> float:
    """GPU time that tasks asked for and held, of all GPU time until the queue first ran out of tasks."""
    nodes = [_Node(shares=shares) for _ in range(NODE_COUNT)]
    coming = iter(tasks)
    waiting: list[tuple[float, _Task]] = []
    ending: list[tuple[float, str, float, _Node]] = []
    now = used = 0.0
    while True:
        while len(waiting) < WINDOW:
            task = next(coming, None)
            if task is None:
                not_yet = sum((at - now) * gpus for at, _, gpus, _ in ending)
                return (used - not_yet) / (now * GPU_COUNT * NODE_COUNT)
            waiting.append((now, task))
        kept: _Node | None = None
        for entry in list(waiting):
            since, task = entry
            node = next((one for one in sorted(nodes, key=_left) if one is not kept and one.takes(task)), None)
            if node is not None:
                waiting.remove(entry)
                heapq.heappush(ending, (now + task.minutes, task.name, task.held, node))
                used += task.minutes * task.held
            elif not overtakes:
                break
            elif kept is None and now - since >= PATIENCE_MINUTES:
                kept = max(nodes, key=_left)
        now, name, held, node = heapq.heappop(ending)
        node.gives_back(name, held)


class _Node:
    """A ledger, and what it need not be asked again until something is given back."""

    def __init__(self, *, shares: bool) -> None:
        self._ledger = _ledger()
        self._shares = shares
        self._no_room: set[tuple[float, int]] = set()
        self.left = float(GPU_COUNT)

    def takes(self, task: _Task) -> bool:
        """Lease it if it fits."""
        alike = (task.gpus, task.part_milli if self._shares else 0)
        if alike in self._no_room:
            return False
        request, gpu = _request(task, shares=self._shares)
        if self._ledger.shortfall(request, gpu=gpu) is not None:
            self._no_room.add(alike)
            return False
        self._ledger.grant(AttemptId(task.name), request, gpu=gpu)
        self.left -= task.held
        return True

    def gives_back(self, name: str, held: float) -> None:
        self._ledger.release_compute(AttemptId(name))
        self._ledger.release_disk(AttemptId(name))
        self._no_room.clear()
        self.left += held


def _left(node: _Node) -> float:
    return node.left


def _ledger() -> Ledger:
    everything = Resources(cpu_milli=10**9, memory_bytes=2**60, disk_bytes=2**60, gpu_count=GPU_COUNT)
    return Ledger(everything, _units(), gpu_sharing_allowed=True)


def _request(task: _Task, *, shares: bool) -> tuple[Resources, GpuRequest]:
    if task.part_milli and shares:
        return Resources(cpu_milli=1), GpuRequest(share=GpuShare(milli=task.part_milli))
    return Resources(cpu_milli=1, gpu_count=math.ceil(task.gpus)), GpuRequest()


def _units() -> tuple[GpuUnit, ...]:
    return tuple(
        GpuUnit(uuid=f"GPU-{number}", name="pretended", memory_bytes=80 * GIB, share_methods=(ShareMethod.MPS,))
        for number in range(GPU_COUNT)
    )
