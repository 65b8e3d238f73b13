"""Who holds what. Grants all or nothing, never overcommits, and gives back only to the owner.

The ledger is a view of the journal: `Ledger.restore` rebuilds it from the records, so a crash cannot lose or double a lease.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nodeservice.core.cpus import Cpu, pick_cpus
from nodeservice.core.gpu_pool import GpuLack, GpuQuestion, free_count, gpu_lack, pick_gpus
from nodeservice.core.gpus import GpuRequest, GpuUnit
from nodeservice.core.model import AttemptId, Lease, Phase, Resources, TaskRecord
from nodeservice.errors import InvariantError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """The first resource that does not fit. `ever` False: more than the node allocates at all, so waiting is no use."""

    resource: str
    asked: int
    available: int
    ever: bool
    words: str = ""
    """What the numbers cannot say."""


@dataclass(slots=True)
class _Holding:
    lease: Lease
    compute: bool = True
    disk: bool = True

    @property
    def amount(self) -> Resources:
        granted = self.lease.granted
        return Resources(
            cpu_milli=granted.cpu_milli if self.compute else 0,
            memory_bytes=granted.memory_bytes if self.compute else 0,
            gpu_count=granted.gpu_count if self.compute else 0,
            disk_bytes=granted.disk_bytes if self.disk else 0,
        )


class Ledger:
    """Mutable, owned by the one driver; plain arithmetic, no I/O."""

    def __init__(
        self,
        allocatable: Resources,
        gpus: Sequence[GpuUnit] = (),
        cpus: Sequence[Cpu] = (),
        *,
        gpu_sharing_allowed: bool = False,
    ) -> None:
        self._allocatable = allocatable
        self._cpus = tuple(cpus)
        self._gpus = tuple(gpus)
        self._gpu_sharing_allowed = gpu_sharing_allowed
        self._holdings: dict[AttemptId, _Holding] = {}

    @property
    def allocatable(self) -> Resources:
        return self._allocatable

    @property
    def gpus(self) -> tuple[GpuUnit, ...]:
        return self._gpus

    @property
    def gpu_sharing_allowed(self) -> bool:
        """The operator takes parts of GPUs that are only watched."""
        return self._gpu_sharing_allowed

    def resize(self, allocatable: Resources, gpus: Sequence[GpuUnit], cpus: Sequence[Cpu] | None = None) -> None:
        """The node changed; `cpus` None: not these. What is leased stays leased, so `free` may be zero for a while."""
        self._allocatable = allocatable
        self._gpus = tuple(gpus)
        if cpus is not None:
            self._cpus = tuple(cpus)

    @property
    def share(self) -> Resources:
        """What all tasks may have together. A node that became smaller takes nothing from those that were granted more."""
        has = self._allocatable
        granted = [holding.lease.granted for holding in self._holdings.values() if holding.compute]
        cpu_milli, memory_bytes = sum(each.cpu_milli for each in granted), sum(each.memory_bytes for each in granted)
        if cpu_milli <= has.cpu_milli and memory_bytes <= has.memory_bytes:  # as nearly always
            return has
        return replace(has, cpu_milli=max(has.cpu_milli, cpu_milli), memory_bytes=max(has.memory_bytes, memory_bytes))

    @property
    def leased(self) -> Resources:
        total = Resources()
        for holding in self._holdings.values():
            total = total.plus(holding.amount)
        return total

    @property
    def free(self) -> Resources:
        """The GPUs in it are those that nobody holds, not even a part."""
        left = self._allocatable.minus(self.leased).clamped()
        return replace(left, gpu_count=free_count(self._gpus, self.gpu_leases()))

    def gpu_leases(self) -> list[Lease]:
        """All that hold GPUs now."""
        return [holding.lease for holding in self._holdings.values() if holding.compute and holding.lease.gpu_uuids]

    @property
    def shared_cpu_ids(self) -> tuple[int, ...]:
        """CPUs for the tasks without exclusive ones; empty while nobody has any, which means all."""
        taken = self._taken_cpus()
        return tuple(cpu.id for cpu in self._cpus if cpu.id not in taken) if taken else ()

    @property
    def exclusive_cpu_ids(self) -> Mapping[AttemptId, tuple[int, ...]]:
        """Whose CPUs are nobody else's."""
        return {
            owner: holding.lease.cpu_ids
            for owner, holding in self._holdings.items()
            if holding.compute and holding.lease.cpu_ids
        }

    def _taken_cpus(self) -> set[int]:
        return {cpu for cpu_ids in self.exclusive_cpu_ids.values() for cpu in cpu_ids}

    def shortfall(
        self, request: Resources, *, exclusive_cpus: bool = False, gpu: GpuRequest | None = None
    ) -> Shortfall | None:
        """None when the request fits now."""
        free = self.free
        for resource in ("cpu_milli", "memory_bytes", "disk_bytes"):
            asked: int = getattr(request, resource)
            limit: int = getattr(self._allocatable, resource)
            available: int = getattr(free, resource)
            if asked > limit:
                return Shortfall(resource=resource, asked=asked, available=limit, ever=False)
            if asked > available:
                return Shortfall(resource=resource, asked=asked, available=available, ever=True)
        lack = gpu_lack(self._gpu_question(request, gpu))
        if lack is not None:
            return Shortfall(
                resource="gpu_count",
                asked=request.gpu_count,
                available=lack.available_count,
                ever=lack.ever,
                words=lack.words,
            )
        if exclusive_cpus:
            # One CPU stays for the host and for everybody else. A CPU that is gone may still be leased.
            whole, most = request.cpu_milli // 1000, len(self._cpus) - 1
            left = most - len(self._taken_cpus() & {cpu.id for cpu in self._cpus})
            if whole > left:
                return Shortfall(resource="cpu_ids", asked=whole, available=max(0, left), ever=whole <= most)
        return None

    def _gpu_question(self, request: Resources, gpu: GpuRequest | None) -> GpuQuestion:
        return GpuQuestion(
            units=self._gpus,
            leases=self.gpu_leases(),
            count=request.gpu_count,
            request=gpu or GpuRequest(),
            sharing_allowed=self._gpu_sharing_allowed,
        )

    def grant(
        self, owner: AttemptId, request: Resources, *, exclusive_cpus: bool = False, gpu: GpuRequest | None = None
    ) -> Lease:
        """Lease all of it. Call `shortfall` first: granting what does not fit is an InvariantError."""
        if owner in self._holdings:
            raise InvariantError(f"{owner} already holds a lease")
        missing = self.shortfall(request, exclusive_cpus=exclusive_cpus, gpu=gpu)
        if missing is not None:
            raise InvariantError(f"{owner} was granted more {missing.resource} than is free")
        gpus = pick_gpus(self._gpu_question(request, gpu))
        if isinstance(gpus, GpuLack):
            raise InvariantError(f"{owner} was granted GPUs that are not free: {gpus.words}")
        cpu_ids: tuple[int, ...] = ()
        if exclusive_cpus:
            taken_cpus = self._taken_cpus()
            free = [cpu.id for cpu in self._cpus if cpu.id not in taken_cpus]
            cpu_ids = pick_cpus(self._cpus, free, request.cpu_milli // 1000) or ()
            if not cpu_ids:
                raise InvariantError(f"{owner} was granted exclusive cores, but none fit")
        lease = Lease(granted=request, gpu_uuids=gpus.uuids, gpu_part=gpus.part, cpu_ids=cpu_ids)
        self._holdings[owner] = _Holding(lease)
        return lease

    def release_compute(self, owner: AttemptId) -> None:
        """Give back CPU, memory and GPUs. Repeating is harmless."""
        holding = self._holdings.get(owner)
        if holding is not None:
            holding.compute = False
            self._drop_if_empty(owner, holding)

    def release_disk(self, owner: AttemptId) -> None:
        """Give back the disk. Repeating is harmless."""
        holding = self._holdings.get(owner)
        if holding is not None:
            holding.disk = False
            self._drop_if_empty(owner, holding)

    def restore(self, records: Iterable[TaskRecord]) -> None:
        """Take up the leases of journalled attempts, even where the node has shrunk meanwhile."""
        for record in records:
            if record.phase is Phase.FINISHED:
                continue
            holding = _Holding(record.lease, compute=not record.compute_released, disk=not record.disk_released)
            if holding.compute or holding.disk:
                self._holdings[record.id] = holding

    def _drop_if_empty(self, owner: AttemptId, holding: _Holding) -> None:
        if not holding.compute and not holding.disk:
            del self._holdings[owner]
