"""From a bare machine to a verified worker with one playbook; again without a change; over a reboot; to the next version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import openssl
from tests.vm.bare import BareMachine
from tests.vm.machine import PATIENCE_SECONDS, ROOT, NoMachineError

pytestmark = [pytest.mark.vm, pytest.mark.timeout(20 * PATIENCE_SECONDS)]

ANSIBLE = ROOT / "ansible"
ADDRESS = "10.0.2.15"
COUNT = "i=0; while true; do echo $i; i=$((i+1)); sleep 1; done"
OBEYS = f"trap 'exit 0' TERM; {COUNT}".replace("sleep 1", "sleep 1 & wait $!")
TASK = "submit --cpus 0.1 --memory 32m --disk 64m --pull never nodeservice/verify:1 --"
CLIENT = (
    f"export NODESERVICE_MASTER={ADDRESS}:50051 NODESERVICE_TLS_CA=/etc/nodeservice/tls/ca.pem"
    " NODESERVICE_TLS_CERT=/etc/nodeservice/tls/node.pem NODESERVICE_TLS_KEY=/etc/nodeservice/tls/node.key\n"
)


@dataclass(frozen=True, slots=True)
class Played:
    """What a playbook said, and its counts for the machine."""

    code: int
    output: str
    counts: dict[str, int]


@dataclass
class Site:
    """One machine that is master and node, and the inventory that says so."""

    machine: BareMachine
    folder: Path

    def play(self, book: str, *options: str, version: str = "0.1.0") -> Played:
        done = subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", self.folder / "hosts.ini", *options,
             "-e", f"nodeservice_package={self.folder}/nodeservice_{version}_amd64.deb", f"playbooks/{book}.yml"],
            cwd=ANSIBLE, capture_output=True, text=True, check=False, timeout=9 * PATIENCE_SECONDS,
            env=os.environ | {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_HOME": str(self.folder / "home")},
        )  # fmt: skip
        recap = re.findall(r"^vm\s+: (.*)$", done.stdout, re.MULTILINE)
        counts = {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", recap[-1] if recap else "")}
        return Played(done.returncode, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}", counts)

    def client(self, command: str) -> str:
        return self.machine.run(f"{CLIENT}nodeservice {command}").stdout.strip()

    def story(self, task: str) -> Any:
        return self.machine.json(f"{CLIENT}nodeservice show {task} --json")


def build(version: str, target: Path) -> None:
    environment = os.environ | {"DEB_VERSION": version}
    done = subprocess.run(
        ["sh", ROOT / "tools" / "deb.sh"], env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    target.write_bytes(Path(ROOT, done.stdout.strip().splitlines()[-1]).read_bytes())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    for version in ("0.1.0", "0.1.1"):
        build(version, folder / f"nodeservice_{version}_amd64.deb")
    try:
        with BareMachine(tmp_path_factory.mktemp("bare")) as machine:
            site = Site(machine, folder)
            tls = f"{folder}/tls"
            (folder / "hosts.ini").write_text(
                f"[masters]\nvm {machine.inventory_host()}\n[nodes]\nvm\n[all:vars]\n"
                f"nodeservice_master_address={ADDRESS}:50051\ncertificates_more_names=['{ADDRESS}']\n"
                f"nodeservice_tls_ca={tls}/ca.pem\nnodeservice_tls_cert={tls}/vm.pem\nnodeservice_tls_key={tls}/vm.key\n"
                "nodeservice_master_tls_ca={{ nodeservice_tls_ca }}\n"
                "nodeservice_master_tls_cert={{ nodeservice_tls_cert }}\n"
                "nodeservice_master_tls_key={{ nodeservice_tls_key }}\n"
                "nodeservice_state_device=/dev/vdc\nnodeservice_verify_patience=30\nnodeservice_verify_task_seconds=900\n"
            )
            made = site.play("certificates")
            assert made.code == 0, made.output
            openssl("verify", "-CAfile", f"{tls}/ca.pem", f"{tls}/vm.pem")
            yield site
    except NoMachineError as error:
        pytest.skip(f"NO VIRTUAL MACHINE, the playbooks are not tried: {error}")


def test_a_bare_machine_becomes_a_verified_worker_that_comes_back_and_is_upgraded_under_a_task(site: Site) -> None:
    """One story, since each chapter begins where the last one ended."""
    looked = site.play("site", "--check")
    assert looked.code == 0, looked.output
    assert site.machine.run("command -v dockerd nodeservice || true").stdout == "", "a look changes nothing"

    first = site.play("site")
    assert first.code == 0, first.output
    assert first.counts["changed"] > 10, first.output

    second = site.play("site")
    assert (second.code, second.counts["changed"]) == (0, 0), second.output
    again = site.play("site", "--check")
    assert (again.code, again.counts["changed"]) == (0, 0), again.output

    before = site.client(f'{TASK} sh -c "echo done"')
    site.machine.run(f"{CLIENT}nodeservice wait {before}")
    running = [site.client(f'{TASK} sh -c "{command}"'.replace("$", r"\$")) for command in (COUNT, OBEYS)]
    for task in running:
        site.machine.run(f"{CLIENT}until nodeservice logs {task} | grep -q 3; do sleep 2; done")
    site.machine.restart()
    for task in running:  # the master gives it to a node again, for that was not its own fault
        second = f"nodeservice show {task} --json | grep -q '\"attempt\": 2'"
        site.machine.run(f"{CLIENT}until {second} && nodeservice logs {task} | grep -q 3; do sleep 2; done")
        (first, second) = site.story(task)["attempts"]
        assert (first["state"], first["reason"], second["state"]) == ("FAILED", "ENGINE_FAULT", "RUNNING"), first
    assert [attempt["state"] for attempt in site.story(before)["attempts"]] == ["SUCCEEDED"]
    site.client(f"cancel {running[1]}")
    proven = site.play("verify")
    assert (proven.code, proven.counts["changed"]) == (0, 0), proven.output

    task = running[0]
    upgraded = site.play("upgrade", version="0.1.1")
    assert upgraded.code == 0, upgraded.output
    assert site.machine.run("dpkg-query -W -f '${Version}' nodeservice").stdout == "0.1.1"
    before = len(site.client(f"logs {task}").split())
    site.machine.run(f"{CLIENT}until [ $(nodeservice logs {task} | wc -l) -gt {before} ]; do sleep 2; done")
    site.client(f"cancel {task}")
    site.machine.run(f"{CLIENT}nodeservice wait {task}", check=False)
    numbers = [int(word) for word in site.client(f"logs {task}").split()]
    assert numbers == list(range(len(numbers))), "its log has neither a gap nor a line twice"
    assert len(numbers) > before

    removed = site.play("remove", "-e", "nodeservice_remove_deadline=1s")
    assert removed.code == 0, removed.output
    assert site.machine.run("command -v nodeservice || true").stdout == ""
