"""Two pretended machines with eight H200 each on one Docker daemon, and what happens on their GPUs while tasks run."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import docker

from gpu_demo.batch import FAULTY, NODES, Expected
from nodeservice.ports import labels
from nodeservice.testing.false_driver import MACHINES, FalseDriver
from nodeservice.testing.false_driver.hook import PROGRAM, HookCall, calls, hook_script
from tests.integration.docker_daemon import DockerDaemon, docker_daemon

FALLEN_OFF = 79
IDLE_MILLIWATTS, BUSY_MILLIWATTS = 76_000, 620_000
_LOOK_SECONDS = 0.4
_FAULT_AFTER_SECONDS = 2.0
_REPAIR_AFTER_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Machines:
    """The drivers by node, and the daemon that all nodes use."""

    drivers: Mapping[str, FalseDriver]
    daemon: DockerDaemon
    places: Mapping[str, tuple[str, int]]
    """Of each GPU: the node that it is in, and N of its /dev/nvidiaN."""

    def hook_calls(self) -> dict[str, HookCall]:
        """By container."""
        return {call.container_id: call for call in calls(self.daemon.home / "seen")}

    def named(self, text: str) -> str:
        """With the names that a person can tell apart in the place of UUIDs."""
        for gpu, (node, number) in self.places.items():
            text = text.replace(gpu, f"GPU {number} of {node}")
        return text

    def driver(self, gpu: str) -> FalseDriver:
        return self.drivers[self.places[gpu][0]]


@contextlib.contextmanager
def machines() -> Iterator[Machines]:
    """All of it is in the daemon's folder, which goes at the end."""
    hook = hook_script(Path("HOME/drivers"), Path("HOME/seen"))
    with docker_daemon(programs={PROGRAM: hook}) as daemon:
        cache = daemon.home / "cache"
        drivers = {node: _driver(daemon.home / "drivers" / node, node, cache) for node in NODES}
        places = {
            gpu: (node, int(driver.facts(gpu)["minor"])) for node, driver in drivers.items() for gpu in driver.gpus
        }
        yield Machines(drivers, daemon, places)


def _driver(directory: Path, node: str, cache: Path) -> FalseDriver:
    """Each node's GPUs have UUIDs of their own."""
    plan = MACHINES["h200x8"]
    own = (replace(gpu, uuid=f"GPU-{uuid.uuid5(uuid.NAMESPACE_URL, f'{node}/{gpu.uuid}')}") for gpu in plan.gpus)
    return FalseDriver.build(directory, replace(plan, gpus=tuple(own)), cache=cache)


@dataclass
class Fault:
    """What is played on the GPU of the task that loses it. Instants are those of time.monotonic()."""

    gpu: str = ""
    failed_at: float = 0.0
    has_failed: bool = False
    repaired_at: float = 0.0
    is_repaired: bool = False


@dataclass
class Play(contextlib.AbstractContextManager["Play"]):
    """A thread that lets the drivers tell of load, memory and energy where containers run, and of one fault."""

    machines: Machines
    expected: dict[str, Expected] = field(default_factory=dict)
    """By task, from before it is submitted."""
    containers: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Container → task and attempt: all that were ever seen."""
    fault: Fault = field(default_factory=Fault)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _joined: set[tuple[str, str]] = field(default_factory=set)
    _energy: dict[str, int] = field(default_factory=dict)
    failed: BaseException | None = None

    def __enter__(self) -> Play:
        self._thread = threading.Thread(target=self._run, name="play", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(10)

    def _run(self) -> None:
        try:
            with self.machines.daemon.client() as client:
                before = time.monotonic()
                while not self._ended.wait(_LOOK_SECONDS):
                    now = time.monotonic()
                    self._look(client, now, now - before)
                    before = now
        except Exception as error:  # told at the end of the demo
            self.failed = error

    def _look(self, client: docker.APIClient, now: float, gap_seconds: float) -> None:
        given = self.machines.hook_calls()
        busy: set[str] = set()
        for entry in client.containers(all=True):
            task = entry["Labels"].get(labels.TASK_ID, "")
            self.containers[entry["Id"]] = task, int(entry["Labels"].get(labels.ATTEMPT, 0))
            if entry["State"] == "running" and entry["Id"] in given:
                busy |= set(given[entry["Id"]].uuids)
                with contextlib.suppress(docker.errors.NotFound, ProcessLookupError, FileNotFoundError):
                    self._use(client, entry["Id"], task, given[entry["Id"]].uuids)
        for gpu, (_, number) in self.machines.places.items():
            self._load(gpu, gap_seconds, 62 + 4 * number if gpu in busy else 0)
        self._break_and_repair(now, given)

    def _use(self, client: docker.APIClient, container: str, task: str, gpus: tuple[str, ...]) -> None:
        """Its first process takes memory of the GPUs, until it ends."""
        for gpu in gpus:
            if (container, gpu) in self._joined:
                continue
            pid = int(client.inspect_container(container)["State"]["Pid"])
            if not pid:
                return
            self.machines.driver(gpu).add_process(gpu, pid, self.expected[task].uses_bytes, while_alive=True)
            self._joined.add((container, gpu))

    def _load(self, gpu: str, gap_seconds: float, percent: int) -> None:
        milliwatts = BUSY_MILLIWATTS if percent else IDLE_MILLIWATTS
        energy = self._energy.get(gpu, 1_000_000) + round(milliwatts * gap_seconds)
        self._energy[gpu] = energy
        self.machines.driver(gpu).set(
            gpu, utilization_percent=percent, power_milliwatts=milliwatts, energy_millijoules=energy,
            temperature_celsius=68 if percent else 31,
        )  # fmt: skip

    def _break_and_repair(self, now: float, given: Mapping[str, HookCall]) -> None:
        fault = self.fault
        if not fault.gpu:
            ill = [call.uuids for id_, call in given.items() if self.containers.get(id_) == (FAULTY, 1)]
            if ill:
                fault.gpu, fault.failed_at = ill[0][0], now + _FAULT_AFTER_SECONDS
            return
        driver = self.machines.driver(fault.gpu)
        if not fault.has_failed and now >= fault.failed_at:
            driver.xid(fault.gpu, FALLEN_OFF)
            driver.lose(fault.gpu)
            fault.has_failed, fault.repaired_at = True, now + _REPAIR_AFTER_SECONDS
        elif fault.has_failed and not fault.is_repaired and now >= fault.repaired_at:
            driver.restore(fault.gpu)
            fault.is_repaired = True
