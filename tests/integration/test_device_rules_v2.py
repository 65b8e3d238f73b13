"""The device programs that a real runc attaches on cgroup v2, turned back into rules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

# In namespaces of its own: there cgroup v2 lies where runc looks for it, whatever this host uses otherwise.
IN_NAMESPACES = """
umount --recursive --lazy /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && cd "$1" || exit 9
if ! runc --root "$1/state" run --detach "$2" >log 2>&1 </dev/null; then
    cat log
    rmdir "/sys/fs/cgroup/$2" 2>/dev/null
    exit 9
fi
pid=$(runc --root "$1/state" state "$2" | sed -n 's/.*"pid": \\([0-9]*\\).*/\\1/p')
status=0
"$3" -m tests.integration.test_device_rules_v2 "$pid" || status=$?
runc --root "$1/state" delete --force "$2"
exit $status
"""


def rules_under(devices: list[dict[str, object]]) -> str | None:
    """What is read of a container that runc gives these rules; a skip that says why it can't be tried."""
    busybox = shutil.which("busybox")
    if os.geteuid() != 0 or shutil.which("runc") is None or busybox is None:
        pytest.skip("NO RUNC to try cgroup v2 with: it needs root, runc and busybox-static")
    with tempfile.TemporaryDirectory() as folder:
        root, name = Path(folder) / "rootfs", f"nodeservice-test-{uuid.uuid4().hex[:8]}"
        (root / "bin").mkdir(parents=True)
        shutil.copy(os.path.realpath(busybox), root / "bin/sleep")
        subprocess.run(["runc", "spec"], cwd=folder, check=True)
        spec = json.loads((Path(folder) / "config.json").read_text())
        spec["process"] |= {"terminal": False, "args": ["/bin/sleep", "60"], "rlimits": []}
        spec["linux"] |= {"cgroupsPath": f"/{name}", "resources": {"devices": devices}}
        (Path(folder) / "config.json").write_text(json.dumps(spec))
        ran = subprocess.run(
            ["unshare", "--mount", "sh", "-c", IN_NAMESPACES, "sh", folder, name, sys.executable],
            capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
    if ran.returncode == 9:
        pytest.skip(f"cgroup v2 can't be had in a namespace here: {(ran.stdout + ran.stderr).strip()[-300:]}")
    assert ran.returncode == 0, ran.stderr
    told: str | None = json.loads(ran.stdout)
    return told


def test_a_containers_own_rules_are_told_and_nothing_else_is_open() -> None:
    allowed = [(195, 0), (195, 255), (10, 229)]
    told = rules_under(
        [{"allow": False, "access": "rwm"}]
        + [{"allow": True, "type": "c", "major": major, "minor": minor, "access": "rw"} for major, minor in allowed]
    )
    assert told is not None
    rules = told.split(", ")
    # runc has a program ask for each access alone, and adds making nodes, which opens nothing.
    assert {rule for rule in rules if rule.startswith(("c 195", "c 10:229"))} == {
        "c 10:229 rwm", "c 195:0 rwm", "c 195:255 rwm",
    }  # fmt: skip
    assert {"c 1:3 rwm", "c 136:* rwm", "c *:* m", "b *:* m"} <= set(rules)
    assert not [rule for rule in rules if rule.startswith("b ") and rule != "b *:* m"]


def test_a_container_that_may_open_everything_is_told_so() -> None:
    told = rules_under([{"allow": True, "access": "rwm"}])
    assert told is not None
    assert {"b *:* rwm", "c *:* rwm"} & set(told.split(", ")) or told == "a *:* rwm"


if __name__ == "__main__":
    from nodeservice.limits.device_rules import read_device_rules

    sys.stdout.write(json.dumps(read_device_rules(int(sys.argv[1])).value))
