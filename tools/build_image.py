"""Builds the images of the demo and the tests from a static busybox, through the engine's API alone.

No registry and no docker command is needed. The same files give the same bytes: an image that is there already and whose
label carries their hash is left as it is.

    nodeservice/demo        busybox with all its applets
    nodeservice/wordcount   the same, with a `wordcount` command and the licence texts of this host as its input

With --busybox-can-be-installed, a host without a static busybox is no error to be told: exit code 3 alone says it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import docker
from docker.errors import DockerException, ImageNotFound

from nodeservice.doctor.busybox import Node, base_files, find_busybox, image_archive, layer_tar

LABEL = "nodeservice.rootfs"
LICENCES = Path("/usr/share/common-licenses")
EXIT_BUSYBOX_MISSING = 3
"""tools/image.sh then installs one where it may."""


class BusyboxMissingError(Exception):
    """This host has no static busybox; the message tells the remedy."""


def main(arguments: Sequence[str]) -> int:
    try:
        client = docker.DockerClient.from_env(timeout=120)
        busybox = find_busybox()
        if busybox is None:
            raise BusyboxMissingError("no static busybox here; apt-get install busybox-static, or set BUSYBOX to one")
        base = [*base_files(busybox)]
        ensure(client, "nodeservice/demo:latest", [base])
        words = [*wordcount_files()]
        if words:
            ensure(client, "nodeservice/wordcount:latest", [base, words])
        else:
            print(f"{LICENCES} is not here: nodeservice/wordcount is not built", file=sys.stderr)
    except BusyboxMissingError as error:
        if "--busybox-can-be-installed" not in arguments:
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
    client.images.load(image_archive(name, tars, labels={LABEL: wanted}, created_by="tools/build_image.py"))
    image = client.images.get(name)
    print(f"built {name} ({image.attrs['Size'] / 1e6:.1f} MB)", file=sys.stderr)


def wordcount_files() -> Iterator[Node]:
    """The program and its input; nothing on a host without licence texts."""
    texts = sorted(path for path in LICENCES.glob("*") if path.is_file() and not path.is_symlink())
    if not texts:
        return
    yield Node("usr/local/bin/wordcount", 0o755, Path(__file__).with_name("wordcount.sh").read_bytes())
    for text in texts:
        yield Node(f"data/licences/{text.name}", 0o644, text.read_bytes())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
