"""What a running node tells as metrics: read from what it knows anyway, in one go, each time that they are sent."""

from __future__ import annotations

import os
import resource
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from nodeservice.core.machine import PHASE_NAMES
from nodeservice.core.model import Phase, TaskRecord
from nodeservice.daemon.instruments import INSTRUMENTS, PHASE_DURATION
from nodeservice.daemon.node import Node
from nodeservice.gpu.health import GpuState
from nodeservice.gpu.throttle import HELD_BACK, throttle_names
from nodeservice.lifecycle.node_mode import Mode
from nodeservice.ports import Gpu
from nodeservice.rpc.uplink import MasterLink
from nodeservice.telemetry.metrics import Attributes, Metrics, Reading, open_metrics

_STATES = {GpuState.WELL: "ok", GpuState.SUSPECT: "degraded", GpuState.FAULTY: "failed"}
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STATM = Path("/proc/self/statm")


class Measured:
    """Without a collector for metrics nothing is read, and nothing imported for it.

    `link` is set once there is one.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._metrics: Metrics | None = None
        self._began = node.clock.elapsed()
        self._seen: dict[str, set[str]] = defaultdict(set)
        self._values: dict[str, list[tuple[float, Attributes]]] = {}
        self.link: MasterLink | None = None

    def open(self) -> None:
        """Raises ConfigError."""
        config = self._node.config
        self._metrics = open_metrics(
            config.otlp_metrics_endpoint,
            insecure=config.otlp_insecure,
            worker_id=config.worker_id,
            instruments=INSTRUMENTS,
            read=self.read,
        )
        if self._metrics is not None:
            self._node.tally.on_phase = self._record_phase

    async def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        if self._metrics is not None:
            await self._metrics.close()

    def read(self) -> Reading:
        self._values = {}
        self._read_tasks()
        self._read_node()
        self._read_master()
        self._read_amounts()
        self._read_gpus()
        self._read_process()
        return self._values

    def _record_phase(self, name: str, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.record(PHASE_DURATION, seconds, {"nodeservice.phase": name})

    def _add(self, name: str, value: float | None, attributes: Attributes | None = None) -> None:
        """None: not known, so not told."""
        if value is not None:
            self._values.setdefault(name, []).append((value, attributes or {}))

    # ---- tasks -----------------------------------------------------------------------------------------------------

    def _read_tasks(self) -> None:
        tally, live = self._node.tally, self._node.driver.live()
        by_phase: dict[Phase, list[TaskRecord]] = defaultdict(list)
        for record in live:
            by_phase[record.phase].append(record)
        now = self._node.clock.now()
        for phase, name in PHASE_NAMES.items():
            attributes = {"nodeservice.phase": name}
            self._add("nodeservice.task.unfinished", len(by_phase[phase]), attributes)
            if began := [record.timings[-1].started_at for record in by_phase[phase]]:
                age_seconds = max(0.0, (now - min(began)).total_seconds())
                self._add("nodeservice.task.phase.age", age_seconds, attributes)
        for (outcome, reason), count in tally.finished.items():
            attributes = {"nodeservice.outcome": outcome.value, "nodeservice.reason": reason.value}
            self._add("nodeservice.task.finished", count, attributes)
        for refusal, count in tally.refused.items():
            self._add("nodeservice.task.refused", count, {"nodeservice.reason": refusal})
        retained = [record.collected for record in live if record.retained and record.collected is not None]
        self._add("nodeservice.result.retained", sum(collected.total_bytes for collected in retained))
        self._add("nodeservice.result.stored", tally.stored_bytes)
        self._add("nodeservice.image.removed", tally.removed_image_bytes)

    # ---- the node --------------------------------------------------------------------------------------------------

    def _read_node(self) -> None:
        node, driver = self._node, self._node.driver
        conditions, is_reachable = driver.all_conditions(), not node.runtime.trouble
        for mode in Mode:
            self._add("nodeservice.node.mode", mode is node.mode.current.mode, {"nodeservice.mode": mode.value})
        takes_tasks = is_reachable and not (conditions or driver.cordoned or driver.draining or self.link is None)
        self._add("nodeservice.node.accepting", takes_tasks)
        self._add("nodeservice.engine.reachable", is_reachable)
        self._add_named("condition", conditions)
        self._add_named("warning", driver.warnings)

    def _add_named(self, kind: str, found: Iterable[str]) -> None:
        """Those that have passed are 0 from then on: an alert ends at once then."""
        self._seen[kind].update(found)
        for name in self._seen[kind]:
            self._add(f"nodeservice.node.{kind}", name in found, {f"nodeservice.{kind}": name})

    def _read_master(self) -> None:
        """Nothing while none is known."""
        link = self.link
        if link is None or link.address is None:
            return
        self._add("nodeservice.master.registered", link.is_registered)
        if link.heard_at is not None:
            silent_seconds = (self._node.clock.now() - link.heard_at).total_seconds()
            self._add("nodeservice.master.silence", max(0.0, silent_seconds))

    def _read_amounts(self) -> None:
        ledger, last = self._node.driver.ledger, self._node.capacity.last
        held = {uuid for lease in ledger.gpu_leases() for uuid in lease.gpu_uuids}
        leased = ledger.leased
        parts = {"allocatable": ledger.allocatable, "granted": leased} | ({"capacity": last.capacity} if last else {})
        for part, amount in parts.items():
            gpu_count = amount.gpu_count
            if amount is leased:  # which knows nothing of parts of GPUs
                gpu_count = sum(1 for unit in ledger.gpus if unit.counts and unit.uuid in held)
            self._add(f"nodeservice.cpu.{part}", amount.cpu_milli / 1000)
            self._add(f"nodeservice.memory.{part}", amount.memory_bytes)
            self._add(f"nodeservice.disk.{part}", amount.disk_bytes)
            self._add(f"nodeservice.gpu.{part}", gpu_count)

    # ---- GPUs ------------------------------------------------------------------------------------------------------

    def _read_gpus(self) -> None:
        """What a driver that fails or hangs shows is of before: it is not told. Events that it told are ours."""
        node, inventory = self._node, self._node.keeper.inventory
        leases = node.driver.ledger.gpu_leases()
        xids = node.gpus.xid_counts()
        for gpu in inventory.gpus:
            attributes = {"hw.id": gpu.uuid, "hw.type": "gpu", "hw.model": gpu.name}
            for (uuid, code), count in xids.items():
                if uuid == gpu.uuid:
                    self._add("hw.errors", count, {**attributes, "error.type": f"xid_{code}"})
            own = {gpu.uuid, *(instance.uuid for instance in gpu.mig_instances)}
            holder_count = sum(1 for lease in leases if not own.isdisjoint(lease.gpu_uuids))
            self._add("nodeservice.gpu.tasks", holder_count, attributes)
            if inventory.error is not None:
                continue
            state = node.keeper.state(gpu.uuid)[0]
            for each, name in _STATES.items():
                self._add("hw.status", each is state, {**attributes, "hw.state": name})
            if not gpu.lost:
                self._read_sensors(gpu, attributes)

    def _read_sensors(self, gpu: Gpu, attributes: Mapping[str, str]) -> None:
        percent, millijoules = gpu.utilization_percent, gpu.energy_millijoules
        self._add("hw.gpu.utilization", None if percent is None else percent / 100, attributes)
        self._add("hw.gpu.memory.usage", gpu.memory_used_bytes, attributes)
        self._add("hw.gpu.memory.limit", gpu.memory_total_bytes, attributes)
        self._add("hw.temperature", gpu.temperature_celsius, attributes)
        self._add("hw.power", gpu.power_watts, attributes)
        self._add("hw.energy", None if millijoules is None else millijoules / 1000, attributes)
        self._add("hw.errors", gpu.ecc_uncorrected_count, {**attributes, "error.type": "uncorrected_memory"})
        held_back = throttle_names(gpu.throttle_reasons)
        for reason in throttle_names(HELD_BACK):
            told = {**attributes, "nodeservice.throttle_reason": reason}
            self._add("nodeservice.gpu.throttled", reason in held_back, told)

    # ---- the daemon itself -----------------------------------------------------------------------------------------

    def _read_process(self) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        self._add("process.cpu.time", used.ru_utime, {"cpu.mode": "user"})
        self._add("process.cpu.time", used.ru_stime, {"cpu.mode": "system"})
        self._add("process.memory.usage", int(_STATM.read_text(encoding="ascii").split()[1]) * _PAGE_BYTES)
        self._add("process.uptime", self._node.clock.elapsed() - self._began)
