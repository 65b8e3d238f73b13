"""Builds the images of the demo and the tests from a static busybox, through the engine's API alone.

No registry and no docker command is needed. The same files give the same bytes: an image that is there already and whose
label carries their hash is left as it is.

    nodeservice/demo        busybox with all its applets
    nodeservice/wordcount   the same, with a `wordcount` command and the licence texts of this host as its input
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
from docker.errors import DockerException, ImageNotFound

LABEL = "nodeservice.rootfs"
LICENCES = Path("/usr/share/common-licenses")
PATH_IN_IMAGE = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
}
DIRECTORIES = {"bin": 0o755, "dev": 0o755, "proc": 0o755, "sys": 0o755, "root": 0o700, "tmp": 0o1777, "var/tmp": 0o1777}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "ppc64le", "s390x": "s390x"}
EXIT_BUSYBOX_MISSING = 3
"""tools/image.sh then installs one where it may."""
_PT_INTERP = 3
"""Program header of a dynamic executable, elf(5)."""


class BusyboxMissingError(Exception):
    """This host has no static busybox; the message tells the remedy."""


@dataclass(frozen=True, slots=True)
class Node:
    """One entry of a root file system: a file with `data`, a link with `target`, else a directory."""

    path: str
    mode: int = 0o755
    data: bytes | None = None
    target: str = ""


def main() -> int:
    try:
        client = docker.DockerClient.from_env(timeout=120)
        base = [*base_files(find_busybox())]
        ensure(client, "nodeservice/demo:latest", [base])
        words = [*wordcount_files()]
        if words:
            ensure(client, "nodeservice/wordcount:latest", [base, words])
        else:
            print(f"{LICENCES} is not here: nodeservice/wordcount is not built", file=sys.stderr)
    except BusyboxMissingError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BUSYBOX_MISSING
    except (DockerException, OSError, subprocess.SubprocessError) as error:
        print(f"error: the demo images cannot be built: {error}", file=sys.stderr)
        return 2
    return 0


def ensure(client: docker.DockerClient, name: str, layers: list[list[Node]]) -> None:
    """Load the image unless the engine has it with these very contents."""
    tars = [layer_tar(layer) for layer in layers]
    wanted = hashlib.sha256(b"".join(hashlib.sha256(tar).digest() for tar in tars)).hexdigest()
    try:
        if client.images.get(name).labels.get(LABEL) == wanted:
            return
    except ImageNotFound:
        pass
    client.images.load(image_archive(name, tars, label=wanted))
    image = client.images.get(name)
    print(f"built {name} ({image.attrs['Size'] / 1e6:.1f} MB)", file=sys.stderr)


def find_busybox() -> Path:
    """A static busybox of this host; only such a one runs in an empty root file system."""
    candidates = [os.environ.get("BUSYBOX"), shutil.which("busybox"), "/bin/busybox.static", "/usr/bin/busybox"]
    for candidate in candidates:
        if candidate and Path(candidate).is_file() and is_static(Path(candidate)):
            return Path(candidate)
    raise BusyboxMissingError("no static busybox here; apt-get install busybox-static, or set BUSYBOX to one")


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
    for path, mode in DIRECTORIES.items():
        yield Node(path, mode)
    for path, text in ACCOUNTS.items():
        yield Node(path, 0o644, text.encode())
    yield Node("bin/busybox", 0o755, busybox.read_bytes())
    listed = subprocess.run([busybox, "--list-full"], check=True, capture_output=True, text=True).stdout
    for applet in sorted(set(listed.split())):
        if applet != "bin/busybox":
            yield Node(applet, target="/bin/busybox")


def wordcount_files() -> Iterator[Node]:
    """The program and its input; nothing on a host without licence texts."""
    texts = sorted(path for path in LICENCES.glob("*") if path.is_file() and not path.is_symlink())
    if not texts:
        return
    yield Node("usr/local/bin/wordcount", 0o755, Path(__file__).with_name("wordcount.sh").read_bytes())
    for text in texts:
        yield Node(f"data/licences/{text.name}", 0o644, text.read_bytes())


def layer_tar(nodes: list[Node]) -> bytes:
    """A tar of the nodes and their parents: sorted, owned by root, dated 1970."""
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


def image_archive(name: str, layers: list[bytes], *, label: str) -> bytes:
    """What `docker save` writes and `docker load` reads (the image specification, v1.2)."""
    config = json.dumps(
        {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {"Env": [f"PATH={PATH_IN_IMAGE}"], "Cmd": ["/bin/sh"], "Labels": {LABEL: label}},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in layers]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "tools/build_image.py"} for _ in layers],
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


if __name__ == "__main__":
    sys.exit(main())
