"""What this node tells of itself: registration and heartbeat carry the same numbers as `inspect`."""

from __future__ import annotations

from dataclasses import dataclass

from nodeservice.core.model import GIB, Phase
from nodeservice.lifecycle.allocatable_disk import AllocatableDisk
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.gpu_keeper import GPU_DRIVER, GpuKeeper
from nodeservice.ports import CapacitySource, GpuInventory
from nodeservice.rpc import convert, convert_gpu
from nodeservice.wire import master_worker_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    worker_id: str
    advertise: str
    """Empty unless configured: a master dials what it gets here instead of the address that it sees."""
    listen: str
    version: str
    capacity: CapacitySource
    disk: AllocatableDisk
    driver: Driver
    gpus: GpuKeeper

    async def registration(self) -> pb.WorkerInfo:
        """A fresh look at the host. The old `total_*` fields carry the allocatable amounts, since masters place on them."""
        node = await self.disk.look()
        ledger, engine, allocatable = self.driver.ledger, node.host.engine, node.allocatable
        return pb.WorkerInfo(
            worker_id=self.worker_id,
            worker_ip=self.advertise,
            total_cpu=allocatable.cpu_milli / 1000,
            total_memory=allocatable.memory_bytes / GIB,
            total_storage=allocatable.disk_bytes / GIB,
            total_gpu=float(allocatable.gpu_count),
            capacity=convert.resources(node.capacity),
            allocatable=convert.resources(allocatable),
            free=convert.resources(ledger.free),
            gpus=self._gpus(node.host.gpus),
            kernel=node.host.kernel,
            cgroup_version=node.host.cgroup_version,
            engine=engine.name if engine else "",
            engine_version=engine.version if engine else "",
            node_version=self.version,
            listen_address=self.listen,
            gpu_driver_version=node.host.gpus.driver_version,
            cuda_version=node.host.gpus.cuda_version,
            warnings=warnings_told(self.driver, node.host.gpus),
        )

    async def heartbeat(self) -> pb.Heartbeat:
        usage = await self.capacity.sample()
        ledger = self.driver.ledger
        return pb.Heartbeat(
            worker_id=self.worker_id,
            cpu_usage=usage.cpu_percent,
            memory_usage=usage.memory_percent,
            storage_usage=usage.disk_percent,
            gpu_usage=usage.gpu_percent,
            running_tasks=[
                convert.running_task(record, ledger.gpus)
                for record in self.driver.live()
                if record.phase <= Phase.REPORTING
            ],
            allocatable=convert.resources(ledger.allocatable),
            free=convert.resources(ledger.free),
            gpus=self._gpus(self.gpus.inventory),
            draining=self.driver.draining or self.driver.cordoned,
            conditions=conditions_told(self.driver),
            warnings=warnings_told(self.driver, self.gpus.inventory),
        )

    def _gpus(self, inventory: GpuInventory) -> list[pb.GpuInfo]:
        ledger = self.driver.ledger
        return convert_gpu.gpu_infos(
            inventory,
            ledger.gpus,
            ledger.gpu_leases(),
            self.gpus.state,
            sharing_allowed=ledger.gpu_sharing_allowed,
        )


def conditions_told(driver: Driver) -> list[str]:
    return [f"{name}: {words}" for name, words in driver.all_conditions().items()]


def warnings_told(driver: Driver, inventory: GpuInventory) -> list[str]:
    """At the first registration nobody may have looked at the GPUs but who made this inventory."""
    told = dict(driver.warnings)
    if inventory.complaints:
        told[GPU_DRIVER] = "; ".join(inventory.complaints)
    return [f"{name}: {words}" for name, words in told.items()]
