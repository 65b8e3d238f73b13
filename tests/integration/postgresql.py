"""A real PostgreSQL cluster of the test's own: own data directory, a Unix socket, no port."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def find_postgresql() -> Path | None:
    """The directory of `initdb` and `pg_ctl`: the newest that the distribution installed, else from PATH."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    if installed:
        return installed[-1].parent
    found = shutil.which("initdb")
    return Path(found).parent if found else None


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    if find_postgresql() is None:
        return "NO POSTGRESQL: its server programs (initdb, pg_ctl) are not installed"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "NO POSTGRESQL: it does not run as root, and there is no user postgres"
    return None


@contextlib.contextmanager
def running_postgresql() -> Iterator[Cluster]:
    programs = find_postgresql()
    assert programs is not None
    # Not below pytest's directory, which only root can enter; and a socket's path has at most 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="nodeservice-pg-", dir="/tmp"))
    cluster = Cluster(programs, home)
    try:
        if os.geteuid() == 0:
            shutil.chown(home, "postgres", "postgres")
        cluster.run("initdb", "-D", str(home / "data"), "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8")
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


class Cluster:
    def __init__(self, programs: Path, home: Path) -> None:
        self._programs = programs
        self._home = home

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self._home}"

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self._home} -c shared_buffers=16MB"
        data, log = str(self._home / "data"), str(self._home / "log")
        self.run("pg_ctl", "-D", data, "-w", "-t", "60", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self._home / "data"), "-w", "-m", "fast", "stop")

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        # The server inherits what it is given, so a pipe would never come to its end.
        with (self._home / "out").open("ab") as out:
            done = subprocess.run(
                command, check=False, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=self._home, timeout=120
            )
        assert done.returncode == 0, (self._home / "out").read_text()[-2000:]
