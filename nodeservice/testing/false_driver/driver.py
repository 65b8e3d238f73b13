"""FalseDriver: a false NVIDIA driver in a directory of its own, and what can happen to it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from nodeservice.testing.false_driver.build import LIBRARY, compiled
from nodeservice.testing.false_driver.facts import Given, gpu_facts, layout, mig_facts, sections_of
from nodeservice.testing.false_driver.machines import MACHINES, Machine, mig_devices
from nodeservice.testing.false_driver.state import VARIABLE, Sections, StateFile

_XID_EVENT = 0x8
_NO_LIMIT = "18446744073709551615"
_EVENTS_KEPT = 512


class FalseDriver:
    """A libnvidia-ml.so.1 and the state file that it reads at every call.

    Changes hold at once, in every process that has loaded the library; each is made as a whole. GPUs and MIG devices are
    named by UUID; KeyError for one that is not there.
    """

    def __init__(self, directory: Path) -> None:
        """Of a directory that `build` made."""
        self.directory = directory.absolute()
        self.library = self.directory / "lib" / LIBRARY
        """Opened by this path before the binding looks for it, it is the binding's in a process that runs already too."""
        self.pci_devices = self.directory / "pci"
        """What /sys/bus/pci/devices would show of the machine's NVIDIA hardware."""
        self._state = StateFile(self.directory / "state")

    @classmethod
    def build(cls, directory: Path, machine: str | Machine, *, cache: Path | None = None) -> FalseDriver:
        """Compile, unless `cache` has it (by default a folder in `directory`), and start from the machine's state.

        RuntimeError without a C compiler.
        """
        plan = MACHINES[machine] if isinstance(machine, str) else machine
        driver = cls(directory)
        driver.library.parent.mkdir(parents=True, exist_ok=True)
        # Never written in place: a process may have it mapped.
        new = driver.library.with_suffix(".new")
        shutil.copyfile(compiled(plan.absent, cache or driver.directory / "cache"), new)
        os.replace(new, driver.library)
        driver._state.write(sections_of(plan))
        _write_pci_devices(driver.pci_devices, plan)
        return driver

    @property
    def environment(self) -> dict[str, str]:
        """For a process at its start: the dynamic linker reads LD_LIBRARY_PATH then and never again.

        Each machine is a host of its own, also to the locks of GPUs: machines of a kind have the same UUIDs.
        """
        paths = [str(self.library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        locks = {"NODESERVICE_GPU_LOCK_DIR": str(self.directory / "locks")}
        return {"LD_LIBRARY_PATH": ":".join(paths), VARIABLE: str(self._state.path), **locks}

    @property
    def machine(self) -> str:
        return self._state.read()["driver"]["machine"]

    @property
    def gpus(self) -> list[str]:
        """UUIDs in the order of the indices."""
        return [head.split()[1] for head in self._state.read() if head.startswith("gpu ")]

    @property
    def migs(self) -> dict[str, str]:
        """UUID of each MIG device → that of its GPU, in the order of the indices."""
        return {head.split()[1]: mig["gpu"] for head, mig in self._state.read().items() if head.startswith("mig ")}

    # ---- readings ----

    def set(self, device: str, **facts: Given) -> None:
        """Set what a GPU or MIG device tells: facts of native/state.h, `remapped_rows` as (corrected, uncorrected, pending,
        failure), or `name`, `cpus`, `serial`. None: it does not tell it. ValueError for an unknown fact.

        `memory_used_bytes` is what the processes use, unless it is set.
        """
        with self._state.edit() as sections:
            section, known = _device(sections, device)
            section.update(known(facts))

    def set_nvlink(self, gpu: str, link: int, to: str | None) -> None:
        """Where an NVLink leads: "switch BUS_ID", "gpu BUS_ID", or None for a link that is down."""
        with self._state.edit() as sections:
            sections[f"gpu {gpu}"][f"nvlink.{link}"] = to or "down"

    def set_mig(self, gpu: str, profiles: Mapping[int, str] | None) -> list[str]:
        """Split a GPU anew, index → profile, or not at all; the UUIDs of its devices. What stays at its index stays the same
        device; of the others the processes end and the handles go stale."""
        devices = [] if profiles is None else mig_devices(gpu, profiles)
        with self._state.edit() as sections:
            sections[f"gpu {gpu}"]["mig_enabled"] = "0" if profiles is None else "1"
            before = [
                head.split()[1] for head, mig in sections.items() if head.startswith("mig ") and mig["gpu"] == gpu
            ]
            kept = {device.uuid for device in devices}
            for gone in (uuid for uuid in before if uuid not in kept):
                for head in [head for head in sections if head.split()[1:2] == [gone]]:
                    del sections[head]
            for device in devices:
                sections.setdefault(f"mig {device.uuid}", layout(device, gpu))
        return [device.uuid for device in devices]

    # ---- processes ----

    def add_process(
        self,
        device: str,
        pid: int,
        used_bytes: int | None,
        *,
        kind: str = "compute",
        sm_percent: int | None = None,
        memory_percent: int | None = None,
        while_alive: bool = False,
        cgroup: str | None = None,
    ) -> None:
        """A process on a GPU or MIG device, or new figures of one that is there. `used_bytes` None: not available.

        `kind` is compute, graphics or mps. With `while_alive`, the driver forgets it when that very process ends, as a
        real one does; else it is only a number. `cgroup`, a directory: where it counts for memory limits, instead of
        where it is.
        """
        if kind not in ("compute", "graphics", "mps"):
            raise ValueError(kind)
        with self._state.edit() as sections:
            section, _ = _device(sections, device)
            numbers = {"used_bytes": used_bytes, "sm_percent": sm_percent, "memory_percent": memory_percent}
            process = {"kind": kind, "cgroup": cgroup or ""}
            process |= {key: str(number) for key, number in numbers.items() if number is not None}
            if while_alive:
                process["start_ticks"] = str(_start_ticks(pid))
            head = f"process {device} {pid}"
            if section.get("accounting_mode") == "1":
                process |= _accounted(sections.get(head, {}), used_bytes or 0)
            sections[head] = process

    def remove_process(self, device: str, pid: int) -> None:
        """The process has ended. Accounting, where it was on, remembers it."""
        with self._state.edit() as sections:
            process = sections[f"process {device} {pid}"]
            if process.get("accounted") == "1":
                process.update({"ended": "1", "ended_microseconds": str(time.time_ns() // 1000)})
            else:
                del sections[f"process {device} {pid}"]

    # ---- faults ----

    def xid(self, gpu: str, code: int, *, gpu_instance: int | None = None, compute_instance: int | None = None) -> None:
        """A critical error: once to each event set in which the GPU is registered by now."""
        with self._state.edit() as sections:
            _device(sections, gpu)
            events = [head for head in sections if head.startswith("event ")]
            number = int(events[-1].split()[1]) + 1 if events else 1
            for old in events[: max(0, len(events) + 1 - _EVENTS_KEPT)]:
                del sections[old]
            instances = {"gpu_instance": gpu_instance, "compute_instance": compute_instance}
            known = {key: str(value) for key, value in instances.items() if value is not None}
            sections[f"event {number}"] = {"gpu": gpu, "type": str(_XID_EVENT), "data": str(code), **known}

    def lose(self, gpu: str) -> None:
        """It has fallen off the bus: it is still counted, and all else about it answers GPU_IS_LOST."""
        self._mark(gpu, lost="1")

    def restore(self, gpu: str) -> None:
        self._mark(gpu, lost="0")

    def deny(self, gpu: str) -> None:
        """This process may not open it: it is counted, and its handle is NO_PERMISSION."""
        self._mark(gpu, denied="1")

    def allow(self, gpu: str) -> None:
        self._mark(gpu, denied="0")

    def fail(self, call: str, code: int, *, device: str | None = None) -> None:
        """An NVML function answers with an error from now on, of one device or altogether.

        A name without its `_v2` means all its versions; "*" is every function.
        """
        with self._state.edit() as sections:
            sections[_failure(call, device)] = {"code": str(code)}

    def heal(self, call: str) -> None:
        """Take back what `fail` said; repeating is harmless."""
        with self._state.edit() as sections:
            sections.pop(_failure(call, None), None)

    def hang(self, seconds: float, calls: str = "*") -> None:
        """Calls, names with commas between, block for that long from now on.

        0 lifts it, also for those that block already.
        """
        with self._state.edit() as sections:
            sections["hang"] = {"seconds": str(seconds), "calls": calls}

    def unhang(self) -> None:
        self.hang(0)

    # ---- what callers have set ----

    def memory_limits(self, gpu: str) -> dict[str, tuple[int, int]]:
        """Directory of each limited cgroup → (soft, hard), in bytes."""
        limits = {}
        for head, limit in self._state.read().items():
            if head.startswith(f"memory_limit {gpu} ") and limit != {"soft_bytes": "0", "hard_bytes": _NO_LIMIT}:
                limits[head.split(" ", 2)[2]] = (int(limit["soft_bytes"]), int(limit["hard_bytes"]))
        return limits

    def facts(self, device: str) -> dict[str, str]:
        """All that the state file has of a GPU or MIG device."""
        return _device(self._state.read(), device)[0]

    def _mark(self, gpu: str, **facts: str) -> None:
        with self._state.edit() as sections:
            sections[f"gpu {gpu}"].update(facts)


def _accounted(before: Mapping[str, str], used_bytes: int) -> dict[str, str]:
    """What accounting keeps of a process: since when, and the most memory that it had."""
    goes_on = before.get("accounted") == "1" and "ended" not in before
    return {
        "accounted": "1",
        "started_microseconds": before["started_microseconds"] if goes_on else str(time.time_ns() // 1000),
        "peak_bytes": str(max(used_bytes, int(before["peak_bytes"]) if goes_on else 0)),
    }


def _failure(call: str, device: str | None) -> str:
    return f"fail {call}" if device is None else f"fail {call} {device}"


def _device(sections: Sections, uuid: str) -> tuple[dict[str, str], Callable[[Mapping[str, Given]], dict[str, str]]]:
    """Its section, and what checks facts of its kind."""
    if f"mig {uuid}" in sections:
        return sections[f"mig {uuid}"], mig_facts
    return sections[f"gpu {uuid}"], gpu_facts


def _start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat: with it, a PID names one process for ever."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _write_pci_devices(directory: Path, machine: Machine) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for gpu in machine.gpus:
        device = directory / gpu.bus_id.lower().removeprefix("0000")
        device.mkdir()
        (device / "vendor").write_text("0x10de\n")
        (device / "class").write_text("0x030200\n")
        (device / "numa_node").write_text(f"{gpu.facts.get('numa_node', -1)}\n")
