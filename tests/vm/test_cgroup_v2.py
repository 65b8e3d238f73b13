"""The same promises on a real cgroup v2 kernel with systemd, where the engine keeps its containers in slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.machine import PATIENCE_SECONDS, Machine, NoMachineError

pytestmark = [pytest.mark.vm, pytest.mark.timeout(7 * PATIENCE_SECONDS)]

ATTACKS = (
    "fork_bomb or memory_hog or hog_in_a_child or 137 or left_its_family or ignores_its_deadline or eight_busy or twenty"
    " or shared_memory or ends_at_its_deadline or share_that_is_full"
)
"""Without those that fill the disk: its root file system has quotas, so that they meet an error; see `volume`.

With cgroupfs as the driver, a few of them: the kernel is the same, and only who makes the cgroups differs."""
SOME = "fork_bomb or hog_in_a_child or left_its_family or eight_busy"
HARD = {
    "CPU", "memory", "swap", "processes", "exclusive CPUs", "block I/O", "open files", "core files", "capabilities",
    "system calls", "no new privileges", "OOM score", "devices", "reserve of the host", "time", "shared memory",
}  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    try:
        with Machine(tmp_path_factory.mktemp("vm")) as booted:
            yield booted
    except NoMachineError as error:
        pytest.skip(f"NO VIRTUAL MACHINE, limits are not tried on cgroup v2 with systemd: {error}")


def not_of_v1(skipped: tuple[str, ...]) -> list[str]:
    return [reason for reason in skipped if "cgroup v1" not in reason]


def states(told: Any) -> dict[str, str]:
    return {check["limit"]: check["state"] for check in told["checks"]}


def test_the_contract_of_task_cgroups_holds_on_cgroup_v2(machine: Machine) -> None:
    ran = machine.pytest("tests/contract/test_task_cgroups.py")
    assert (ran.failed, not_of_v1(ran.skipped)) == ((), []), ran.output
    assert ran.passed >= 30


@pytest.mark.parametrize(
    ("driver", "attacks", "count"), [("systemd", ATTACKS, 11), ("cgroupfs", SOME, 4)], ids=["systemd", "cgroupfs"]
)
def test_attacks_meet_their_limits_on_cgroup_v2(machine: Machine, driver: str, attacks: str, count: int) -> None:
    machine.set_cgroup_driver(driver)
    ran = machine.pytest("tests/integration/test_attacks.py", "-k", attacks)
    assert (ran.failed, ran.skipped) == ((), ()), ran.output
    assert ran.passed == count


def test_causes_of_death_are_told_as_they_were_on_cgroup_v2(machine: Machine) -> None:
    machine.set_cgroup_driver("systemd")
    ran = machine.pytest("tests/integration/test_verdicts.py")
    assert (ran.failed, ran.skipped) == ((), ()), ran.output
    assert ran.passed == 2


def test_limits_and_counts_are_in_the_tasks_own_cgroup_on_cgroup_v2(machine: Machine) -> None:
    machine.set_cgroup_driver("systemd")
    ran = machine.pytest("tests/integration/test_cgroup_engine.py")
    assert (ran.failed, not_of_v1(ran.skipped)) == ((), []), ran.output
    assert ran.passed >= 7


def test_a_task_ends_as_a_whole_though_systemd_takes_that_away_again_and_again(machine: Machine) -> None:
    """A reload writes 0 to memory.oom.group of every slice."""
    machine.set_cgroup_driver("systemd")
    hog = "sleep 10; (dd if=/dev/zero of=/dev/null bs=300M count=1); sleep 600; exit 0"
    command = (
        f"python3 -m nodeservice run --json --memory 32m --cpus 0.5 --timeout {PATIENCE_SECONDS}s nodeservice/demo"
        f" -- sh -c '{hog}'"
    )
    told = machine.json(
        "(while sleep 1; do systemctl daemon-reload; done) >/dev/null 2>&1 &\nreloads=$!\n"
        f"{command} </dev/null || code=$?\nkill $reloads\nexit ${{code:-0}}",
        codes=(0, 1, 137),
    )
    assert (told["reason"], told["exit_code"]) == ("MEMORY_LIMIT", 137), told


def test_doctor_says_hard_where_the_state_lies_on_a_volume_with_quotas(volume: Machine) -> None:
    """XFS with project quotas below the state directory and the engine: then the kernel bounds the disk too."""
    told = volume.json(
        f"python3 -m nodeservice doctor --json --patience {PATIENCE_SECONDS // 20} --image nodeservice/demo"
        " --state-dir /volume/state",
        codes=(0, 1),
        timeout_seconds=6 * PATIENCE_SECONDS,
    )
    assert told["sound"], told
    assert told["facts"]["cgroup version"] == "2"
    found = states(told)
    assert {name: state for name, state in found.items() if state != "hard"} == {"disk log": "watched"}
    assert set(found) >= HARD


@pytest.mark.parametrize("place", ["/results/f", "/f", "/tmp/f", "/etc/hosts"])
def test_a_filler_meets_an_error_where_a_quota_holds_and_is_not_killed(volume: Machine, place: str) -> None:
    """The engine makes the files in /etc when it starts the container, so that they are bound only after that."""
    wait = "sleep 20; " if place.startswith("/etc/") else ""
    told = run_there(volume, f"{wait}dd if=/dev/zero of={place} bs=1M count=60; sleep 1; exit 4")
    assert (told["reason"], told["exit_code"]) == ("EXIT_NONZERO", 4), told
    assert told["limits"]["enforcement"]["disk_bytes"] == "hard"
    assert told["usage"]["disk_peak_bytes"] < 12 * 1024**2


def test_what_is_written_to_the_engines_files_before_they_are_bound_is_noticed(volume: Machine) -> None:
    """Where they are bound first, as the one above meets it."""
    told = run_there(volume, "dd if=/dev/zero of=/etc/hosts bs=1M count=60; sleep 60; exit 4")
    in_time = told["reason"] == "EXIT_NONZERO" and told["usage"]["disk_peak_bytes"] < 12 * 1024**2
    assert in_time or told["reason"] == "DISK_LIMIT", told


def test_tiny_files_without_end_meet_an_error_where_a_quota_holds(volume: Machine) -> None:
    told = run_there(volume, "i=0; while true >/results/$i; do i=$((i+1)); done; exit 4")
    assert (told["reason"], told["exit_code"]) == ("EXIT_NONZERO", 4), told
    assert told["limits"]["enforcement"]["disk_bytes"] == "hard"


def test_a_flood_of_log_lines_is_ended_though_a_quota_holds_the_rest(volume: Machine) -> None:
    told = run_there(volume, "yes 0123456789012345678901234567890123456789")
    assert told["reason"] == "DISK_LIMIT", told


def test_what_is_taken_out_of_its_quota_is_noticed(volume: Machine) -> None:
    """As the owner of a file may do with one system call, done from outside here for want of a program in the image."""
    leave = (
        "import fcntl, glob, os, struct, time\n"
        "where = '/volume/home/**/results/free'\n"
        "while not (found := glob.glob(where, recursive=True, include_hidden=True)): time.sleep(0.1)\n"
        "place = os.open(found[0], os.O_RDONLY)\n"
        "held = struct.unpack('=5I8x', fcntl.ioctl(place, 0x801C581F, bytes(28)))\n"
        "fcntl.ioctl(place, 0x401C5820, struct.pack('=5I8x', held[0] & ~0x200, held[1], held[2], 0, held[4]))\n"
    )
    volume.run(f"cat >/tmp/leave.py <<'END'\n{leave}END\nnohup python3 /tmp/leave.py >/tmp/leave.log 2>&1 &")
    told = run_there(
        volume, "mkdir /results/free; sleep 5; dd if=/dev/zero of=/results/free/f bs=1M count=60; sleep 600"
    )
    assert told["reason"] == "DISK_LIMIT", told


GIVES_ITSELF_A_NUMBER = """
import fcntl, os, struct, sys
from pathlib import Path
from nodeservice.limits.project_quota import ProjectQuotas, quota_support

def quotas():
    return ProjectQuotas(quota_support(top), engine_root=None, engine_passes_ext4=True)

def attributes(place):
    descriptor = os.open(place, os.O_RDONLY)
    return descriptor, struct.unpack("=5I8x", fcntl.ioctl(descriptor, 0x801C581F, bytes(28)))

def move(place, number):
    descriptor, held = attributes(place)
    fcntl.ioctl(descriptor, 0x401C5820, struct.pack("=5I8x", held[0] & ~0x200, held[1], held[2], number, held[4]))

top = Path(sys.argv[1])
assert not quota_support(top).why_not
mine, others = top / "mine" / "results", top / "others" / "results"
for work in (mine, others):
    work.mkdir(parents=True)
    (work / "file").write_bytes(b"x" * 2**20)
number, other = quotas().bind(mine, 8 << 20), quotas().bind(others, 64 << 20)
for taken in (other, 0):
    for place in (mine / "file", mine):
        move(place, taken)
    again = quotas()
    assert (again.project_of(mine), again.bind(mine, 8 << 20)) == (number, number) != (other, other)
    assert [attributes(place)[1][3] for place in (mine, mine / "file", others)] == [number, number, other]
    assert (again.limit_of(number), again.limit_of(other)) == (8 << 20, 64 << 20)
    assert again.use_of(number).bytes >= 2**20
for used in (number, other):
    again.lift(used)
"""


@pytest.mark.parametrize("top", ["/volume/own", "/root/own"], ids=["xfs", "ext4"])
def test_a_number_that_a_task_gave_itself_is_not_believed(volume: Machine, top: str) -> None:
    volume.run(f"python3 - {top} <<'END'\n{GIVES_ITSELF_A_NUMBER}END\nrm -r {top}")


def test_the_quota_of_a_run_that_was_killed_goes_with_its_directory(volume: Machine) -> None:
    report = "xfs_quota -x -c 'report -p -n -N -b' /volume | awk '$4 > 0'"
    volume.run(
        "export HOME=/volume/home\nmkdir -p $HOME\nnohup python3 -m nodeservice run --results /volume/results --disk 8m"
        " --memory 64m --cpus 0.5 nodeservice/demo -- sh -c 'sleep 600' </dev/null >/tmp/killed 2>&1 &\nrun=$!\n"
        "until docker ps -q --filter label=nodeservice.node | grep -q .; do sleep 1; done\nkill -9 $run"
    )
    assert volume.run(report).stdout != ""
    run_there(volume, "exit 4")
    assert volume.run(report).stdout == ""


def test_a_crash_starts_no_program_of_the_host(volume: Machine) -> None:
    """Where core files are piped to a program, a limit of 0 does not keep the kernel from starting it, as root."""
    volume.run(
        "printf '#!/bin/sh\\nwc -c >/tmp/core-bytes\\n' >/tmp/handler\nchmod +x /tmp/handler\n"
        "cat /proc/sys/kernel/core_pattern >/tmp/pattern\necho '|/tmp/handler' >/proc/sys/kernel/core_pattern"
    )
    told = run_there(volume, "sleep 1; kill -SEGV $$")
    left = volume.run("cat /tmp/pattern >/proc/sys/kernel/core_pattern\nls /tmp/core-bytes", check=False)
    assert told["exit_code"] == 139, told
    assert "No such file" in left.stderr


def run_there(machine: Machine, script: str) -> Any:
    """One task of 8 MiB disk, its state on the volume."""
    options = f"--json --results /volume/results --memory 64m --cpus 0.8 --disk 8m --timeout {PATIENCE_SECONDS}s"
    command = f"HOME=/volume/home python3 -m nodeservice run {options} nodeservice/demo -- sh -c '{script}' </dev/null"
    return machine.json(f"mkdir -p /volume/home\n{command}", codes=(0, 1, 4, 73, 74, 124, 137, 139, 143))


@pytest.fixture(scope="module")
def volume(machine: Machine) -> Machine:
    machine.run(
        "systemctl stop docker.socket docker\nmkfs.xfs -q -f /dev/vdc\nmkdir -p /volume\n"
        "mount -o pquota /dev/vdc /volume\nmkdir -p /volume/docker /volume/state\n"
        """echo '{"data-root": "/volume/docker"}' > /etc/docker/daemon.json\nsystemctl start docker\n"""
        "python3 tools/build_image.py >&2"
    )
    return machine
