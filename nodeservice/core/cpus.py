"""Which CPUs a task gets that asked for whole cores of its own. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cpu:
    """One logical CPU. `core` names the physical core (hardware threads of one core share it), `numa_node` its memory."""

    numa_node: int
    core: int
    id: int


def pick_cpus(cpus: Sequence[Cpu], free_ids: Iterable[int], count: int) -> tuple[int, ...] | None:
    """`count` of the free CPUs, in ascending order; None where there are too few.

    One NUMA node is preferred, the one that is left with the least; in it, physical cores that are wholly free come first,
    so that no hardware thread is shared with a neighbour while that can be avoided.
    """
    wanted = set(free_ids)
    free = sorted(cpu for cpu in cpus if cpu.id in wanted)
    if len(free) < count:
        return None
    nodes = [list(group) for _, group in groupby(free, key=lambda cpu: cpu.numa_node)]
    fitting = [node for node in nodes if len(node) >= count]
    pool = min(fitting, key=len) if fitting else [cpu for node in sorted(nodes, key=len, reverse=True) for cpu in node]
    picked = _whole_cores_first(cpus, pool, count)
    return tuple(sorted(picked))


def _whole_cores_first(cpus: Sequence[Cpu], pool: Sequence[Cpu], count: int) -> list[int]:
    threads: dict[tuple[int, int], int] = {}
    for cpu in cpus:
        place = (cpu.numa_node, cpu.core)
        threads[place] = threads.get(place, 0) + 1
    cores: dict[tuple[int, int], list[int]] = {}
    for cpu in pool:
        cores.setdefault((cpu.numa_node, cpu.core), []).append(cpu.id)
    whole = [ids for place, ids in cores.items() if len(ids) == threads[place]]
    broken = [ids for place, ids in cores.items() if len(ids) != threads[place]]
    picked: list[int] = []
    # A whole core that is taken whole first; what is left over comes from cores that are shared already.
    for ids in whole:
        if len(ids) <= count - len(picked):
            picked += ids
    for ids in (*broken, *whole):
        picked += [id_ for id_ in ids if id_ not in picked][: count - len(picked)]
    return picked
