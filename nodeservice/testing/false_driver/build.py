"""Compiles the false libnvidia-ml.so.1. Once per source and set of functions: what is in the cache is taken from there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"
_NATIVE = Path(__file__).parent / "native"
_COMPILERS = ("gcc", "cc", "clang")
_FLAGS = ("-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", f"-Wl,-soname,{LIBRARY}")
_TIMEOUT_SECONDS = 120


def compiler() -> str | None:
    """The C compiler of this host, or None."""
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def compiled(absent: Collection[str], cache: Path) -> Path:
    """The library without the functions `absent`: older drivers lack the symbols, and the binding says "function not found".

    RuntimeError where there is no compiler.
    """
    sources = sorted(_NATIVE.glob("*.[ch]"))
    digest = hashlib.sha256("\0".join([*_FLAGS, *sorted(absent)]).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    library = cache / digest.hexdigest()[:16] / LIBRARY
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile([source for source in sources if source.suffix == ".c"], absent, library)
    return library


def _compile(sources: list[Path], absent: Collection[str], library: Path) -> None:
    command = compiler()
    if command is None:
        raise RuntimeError("the false driver needs a C compiler; install gcc")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        script, output = Path(scratch) / "symbols.map", Path(scratch) / LIBRARY
        # An exact name goes before a pattern. The script gives no versions: NVML's symbols have none.
        script.write_text(f"{{ global: nvml*; local: {' '.join(f'{name};' for name in sorted(absent))} *; }};\n")
        done = subprocess.run(  # noqa: S603
            [command, *_FLAGS, f"-Wl,--version-script={script}", "-o", output, *sources, "-lpthread"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the false driver does not compile:\n{done.stderr}")
        os.replace(output, library)
