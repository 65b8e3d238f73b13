"""Which GPUs of a node would do for a task, and whether enough of them are free: pure, from what the node told last.

The node has the last word. This keeps a task from being offered where it can't go, and refuses what no node could ever
hold; so where something can't be known here, the answer is yes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nodeservice.master.request import GpuWish
from nodeservice.task_bounds import capability_of
from nodeservice.wire import master_worker_pb2 as pb

_WELL = "WELL"
_MOST_SLICES = 7
_FEWER_SLICES = (4, 2)
"""Compute slices of GPUs that can be split by MIG: an A100 and all of its kind have 7, an A30 has 4, an RTX PRO 5000 2."""
_ROUNDING_MILLI = 20
"""The halves of a GPU that MIG makes are a little less than half."""
_PROFILE = re.compile(r"(?:([0-9])c\.)?([0-9])g\.")
_NAMES_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A GPU that is not split, or a MIG instance. `held_milli` of it are given away; `unwell`: why it takes nothing now."""

    uuid: str
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int] = (0, 0)
    mig_profile: str = ""
    memory_milli: int = 1000
    """Of a MIG instance: its part of its GPU."""
    counts: bool = True
    unwell: str = ""
    held_milli: int = 0
    share_methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuRoom:
    """All that a node has for tasks. `trouble`: why it may have more than it can tell, in words."""

    units: tuple[Unit, ...] = ()
    trouble: str = ""

    def could(self, wish: GpuWish) -> bool:
        """Whether it fits with nothing given away and all of them well."""
        if self.trouble and not self.units:
            return True
        suitable = [unit for unit in self.units if _suits(unit, wish)]
        return len(suitable) >= (1 if wish.is_part else wish.count)

    def free(self, wish: GpuWish) -> list[Unit]:
        """All that would do and are to be had now, those first that are the least loss."""
        now = [
            unit
            for unit in self.units
            if not unit.unwell and _suits(unit, wish) and unit.held_milli + _needed(unit, wish) <= 1000
        ]
        return sorted(now, key=lambda unit: _loss(unit, wish))

    def taking(self, wish: GpuWish) -> GpuRoom | None:
        """What is left after it has taken the best ones; None where they are not to be had now."""
        number = 1 if wish.is_part else wish.count
        chosen = {unit.uuid: _needed(unit, wish) for unit in self.free(wish)[:number]}
        if len(chosen) < number:
            return None
        units = (replace(unit, held_milli=unit.held_milli + chosen.get(unit.uuid, 0)) for unit in self.units)
        return GpuRoom(tuple(units), self.trouble)

    def loss(self, wish: GpuWish) -> tuple[bool, int]:
        """How much it would be a pity here, to compare nodes: whether a GPU is begun that was whole, and memory taken."""
        if wish.takes_any:
            return False, 0
        chosen = self.free(wish)[: max(1, wish.count)]
        return any(_loss(unit, wish)[0] for unit in chosen), sum(unit.memory_bytes for unit in chosen)

    def never_words(self, wish: GpuWish) -> str:
        """Why not, in the form "has …"."""
        suitable = sum(_suits(unit, wish) for unit in self.units)
        names = list(dict.fromkeys(unit.name for unit in self.units))
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
        if not names:
            return "has no GPU"
        if wish.is_part and any(_will_do(unit, wish) for unit in self.units):
            return f"can keep no task to such a part of its GPUs ({shown})"
        return f"has {suitable} that will do, of {len(self.units)} ({shown})"

    def busy_words(self, wish: GpuWish) -> str:
        if self.trouble and not self.units:
            return f"can give none now: {self.trouble}"
        unwell = [unit for unit in self.units if unit.unwell and _suits(unit, wish)]
        out = f"; {len(unwell)} out of service, such as {unwell[0].uuid}: {unwell[0].unwell}" if unwell else ""
        return f"has {len(self.free(wish))} free now{out}"


# ---- what will do ------------------------------------------------------------------------------------------------------


def _suits(unit: Unit, wish: GpuWish) -> bool:
    if wish.is_part:
        return _will_do(unit, wish) and _can_be_parted(unit, wish)
    kind = unit.mig_profile == wish.mig_profile if wish.mig_profile else unit.counts or unit.uuid in wish.uuids
    return kind and _will_do(unit, wish)


def _will_do(unit: Unit, wish: GpuWish) -> bool:
    return (
        (not wish.uuids or unit.uuid in wish.uuids)
        and wish.model.lower() in unit.name.lower()
        and unit.memory_bytes >= wish.min_memory_bytes
        and unit.compute_capability >= wish.min_compute_capability
    )


def _can_be_parted(unit: Unit, wish: GpuWish) -> bool:
    """Whether somebody keeps a task to such a part of it, or the operator takes parts that are only watched."""
    if wish.part_memory_bytes > unit.memory_bytes:
        return False
    if unit.mig_profile:
        compute_milli = _compute_milli(unit) + _ROUNDING_MILLI
        return unit.memory_milli + _ROUNDING_MILLI >= wish.part_milli and compute_milli >= max(
            wish.part_milli, 10 * wish.part_sm_percent
        )
    if "mps" in unit.share_methods:
        return True
    if "watched" in unit.share_methods:
        return not wish.part_sm_percent
    return "driver" in unit.share_methods and not (wish.part_milli or wish.part_sm_percent)


def _compute_milli(unit: Unit) -> int:
    """From a profile such as 2g.35gb or 1c.3g.71gb; of one that can't be read, all of it.

    A node does not tell how many slices the whole has: where the part of the memory goes with fewer than most have, so does
    the part of the compute.
    """
    found = _PROFILE.match(unit.mig_profile)
    if found is None:
        return 1000
    of_memory, of_compute = int(found[2]), int(found[1] or found[2])
    fewer = (count for count in _FEWER_SLICES if unit.memory_milli + _ROUNDING_MILLI >= of_memory * 1000 // count)
    return min(1000, of_compute * 1000 // min(fewer, default=_MOST_SLICES))


def _needed(unit: Unit, wish: GpuWish) -> int:
    """Thousandths of a unit that suits."""
    if not wish.is_part or unit.mig_profile:
        return 1000
    wanted = wish.part_memory_bytes or unit.memory_bytes * wish.part_milli // 1000
    return -(-wanted * 1000 // max(1, unit.memory_bytes))


def _loss(unit: Unit, wish: GpuWish) -> tuple[bool, int, str]:
    """Of parts: a GPU that is whole stays whole while another is begun, or a MIG instance is free; the fullest first.

    Of whole ones: the least capable first. As the node chooses, as far as that can be known here.
    """
    if not wish.is_part:
        return False, unit.memory_bytes, unit.uuid
    left = unit.memory_bytes * (1000 - unit.held_milli) // 1000
    return not unit.mig_profile and unit.held_milli == 0, left, unit.uuid


# ---- from the wire -----------------------------------------------------------------------------------------------------


def units_told(infos: Sequence[pb.GpuInfo]) -> tuple[Unit, ...] | None:
    """What can be leased of what a node listed; None from a node that does not tell (its entries have no state)."""
    if not infos or not all(info.state for info in infos):
        return None
    whole = {info.uuid: info for info in infos}
    return tuple(_unit(info, whole.get(info.parent_uuid)) for info in infos if info.leasable)


def _unit(info: pb.GpuInfo, parent: pb.GpuInfo | None) -> Unit:
    whole_bytes = parent.memory_total_bytes if parent is not None else info.memory_total_bytes
    return Unit(
        uuid=info.uuid,
        name=info.name,
        memory_bytes=max(0, info.memory_total_bytes - info.memory_reserved_bytes),
        compute_capability=capability_of(info.compute_capability) or (0, 0),
        mig_profile=info.mig_profile,
        memory_milli=min(1000, info.memory_total_bytes * 1000 // max(1, whole_bytes)),
        counts=info.counted,
        unwell="" if info.state == _WELL else info.state_reason or info.state,
        held_milli=min(1000, max(0, info.held_milli)),
        share_methods=tuple(info.share_methods),
    )


def room_of(
    units: tuple[Unit, ...], trouble: str, *, untold: Iterable[GpuWish], ended: Iterable[pb.RunningTask]
) -> GpuRoom:
    """What the node told, less what `untold` tasks take that were given to it since, more what `ended` ones held."""
    back: dict[str, int] = {}
    for task in ended:
        for uuid in task.gpu_uuids:
            # A node can send any number, NaN too, which this makes 0.
            part = 1.0 if len(task.gpu_uuids) > 1 else min(1.0, max(0.0, task.gpu_allocated))
            back[uuid] = back.get(uuid, 0) + round(part * 1000)
    room = GpuRoom(
        tuple(replace(unit, held_milli=max(0, unit.held_milli - back.get(unit.uuid, 0))) for unit in units), trouble
    )
    for wish in untold:
        # One that finds no place here is the node's to refuse.
        room = room.taking(wish) or room
    return room
