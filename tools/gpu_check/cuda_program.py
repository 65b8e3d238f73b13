"""A program that takes memory of one GPU and works on it when told to. Started by cuda.py; speaks JSON, a line each.

With PyTorch or CuPy where they are, else with the CUDA driver's own library by ctypes, which needs no package.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

_FAULT = b"""
.version 6.0
.target sm_70
.address_size 64
.visible .entry fault()
{
    .reg .u64 %address;
    .reg .u32 %value;
    mov.u64 %address, 64;
    mov.u32 %value, 1;
    st.global.u32 [%address], %value;
    ret;
}
"""
"""Writes to an address that nobody has: the driver ends this context and reports an XID."""


class Driver:
    """The CUDA driver API, on the first visible device."""

    name = "libcuda"

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._pointer = ctypes.c_uint64()
        self._bytes = 0
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def allocate(self, size_bytes: int) -> int:
        self._call("cuMemAlloc_v2", ctypes.byref(self._pointer), ctypes.c_size_t(size_bytes))
        self._bytes = size_bytes
        self._fill(1)
        self._call("cuCtxSynchronize")
        return size_bytes

    def work(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        number = 0
        while time.monotonic() < end:
            for _ in range(16):
                number += 1
                self._fill(number & 0xFFFF)
            self._call("cuCtxSynchronize")

    def fault(self) -> str:
        """An illegal write; what CUDA says of it."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(_FAULT))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(b"fault"))
        one, none = ctypes.c_uint(1), ctypes.c_void_p()
        self._call("cuLaunchKernel", function, one, one, one, one, one, one, ctypes.c_uint(0), none, none, none)
        return f"cuCtxSynchronize answers {self._cuda.cuCtxSynchronize()}"

    def _fill(self, value: int) -> None:
        self._call("cuMemsetD32_v2", self._pointer, ctypes.c_uint(value), ctypes.c_size_t(self._bytes // 4))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name} answers {code}")


class Torch:
    """PyTorch, whose own figure is what its allocator has reserved."""

    name = "PyTorch"

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("PyTorch finds no CUDA")
        self._torch = torch
        self._kept: list[Any] = []

    def allocate(self, size_bytes: int) -> int:
        self._kept.append(self._torch.zeros(size_bytes, dtype=self._torch.uint8, device="cuda"))
        self._torch.cuda.synchronize()
        return int(self._torch.cuda.memory_reserved())

    def work(self, seconds: float) -> None:
        matrix = self._torch.rand(4096, 4096, device="cuda")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(8):
                self._torch.matmul(matrix, matrix)
            self._torch.cuda.synchronize()


class Cupy:
    """CuPy, whose own figure is what its pool holds."""

    name = "CuPy"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._kept: list[Any] = []
        cupy.cuda.runtime.getDeviceCount()

    def allocate(self, size_bytes: int) -> int:
        self._kept.append(self._cupy.zeros(size_bytes, dtype=self._cupy.uint8))
        self._cupy.cuda.Device().synchronize()
        return int(self._cupy.get_default_memory_pool().total_bytes())

    def work(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(16):
                self._kept[0].fill(1)
            self._cupy.cuda.Device().synchronize()


def open_cuda(which: str) -> Any:
    """By the name asked for; "auto" is the first that there is."""
    kinds = {"torch": [Torch], "cupy": [Cupy], "driver": [Driver], "auto": [Torch, Cupy, Driver]}[which]
    errors = []
    for kind in kinds:
        try:
            return kind()
        except Exception as error:
            errors.append(f"{kind.name}: {error}")
    raise RuntimeError("; ".join(errors))


def main() -> None:
    cuda = None
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if order == "open":
                cuda = open_cuda(arguments[0])
                answer["with"] = cuda.name
            else:
                answer["value"] = getattr(cuda, order)(*arguments)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
