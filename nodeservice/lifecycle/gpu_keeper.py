"""Keeps the GPUs honest: looks at them, takes the faulty ones out of service, ends tasks that lost or overdraw theirs.

It looks each second while there are GPUs. A driver that hangs holds back nothing but the GPUs themselves: everything here
works on what was seen last.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import structlog

from nodeservice.core.gpu_pool import counted
from nodeservice.core.gpus import GpuUnit, GpuUsage, ShareMethod
from nodeservice.core.model import AttemptId, Phase, StopCause, TaskRecord
from nodeservice.core.verdict import changes_the_end
from nodeservice.gpu.health import GpuFault, GpuState, HealthBoard
from nodeservice.gpu.holders import (
    Place,
    left_behind_bytes,
    places,
    sample,
    still_there,
    strangers,
    touched,
)
from nodeservice.gpu.locks import GpuLocks
from nodeservice.gpu.units import SharingPolicy, units_of
from nodeservice.gpu.xid import words as xid_words
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.gpu_bills import GpuBills
from nodeservice.lifecycle.gpu_resets import GpuResets
from nodeservice.lifecycle.gpu_watch import PartWatch
from nodeservice.lifecycle.workdir import WorkDirs
from nodeservice.ports import Clock, GpuInventory, GpuProvider, GpuXid, ProcessOwners

log = structlog.get_logger(__name__)

GPU_DRIVER, GPU_LOCKS = "GPU_DRIVER", "GPU_LOCKS"
_STRANGER, _LEFT_BEHIND, _LOCKED = "stranger", "left behind", "locked"
_READY_LOOK_SECONDS = 0.2
_LATE_EVENT_SECONDS = 0.3
"""An event of the driver comes on a way of its own, and may come after the end of the task that it ended."""
_SAVE_EVERY_LOOKS = 10
_LAST_SAVE_SECONDS = 1.0
_WITHOUT_GPUS_SECONDS = 30.0


class GpuKeeper:
    """Made before the driver of the lifecycle, which `run` gets: what a GPU is good for is asked from the start."""

    def __init__(
        self,
        provider: GpuProvider,
        *,
        clock: Clock,
        owners: ProcessOwners,
        dirs: WorkDirs,
        locks: GpuLocks,
        policy: SharingPolicy | None = None,
        board: HealthBoard | None = None,
        look_seconds: float = 1.0,
        ready_seconds: float = 10.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._provider = provider
        self._clock = clock
        self._owners = owners
        self._locks = locks
        self._policy = policy or SharingPolicy()
        self._board = board or HealthBoard()
        self._look_seconds = look_seconds
        self._ready_seconds = ready_seconds
        self._monotonic = monotonic
        self._inventory = GpuInventory()
        self._driver: Driver | None = None
        self._on_change: Callable[[], None] = lambda: None
        self._pids: dict[AttemptId, int] = {}
        self._bills = GpuBills(dirs)
        self._resets = GpuResets(dirs.gpu_resets)
        self._resets.tell(self._board, now_seconds=monotonic())
        self._faults: dict[AttemptId, str] = {}
        self._noticed: dict[tuple[str, str], str] = {}
        self._parts = PartWatch(self._stop)
        self._missed: set[str] = set()
        self._looks = 0

    # ---- what there is ---------------------------------------------------------------------------------------------

    def units(self, inventory: GpuInventory) -> tuple[GpuUnit, ...]:
        """What tasks can lease, and what of it is out of service: with what other workers on this host hold just now."""
        for gpu in inventory.gpus:
            self._board.suspect(gpu.uuid, _LOCKED, self._locks.in_use(gpu.uuid))
        return units_of(inventory, self._board.unwell(), self._policy)

    def state(self, uuid: str) -> tuple[GpuState, str]:
        return self._board.state(uuid)

    @property
    def inventory(self) -> GpuInventory:
        """As of the last look."""
        return self._inventory

    # ---- work ------------------------------------------------------------------------------------------------------

    async def run(self, driver: Driver, *, on_change: Callable[[], None]) -> None:
        """Work until cancelled. `on_change` is called when what tasks can lease has changed."""
        self._driver, self._on_change = driver, on_change
        driver.on_change(self._follow_lease)
        try:
            while True:
                await self.look()
                there = self._inventory.gpus or self._inventory.error
                await self._clock.sleep(self._look_seconds if there else _WITHOUT_GPUS_SECONDS)
        finally:
            with contextlib.suppress(TimeoutError):  # a disk that hangs holds up no end
                async with asyncio.timeout(_LAST_SAVE_SECONDS):
                    await self._bills.save(record.id for record in self._holders())

    def close(self) -> None:
        """Let others on this host have the GPUs. What runs on is found there by its processes."""
        self._locks.close()

    async def look(self) -> None:
        """Take up what was seen last, and act on it."""
        await self._take(await self._provider.inventory())

    async def _look_now(self) -> None:
        await self._take(await self._provider.refresh())

    async def _take(self, inventory: GpuInventory) -> None:
        self._inventory = inventory
        now = self._monotonic()
        xids = self._provider.take_xids()
        # What a driver that fails or hangs shows is of before; the events that it tells meanwhile count all the same.
        shown = inventory.gpus if inventory.error is None else ()
        faults = self._board.observe(shown, xids, now_seconds=now)
        seen = places(inventory)
        holders = self._holders()
        self._note_xids(xids, seen, holders)
        self._fail_tasks([*faults, *self._gone(inventory, seen, holders)], seen, holders)
        if inventory.gpus and inventory.error is None:
            owners = self._owners_of(inventory)
            self._lock_all(holders)
            self._look_for_strangers(seen, holders, owners)
            self._parts.look(holders, seen, owners)
            for record in holders:
                bill = self._bills.of(record.id)
                bill.add(
                    [
                        sample(seen[uuid], record.id, record.lease, owners)
                        for uuid in record.lease.gpu_uuids
                        if uuid in seen
                    ],
                    # A driver that hangs tells the same look again: no time has passed for the bill then.
                    now_seconds=inventory.looked_at_seconds or now,
                    every_seconds=self._look_seconds,
                )
        if inventory.error is not None:
            self._parts.see_nothing(holders, inventory.error, now_seconds=now)
        await self._resets.write(self._board.awaited_resets(), self._board.memory_errors())
        self._looks += 1
        if holders and self._looks % _SAVE_EVERY_LOOKS == 0:
            await self._bills.save(record.id for record in holders)
        self._tell_driver(inventory)

    def _holders(self) -> list[TaskRecord]:
        """Attempts that hold GPUs now."""
        if self._driver is None:
            return []
        return [record for record in self._driver.live() if record.lease.gpu_uuids and not record.compute_released]

    # ---- faults ----------------------------------------------------------------------------------------------------

    def _note_xids(self, xids: Iterable[GpuXid], seen: Mapping[str, Place], holders: Iterable[TaskRecord]) -> None:
        for xid in xids:
            log.warning("gpu.xid", uuid=xid.uuid, code=xid.code, instance=xid.gpu_instance_id, what=xid_words(xid.code))
            for record in holders:
                for uuid in touched(record.lease, xid.uuid, xid.gpu_instance_id, seen):
                    self._bills.of(record.id).note_xid(uuid, xid.code)

    def _fail_tasks(self, faults: Iterable[GpuFault], seen: Mapping[str, Place], holders: Iterable[TaskRecord]) -> None:
        for fault in faults:
            log.error("gpu.fault", uuid=fault.uuid, instance=fault.gpu_instance_id, what=fault.words)
            for record in holders:
                if not touched(record.lease, fault.uuid, fault.gpu_instance_id, seen):
                    continue
                what = f"{fault.uuid}: {fault.words}"
                self._faults.setdefault(record.id, what)
                if record.phase <= Phase.RUNNING:
                    self._stop(record, StopCause.GPU_FAULT, f"A GPU of the task failed: {what}.")

    def _gone(self, inventory: GpuInventory, seen: Collection[str], holders: Iterable[TaskRecord]) -> list[GpuFault]:
        """What tasks hold and a driver that works does not list, at the second look in a row: it went meanwhile."""
        before, self._missed = self._missed, set()
        if inventory.error is None and inventory.driver_version is not None:
            held = {uuid for record in holders if record.id not in self._faults for uuid in record.lease.gpu_uuids}
            self._missed = held.difference(seen)
        return [GpuFault(uuid=uuid, words="the driver does not list it") for uuid in sorted(before & self._missed)]

    def fault(self, id_: AttemptId) -> str:
        """What went wrong with a GPU while the attempt held it, in words; empty where nothing did."""
        return self._faults.get(id_, "")

    def _stop(self, record: TaskRecord, cause: StopCause, message: str) -> None:
        if self._driver is not None and changes_the_end(record, cause):
            self._driver.end(record.id, cause, message)

    # ---- who is there ----------------------------------------------------------------------------------------------

    def _look_for_strangers(
        self, seen: Mapping[str, Place], holders: Iterable[TaskRecord], owners: Mapping[int, AttemptId]
    ) -> None:
        """A GPU that somebody else uses, or whose memory did not come back, is given to nobody."""
        by_uuid: dict[str, list[TaskRecord]] = {}
        for record in holders:
            for uuid in record.lease.gpu_uuids:
                by_uuid.setdefault(uuid, []).append(record)
        held_parents = {seen[uuid].gpu.uuid for uuid in by_uuid if uuid in seen}
        words: dict[str, tuple[str, str]] = {}
        for uuid, place in seen.items():
            if place.gpu.mig_enabled and place.instance is None:
                continue
            stranger, left = words.get(place.gpu.uuid, ("", ""))
            own = by_uuid.get(uuid, [])
            # While a holder's container is being started or ended, it can't be said whose a process is.
            if all(record.phase is Phase.RUNNING and record.id in self._pids for record in own):
                pids = strangers(place, (record.id for record in own), owners)
                stranger = stranger or (f"process {pids[0]} uses it, which is of no task that holds it" if pids else "")
            left_bytes = left_behind_bytes(place, owners)
            if not own and left_bytes and place.gpu.uuid not in held_parents:
                # Without the bytes, which change from look to look: a change of the words is told to the master.
                left = left or "its memory is in use though no task holds it"
            words[place.gpu.uuid] = (stranger, left)
        for uuid, (stranger, left) in words.items():
            self._suspect(uuid, _STRANGER, stranger)
            self._suspect(uuid, _LEFT_BEHIND, left)

    def _suspect(self, uuid: str, by: str, why: str) -> None:
        """At the second look in a row: what is gone at the next was just on its way."""
        before = self._noticed.get((uuid, by), "")
        self._noticed[uuid, by] = why
        if not why or before:
            self._board.suspect(uuid, by, why)

    # ---- one attempt -----------------------------------------------------------------------------------------------

    async def ready(self, record: TaskRecord) -> str:
        """Before the container is made: why the attempt can't have its GPUs, in words; empty when it can.

        What the last holder left goes within moments; so long it is waited for. The look is made under the lock.
        """
        until = self._monotonic() + self._ready_seconds
        while True:
            locked = self._lock(record)
            await self._look_now()
            why = self._not_ready(record) or locked
            if not why or self._monotonic() >= until:
                return why
            await self._clock.sleep(_READY_LOOK_SECONDS)

    def _lock(self, record: TaskRecord) -> str:
        """Why not all GPUs of the attempt are this worker's, in words; empty when they are."""
        seen = places(self._inventory)
        if unseen := [uuid for uuid in record.lease.gpu_uuids if uuid not in seen]:
            return f"{unseen[0]} was not seen yet"
        whole = {seen[uuid].gpu.uuid for uuid in record.lease.gpu_uuids}
        why = self._locks.take(record.id, whole)
        if why and record.container_id is None:
            self._locks.release(record.id)  # who waits for one GPU keeps no other from anybody
        return why

    def _lock_all(self, holders: Iterable[TaskRecord]) -> None:
        """Again after a restart: what has its container then keeps its GPUs, whoever has their locks."""
        lacks = [f"{record.id}: {why}" for record in holders if (why := self._lock(record)) and record.container_id]
        self._warn(GPU_LOCKS, "; ".join(filter(None, [self._locks.trouble, *lacks])))

    def _follow_lease(self, record: TaskRecord) -> None:
        """From the grant on, so that others choose other GPUs while an image is pulled."""
        if record.compute_released:
            self._locks.release(record.id)
        elif record.lease.gpu_uuids:
            self._lock(record)

    def _not_ready(self, record: TaskRecord) -> str:
        if why := self._inventory.error or self._inventory.outdated:
            return why
        seen, owners = places(self._inventory), self._owners_of(self._inventory)
        shared = record.lease.gpu_part is not None and record.lease.gpu_part.method is not ShareMethod.MIG
        for uuid in record.lease.gpu_uuids:
            place = seen.get(uuid)
            if place is None:
                return f"{uuid} is there no more"
            state, why = self._board.state(place.gpu.uuid)
            if state is not GpuState.WELL:
                return f"{place.gpu.uuid}: {why}"
            if place.gpu.mig_enabled and place.instance is None:
                return f"{uuid} was split into MIG instances meanwhile"
            if not shared and (busy := still_there(place, owners)):
                return f"{uuid}: {busy} on it"
        return ""

    def _owners_of(self, inventory: GpuInventory) -> Mapping[int, AttemptId]:
        pids = [process.pid for gpu in inventory.gpus for process in gpu.processes]
        return self._owners.owners(pids, self._pids, before_seconds=inventory.looked_at_seconds)

    def follow(self, id_: AttemptId, pid: int) -> None:
        """The first process of the attempt's container: what is on the GPU in its cgroup is the attempt's."""
        self._pids[id_] = pid

    async def limit(self, record: TaskRecord, pid: int) -> tuple[int, str]:
        """Set the driver's limit on the container's own cgroup: what is in force then, and where.

        Raises NodeFaultError (LIMIT_NOT_ENFORCED).
        """
        part = record.lease.gpu_part
        assert part is not None
        cgroup = self._owners.cgroup(pid) or ""
        held = await self._provider.limit_memory(record.lease.gpu_uuids[0], cgroup, part.memory_bytes)
        return held, cgroup

    async def ended(self, id_: AttemptId, *, well: bool) -> None:
        """The container ended: look once more, after a moment for late events where it did not end well."""
        if not well:
            await self._clock.sleep(_LATE_EVENT_SECONDS)
        await self._look_now()
        await self._bills.save([id_])

    async def returned(self, record: TaskRecord) -> None:
        """Before the lease goes back: wait, within a bound, until nothing of the attempt is left on its GPUs.

        What is left after that keeps the GPU out of service, not the attempt from its end.
        """
        self._pids.pop(record.id, None)
        until = self._monotonic() + self._ready_seconds
        while record.lease.gpu_part is None and (why := self._left(record)):
            if self._monotonic() >= until:
                log.warning("gpu.not_returned", task_id=record.id.task_id, attempt=record.id.attempt, why=why)
                break
            await self._clock.sleep(_READY_LOOK_SECONDS)
            await self._look_now()

    def _left(self, record: TaskRecord) -> str:
        seen, owners = places(self._inventory), self._owners_of(self._inventory)
        held = [seen[uuid] for uuid in record.lease.gpu_uuids if uuid in seen and not seen[uuid].gpu.lost]
        return "; ".join(f"{place.uuid}: {busy}" for place in held if (busy := still_there(place, owners)))

    # ---- the bill --------------------------------------------------------------------------------------------------

    def usage(self, id_: AttemptId) -> tuple[GpuUsage, ...]:
        return self._bills.usage(id_)

    def forget(self, id_: AttemptId) -> None:
        self._bills.forget(id_)
        for known in (self._pids, self._faults):
            known.pop(id_, None)

    # ---- the node --------------------------------------------------------------------------------------------------

    def _tell_driver(self, inventory: GpuInventory) -> None:
        driver = self._driver
        if driver is None:
            return
        self._warn(GPU_DRIVER, "; ".join(inventory.complaints))
        units = self.units(inventory)
        if units != driver.ledger.gpus:
            driver.ledger.resize(replace(driver.ledger.allocatable, gpu_count=counted(units)), units)
            for unit in units:
                if unit.unwell:
                    log.warning("gpu.out_of_service", uuid=unit.uuid, why=unit.unwell)
            self._on_change()

    def _warn(self, name: str, words: str) -> None:
        if self._driver is not None and words:
            self._driver.warnings[name] = words
        elif self._driver is not None:
            self._driver.warnings.pop(name, None)
