"""The Debian package as an administrator has it: install, work, crash, hang, upgrade, remove, purge, under a real systemd.

The tests build on each other, in this order, on one machine.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vm.bare import BareMachine
from tests.vm.machine import PATIENCE_SECONDS, ROOT, Machine, NoMachineError

pytestmark = [pytest.mark.vm, pytest.mark.timeout(7 * PATIENCE_SECONDS)]

TASKS = "/sys/fs/cgroup/nodeservice.slice"
IMAGE = "nodeservice/demo"
CLIENT = "--insecure --master 127.0.0.1:50051"
NEWER = "9.0"
HARD = {"memory_bytes", "cpu_milli", "pids_limit", "memory_swap_bytes"}


@dataclass
class Host:
    """A machine with the package, and what the tests ask it."""

    machine: Machine

    def run(self, script: str, *, check: bool = True) -> str:
        done = self.machine.run(f"unset PYTHONPATH\n{script}", check=check)
        return done.stdout.strip()

    def shown(self, unit: str, name: str) -> str:
        return self.run(f"systemctl show {unit} -p {name} --value")

    def until(self, what: str, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            assert time.monotonic() < deadline, f"not so: {what}\n{self.run('journalctl -n 80 --no-pager')}"
            time.sleep(1)

    def serves(self) -> None:
        """Until the worker has tasks' limits in hand and the master takes it for active."""
        self.until("the worker serves", lambda: "tasks running" in self.shown("nodeservice", "StatusText"))
        self.until(
            "the master knows it", lambda: "1 of 1 nodes active" in self.shown("nodeservice-master", "StatusText")
        )

    def submit(self, script: str, options: str = "") -> str:
        return self.run(
            f"nodeservice submit {CLIENT} --memory 64m --cpus 0.5 --disk 16m {options} {IMAGE} -- sh -c '{script}'"
        )

    def show(self, task_id: str) -> Any:
        return json.loads(self.run(f"nodeservice show {CLIENT} --json {task_id}"))

    def wait(self, task_id: str) -> Any:
        self.run(f"nodeservice wait {CLIENT} --timeout {PATIENCE_SECONDS}s {task_id}", check=False)
        return self.show(task_id)

    def container(self, task_id: str) -> str:
        """The id of its running container, or nothing."""
        return self.run(f"docker ps -q --no-trunc --filter name=nodeservice.{task_id}.")

    def running(self, task_id: str) -> str:
        self.until(f"{task_id} runs", lambda: bool(self.container(task_id)))
        return self.container(task_id)

    def pid(self) -> int:
        return int(self.shown("nodeservice", "MainPID"))


def released(task_id: str) -> str:
    """For a script that goes on until somebody makes the file, whatever the speed of this machine."""
    return f"/var/lib/nodeservice/tasks/{task_id}.1/results/go"


WAITING = "until test -e /results/go; do sleep 1; done; rm /results/go; echo done > /results/told"


@pytest.fixture(scope="module")
def package() -> Path:
    built = subprocess.run(["make", "deb"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    found = [line.split()[1] for line in built.stderr.splitlines() if line.startswith("Built dist/nodeservice_")]
    return ROOT / found[0]


@pytest.fixture(scope="module")
def host(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    try:
        with Machine(tmp_path_factory.mktemp("vm")) as machine:
            machine.put(package, "/root/nodeservice.deb")
            machine.run("dpkg -i /root/nodeservice.deb >&2")
            yield Host(machine)
    except NoMachineError as error:
        pytest.skip(f"NO VIRTUAL MACHINE, the package is not tried under systemd: {error}")


def test_a_fresh_install_serves_and_listens_for_this_machine_alone(host: Host) -> None:
    host.until("it is active", lambda: host.shown("nodeservice", "ActiveState") == "active")
    host.until("it serves", lambda: host.shown("nodeservice", "StatusText").startswith("0 tasks running"))
    listening = host.run("ss -Hltnp | grep nodeservice")
    assert [line.split()[3].replace("[::ffff:127.0.0.1]", "127.0.0.1") for line in listening.splitlines()] == [
        "127.0.0.1:50052"
    ]
    assert host.shown("nodeservice", "UnitFileState") == "enabled"
    assert host.shown("nodeservice-master", "UnitFileState") == "disabled"
    assert host.shown("nodeservice-master", "ActiveState") == "inactive"
    assert host.run("stat -c %a /etc/nodeservice/node.env /etc/nodeservice/master.env") == "600\n600"
    assert "unknown" not in host.run("nodeservice --version")


def test_systemd_finds_nothing_to_complain_of_in_the_units(host: Host) -> None:
    units = "nodeservice.service nodeservice-master.service nodeservice.slice nodeserviced.slice"
    said = host.run(f"cd /usr/lib/systemd/system && systemd-analyze verify --man=no {units} 2>&1")
    assert said == ""


def test_what_the_worker_has_for_certain_stands_in_the_kernels_files(host: Host) -> None:
    for place in ("nodeserviced.slice", "nodeserviced.slice/nodeservice.service"):
        assert host.run(f"cat /sys/fs/cgroup/{place}/memory.min") == str(128 * 1024**2)
        assert host.run(f"cat /sys/fs/cgroup/{place}/cpu.weight") == "10000"
    assert host.run(f"cat /proc/{host.pid()}/oom_score_adj") == "-900"
    assert "Max open files            65536                65536" in host.run(f"cat /proc/{host.pid()}/limits")


def test_a_task_from_the_master_has_all_its_limits_under_the_hardened_unit(host: Host) -> None:
    host.run(
        """echo 'master = "127.0.0.1:50051"' >>/etc/nodeservice/node.toml\n"""
        "systemctl enable --now nodeservice-master\nsystemctl restart nodeservice"
    )
    host.serves()
    told = host.wait(
        host.submit("dd if=/dev/zero of=/results/f bs=1M count=50 || echo full > /dev/stderr; sleep 2; exit 3")
    )
    assert (told["reason"], told["exit_code"]) == ("EXIT_NONZERO", 3), told
    limits = told["limits"]
    assert limits["mismatches"] == [], limits
    assert {name: limits["enforcement"][name] for name in HARD} == dict.fromkeys(HARD, "hard")
    assert "the work directory is held by the quota of ext4" in limits["why_watched"], limits
    assert limits["unread"] == {}, limits
    assert limits["cgroup"]["path"].startswith("/nodeservice.slice/"), limits
    assert told["usage"]["memory_peak_bytes"] > 0
    assert told["usage"]["disk_peak_bytes"] <= 17 * 1024**2, told["usage"]


def test_a_lack_of_memory_is_told_as_one_under_the_hardened_unit(host: Host) -> None:
    told = host.wait(host.submit("x=a; while true; do x=$x$x; done"))
    assert told["reason"] == "MEMORY_LIMIT", told


def test_the_journal_finds_an_attempt_by_its_id(host: Host) -> None:
    task_id = host.submit("exit 0")
    host.wait(task_id)
    lines = host.run(f"journalctl -u nodeservice TASK_ID={task_id} EVENT=task.finished -o json --no-pager").splitlines()
    (entry,) = [json.loads(line) for line in lines]
    assert (entry["PRIORITY"], entry["OUTCOME"], entry["_SYSTEMD_UNIT"]) == ("6", "SUCCEEDED", "nodeservice.service")


def test_a_task_outlives_a_killed_and_a_frozen_worker_and_an_engine_is_waited_for(host: Host) -> None:
    task_id = host.submit(WAITING)
    container = host.running(task_id)

    killed = host.pid()
    host.run(f"kill -KILL {killed}")
    host.until("it was started anew", lambda: host.pid() not in (0, killed))
    host.serves()
    assert host.container(task_id) == container

    frozen = host.pid()
    host.run(f"kill -STOP {frozen}")
    host.until("it was started anew", lambda: host.pid() not in (0, frozen))
    host.serves()
    assert host.container(task_id) == container
    assert int(host.shown("nodeservice", "NRestarts")) >= 2
    assert "watchdog" in host.run("journalctl -u nodeservice --no-pager | grep -i 'result .watchdog'")

    host.run(f"touch {released(task_id)}")
    told = host.wait(task_id)
    assert (told["outcome"], len(told["attempts"])) == ("SUCCEEDED", 1), told

    alive = host.pid()
    host.run("systemctl stop docker.socket docker")
    host.run("systemctl start docker")
    told = host.wait(host.submit("exit 0"))
    assert told["outcome"] == "SUCCEEDED", told
    assert host.pid() == alive


def test_a_worker_that_starts_without_an_engine_is_ready_and_says_what_it_waits_for(host: Host) -> None:
    host.run("systemctl stop docker.socket docker\nsystemctl restart nodeservice")
    assert host.shown("nodeservice", "ActiveState") == "active"
    assert "container engine" in host.shown("nodeservice", "StatusText")
    host.run("systemctl start docker")
    host.serves()


def test_a_configuration_that_it_cant_start_with_is_told_once_and_not_tried_again(host: Host) -> None:
    host.run("cp /etc/nodeservice/node.toml /root/kept\necho 'wrong = 1' >>/etc/nodeservice/node.toml")
    host.run("systemctl restart nodeservice", check=False)
    host.until("it failed", lambda: host.shown("nodeservice", "ActiveState") == "failed")
    assert host.shown("nodeservice", "ExecMainStatus") == "78"
    assert "unknown key" in host.run("journalctl -u nodeservice -n 20 --no-pager")
    host.run("cp /root/kept /etc/nodeservice/node.toml\nsystemctl restart nodeservice")
    host.serves()


def test_an_upgrade_keeps_the_configuration_and_the_running_task(host: Host, package: Path, tmp_path: Path) -> None:
    task_id = host.submit(WAITING)
    container = host.running(task_id)
    unpacked = tmp_path / "unpacked"
    subprocess.run(["dpkg-deb", "-R", package, unpacked], check=True)
    control = unpacked / "DEBIAN" / "control"
    control.write_text("".join(
        f"Version: {NEWER}\n" if line.startswith("Version:") else line for line in control.open()
    ))  # fmt: skip
    config = unpacked / "etc" / "nodeservice" / "node.toml"
    config.write_text(config.read_text() + "# A newer default.\n")
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-b", unpacked, tmp_path / "newer.deb"], check=True)
    host.machine.put(tmp_path / "newer.deb", "/root/newer.deb")
    before = host.run("cat /etc/nodeservice/node.toml")
    worker, master = host.pid(), host.shown("nodeservice-master", "MainPID")

    host.run("dpkg -i --force-confold /root/newer.deb >&2")
    assert host.run("dpkg-query -W -f '${Version}' nodeservice") == NEWER
    assert host.run("cat /etc/nodeservice/node.toml") == before
    assert (host.pid(), host.shown("nodeservice-master", "MainPID")) != (worker, master)
    host.serves()
    assert host.container(task_id) == container
    host.run(f"touch {released(task_id)}")
    assert host.wait(task_id)["outcome"] == "SUCCEEDED"


def test_a_removal_stops_and_leaves_tasks_and_a_new_install_goes_on_with_them(host: Host) -> None:
    task_id = host.submit(WAITING)
    container = host.running(task_id)
    host.run("dpkg -r nodeservice >/root/said 2>&1")
    assert "run on" in host.run("cat /root/said")
    assert host.shown("nodeservice", "ActiveState") == "inactive"
    assert host.run("ls -d /usr/lib/nodeservice /usr/bin/nodeservice 2>/dev/null || true") == ""
    assert host.container(task_id) == container
    host.run("dpkg -i /root/newer.deb >&2")
    host.serves()
    assert host.container(task_id) == container
    host.run(f"touch {released(task_id)}")
    assert host.wait(task_id)["outcome"] == "SUCCEEDED"


def test_a_purge_ends_tasks_and_leaves_what_the_manual_names(host: Host) -> None:
    host.wait(host.submit("echo done > /results/told"))
    task_id = host.submit("sleep 3600")
    host.running(task_id)
    stored = host.run("find /var/lib/nodeservice/results -name told | wc -l")
    assert int(stored) >= 1
    host.run("dpkg -P nodeservice >&2")
    assert host.run("docker ps -aq --filter label=nodeservice.node") == ""
    assert host.run(f"ls -d {TASKS} /sys/fs/cgroup/nodeserviced.slice 2>/dev/null || true") == ""
    assert host.run("find /var/lib/nodeservice -name told | wc -l") == stored
    assert host.run("ls /var/lib/nodeservice") == "results"
    assert host.run("rm -r /var/lib/nodeservice; ls -d /var/lib/nodeservice* 2>/dev/null || true") == ""
    places = "/etc /usr /var /run"
    ours = (
        "-path /srv -prune -o -name '*nodeservice*' ! -path '/etc/systemd/network/*' ! -path '/etc/systemd/journald*'"
    )
    machine_itself = "! -path '*initramfs*' ! -path '/run/log/*' -print"
    assert host.run(f"find {places} {ours} {machine_itself}") == ""
    assert host.run("systemctl list-units --all --no-legend | grep nodeservice || true") == ""
    assert host.run("getent passwd nodeservice-master || true") == ""


def test_apt_makes_a_worker_of_a_bare_machine_and_takes_it_away_again(
    package: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From the file alone; the engine comes along from the distribution."""
    apt = "export DEBIAN_FRONTEND=noninteractive\napt-get -q"
    try:
        with BareMachine(tmp_path_factory.mktemp("bare")) as machine:
            host = Host(machine)
            assert host.run("command -v dockerd nodeservice || true") == ""
            machine.put(package, f"/root/{package.name}")
            machine.run(
                f"{apt} update >&2\napt-get -q install -y /root/{package.name} >&2",
                timeout_seconds=3 * PATIENCE_SECONDS,
            )
            host.until("it serves", lambda: host.shown("nodeservice", "StatusText").startswith("0 tasks running"))
            assert host.shown("nodeservice", "UnitFileState") == "enabled"
            assert json.loads(host.run("nodeservice inspect --json"))
            machine.run(f"{apt} purge -y nodeservice >&2")
            assert host.run("command -v nodeservice || true") == ""
            assert host.run("systemctl list-units --all --no-legend | grep nodeservice || true") == ""
    except NoMachineError as error:
        pytest.skip(f"NO VIRTUAL MACHINE, apt is not tried: {error}")
