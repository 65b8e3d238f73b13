"""The nodes that have registered: what they have for tasks, how they are, when they were last heard of."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import structlog

from nodeservice.errors import TransientError
from nodeservice.master.amounts import GIB, Amounts, from_message
from nodeservice.master.checks import amount_of, check_id, invalid
from nodeservice.master.clock import MasterClock
from nodeservice.master.dialing import NodeDialer, node_address
from nodeservice.master.gpu_fit import GpuRoom, Unit, room_of, units_told
from nodeservice.master.placement import Offer
from nodeservice.master.request import Request
from nodeservice.master.rows import Key, NodeRow, Untold
from nodeservice.master.store import MasterStore
from nodeservice.wire import master_worker_pb2 as pb

log = structlog.get_logger(__name__)

_LARGEST = 2**60
_MOST_GPUS = 2**31 - 1
"""What `Resources` can tell to a client."""
_ABSENT_SECONDS = 2.5
_NOTICE_SECONDS = 1.0
_RETURN_SECONDS = 86400.0
"""How long a start of the master waits for a node at least; when it last beat is not stored."""
_ABLE_COUNT = 8
_GPU_DRIVER = "GPU_DRIVER"
"""The warning of a node whose GPU driver does not work, which may then not know what GPUs it has."""

Assigned = Mapping[str, Mapping[Key, Request]]
"""By node and attempt, what is asked for."""
_NOTHING: Mapping[Key, Request] = {}


@dataclass(slots=True, kw_only=True)
class Node:
    """One registered node. `heard_at` is monotonic; None until it has spoken to this run of the master."""

    worker_id: str
    address: str
    info: pb.WorkerInfo
    capacity: Amounts
    allocatable: Amounts
    registered_at_ms: int
    heard_at_ms: int
    known_since: float
    heard_at: float | None = None
    was_active: bool = False
    heartbeat: pb.Heartbeat = field(default_factory=pb.Heartbeat)
    gpus: list[pb.GpuInfo] = field(default_factory=list)
    """As it told last, at its registration or in a heartbeat; likewise `warnings`."""
    warnings: list[str] = field(default_factory=list)
    units: tuple[Unit, ...] | None = None
    """What tasks can have of `gpus`; None from a peer that does not tell that."""
    ended: set[Key] = field(default_factory=set)
    """Attempts that it reported since its last heartbeat, which may still list them."""
    released: frozenset[Key] = frozenset()
    """Attempts of which it said last that their CPU, memory and GPUs are free for others; they hold their disk."""
    has_news: bool = True
    """Whether its last heartbeat told anything that may let a task move. Most do not."""
    unsettled: bool = False
    """It was given up, or is known from an earlier run of the master: it gets nothing until it has told what it holds."""
    offer: Offer | None = None
    """As it was made last; None once it has news. `offered_of` is what was assigned to it then."""
    offered_of: Mapping[Key, Request] = field(default_factory=dict)

    @property
    def draining(self) -> bool:
        return self.heartbeat.draining

    def held(self, given: Mapping[Key, Request]) -> Amounts:
        """What `given`, the open attempts that are assigned to it, take of it."""
        total = Amounts()
        for key, request in given.items():
            amounts = request.amounts
            total = total.plus(Amounts(disk_bytes=amounts.disk_bytes) if key in self.released else amounts)
        return total

    def tell_gpus(self, gpus: Sequence[pb.GpuInfo], warnings: Sequence[str]) -> None:
        self.gpus, self.warnings = list(gpus), list(warnings)
        self.units = units_told(self.gpus)

    def room(self, given: Mapping[Key, Request]) -> GpuRoom | None:
        """What of its GPUs is to be had, as far as it is known; `given` are the open attempts that are assigned to it."""
        trouble = next((words for words in self.warnings if words.startswith(_GPU_DRIVER)), "")
        if self.units is None and not (trouble and not self.gpus):
            return None
        listed = {_key(task): task for task in self.heartbeat.running_tasks}
        return room_of(
            self.units or (),
            trouble,
            untold=[request.gpus for key, request in given.items() if key not in listed and request.gpus.is_something],
            ended=[task for key, task in listed.items() if key in self.ended],
        )


class NodeRegistry:
    """Nodes survive a restart of the master, but count as inactive until they speak again."""

    def __init__(
        self,
        store: MasterStore,
        dialer: NodeDialer,
        clock: MasterClock,
        *,
        timeout_seconds: float,
        gone_after_seconds: float,
    ) -> None:
        self._store = store
        self._dialer = dialer
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self.gone_after_seconds = gone_after_seconds
        self._nodes: dict[str, Node] = {}
        self._ran_at = clock.monotonic()
        self._noticed_at = -math.inf
        self._lately_able: list[str] = []
        """The nodes that could hold the last requests, the newest first: what comes next is mostly alike."""

    async def load(self) -> None:
        for row in await self._store.load_nodes():
            capacity, allocatable = amounts_of(row.info)
            self._nodes[row.worker_id] = node = Node(
                worker_id=row.worker_id,
                address=row.address,
                info=row.info,
                capacity=capacity,
                allocatable=allocatable,
                registered_at_ms=row.registered_at_ms,
                heard_at_ms=row.heard_at_ms,
                known_since=self._clock.monotonic(),
                unsettled=True,
            )
            node.tell_gpus(row.info.gpus, row.info.warnings)

    # ---- from nodes ---------------------------------------------------------------------------------------------------

    async def register(self, info: pb.WorkerInfo, peer: str) -> Node:
        """Idempotent; durable when it returns. Raises RequestError for what can't be a node."""
        check_id("worker_id", info.worker_id)
        address = node_address(info, peer)
        capacity, allocatable = amounts_of(info)
        now_ms = self._clock.unix_ms()
        self._allow_for_absence()
        before = self._nodes.get(info.worker_id)
        await self._store.save_node(
            NodeRow(
                worker_id=info.worker_id,
                address=address,
                info=info,
                registered_at_ms=before.registered_at_ms if before else now_ms,
                heard_at_ms=now_ms,
            )
        )
        node = Node(
            worker_id=info.worker_id,
            address=address,
            info=info,
            capacity=capacity,
            allocatable=allocatable,
            registered_at_ms=before.registered_at_ms if before else now_ms,
            heard_at_ms=now_ms,
            known_since=before.known_since if before else self._clock.monotonic(),
            heard_at=self._clock.monotonic(),
            was_active=True,
        )
        if before is not None:
            node.heartbeat, node.ended, node.released = before.heartbeat, before.ended, before.released
            node.unsettled = before.unsettled or self._silent_for_good(before)
        node.tell_gpus(info.gpus, info.warnings)
        self._nodes[info.worker_id] = node
        if before is None or before.address != address:
            log.info("node.registered", worker_id=node.worker_id, address=address)
        if before is not None and before.address != address and not self._in_use(before.address):
            await self._dialer.drop(before.address)
        return node

    def heartbeat(self, beat: pb.Heartbeat) -> Node | None:
        """Note it; None when the node is not known and has to register."""
        node = self._nodes.get(beat.worker_id)
        if node is None:
            return None
        self._allow_for_absence()
        self._mark_silence(node)
        before, had_ends = _for_placement(node), bool(node.ended)
        if not node.was_active:
            log.info("node.active", worker_id=node.worker_id)
        node.heard_at, node.heard_at_ms, node.was_active = self._clock.monotonic(), self._clock.unix_ms(), True
        node.heartbeat, node.ended = beat, set()
        node.released = frozenset(_key(task) for task in beat.running_tasks if task.compute_released)
        if beat.HasField("allocatable"):
            node.allocatable = from_message(beat.allocatable)
            node.tell_gpus(beat.gpus, beat.warnings)
        node.has_news = had_ends or node.unsettled or _for_placement(node) != before
        if node.has_news:
            node.offer = None
        return node

    def settled(self, worker_id: str) -> None:
        """What the node holds has been compared with what it was given."""
        self._nodes[worker_id].unsettled = False

    def note_end(self, worker_id: str, key: Key) -> None:
        """The node reported the attempt: what it held is free, though the last heartbeat still lists it."""
        node = self._nodes.get(worker_id)
        if node is not None:
            node.ended.add(key)
            node.offer = None

    # ---- for the scheduler ----------------------------------------------------------------------------------------------

    def offers(self, assigned: Assigned) -> list[Offer]:
        return [self._offer(node, assigned.get(node.worker_id, _NOTHING)) for node in self._nodes.values()]

    def empty_offers(self) -> list[Offer]:
        """As `offers`, but of nodes to which nothing is assigned."""
        return [self._new_offer(node, _NOTHING) for node in self._nodes.values()]

    def _offer(self, node: Node, given: Mapping[Key, Request]) -> Offer:
        """Most nodes have nothing new from one pass of the scheduler to the next."""
        if node.offer is None or node.offer.blocked != self._blocked(node) or node.offered_of != given:
            node.offer, node.offered_of = self._new_offer(node, given), dict(given)
        return node.offer

    def _new_offer(self, node: Node, given: Mapping[Key, Request]) -> Offer:
        return Offer(
            worker_id=node.worker_id,
            allocatable=node.allocatable,
            assigned=node.held(given),
            blocked=self._blocked(node),
            gpus=node.room(given),
        )

    def could_hold(self, request: Request, target: str = "") -> bool:
        """Whether some node, or the target, has enough for it when nothing else is there. Looks no further than to that."""
        if target:
            return target in self._nodes and not self._new_offer(self._nodes[target], _NOTHING).lacking_ever(request)
        lately = [self._nodes[worker_id] for worker_id in self._lately_able]
        for node in chain(lately, self._nodes.values()):
            if not self._new_offer(node, _NOTHING).lacking_ever(request):
                others = [worker_id for worker_id in self._lately_able if worker_id != node.worker_id]
                self._lately_able = [node.worker_id, *others][:_ABLE_COUNT]
                return True
        return False

    def running(self, worker_id: str, key: Key) -> pb.RunningTask | None:
        """The attempt as the node listed it last."""
        node = self._nodes.get(worker_id)
        tasks = node.heartbeat.running_tasks if node is not None else ()
        return next((task for task in tasks if _key(task) == key), None)

    def stub(self, worker_id: str) -> Any | None:
        """To call the node, whether it is active or not; None for one that never registered."""
        node = self._nodes.get(worker_id)
        return None if node is None else self._dialer.stub(node.address)

    def is_active(self, worker_id: str) -> bool:
        node = self._nodes.get(worker_id)
        return node is not None and self._active(node)

    def is_gone(self, worker_id: str) -> bool:
        """Silent for so long that nobody waits for it any more. Time in which the master was down does not count."""
        node = self._nodes.get(worker_id)
        if node is None:
            return True
        return self._silent_for_good(node)

    def notice_silence(self) -> None:
        """Say once in the log of each node that it fell silent. Looks at all of them, once a second at most."""
        self._allow_for_absence()
        now = self._clock.monotonic()
        if now - self._noticed_at < _NOTICE_SECONDS:
            return
        self._noticed_at = now
        for node in self._nodes.values():
            self._mark_silence(node)

    def _mark_silence(self, node: Node) -> None:
        node.unsettled |= self._silent_for_good(node)
        if node.was_active and not self._active(node):
            node.was_active = False
            log.warning("node.inactive", worker_id=node.worker_id, timeout_seconds=self._timeout_seconds)

    def views(self, assigned: Assigned) -> list[tuple[Node, bool, Amounts]]:
        """Each node with whether it is active and what is assigned to it, by name."""
        nodes = sorted(self._nodes.values(), key=lambda node: node.worker_id)
        return [(node, self._active(node), node.held(assigned.get(node.worker_id, _NOTHING))) for node in nodes]

    def untold(self, before_ms: int) -> Untold:
        """Of which tasks nodes may have more to tell. Who was last heard of before `before_ms` is not waited for."""
        away = [
            node.worker_id
            for node in self._nodes.values()
            if not (self._active(node) and node.heartbeat.worker_id and not node.unsettled)
            and not self._is_past(node, before_ms)
        ]
        listed = [task.task_id for node in self._nodes.values() for task in node.heartbeat.running_tasks]
        return Untold(frozenset(away), frozenset(listed))

    def _is_past(self, node: Node, before_ms: int) -> bool:
        return node.heard_at_ms < before_ms and self._silent_for(node) > _RETURN_SECONDS

    async def forget(self, before_ms: int, holders: Container[str]) -> list[str]:
        """Remove those that were last heard of before, but for `holders` of open attempts; returns which.

        One that comes back is told that it is not known, and registers.
        """
        gone = [n for n in self._nodes.values() if n.worker_id not in holders and self._is_past(n, before_ms)]
        names = [node.worker_id for node in gone]
        for name in names:
            del self._nodes[name]
        self._lately_able = [name for name in self._lately_able if name in self._nodes]
        try:
            await self._store.forget_nodes(names, before_ms)
        except TransientError:
            self._nodes = {node.worker_id: node for node in gone} | self._nodes
            raise
        for node in gone:
            if not self._in_use(node.address):
                await self._dialer.drop(node.address)
        return names

    async def run(self) -> None:
        """Keep watch over our own time until cancelled."""
        while True:
            self._allow_for_absence()
            await self._clock.sleep(1.0)

    def _allow_for_absence(self) -> None:
        """Time in which this process did not run (frozen, starved) is no silence of the nodes: nobody could hear them."""
        now = self._clock.monotonic()
        absent_seconds, self._ran_at = now - self._ran_at, now
        if absent_seconds <= _ABSENT_SECONDS:
            return
        log.warning("master.was_away", seconds=round(absent_seconds, 1))
        for node in self._nodes.values():
            node.known_since = min(now, node.known_since + absent_seconds)
            if node.heard_at is not None:
                node.heard_at = min(now, node.heard_at + absent_seconds)

    def _silent_for_good(self, node: Node) -> bool:
        return self._silent_for(node) > self.gone_after_seconds

    def _silent_for(self, node: Node) -> float:
        """Seconds. Time in which the master was down does not count."""
        return self._clock.monotonic() - (node.known_since if node.heard_at is None else node.heard_at)

    def _active(self, node: Node) -> bool:
        return node.heard_at is not None and self._clock.monotonic() - node.heard_at <= self._timeout_seconds

    def _blocked(self, node: Node) -> str:
        if node.heard_at is None:
            return "has not spoken since the master started"
        if not self._active(node):
            return f"has been silent for more than {self._timeout_seconds:g} s"
        if node.unsettled:
            return "has come back and has not told yet what it holds"
        if node.heartbeat.conditions:
            return f"is not well: {'; '.join(node.heartbeat.conditions)}"
        return "is draining" if node.draining else ""

    def _in_use(self, address: str) -> bool:
        return any(node.address == address for node in self._nodes.values())


def _for_placement(node: Node) -> tuple[object, ...]:
    """All of it that placement looks at: load and temperatures, which change with every beat, are not in it."""
    held = [(task.task_id, task.attempt, task.phase) for task in node.heartbeat.running_tasks]
    conditions = list(node.heartbeat.conditions)
    is_told = node.units, bool(node.gpus), node.warnings
    return node.was_active, node.allocatable, is_told, node.draining, conditions, held, node.released


def _key(task: pb.RunningTask) -> Key:
    """A peer that tells no attempt has the first."""
    return task.task_id, task.attempt or 1


def amounts_of(info: pb.WorkerInfo) -> tuple[Amounts, Amounts]:
    """(capacity, allocatable): the exact fields where there are some, else the old ones. Raises RequestError."""
    gpus = math.floor(info.total_gpu) if math.isfinite(info.total_gpu) else info.total_gpu
    cpu = amount_of("total_cpu", info.total_cpu, scale=1000, largest=_LARGEST)
    memory = amount_of("total_memory", info.total_memory, scale=GIB, largest=_LARGEST)
    disk = amount_of("total_storage", info.total_storage, scale=GIB, largest=_LARGEST)
    gpu = amount_of("total_gpu", gpus, scale=1, largest=_MOST_GPUS)
    old = Amounts(cpu_milli=cpu, memory_bytes=memory, disk_bytes=disk, gpu_count=gpu)
    allocatable = from_message(info.allocatable) if info.HasField("allocatable") else old
    capacity = from_message(info.capacity) if info.HasField("capacity") else allocatable
    for name, amounts in (("allocatable", allocatable), ("capacity", capacity)):
        if min(amounts.cpu_milli, amounts.memory_bytes, amounts.disk_bytes, amounts.gpu_count) < 0:
            raise invalid(name, "has a negative amount")
    return capacity, allocatable
