"""Choose a node for one request: pure, best fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nodeservice.master.amounts import LABELS, Amounts, describe, shortage_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one node has for tasks. `blocked` says in words why it takes nothing now (silent, draining); empty if it does."""

    worker_id: str
    allocatable: Amounts
    assigned: Amounts = field(default_factory=Amounts)
    blocked: str = ""

    @property
    def free(self) -> Amounts:
        return self.allocatable.minus(self.assigned)


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
    request: Amounts,
    offers: Sequence[Offer],
    *,
    target: str = "",
    excluded: Iterable[str] = (),
    reserved: Iterable[str] = (),
) -> Placement:
    """The node on which the least stays unused, or why there is none.

    `target` restricts to one node. `excluded` are nodes that refused this very task a moment ago; `reserved` are nodes
    kept for a task that has waited longer. Neither makes a request impossible, only late.
    """
    if not offers:
        return Waiting("NO_NODE", "no node has registered yet")
    candidates = [offer for offer in offers if not target or offer.worker_id == target]
    if not candidates:
        return Waiting("TARGET_UNKNOWN", f"the target node {target} has not registered")
    able = [offer for offer in candidates if not offer.allocatable.lacking(request)]
    if not able:
        return _never(request, candidates)
    awake = [offer for offer in able if not offer.blocked]
    if not awake:
        return Waiting("NODE_UNAVAILABLE", "; ".join(f"node {o.worker_id} {o.blocked}" for o in able[:3]))
    roomy = [offer for offer in awake if not offer.free.lacking(request)]
    if not roomy:
        return _busy(request, awake)
    barred, kept = set(excluded), set(reserved)
    fitting = [offer for offer in roomy if offer.worker_id not in kept]
    if not fitting:
        return Waiting("RESERVED", "the room there is is kept for a task that has waited longer")
    willing = [offer for offer in fitting if offer.worker_id not in barred]
    if not willing:
        return Waiting("NODE_REFUSED", f"node {fitting[0].worker_id} refused it a moment ago; it is asked again")
    return Choice(min(willing, key=lambda offer: _waste(request, offer)).worker_id)


def _waste(request: Amounts, offer: Offer) -> tuple[int, float, str]:
    """Sort key: GPUs that a task without GPUs would block first, then the unused shares, then the name."""
    left = offer.free.minus(request)
    idle_gpus = left.gpu_count if request.gpu_count == 0 else 0
    shares = sum(left.of(name) / offer.allocatable.of(name) for name in LABELS if offer.allocatable.of(name) > 0)
    return max(0, idle_gpus), shares, offer.worker_id


def _never(request: Amounts, candidates: Sequence[Offer]) -> NeverFits:
    nearest = min(candidates, key=lambda offer: (len(offer.allocatable.lacking(request)), offer.worker_id))
    resource = nearest.allocatable.lacking(request)[0]
    best = max(candidates, key=lambda offer: offer.allocatable.of(resource))
    if best.allocatable.of(resource) >= request.of(resource):
        detail = f"no single node has all that is asked; node {nearest.worker_id} comes nearest and has"
        amount = nearest.allocatable.of(resource)
    else:
        detail = f"node {best.worker_id} has the most for tasks:"
        amount = best.allocatable.of(resource)
    return NeverFits(
        shortage_reason(resource),
        f"{describe(resource, request.of(resource))} asked; {detail} {describe(resource, amount)}",
    )


def _busy(request: Amounts, awake: Sequence[Offer]) -> Waiting:
    nearest = min(awake, key=lambda offer: (len(offer.free.lacking(request)), offer.worker_id))
    resource = nearest.free.lacking(request)[0]
    asked, free = request.of(resource), max(0, nearest.free.of(resource))
    return Waiting(
        shortage_reason(resource),
        f"{describe(resource, asked)} asked; node {nearest.worker_id} has {describe(resource, free)} free now",
    )
