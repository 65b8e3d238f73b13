"""Reading a process through /proc: a saved tree, hostile contents, and processes that are gone or are no container's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nodeservice.core.model import MIB
from nodeservice.limits.process import ENDED, ProcReader, read_network, read_process
from nodeservice.ports import ProcessReader, Reading

PID = 4711
STATUS = """\
Name:\tsh
State:\tS (sleeping)
NSpid:\t4711\t1
CapInh:\t0000000000000000
CapEff:\t00000000800405fb
CapBnd:\t00000000800405fb
NoNewPrivs:\t1
Seccomp:\t2
"""
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units     
Max core file size        0                    0                    bytes     
Max open files            1024                 65536                files     
Max realtime timeout      unlimited            unlimited            us        
"""  # noqa: W291 the kernel pads its table
MOUNTS = """\
78 76 0:43 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755
92 78 0:47 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm rw,size=98304k
"""
CGROUP_MOUNT = "30 25 0:26 / /cg rw - cgroup cgroup rw,devices\n"
NETWORK = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     999       9    0    0    0     0          0         0      999       9    0    0    0     0       0          0
  eth0:     200       2    0    0    0     0          0         0       30       1    0    0    0     0       0          0
  eth1:      50       2    0    0    0     0          0         0        7       1    0    0    0     0       0          0
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A saved tree, as of a running container."""
    process = tmp_path / "proc" / str(PID)
    (process / "net").mkdir(parents=True)
    (process / "root/dev/pts").mkdir(parents=True)
    (process / "status").write_text(STATUS)
    (process / "limits").write_text(LIMITS)
    (process / "oom_score_adj").write_text("0\n")
    (process / "mountinfo").write_text(MOUNTS)
    (process / "net/dev").write_text(NETWORK)
    (process / "cgroup").write_text("7:devices:/docker/c1\n0::/\n")
    (process / "stat").write_text("4711 (sh) S 1 7 7 0 -1 4194560 100 0 0 0\n")
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/mountinfo").write_text(CGROUP_MOUNT)
    (tmp_path / "cg/docker/c1").mkdir(parents=True)
    (tmp_path / "cg/docker/c1/devices.list").write_text("c *:* m\nc 1:3 rwm\n")
    return tmp_path


def process(root: Path) -> Path:
    return root / "proc" / str(PID)


def by_limit(readings: list[Reading]) -> dict[str, Reading]:
    return {one.limit: one for one in readings}


def test_every_limit_is_read_with_the_file_it_was_read_from(root: Path) -> None:
    readings = read_process(PID, root)

    assert all(one.readable for one in readings)
    assert {one.limit: one.value for one in readings} == {
        "capabilities": "00000000800405fb",
        "seccomp": 2,
        "no_new_privileges": 1,
        "oom_score_adj": 0,
        "open_files_limit": 65536,
        "core_file_bytes": 0,
        "shm_bytes": 96 * MIB,
        "devices": "",
        "device_rules": "c *:* m, c 1:3 rwm",
    }
    assert all(Path(one.source.split(" ")[0]).exists() for one in readings)


def test_effective_and_possible_capabilities_are_both_told(root: Path) -> None:
    (process(root) / "status").write_text(STATUS.replace("CapEff:\t00000000800405fb", "CapEff:\t0000000000000000"))

    found = [(one.value, one.source) for one in read_process(PID, root) if one.limit == "capabilities"]

    assert found == [
        ("0000000000000000", f"{process(root)}/status CapEff"),
        ("00000000800405fb", f"{process(root)}/status CapBnd"),
    ]


def test_unlimited_is_no_limit(root: Path) -> None:
    (process(root) / "limits").write_text(LIMITS.replace("65536    ", "unlimited"))

    found = by_limit(read_process(PID, root))["open_files_limit"]

    assert (found.readable, found.value) == (True, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [("NSpid:\t4711\t1", "NSpid:\t4711"), ("NSpid:\t4711\t1", "NSpid:\t4711\t8"), ("S (sleeping)", "Z (zombie)")],
    ids=["a process of the host", "not the first of its container", "a zombie"],
)
def test_a_number_that_another_bears_by_now_is_told_like_one_that_ended(root: Path, old: str, new: str) -> None:
    (process(root) / "status").write_text(STATUS.replace(old, new))

    readings = read_process(PID, root)

    assert len(readings) == 9
    assert {(one.readable, one.note) for one in readings} == {(False, ENDED)}
    assert read_network(PID, root) is None


def test_one_that_ended_is_told_as_such() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

    assert {(one.readable, one.note) for one in read_process(child)} == {(False, ENDED)}
    assert read_network(child) is None


def test_one_that_ends_between_two_files_is_told_for_what_is_missing(root: Path) -> None:
    (process(root) / "mountinfo").unlink()
    (process(root) / "root").rename(root / "away")

    found = by_limit(read_process(PID, root))

    assert found["seccomp"].readable
    assert [(found[name].readable, found[name].note) for name in ("shm_bytes", "devices")] == [(False, ENDED)] * 2


@pytest.mark.parametrize("name", ["limits", "mountinfo", "oom_score_adj"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe nonsense \n\n - \n"])
def test_a_file_that_makes_no_sense_never_breaks_the_reading(root: Path, name: str, content: bytes) -> None:
    (process(root) / name).write_bytes(content)

    readings = read_process(PID, root)

    assert by_limit(readings)["seccomp"].value == 2
    assert {one.limit for one in readings} >= {"shm_bytes", "open_files_limit", "oom_score_adj", "devices"}


def test_a_kernel_that_tells_less_is_told(root: Path) -> None:
    (process(root) / "status").write_text(STATUS.replace("NoNewPrivs:\t1\n", ""))

    found = by_limit(read_process(PID, root))["no_new_privileges"]

    assert (found.readable, found.note) == (False, "this kernel does not tell")


def test_a_process_name_of_any_bytes_is_no_hindrance(root: Path) -> None:
    (process(root) / "status").write_bytes(STATUS.encode().replace(b"sh", b"\xff\xfe:\\n"))

    assert by_limit(read_process(PID, root))["seccomp"].value == 2


def test_shared_memory_without_a_size_is_asked_of_the_file_system(root: Path) -> None:
    (process(root) / "mountinfo").write_text(MOUNTS.replace("rw,size=98304k", "rw"))
    (process(root) / "root/dev/shm").mkdir()

    found = by_limit(read_process(PID, root))["shm_bytes"]

    told = os.statvfs(root)
    assert found.value == told.f_blocks * told.f_frsize


def test_of_two_mounts_on_shared_memory_the_later_counts(root: Path) -> None:
    (process(root) / "mountinfo").write_text(MOUNTS + MOUNTS.replace("98304k", "1g"))

    assert by_limit(read_process(PID, root))["shm_bytes"].value == 1024 * MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes are made by root alone")
def test_device_nodes_are_told_by_name_and_by_number_where_it_is_not_the_usual_one(root: Path) -> None:
    devices = process(root) / "root/dev"
    (devices / "nvidia-caps").mkdir()
    for name in ("null", "zero", "nvidia-caps/nvidia-cap1", "pts/0"):
        os.mknod(devices / name, 0o020666, os.makedev(1, 3))
    os.mknod(devices / "a b=1", 0o060600, os.makedev(254, 0))
    (devices / "plain").write_text("")
    (devices / "link").symlink_to("/dev/null")

    assert (
        by_limit(read_process(PID, root))["devices"].value == "a?b?1=b254:0 null nvidia-caps/nvidia-cap1=1:3 zero=1:3"
    )


def test_no_link_of_the_container_is_followed(root: Path) -> None:
    (process(root) / "root/dev/pts").rmdir()
    (process(root) / "root/dev").rmdir()
    (process(root) / "root/dev").symlink_to("/dev")

    found = by_limit(read_process(PID, root))["devices"]

    assert (found.readable, found.value) == (False, None)
    assert found.note != ENDED


def test_a_directory_full_of_entries_is_not_read_to_its_end(root: Path) -> None:
    for number in range(1100):
        (process(root) / f"root/dev/{number}").touch()

    found = by_limit(read_process(PID, root))["devices"]

    assert (found.readable, found.note) == (False, "more than 1024 entries")


def test_traffic_is_that_of_all_interfaces_but_the_loopback(root: Path) -> None:
    assert read_network(PID, root) == (250, 37)


def test_traffic_that_makes_no_sense_is_none(root: Path) -> None:
    (process(root) / "net/dev").write_text("a\nb\neth0: x y\n")

    assert read_network(PID, root) is None


def test_the_reader_is_what_the_port_asks_for(root: Path) -> None:
    reader: ProcessReader = ProcReader(root)

    assert (len(reader.readings(PID)), reader.network(PID)) == (10, (250, 37))
