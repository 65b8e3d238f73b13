"""A virtual machine with systemd and cgroup v2 alone: another kernel, in which this project's own code and tests run.

Its disk is built once by `tools/vm/build.sh` and kept; each machine writes to an overlay that goes with it. QEMU emulates
it, about ten times slower than this host.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = int(os.environ.get("TEST_PATIENCE_SECONDS", "600"))
"""For one task in it, or to boot; a host that is busy with other things needs more."""
PROJECT = "/srv/project"
_SITE = "/payload/site"
_LEFT_OUT = (
    "mypy", "mypyc", "ruff", "grpc_tools", "pip", "psycopg_binary", "tests", "ansible*", "black", "yamllint",
)  # fmt: skip
_DISKS = {"root.qcow2": "qcow2", "payload.img": "raw", "volume.img": "raw"}
_COMMAND_LINE = (
    "root=/dev/vda rw rootflags=prjquota console=ttyS0 "
    "cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1 mitigations=off quiet"
)


class NoMachineError(Exception):
    """It can't be had here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class TestRun:
    """What pytest in the machine said."""

    passed: int
    failed: tuple[str, ...]
    skipped: tuple[str, ...]
    output: str


@dataclass
class Machine:
    """Use as a context manager: its process and its disks end with the block, its logs stay in `path`."""

    packages: ClassVar[str] = "packages.txt"
    """Which list in tools/vm makes its disk."""
    network: ClassVar[str] = "restrict=on,"

    path: Path
    image: Path = field(init=False)
    port: int = field(init=False)
    _process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        try:
            self.image = _build(self.packages)
            self._make_disks()
            self._boot()
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._keep_logs()
            self._process.kill()
            self._process.wait(timeout=60)
        for disk in _DISKS:
            (self.path / disk).unlink(missing_ok=True)

    def run(
        self,
        script: str,
        *,
        timeout_seconds: float = 2 * PATIENCE_SECONDS,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A shell script in it, as root, in the project's folder. With `check`, AssertionError tells what it said."""
        words = "".join(f"export {name}='{value}'\n" for name, value in (env or {}).items())
        done = subprocess.run(
            [*self._ssh(), "sh -eu -s"],
            input=f"cd {PROJECT} 2>/dev/null || cd /\nexport PYTHONPATH={PROJECT}:{_SITE}\n{words}{script}\n",
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        assert not check or done.returncode == 0, f"exit {done.returncode} of: {script}\n{done.stdout}\n{done.stderr}"
        return done

    def put(self, source: Path, target: str) -> None:
        """Copy a file into it."""
        with source.open("rb") as stream:
            subprocess.run([*self._ssh(), f"cat >{target}"], stdin=stream, check=True, timeout=600)

    def pytest(self, *arguments: str, env: Mapping[str, str] | None = None) -> TestRun:
        """Tests of this checkout, there."""
        words = " ".join(f"'{word}'" for word in arguments)
        patient = {"TEST_PATIENCE_SECONDS": str(PATIENCE_SECONDS)} | dict(env or {})
        done = self.run(
            "rm -f /tmp/junit.xml\n"
            "python3 -m pytest -p no:cacheprovider -p no:unraisableexception -q --tb=native "
            f"-o timeout={5 * PATIENCE_SECONDS} --junitxml=/tmp/junit.xml {words}",
            check=False,
            env=patient,
            timeout_seconds=6 * PATIENCE_SECONDS,
        )
        assert done.returncode in (0, 1), f"pytest did not run: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return _read_junit(self.run("cat /tmp/junit.xml").stdout, done.stdout)

    def json(self, command: str, *, codes: Sequence[int] = (0,), timeout_seconds: float = 2 * PATIENCE_SECONDS) -> Any:
        """What a command prints on stdout."""
        done = self.run(command, check=False, timeout_seconds=timeout_seconds)
        assert done.returncode in codes, f"exit {done.returncode} of {command}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def set_cgroup_driver(self, name: str) -> None:
        """`systemd` or `cgroupfs`, by a restart of its engine."""
        options = json.dumps({"exec-opts": [f"native.cgroupdriver={name}"]})
        self.run(f"mkdir -p /etc/docker\necho '{options}' > /etc/docker/daemon.json\nsystemctl restart docker")
        told = self.run("docker info --format '{{.CgroupDriver}} {{.CgroupVersion}}'").stdout.split()
        assert told == [name, "2"], told

    def _ssh(self) -> list[str]:
        return [
            "ssh", "-q", "-i", str(self.image / "id_ed25519"), "-p", str(self.port), "-o", "BatchMode=yes",
            "-o", f"UserKnownHostsFile={self.image / 'known_hosts'}", "-o", "HostKeyAlias=nodeservice-vm",
            "-o", "ConnectTimeout=10", "root@127.0.0.1",
        ]  # fmt: skip

    def _keep_logs(self) -> None:
        """The journal, and what the nodes of its tests logged. As much of it as can be had: it may have hung."""
        nodes = "cd /tmp && find pytest-of-root -name 'serve-*.log' -size -64M | tar -cz -T -"
        for command, name in (("journalctl --no-pager -o short-precise", "journal.log"), (nodes, "nodes.tar.gz")):
            with (self.path / name).open("wb") as kept, contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*self._ssh(), command], stdout=kept, stderr=subprocess.DEVNULL, check=False, timeout=120
                )

    def _make_disks(self) -> None:
        for name, size_bytes in (("payload.img", 700 * 1024**2), ("volume.img", 3 * 1024**3)):
            with (self.path / name).open("wb") as image:
                image.truncate(size_bytes)
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.image / "disk.img",
             self.path / "root.qcow2", "8G"],
            check=True,
        )  # fmt: skip
        self._fill_payload()

    def _fill_payload(self) -> None:
        """This checkout and the packages that it needs, on a disk of their own."""
        payload = self.path / "payload"
        (payload / "project").mkdir(parents=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                target = payload / "project" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        (site,) = [Path(place) for place in sys.path if Path(place).name == "site-packages" and sys.prefix in place][:1]
        shutil.copytree(site, payload / "site", ignore=shutil.ignore_patterns(*_LEFT_OUT))
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", payload, self.path / "payload.img"], check=True)
        shutil.rmtree(payload)

    def _boot(self) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        with (self.path / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "qemu64",
                    "-smp", "2", "-m", "2048", "-kernel", self.image / "vmlinuz", "-initrd", self.image / "initrd.img",
                    "-append", _COMMAND_LINE,
                    *(word for name, kind in _DISKS.items()
                      for word in ("-drive", f"file={self.path / name},if=virtio,format={kind},cache=unsafe")),
                    "-netdev", f"user,id=n,{self.network}hostfwd=tcp:127.0.0.1:{self.port}-:22",
                    "-device", "virtio-net-pci,netdev=n", "-display", "none", "-monitor", "none",
                    "-serial", f"file:{self.path / 'console'}",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._await_ssh()

    def restart(self) -> None:
        """As an operator does; returns when it is up again."""
        before = self.run("cat /proc/sys/kernel/random/boot_id").stdout
        self.run("systemctl reboot", check=False)
        self._await_ssh(f'test "$(cat /proc/sys/kernel/random/boot_id)" != {before.strip()}')

    def _await_ssh(self, condition: str = "true") -> None:
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._holds(condition):
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                console = (self.path / "console").read_text(errors="replace")[-2000:]
                raise NoMachineError(f"QEMU does not boot: {(self.path / 'qemu.log').read_text()}\n{console}")
            time.sleep(1)

    def _holds(self, condition: str) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.run(condition, check=False, timeout_seconds=60).returncode == 0
        return False

    def _set_up(self) -> None:
        self.run(f"mkdir -p /payload\nmount -o ro /dev/vdb /payload\ncp -r /payload/project {PROJECT}")
        self.run("until docker info >/dev/null 2>&1; do sleep 1; done\npython3 tools/build_image.py >&2")


def _build(packages: str) -> Path:
    if sys.version_info[:2] != (3, 11):
        raise NoMachineError("the machine has Python 3.11 and takes over the packages of .venv, which has another")
    done = subprocess.run(
        ["sh", ROOT / "tools" / "vm" / "build.sh", packages],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0:
        raise NoMachineError((done.stderr.strip().splitlines() or ["tools/vm/build.sh failed"])[-1])
    return Path(done.stdout.strip())


def _read_junit(text: str, output: str) -> TestRun:
    passed, failed, skipped = 0, [], []
    for case in ET.fromstring(text).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            skipped.append(f"{name}: {skip.get('message')}")
        else:
            passed += 1
    return TestRun(passed, tuple(failed), tuple(skipped), output)
