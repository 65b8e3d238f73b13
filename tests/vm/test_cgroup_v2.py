"""The same promises on a real cgroup v2 kernel with systemd, where the engine keeps its containers in slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.machine import Machine, NoMachineError

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1500)]

ATTACKS = "fork_bomb or hog_in_a_child or 137 or left_its_family or eight_busy or independent_look"
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


def states(told: Any) -> dict[str, str]:
    return {check["limit"]: check["state"] for check in told["checks"]}


def test_the_contract_of_task_cgroups_holds_on_cgroup_v2(machine: Machine) -> None:
    ran = machine.pytest("tests/contract/test_task_cgroups.py")
    assert ran.failed == (), ran.output
    assert ran.passed >= 30
    assert [reason for reason in ran.skipped if "v1" not in reason] == []


@pytest.mark.parametrize("driver", ["systemd", "cgroupfs"])
def test_attacks_meet_their_limits_on_cgroup_v2(machine: Machine, driver: str) -> None:
    machine.set_cgroup_driver(driver)
    ran = machine.pytest("tests/integration/test_attacks.py", "-k", ATTACKS)
    assert (ran.failed, ran.skipped) == ((), ()), ran.output
    assert ran.passed == 6


def test_doctor_says_hard_where_the_state_lies_on_a_volume_with_quotas(machine: Machine) -> None:
    """XFS with project quotas below the state directory and the engine: then the kernel bounds the disk too."""
    machine.run(
        "systemctl stop docker.socket docker\nmkfs.xfs -q -f /dev/vdc\nmkdir -p /volume\n"
        "mount -o pquota /dev/vdc /volume\nmkdir -p /volume/docker /volume/state\n"
        """echo '{"data-root": "/volume/docker"}' > /etc/docker/daemon.json\nsystemctl start docker\n"""
        "python3 tools/build_image.py >&2"
    )
    told = machine.json(
        "python3 -m nodeservice doctor --json --patience 10 --image nodeservice/demo --state-dir /volume/state"
    )
    assert told["sound"], told
    assert told["facts"]["cgroup_version"] == 2
    found = states(told)
    assert {name: state for name, state in found.items() if state != "hard"} == {"disk log": "watched"}
    assert set(found) >= HARD
