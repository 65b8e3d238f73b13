"""Turns the programs by which cgroup v2 guards devices back into rules, by asking each program itself.

The kernel shows no rules on cgroup v2, only the instructions of the programs that a container runtime attached. They compare
the device with constants, so they are run here, on paper, for every device that they name and for one that they don't.

Sources: bpf(2), linux/bpf.h (bpf_attr, bpf_prog_info, bpf_cgroup_dev_ctx), RFC 9669 (the instructions).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
_GET_FD_BY_ID, _GET_INFO_BY_FD, _QUERY = 13, 15, 16
_CGROUP_DEVICE = 6
_EFFECTIVE = 1
_MAX_PROGRAMS = 64
_INFO_BYTES = 256
_INSTRUCTION = struct.Struct("<BBhi")
_KINDS = {"b": 1, "c": 2}
_ACCESSES = {"r": 2, "w": 4, "m": 1}
_NOT_NAMED = (1 << 20) - 1
"""A number that no program names: the kernel's own last minor."""
_MAX_STEPS = 20_000
_WORD, _LONG = (1 << 32) - 1, (1 << 64) - 1
_OFFSETS = {0: "type", 4: "major", 8: "minor"}

_LOADS = {0x61: _WORD, 0x69: 0xFFFF, 0x71: 0xFF}
_ALU: dict[int, Callable[[int, int], int]] = {
    0x0: lambda a, b: a + b,
    0x1: lambda a, b: a - b,
    0x4: lambda a, b: a | b,
    0x5: lambda a, b: a & b,
    0x6: lambda a, b: a << (b & 63),
    0x7: lambda a, b: a >> (b & 63),
    0xA: lambda a, b: a ^ b,
    0xB: lambda _a, b: b,
}
_JUMPS: dict[int, Callable[[int, int], bool]] = {
    0x0: lambda _a, _b: True,
    0x1: lambda a, b: a == b,
    0x2: lambda a, b: a > b,
    0x3: lambda a, b: a >= b,
    0x4: lambda a, b: bool(a & b),
    0x5: lambda a, b: a != b,
    0xA: lambda a, b: a < b,
    0xB: lambda a, b: a <= b,
}


class UnreadableProgramError(Exception):
    """Programs are attached, and what they allow can't be told; the message says why."""


@dataclass(frozen=True, slots=True)
class _Step:
    code: int
    target: int
    source: int
    offset: int
    value: int


@dataclass(slots=True)
class Program:
    """Instructions, and the numbers that they compare a device's major and minor with."""

    steps: list[_Step]
    majors: set[int] = field(default_factory=set)
    minors: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, code: bytes) -> Program:
        steps = [
            _Step(code, registers & 15, registers >> 4, offset, value)
            for code, registers, offset, value in _INSTRUCTION.iter_unpack(code)
        ]
        program = cls(steps)
        held: dict[int, str] = {}
        for step in steps:
            kind = step.code & 7
            if step.code in _LOADS:
                held[step.target] = _OFFSETS.get(step.offset, "")
            elif kind in (4, 7) and step.code >> 4 == 0xB:
                held[step.target] = held.get(step.source, "") if step.code & 8 else ""
            elif kind in (5, 6) and not step.code & 8:
                named = {"major": program.majors, "minor": program.minors}.get(held.get(step.target, ""))
                if named is not None:
                    named.add(step.value & _WORD)
        return program

    def allows(self, kind: str, access: str, major: int, minor: int) -> bool:
        """Raises UnreadableProgramError for instructions that no guard of devices needs."""
        context = {0: _ACCESSES[access] << 16 | _KINDS[kind], 4: major, 8: minor}
        registers = [0] * 11
        at = 0
        for _ in range(_MAX_STEPS):
            if not 0 <= at < len(self.steps):
                break
            step = self.steps[at]
            at += 1
            operation, group = step.code >> 4, step.code & 7
            operand = registers[step.source] if step.code & 8 else step.value
            if step.code in _LOADS:
                if step.source != 1 or step.offset not in context:
                    break
                registers[step.target] = context[step.offset] & _LOADS[step.code]
            elif step.code == 0x95:  # exit
                return bool(registers[0] & _WORD)
            elif group in (4, 7) and operation in _ALU:
                mask = _WORD if group == 4 else _LONG
                registers[step.target] = _ALU[operation](registers[step.target] & mask, operand & mask) & mask
            elif group in (5, 6) and operation in _JUMPS:
                mask = _LONG if group == 5 else _WORD
                if _JUMPS[operation](registers[step.target] & mask, operand & mask):
                    at += step.offset
            else:
                break
        raise UnreadableProgramError("a device program is attached that uses instructions beyond comparing numbers")


def allowed_devices(directory: Path) -> list[str] | None:
    """Rules as cgroup v1 writes them, for what all programs that apply to the cgroup allow; None where none applies.

    Raises OSError where the kernel does not tell, UnreadableProgramError.
    """
    programs = [Program.of(code) for code in _attached(directory)]
    return rules(programs) if programs else None


def rules(programs: Sequence[Program]) -> list[str]:
    """`c 1:3 rwm`, with `*` for whatever no program names. Raises UnreadableProgramError."""
    majors = sorted({major for program in programs for major in program.majors})
    minors = sorted({minor for program in programs for minor in program.minors})
    found: list[str] = []

    def access(kind: str, major: int, minor: int) -> str:
        return "".join(
            word for word in _ACCESSES if all(program.allows(kind, word, major, minor) for program in programs)
        )

    for kind in _KINDS:
        of_all = access(kind, _NOT_NAMED, _NOT_NAMED)
        if of_all:
            found.append(f"{kind} *:* {of_all}")
        of_minors = {minor: access(kind, _NOT_NAMED, minor) for minor in minors}
        found += [f"{kind} *:{minor} {of_one}" for minor, of_one in of_minors.items() if set(of_one) - set(of_all)]
        for major in majors:
            of_major = access(kind, major, _NOT_NAMED)
            if set(of_major) - set(of_all):
                found.append(f"{kind} {major}:* {of_major}")
            for minor in minors:
                one = access(kind, major, minor)
                if set(one) - set(of_major) - set(of_minors[minor]):
                    found.append(f"{kind} {major}:{minor} {one}")
    return found


def _attached(directory: Path) -> list[bytes]:
    """The instructions of all programs that apply to a cgroup, its ancestors' included. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ids = (ctypes.c_uint32 * _MAX_PROGRAMS)()
        query = struct.pack("=IIIIQI", descriptor, _CGROUP_DEVICE, _EFFECTIVE, 0, ctypes.addressof(ids), _MAX_PROGRAMS)
        _, answer = _bpf(_QUERY, query)
        count = struct.unpack_from("=I", answer, 24)[0]
        return [_instructions(int(id_)) for id_ in ids[:count]]
    finally:
        os.close(descriptor)


def _instructions(program_id: int) -> bytes:
    descriptor, _ = _bpf(_GET_FD_BY_ID, struct.pack("=III", program_id, 0, 0))
    try:
        size = struct.unpack_from("=I", _info(descriptor), 20)[0]
        code = ctypes.create_string_buffer(size)
        if size:
            _info(descriptor, size, ctypes.addressof(code))
    finally:
        os.close(descriptor)
    if not size:
        raise UnreadableProgramError("a device program is attached; this process may not read its instructions")
    return code.raw


def _info(descriptor: int, code_bytes: int = 0, code_at: int = 0) -> bytes:
    """The kernel's bpf_prog_info, with the instructions written to `code_at`."""
    info = ctypes.create_string_buffer(struct.pack("=IIQIIQQ", 0, 0, 0, 0, code_bytes, 0, code_at), _INFO_BYTES)
    _bpf(_GET_INFO_BY_FD, struct.pack("=IIQ", descriptor, _INFO_BYTES, ctypes.addressof(info)))
    return info.raw


def _bpf(command: int, attributes: bytes) -> tuple[int, bytes]:
    """The system call; what it returned, and the attributes as it left them. Raises OSError."""
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(f"the number of bpf(2) is not known for {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, 128)
    done = ctypes.CDLL(None, use_errno=True).syscall(number, command, ctypes.byref(buffer), 128)
    if done < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(done), buffer.raw
