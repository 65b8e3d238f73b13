"""Makes an image from a static busybox of this host, in the form that the engine loads. No registry is needed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATH_IN_IMAGE = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
}
_DIRECTORIES = {
    "bin": 0o755,
    "dev": 0o755,
    "proc": 0o755,
    "sys": 0o755,
    "root": 0o700,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
}
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "ppc64le", "s390x": "s390x"}
_PT_INTERP = 3
"""Program header of a dynamic executable, elf(5)."""


@dataclass(frozen=True, slots=True)
class Node:
    """One entry of a root file system: a file with `data`, a link with `target`, else a directory."""

    path: str
    mode: int = 0o755
    data: bytes | None = None
    target: str = ""


def find_busybox() -> Path | None:
    """A static busybox of this host, or the one that BUSYBOX names; only such a one runs in an empty root file system."""
    candidates = [os.environ.get("BUSYBOX"), shutil.which("busybox"), "/bin/busybox.static", "/usr/bin/busybox"]
    for candidate in candidates:
        if candidate and Path(candidate).is_file() and is_static(Path(candidate)):
            return Path(candidate)
    return None


def is_static(path: Path) -> bool:
    """Whether a 64-bit little-endian or 32-bit ELF file asks for no interpreter (elf(5))."""
    blob = path.read_bytes()
    if blob[:4] != b"\x7fELF":
        return False
    order = "<" if blob[5] == 1 else ">"
    wide = blob[4] == 2
    (table,) = struct.unpack_from(order + ("Q" if wide else "I"), blob, 32 if wide else 28)
    size, count = struct.unpack_from(order + "HH", blob, 54 if wide else 42)
    kinds = (struct.unpack_from(order + "I", blob, table + index * size)[0] for index in range(count))
    return _PT_INTERP not in kinds


def base_files(busybox: Path) -> Iterator[Node]:
    """A root file system with all applets. Raises OSError and SubprocessError for a busybox that cannot be run."""
    for path, mode in _DIRECTORIES.items():
        yield Node(path, mode)
    for path, text in _ACCOUNTS.items():
        yield Node(path, 0o644, text.encode())
    yield Node("bin/busybox", 0o755, busybox.read_bytes())
    command: list[str | Path] = [busybox, "--list-full"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 no outside input
    for applet in sorted(set(listed.split())):
        if applet != "bin/busybox":
            yield Node(applet, target="/bin/busybox")


def layer_tar(nodes: Sequence[Node]) -> bytes:
    """A tar of the nodes and their parents: sorted, owned by root, dated 1970. The same files give the same bytes."""
    entries = {node.path: node for node in nodes}
    for node in nodes:
        for parent in Path(node.path).parents:
            entries.setdefault(str(parent), Node(str(parent)))
    entries.pop(".", None)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(entries):
            node = entries[path]
            info = tarfile.TarInfo(path)
            info.mode = node.mode
            if node.data is not None:
                info.size = len(node.data)
            elif node.target:
                info.type, info.linkname, info.mode = tarfile.SYMTYPE, node.target, 0o777
            else:
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(node.data or b""))
    return buffer.getvalue()


def image_archive(
    name: str,
    layers: Sequence[bytes],
    *,
    labels: Mapping[str, str],
    created_by: str,
    env: Mapping[str, str] | None = None,
) -> bytes:
    """What `docker save` writes and `docker load` reads (the image specification, v1.2)."""
    variables = {"PATH": PATH_IN_IMAGE, **(env or {})}
    config = json.dumps(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "Env": [f"{name}={value}" for name, value in variables.items()],
                "Cmd": ["/bin/sh"],
                "Labels": dict(labels),
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in layers]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": created_by} for _ in layers],
        },
        sort_keys=True,
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    names = [f"{hashlib.sha256(tar).hexdigest()}.tar" for tar in layers]
    index = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": names}]).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file_name, blob in [(config_name, config), *zip(names, layers, strict=True), ("manifest.json", index)]:
            info = tarfile.TarInfo(file_name)
            info.size, info.mode = len(blob), 0o644
            tar.addfile(info, io.BytesIO(blob))
    return archive.getvalue()
