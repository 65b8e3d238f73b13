"""Which GPUs a task gets, or why none will do: pure, from what there is and what is leased.

A GPU is leased whole, or in parts by tasks that are kept to their parts. Of those that will do, a task gets the least
capable ones, several of them as close together as can be had, and in a way that leaves the others close together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace

from nodeservice.core.gpu_choice import closest
from nodeservice.core.gpus import HOLDS_COMPUTE, GpuPart, GpuRequest, GpuShare, GpuUnit, ShareMethod
from nodeservice.core.model import GIB, Lease

_ROUNDING_MILLI = 20
"""The halves of a GPU that MIG makes are a little less than half: what the driver keeps comes off once for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuQuestion:
    """`leases` are all that hold GPUs now; `sharing_allowed`: the operator takes parts that are only watched."""

    units: Sequence[GpuUnit]
    leases: Sequence[Lease]
    count: int
    request: GpuRequest
    sharing_allowed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPick:
    uuids: tuple[str, ...]
    part: GpuPart | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLack:
    """Why not, in words. `ever` False: this node could not give it even with nothing leased."""

    words: str
    ever: bool
    available_count: int = 0


def counted(units: Iterable[GpuUnit]) -> int:
    """The GPUs that a task can ask for by count alone, and that are well."""
    return sum(1 for unit in units if unit.counts and not unit.unwell)


def free_count(units: Iterable[GpuUnit], leases: Iterable[Lease]) -> int:
    """Those of them that nobody holds, not even a part."""
    held = _held(leases)
    return sum(1 for unit in units if unit.counts and not unit.unwell and not _is_held(unit, held))


def gpu_lack(question: GpuQuestion) -> GpuLack | None:
    """None when it can be had now."""
    found = _candidates(question)
    return found if isinstance(found, GpuLack) else None


def pick_gpus(question: GpuQuestion) -> GpuPick | GpuLack:
    """As `gpu_lack`, and the choice."""
    found, share = _candidates(question), question.request.share
    if isinstance(found, GpuLack):
        return found
    if share is None:
        return GpuPick(uuids=tuple(unit.uuid for unit in closest(found, question.count)))
    chosen = _tightest(found, question.leases)
    return GpuPick(uuids=(chosen.uuid,), part=_part(chosen, share, question.sharing_allowed))


def _candidates(question: GpuQuestion) -> list[GpuUnit] | GpuLack:
    """All that would do and are free: `count` of them, or for a part any one."""
    request, count = question.request, question.count
    if request.share is not None:
        return _open_for_part(question, request.share)
    suitable = [unit for unit in question.units if _suits(unit, request)] if count else []
    if len(suitable) < count:
        words = f"{count} asked{_described(request)}, this node has {len(suitable)} in all"
        return GpuLack(words=words, ever=False, available_count=len(suitable))
    held = _held(question.leases)
    free = [unit for unit in suitable if not unit.unwell and not _is_held(unit, held)]
    if len(free) < count:
        words = f"{count} asked{_described(request)}, {len(free)} free{_out_of_service(suitable)}"
        return GpuLack(words=words, ever=True, available_count=len(free))
    return free


# ---- whole GPUs and MIG instances --------------------------------------------------------------------------------------


def _suits(unit: GpuUnit, request: GpuRequest) -> bool:
    """For a task that asks for whole units."""
    counts = unit.counts or unit.uuid in request.uuids
    kind = unit.mig_profile == request.mig_profile if request.mig_profile else counts
    return kind and _will_do(unit, request)


def _will_do(unit: GpuUnit, request: GpuRequest) -> bool:
    return (
        (not request.uuids or unit.uuid in request.uuids)
        and request.model.lower() in unit.name.lower()
        and unit.memory_bytes >= request.min_memory_bytes
        and unit.compute_capability >= (request.min_compute_capability or (0, 0))
    )


def _held(leases: Iterable[Lease]) -> set[str]:
    return {uuid for lease in leases for uuid in lease.gpu_uuids}


def _is_held(unit: GpuUnit, held: Set[str]) -> bool:
    """Or the whole GPU is that it is a part of: it was split after a task was granted it."""
    return unit.uuid in held or unit.parent_uuid in held


# ---- parts of a GPU ----------------------------------------------------------------------------------------------------


def _open_for_part(question: GpuQuestion, share: GpuShare) -> list[GpuUnit] | GpuLack:
    request, leases = question.request, question.leases
    parts: dict[str, GpuPart] = {}
    for unit in question.units:
        part = _part(unit, share, question.sharing_allowed)
        if part is not None and _will_do(unit, request):
            parts[unit.uuid] = part
    possible = [unit for unit in question.units if unit.uuid in parts]
    if not possible:
        return GpuLack(words=_no_part(question, share), ever=False)
    open_now = [unit for unit in possible if not unit.unwell and _fits(unit, parts[unit.uuid], leases)]
    if not open_now:
        words = f"{_share_words(share)} asked{_described(request)}, no GPU has that free{_out_of_service(possible)}"
        return GpuLack(words=words, ever=True)
    return open_now


def _tightest(units: Sequence[GpuUnit], leases: Sequence[Lease]) -> GpuUnit:
    """A MIG instance, which keeps best; else a GPU that is shared already. Of each, the one with least left."""
    begun = _held(leases)

    def cost(unit: GpuUnit) -> tuple[bool, bool, int, str]:
        return not unit.mig_profile, unit.uuid not in begun, _memory_left(unit, leases), unit.uuid

    return min(units, key=cost)


def _part(unit: GpuUnit, share: GpuShare, /, sharing_allowed: bool) -> GpuPart | None:
    """What this share comes to on this GPU, and who keeps the task to it; None where nobody may or can."""
    if unit.mig_profile:
        big_enough = (
            unit.memory_bytes >= share.memory_bytes
            and unit.memory_milli + _ROUNDING_MILLI >= share.milli
            and unit.compute_milli + _ROUNDING_MILLI >= max(share.milli, 10 * share.sm_percent)
        )
        has = GpuPart(memory_bytes=unit.memory_bytes, sm_percent=unit.compute_milli // 10, method=ShareMethod.MIG)
        return has if big_enough else None
    memory_bytes = share.memory_bytes or unit.memory_bytes * share.milli // 1000
    if not 0 < memory_bytes <= unit.memory_bytes:
        return None
    for method in unit.share_methods:
        if _is_kept(method, share) or (sharing_allowed and not share.sm_percent):
            # Rounded down, so that eight eighths fit.
            percent = share.sm_percent or min(share.milli, max(1, share.milli // 10))
            return GpuPart(memory_bytes=memory_bytes, sm_percent=percent, method=method)
    return None


def _is_kept(method: ShareMethod, share: GpuShare) -> bool:
    """Whether all that is asked is enforced. Half a GPU is half of its compute too; so many bytes are bytes alone."""
    if method is ShareMethod.WATCHED:
        return False
    return method in HOLDS_COMPUTE or not (share.milli or share.sm_percent)


def _fits(unit: GpuUnit, part: GpuPart, leases: Iterable[Lease]) -> bool:
    holders = [lease for lease in leases if _is_held(unit, {*lease.gpu_uuids})]
    if part.method is ShareMethod.MIG:
        return not holders
    parts = [lease.gpu_part for lease in holders if lease.gpu_part is not None]
    if len(parts) < len(holders):
        return False
    # Beside clients of an MPS server nobody else gets at the GPU, so the compute mode must have changed since.
    if any((other.method is ShareMethod.MPS) != (part.method is ShareMethod.MPS) for other in parts):
        return False
    percent = sum(other.sm_percent for other in parts)
    return part.memory_bytes <= _memory_left(unit, holders) and percent + part.sm_percent <= 100


def _memory_left(unit: GpuUnit, leases: Iterable[Lease]) -> int:
    taken = sum(lease.gpu_part.memory_bytes for lease in leases if lease.gpu_part and unit.uuid in lease.gpu_uuids)
    return unit.memory_bytes - taken


# ---- words -------------------------------------------------------------------------------------------------------------


def _no_part(question: GpuQuestion, share: GpuShare) -> str:
    asked = f"{_share_words(share)} asked{_described(question.request)}"
    candidates = [unit for unit in question.units if _will_do(unit, question.request)]
    if not candidates:
        return f"{asked}, this node has none"
    if not question.sharing_allowed and any(_part(unit, share, sharing_allowed=True) for unit in candidates):
        return f"{asked}, which nothing here can enforce, and sharing that is only watched is off (gpu_sharing)"
    without = replace(share, sm_percent=0)
    if share.sm_percent and any(_part(unit, without, sharing_allowed=True) for unit in candidates):
        return f"{asked}, and nothing here can keep a task to that share of the compute"
    return f"{asked}, no GPU here has that to give"


def _share_words(share: GpuShare) -> str:
    if share.milli:
        return f"{share.milli / 1000:g} of a GPU"
    words = [f"{share.memory_bytes / GIB:g} GiB" if share.memory_bytes else ""]
    words.append(f"{share.sm_percent} % of the SMs" if share.sm_percent else "")
    return " and ".join(filter(None, words)) + " of a GPU"


def _described(request: GpuRequest) -> str:
    capability = request.min_compute_capability
    words = [
        f"model {request.model}" if request.model else "",
        f"MIG profile {request.mig_profile}" if request.mig_profile else "",
        f"at least {request.min_memory_bytes / GIB:g} GiB" if request.min_memory_bytes else "",
        f"compute capability {capability[0]}.{capability[1]} and up" if capability else "",
        f"of {len(request.uuids)} that are named" if request.uuids else "",
    ]
    told = ", ".join(filter(None, words))
    return f" ({told})" if told else ""


def _out_of_service(units: Iterable[GpuUnit]) -> str:
    unwell = [unit for unit in units if unit.unwell]
    if not unwell:
        return ""
    return f"; {len(unwell)} out of service, such as {unwell[0].uuid}: {unwell[0].unwell}"
