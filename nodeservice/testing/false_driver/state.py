"""The file that tells the false library what to say: sections of `key=value` lines, replaced as a whole under a lock.

    [driver]                          version, nvml_version, cuda_version, machine, init_error, pid_namespace
    [hang]                            seconds, calls (names with commas between, or *)
    [fail CALL] or [fail CALL UUID]   code
    [gpu UUID]                        the facts of native/state.h, name, bus_id, serial, cpus, pcie_switch, nvlink.N
    [mig UUID]                        gpu, profile and facts
    [process UUID PID]                kind (compute, graphics, mps), cgroup and facts
    [event NUMBER]                    gpu and facts; numbers rise
    [memory_limit UUID CGROUP]        soft_bytes, hard_bytes

A fact that is left out, or empty, is one that the device does not tell: its call is NOT_SUPPORTED. The library adds sections
itself when a caller sets something. A section may come twice: later lines hold.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "FALSE_NVIDIA_DRIVER"
"""Names the file, in the environment of whoever loads the library."""

Sections = dict[str, dict[str, str]]


class StateFile:
    """The file at `path`. Its lock, at `path` + ".lock", is shared with the library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Sections:
        return _parse(self.path.read_text())

    def write(self, sections: Sections) -> None:
        with self._locked():
            self._replace(sections)

    @contextmanager
    def edit(self) -> Iterator[Sections]:
        """What is in the file, to be changed; it is written at the end, unless an exception leaves it as it was."""
        with self._locked():
            sections = self.read()
            yield sections
            self._replace(sections)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self.path.with_name(self.path.name + ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _replace(self, sections: Sections) -> None:
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(_written(sections))
        os.replace(new, self.path)


def _parse(text: str) -> Sections:
    sections: Sections = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip()[1:-1], {})
        elif "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            current[key.strip()] = value.strip()
    return sections


def _written(sections: Sections) -> str:
    lines = []
    for head, values in sections.items():
        texts = [head, *values.values()]
        if any("\n" in text for text in texts):
            raise ValueError(f"a line break in [{head}] of the false driver's state")
        lines += [f"[{head}]", *(f"{key}={value}" for key, value in values.items()), ""]
    return "\n".join(lines)
