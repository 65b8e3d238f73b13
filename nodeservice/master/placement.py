"""Choose a node for one request: pure, best fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from nodeservice.master.amounts import LABELS, Amounts, describe, shortage_reason
from nodeservice.master.gpu_fit import GpuRoom
from nodeservice.master.request import Request

_GPUS = "gpu_count"
_NODES_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one node has for tasks. `blocked` says in words why it takes nothing now (silent, draining); empty if it does.

    `gpus` None: the node tells their number alone (an older peer), and decides itself what it can't be asked here.
    """

    worker_id: str
    allocatable: Amounts
    assigned: Amounts = field(default_factory=Amounts)
    blocked: str = ""
    gpus: GpuRoom | None = None
    free: Amounts = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "free", self.allocatable.minus(self.assigned))

    def lacking_ever(self, request: Request) -> tuple[str, ...]:
        """Which resources (keys of `LABELS`) are too small here even with nothing assigned; empty when it fits."""
        return self._lacking(self.allocatable, request, lambda gpus: gpus.could(request.gpus))

    def lacking_now(self, request: Request) -> tuple[str, ...]:
        return self._lacking(self.free, request, lambda gpus: gpus.taking(request.gpus) is not None)

    def taking(self, request: Request) -> Offer:
        """What is left of it with that assigned too."""
        gpus = self.gpus.taking(request.gpus) if self.gpus is not None else None
        return replace(self, assigned=self.assigned.plus(request.amounts), gpus=gpus or self.gpus)

    def _lacking(self, have: Amounts, request: Request, gives: Callable[[GpuRoom], bool]) -> tuple[str, ...]:
        if not request.gpus.is_something:
            has_gpus = True
        else:
            has_gpus = gives(self.gpus) if self.gpus is not None else self._counted(have, request)
        lacking = have.lacking(request.amounts)
        if has_gpus and not lacking:
            return ()
        others = tuple(name for name in lacking if name != _GPUS)
        return others if has_gpus else (*others, _GPUS)

    @staticmethod
    def _counted(have: Amounts, request: Request) -> bool:
        """By number alone. To a peer that knows nothing of parts, one by amounts would be no GPU at all."""
        wish = request.gpus
        if wish.is_part and not wish.part_milli:
            return False
        return have.gpu_count >= max(1, wish.count)


@dataclass(frozen=True, slots=True)
class Choice:
    worker_id: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not now, perhaps later."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class NeverFits:
    """No node that is known now could hold it, even empty."""

    reason: str
    message: str


Placement = Choice | Waiting | NeverFits


def place(
    request: Request,
    offers: Sequence[Offer],
    *,
    target: str = "",
    excluded: Iterable[str] = (),
    reserved: Iterable[str] = (),
    avoid: Iterable[str] = (),
) -> Placement:
    """The node on which the least stays unused, or why there is none.

    `target` restricts to one node. `excluded` are nodes that refused this very task a moment ago; `reserved` are nodes
    kept for a task that has waited longer. Neither makes a request impossible, only late. `avoid` are nodes on which it
    failed before: the others come first.
    """
    if not offers:
        return Waiting("NO_NODE", "no node has registered yet")
    kept, failed_on = frozenset(reserved), frozenset(avoid)
    barred = kept.union(excluded)
    # In the course of time most nodes that a master knows may be gone for good: those are looked at last.
    unblocked = [offer for offer in offers if not offer.blocked]
    willing = [offer for offer in unblocked if can_take(request, offer, target=target, barred=barred)]
    if willing:
        return Choice(min(willing, key=lambda offer: rank(request, offer, failed_on)).worker_id)
    is_meant = [offer for offer in unblocked if not target or offer.worker_id == target]
    awake = [offer for offer in is_meant if not offer.lacking_ever(request)]
    if not awake:
        candidates = [offer for offer in offers if offer.worker_id == target] if target else offers
        if not candidates:
            return Waiting("TARGET_UNKNOWN", f"the target node {target} has not registered")
        able = [offer for offer in candidates if not offer.lacking_ever(request)]
        if not able:
            return _never(request, candidates)
        return Waiting("NODE_UNAVAILABLE", "; ".join(f"node {o.worker_id} {o.blocked}" for o in able[:3]))
    roomy = [offer for offer in awake if not offer.lacking_now(request)]
    if not roomy:
        return _busy(request, awake)
    fitting = [offer for offer in roomy if offer.worker_id not in kept]
    if not fitting:
        return Waiting("RESERVED", "the room there is is kept for a task that has waited longer")
    return Waiting("NODE_REFUSED", f"node {fitting[0].worker_id} refused it a moment ago; it is asked again")


def can_take(request: Request, offer: Offer, *, target: str = "", barred: Collection[str] = ()) -> bool:
    """Whether the node has room for it now, and nothing speaks against it."""
    if (target and offer.worker_id != target) or offer.blocked or offer.worker_id in barred:
        return False
    return not offer.lacking_now(request)


def rank(request: Request, offer: Offer, failed_on: Collection[str]) -> tuple[object, ...]:
    """Sort key of the nodes that can take it, the best first; no two nodes have the same."""
    return offer.worker_id in failed_on, *_waste(request, offer)


def _waste(request: Request, offer: Offer) -> tuple[int, tuple[bool, bool, int], float, str]:
    """Sort key: GPUs that a task without GPUs would block first, then GPUs that are more than it needs, then the unused
    shares, then the name."""
    left = offer.free.minus(request.amounts)
    idle_gpus = left.gpu_count if not request.gpus.is_something else 0
    # Who tells what GPUs it has comes before who might refuse.
    is_guess = offer.gpus is None and not request.gpus.takes_any
    loss = (is_guess, *(offer.gpus.loss(request.gpus) if offer.gpus is not None else (False, 0)))
    shares = sum(left.of(name) / offer.allocatable.of(name) for name in LABELS if offer.allocatable.of(name) > 0)
    return max(0, idle_gpus), loss, shares, offer.worker_id


def _never(request: Request, candidates: Sequence[Offer]) -> NeverFits:
    nearest = min(candidates, key=lambda offer: (len(offer.lacking_ever(request)), offer.worker_id))
    resource = nearest.lacking_ever(request)[0]
    if resource == _GPUS:
        return NeverFits(shortage_reason(resource), f"{request.gpus.words} asked; {_never_gpus(request, candidates)}")
    asked = request.amounts.of(resource)
    best = max(candidates, key=lambda offer: offer.allocatable.of(resource))
    if best.allocatable.of(resource) >= asked:
        detail = f"no single node has all that is asked; node {nearest.worker_id} comes nearest and has"
        amount = nearest.allocatable.of(resource)
    else:
        detail = f"node {best.worker_id} has the most for tasks:"
        amount = best.allocatable.of(resource)
    return NeverFits(
        shortage_reason(resource), f"{describe(resource, asked)} asked; {detail} {describe(resource, amount)}"
    )


def _never_gpus(request: Request, candidates: Sequence[Offer]) -> str:
    if any(_GPUS not in offer.lacking_ever(request) for offer in candidates):
        return "no single node has all that is asked"
    with_gpus = [offer for offer in candidates if offer.gpus is not None and offer.gpus.units]
    if not with_gpus:
        best = max(candidates, key=lambda offer: offer.allocatable.gpu_count)
        return f"node {best.worker_id} has the most for tasks: {best.allocatable.gpu_count} GPU"
    told = [
        f"node {offer.worker_id} {offer.gpus.never_words(request.gpus)}"
        for offer in with_gpus
        if offer.gpus is not None
    ]
    return "; ".join(told[:_NODES_SHOWN]) + (f"; and {len(told) - _NODES_SHOWN} more" if told[_NODES_SHOWN:] else "")


def _busy(request: Request, awake: Sequence[Offer]) -> Waiting:
    nearest = min(awake, key=lambda offer: (len(offer.lacking_now(request)), offer.worker_id))
    resource = nearest.lacking_now(request)[0]
    if resource == _GPUS and nearest.gpus is not None:
        words = f"{request.gpus.words} asked; node {nearest.worker_id} {nearest.gpus.busy_words(request.gpus)}"
        return Waiting(shortage_reason(resource), words)
    asked, free = request.amounts.of(resource), max(0, nearest.free.of(resource))
    shown = request.gpus.words if resource == _GPUS else describe(resource, asked)
    return Waiting(
        shortage_reason(resource), f"{shown} asked; node {nearest.worker_id} has {describe(resource, free)} free now"
    )
