"""One pass over the queue: who goes where, who waits and why. Pure.

Tasks are taken in order. One that doesn't fit now is skipped, so that smaller ones behind it use the room. So that skipping
never starves it, the first task that has waited longer than `patience_seconds` gets one node reserved: nothing else is
placed there until it fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from nodeservice.master.placement import Choice, NeverFits, Offer, Placement, Waiting, can_take, place, rank
from nodeservice.master.request import Request
from nodeservice.master.rows import Key

_MOST_RANKINGS = 8
"""Each has an entry for every node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A queued attempt. `waited_seconds` counts from when it was queued."""

    key: Key
    request: Request
    target: str = ""
    waited_seconds: float = 0.0
    excluded: frozenset[str] = frozenset()
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    assign: tuple[tuple[Key, str], ...] = ()
    waiting: Mapping[Key, Waiting] = field(default_factory=dict)
    never: Mapping[Key, NeverFits] = field(default_factory=dict)


def make_plan(queue: Sequence[Candidate], offers: Sequence[Offer], *, patience_seconds: float) -> Plan:
    room = {offer.worker_id: offer for offer in offers}
    assign: list[tuple[Key, str]] = []
    waiting: dict[Key, Waiting] = {}
    never: dict[Key, NeverFits] = {}
    reserved: frozenset[str] = frozenset()
    known: dict[object, Placement] = {}
    fitted: set[object] = set()
    rankings: dict[object, _Ranking] = {}
    for candidate in queue:
        alike = (candidate.request, candidate.target, candidate.excluded, candidate.avoid, reserved)
        # Room only shrinks during a pass, so an equal request that did not fit before does not fit now.
        answer = known.get(alike)
        if answer is None and alike in fitted:  # more of a kind: all nodes need not be looked at again for each
            ranking = rankings.pop(alike, None) or _Ranking(candidate, reserved, room)
            rankings[alike] = ranking
            if len(rankings) > _MOST_RANKINGS:
                del rankings[next(iter(rankings))]
            answer = ranking.best()
        if answer is None:
            answer = place(
                candidate.request,
                tuple(room.values()),
                target=candidate.target,
                excluded=candidate.excluded,
                reserved=reserved,
                avoid=candidate.avoid,
            )
        match answer:
            case Choice(worker_id=worker_id):
                fitted.add(alike)
                assign.append((candidate.key, worker_id))
                room[worker_id] = room[worker_id].taking(candidate.request)
                for one in rankings.values():
                    one.add(room[worker_id])
            case NeverFits():
                known[alike] = answer
                never[candidate.key] = answer
            case Waiting():
                known[alike] = answer
                waiting[candidate.key] = answer
                if not reserved and candidate.waited_seconds >= patience_seconds:
                    reserved = _reserve(candidate, tuple(room.values()))
    return Plan(assign=tuple(assign), waiting=waiting, never=never)


class _Ranking:
    """The nodes that can take one request, the best on top: all are looked at once, then only those that change."""

    def __init__(self, candidate: Candidate, reserved: frozenset[str], room: Mapping[str, Offer]) -> None:
        self._request, self._target, self._failed_on = candidate.request, candidate.target, candidate.avoid
        self._barred = reserved | candidate.excluded
        self._room = room
        self._number = count()
        self._heap: list[tuple[tuple[object, ...], int, Offer]] = []
        for offer in room.values():
            self.add(offer)

    def add(self, offer: Offer) -> None:
        """It is as it was not before."""
        if can_take(self._request, offer, target=self._target, barred=self._barred):
            heappush(self._heap, (rank(self._request, offer, self._failed_on), next(self._number), offer))

    def best(self) -> Choice | None:
        while self._heap:
            offer = self._heap[0][2]
            if self._room[offer.worker_id] is offer:
                return Choice(offer.worker_id)
            heappop(self._heap)  # since then it has taken something
        return None


def _reserve(candidate: Candidate, offers: Sequence[Offer]) -> frozenset[str]:
    """The node that could hold the task and lacks the least now; none if all that could are unavailable."""
    able = [
        offer
        for offer in offers
        if not offer.blocked
        and (not candidate.target or offer.worker_id == candidate.target)
        and not offer.lacking_ever(candidate.request)
    ]
    if not able:
        return frozenset()
    nearest = min(able, key=lambda offer: (len(offer.lacking_now(candidate.request)), offer.worker_id))
    return frozenset({nearest.worker_id})
