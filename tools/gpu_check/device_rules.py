"""A cgroup whose processes may open only the device nodes that a list of rules names: on cgroup v1, or on v2 by a filter.

The kernel documents both: cgroup-v1/devices.rst, and "Device controller" in cgroup-v2.rst. On v2 a program of type
BPF_PROG_TYPE_CGROUP_DEVICE is asked at each open and mknod; it is loaded by ctypes, so that nothing needs to be installed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from gpu_check.record import CannotRunError

Rule = tuple[int, int | None]
"""Major and minor number of a character device; None is every minor."""

BASE_RULES: tuple[Rule, ...] = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, None))
"""null, zero, full, random, urandom, tty, ptmx and terminals: what a container gets."""


class DeviceCgroup(ABC):
    """A cgroup of our own. Use it with `with`; whatever is in it must have ended by the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> DeviceCgroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.directory.rmdir()

    @abstractmethod
    def allow(self, rules: Sequence[Rule]) -> None:
        """These and no others, from now on. What is open stays open."""

    def enter(self) -> None:
        """The calling process moves into it."""
        (self.directory / "cgroup.procs").write_text(str(os.getpid()))

    def holds(self, pid: int) -> bool:
        """Whether /proc says that the process is in it."""
        path = "/" + self.directory.name
        return any(line.endswith(path) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())


# ---- version 1 ---------------------------------------------------------------------------------------------------------


class CgroupV1(DeviceCgroup):
    """The `devices` controller."""

    version = 1

    def __init__(self) -> None:
        mount = next(
            (Path(words[1]) for words in _mounts() if words[2] == "cgroup" and "devices" in words[3].split(",")), None
        )
        if mount is None:
            raise CannotRunError("no cgroup v1 with the devices controller is mounted")
        super().__init__(_make(mount))

    def allow(self, rules: Sequence[Rule]) -> None:
        (self.directory / "devices.deny").write_text("a")
        for major, minor in rules:
            (self.directory / "devices.allow").write_text(f"c {major}:{'*' if minor is None else minor} rwm")


# ---- version 2 ---------------------------------------------------------------------------------------------------------

_BPF_CALL = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH = 5, 8, 9
_CGROUP_DEVICE_PROGRAM, _CGROUP_DEVICE_HOOK = 15, 6
_ALLOW_MULTI = 2
_CHARACTER_DEVICE = 2
_LOG_BYTES = 65536


class CgroupV2(DeviceCgroup):
    """A filter program on a cgroup of the unified hierarchy, which is mounted here for the time if it is not."""

    version = 2

    def __init__(self) -> None:
        if platform.machine() not in _BPF_CALL:
            raise CannotRunError(f"the number of bpf(2) on {platform.machine()} is not known here")
        self._mounted: Path | None = None
        mount = next((Path(words[1]) for words in _mounts() if words[2] == "cgroup2"), None)
        if mount is None:
            mount = self._mounted = _mount_cgroup2()
        self._filter: int | None = None
        super().__init__(_make(mount))

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._filter is not None:
            os.close(self._filter)
        if self._mounted is not None:
            _libc().umount2(os.fsencode(self._mounted), 0)
            self._mounted.rmdir()

    def allow(self, rules: Sequence[Rule]) -> None:
        program = load_filter(rules)
        cgroup = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # The new one first: between the two, only what both allow may be opened, never more.
            _attach(_PROG_ATTACH, cgroup, program, _ALLOW_MULTI)
            if self._filter is not None:
                _attach(_PROG_DETACH, cgroup, self._filter, 0)
                os.close(self._filter)
        finally:
            os.close(cgroup)
        self._filter = program


def load_filter(rules: Sequence[Rule]) -> int:
    """A loaded program, as a file descriptor, that allows these character devices and nothing else.

    CannotRunError without the privilege (CAP_BPF or CAP_SYS_ADMIN), or where the kernel does not take it.
    """
    code = filter_code(rules)
    instructions, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(_LOG_BYTES)
    # union bpf_attr: prog_type, insn_cnt, insns, license, log_level, log_size, log_buf
    attributes = struct.pack(
        "=IIQQIIQ",
        _CGROUP_DEVICE_PROGRAM,
        len(code) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(licence),
        1,
        _LOG_BYTES,
        ctypes.addressof(log),
    )
    try:
        return _bpf(_PROG_LOAD, attributes)
    except PermissionError as error:
        raise CannotRunError("this process may not load BPF programs") from error
    except OSError as error:
        raise CannotRunError(f"the kernel takes no device filter: {error}; {log.value.decode()[-300:]}") from error


def filter_code(rules: Sequence[Rule]) -> bytes:
    """BPF instructions.

    r1 is struct bpf_cgroup_dev_ctx {u32 access_type; u32 major; u32 minor}; the low half of access_type is the kind of
    device. r0 at the end: 1 is yes.
    """
    load, mask, unless, move, leave = 0x61, 0x54, 0x55, 0xB7, 0x95  # LDX|MEM|W, ALU|AND|K, JMP|JNE|K, ALU64|MOV|K, EXIT
    program = [
        _instruction(load, 2, 1, 0, 0),
        _instruction(mask, 2, 0, 0, 0xFFFF),
        _instruction(load, 3, 1, 4, 0),
        _instruction(load, 4, 1, 8, 0),
    ]
    for major, minor in rules:
        tests = [(2, _CHARACTER_DEVICE), (3, major)] + ([] if minor is None else [(4, minor)])
        for position, (register, value) in enumerate(tests):
            # To behind this rule: over the tests that are left, and over its two last instructions.
            program.append(_instruction(unless, register, 0, len(tests) - position - 1 + 2, value))
        program += [_instruction(move, 0, 0, 0, 1), _instruction(leave, 0, 0, 0, 0)]
    program += [_instruction(move, 0, 0, 0, 0), _instruction(leave, 0, 0, 0, 0)]
    return b"".join(program)


def _instruction(code: int, to: int, source: int, offset: int, value: int) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | to, offset, value)


def _attach(order: int, cgroup: int, program: int, flags: int) -> None:
    # union bpf_attr: target_fd, attach_bpf_fd, attach_type, attach_flags
    _bpf(order, struct.pack("=IIII", cgroup, program, _CGROUP_DEVICE_HOOK, flags))


def _bpf(order: int, attributes: bytes) -> int:
    libc = _libc()
    libc.syscall.restype = ctypes.c_long
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    done = libc.syscall(
        ctypes.c_long(_BPF_CALL[platform.machine()]), ctypes.c_long(order), buffer, ctypes.c_long(len(attributes))
    )
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(done)


# ---- both --------------------------------------------------------------------------------------------------------------


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mounts() -> list[list[str]]:
    """Device, mount point, type, options."""
    return [line.split() for line in Path("/proc/mounts").read_text().splitlines()]


def _mount_cgroup2() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="gpu-check-cgroup2-"))
    if _libc().mount(b"none", os.fsencode(directory), b"cgroup2", 0, None) != 0:
        reason = os.strerror(ctypes.get_errno())
        directory.rmdir()
        raise CannotRunError(f"no cgroup v2 is mounted, and none can be: {reason}")
    return directory


def _make(mount: Path) -> Path:
    directory = mount / f"nodeservice-gpu-check-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as error:
        raise CannotRunError(f"no cgroup can be made in {mount}: {error.strerror}") from error
    return directory
