"""A Docker daemon of the test's own that it may stop, kill, freeze and start again on the same containers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import docker
import psutil

from tests.integration.docker_daemon import START_SECONDS, DockerDaemon, load_images


class OwnEngine:
    """Its namespaces are kept by a process beside it, so that a daemon started again finds the mounts of the one before."""

    def __init__(self, home: Path, config: Mapping[str, Any]) -> None:
        self.home = home
        self.url = f"unix://{home}/d.sock"
        self._config = config
        self._keeper: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def client(self) -> contextlib.AbstractContextManager[docker.APIClient]:
        return DockerDaemon(self.url, self.home).client()

    def start(self) -> None:
        (self.home / "daemon.json").write_text(json.dumps(self._config))
        if self._keeper is None:
            self._keeper = subprocess.Popen(["unshare", "--net", "--mount", "sleep", "infinity"])
            self._await_namespaces(self._keeper.pid)
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["nsenter", f"--target={self._keeper.pid}", "--net", "--mount", "dockerd",
                 "--config-file", self.home / "daemon.json", "--data-root", self.data_root,
                 "--exec-root", self.home / "exec", "--pidfile", self.home / "pid", "--host", self.url,
                 "--bridge", "none", "--iptables=false", "--ip6tables=false"],
                env=os.environ | {"PATH": f"{self.programs}:{os.environ['PATH']}"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        give_up = time.monotonic() + START_SECONDS
        while True:
            try:
                with self.client():
                    return
            except (docker.errors.DockerException, OSError) as error:
                if self._process.poll() is not None or time.monotonic() > give_up:
                    said = (self.home / "log").read_text(errors="replace")[-3000:]
                    raise AssertionError(f"dockerd does not serve:\n{said}") from error
                time.sleep(0.02)

    @property
    def programs(self) -> Path:
        """First on the PATH of the daemon and of all that it starts."""
        return self.home / "bin"

    @property
    def data_root(self) -> Path:
        return self.home / "data"

    def stop(self) -> None:
        """As an upgrade of the package does."""
        self._end(signal.SIGTERM)

    def crash(self, *, everything: bool = False) -> None:
        """SIGKILL to the daemon; with `everything`, to all that it started too, as a power cut does."""
        self._end(signal.SIGKILL)
        self._bury_containerd()
        if everything:
            end_all_that_name(self.home / "exec")

    def freeze(self) -> None:
        self._running().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    async def restart(self, *, crash: bool = False) -> None:
        await asyncio.to_thread(self.crash if crash else self.stop)
        await asyncio.to_thread(self.start)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.thaw()
            with contextlib.suppress(docker.errors.DockerException, OSError), self.client() as client:
                for entry in client.containers(all=True):
                    client.remove_container(entry["Id"], force=True, v=True)
            self._end(signal.SIGTERM)
        end_all_that_name(self.home / "exec")
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
        shutil.rmtree(self.home)

    def _await_namespaces(self, pid: int) -> None:
        mine = os.readlink("/proc/self/ns/mnt")
        while os.readlink(f"/proc/{pid}/ns/mnt") == mine:
            time.sleep(0.005)

    def _end(self, number: signal.Signals) -> None:
        process = self._running()
        process.send_signal(number)
        process.wait(60)

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start it first"
        return self._process

    def _bury_containerd(self) -> None:
        """It dies with the daemon. Where nobody reaps it, the next daemon would take its number for a living one."""
        pidfile = self.home / "exec/containerd/containerd.pid"
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            process = psutil.Process(int(pidfile.read_text()))
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        pidfile.unlink(missing_ok=True)


def end_all_that_name(place: Path) -> None:
    """A daemon's containerd, and the shims with what runs under them: their command lines name its folder or socket."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(place) in part for part in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in process.children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                process.kill()


@contextlib.asynccontextmanager
async def own_engine(where: Path | None = None, **config: Any) -> AsyncIterator[OwnEngine]:
    """`config` as in daemon.json, with underscores. Two images are loaded: `docker_daemon.IMAGE` is one."""
    home = Path(
        tempfile.mkdtemp(prefix="dockerd-", dir=where or "/tmp")
    )  # short: a socket's path has 107 bytes at most
    engine = OwnEngine(home, {name.replace("_", "-"): value for name, value in config.items()})
    try:
        await asyncio.to_thread(engine.start)
        await asyncio.to_thread(load_images, DockerDaemon(engine.url, home))
        yield engine
    finally:
        await asyncio.to_thread(engine.close)
