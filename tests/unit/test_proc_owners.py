"""Whose a process is follows from the cgroup that the kernel keeps it in, whatever a task calls its own cgroups."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nodeservice.core.model import AttemptId
from nodeservice.limits.owners import ProcOwners
from nodeservice.ports import NOBODY

A, B = AttemptId("a"), AttemptId("b")
TICKS = os.sysconf("SC_CLK_TCK")
NOW = 1000.0


class FalseProc:
    """A /proc of files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.owners = ProcOwners(root)

    def process(self, pid: int, *cgroup: str, started_seconds: float = 1.0, name: str = "python3") -> None:
        directory = self.root / "proc" / str(pid)
        directory.mkdir(parents=True, exist_ok=True)
        directory.joinpath("cgroup").write_bytes("".join(f"{line}\n" for line in cgroup).encode())
        fields = ["S", *["0"] * 18, str(int(started_seconds * TICKS)), *["0"] * 30]
        directory.joinpath("stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")
        directory.joinpath("comm").write_text(f"{name[:15]}\n")

    def whose(self, *pids: int, first: dict[AttemptId, int] | None = None) -> dict[int, AttemptId]:
        attempts = {A: 1, B: 2} if first is None else first
        return dict(self.owners.owners(pids, attempts, before_seconds=NOW))


@pytest.fixture
def proc(tmp_path: Path) -> FalseProc:
    return FalseProc(tmp_path)


def v2(path: str) -> str:
    return f"0::{path}"


def hybrid(path: str) -> tuple[str, ...]:
    """As Debian's hybrid hosts have it: the unified hierarchy knows another place."""
    return (
        f"12:memory:{path}",
        f"4:cpu,cpuacct:{path}/elsewhere",
        "1:name=systemd:/system.slice/x",
        "0::/system.slice/docker.service",
    )


def test_on_v2_a_process_belongs_to_the_attempt_below_whose_cgroup_it_lives(proc: FalseProc) -> None:
    proc.process(1, v2("/task.slice/a.scope"))
    proc.process(2, v2("/task.slice/b.scope"))
    proc.process(11, v2("/task.slice/a.scope/deep/deeper"))
    proc.process(12, v2("/task.slice/b.scope"))
    proc.process(13, v2("/task.slice"))
    assert proc.whose(1, 11, 12, 13) == {1: A, 11: A, 12: B, 13: NOBODY}


def test_on_a_hybrid_host_the_hierarchy_that_counts_memory_says_it(proc: FalseProc) -> None:
    proc.process(1, *hybrid("/docker/aa"))
    proc.process(2, *hybrid("/docker/bb"))
    proc.process(11, *hybrid("/docker/bb/inner"))
    assert proc.whose(11, 1) == {11: B, 1: A}


def test_a_name_that_only_begins_alike_is_another_cgroup(proc: FalseProc) -> None:
    proc.process(1, v2("/docker/a"))
    proc.process(11, v2("/docker/ab"))
    assert proc.whose(11, first={A: 1}) == {11: NOBODY}


def test_a_nested_cgroup_named_like_another_container_s_does_not_deceive(proc: FalseProc) -> None:
    proc.process(1, v2("/docker/aa"))
    proc.process(2, v2("/docker/bb"))
    proc.process(11, v2("/docker/aa/docker/bb"))
    proc.process(12, v2("/docker/aa/../bb"))
    assert proc.whose(11, 12) == {11: A, 12: A}


@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_a_name_with_what_looks_like_the_end_of_a_line_does_not_deceive(proc: FalseProc, mark: str) -> None:
    """The kernel takes all but the real end of a line in the name of a cgroup."""
    proc.process(1, *hybrid("/docker/aa"))
    proc.process(2, *hybrid("/docker/bb"))
    proc.process(11, *hybrid(f"/docker/aa/x{mark}9:memory:/docker/bb"))
    assert proc.whose(11) == {11: A}


def test_a_hierarchy_that_is_only_named_like_memory_counts_none(proc: FalseProc) -> None:
    proc.process(1, v2("/docker/aa"))
    proc.process(2, v2("/docker/bb"))
    proc.process(11, "2:name=memory:/docker/bb", v2("/docker/aa"))
    assert proc.whose(11) == {11: A}


def test_a_name_with_colons_and_bytes_that_are_no_text_is_read(proc: FalseProc) -> None:
    proc.process(1, v2("/docker/a:b"))
    proc.process(11)
    (proc.root / "proc/11/cgroup").write_bytes(b"0::/docker/a:b/\xff\xfe:memory:/x\n")
    assert proc.whose(11, first={A: 1}) == {11: A}


def test_the_root_cgroup_owns_nobody(proc: FalseProc) -> None:
    proc.process(1, v2("/"))
    proc.process(2, v2("/docker/bb"))
    proc.process(11, v2("/system.slice/x"))
    proc.process(12, v2("/docker/bb"))
    assert proc.whose(1, 11, 12) == {1: NOBODY, 11: NOBODY, 12: B}


def test_what_lies_above_a_cgroup_namespace_owns_nobody_and_what_lies_beside_it_does(proc: FalseProc) -> None:
    """A node in a container of its own sees its neighbours as /../NAME."""
    proc.process(1, v2("/../.."))
    proc.process(2, v2("/../docker-bb"))
    proc.process(11, v2("/../docker-cc"))
    proc.process(12, v2("/../docker-bb/init"))
    assert proc.whose(1, 11, 12) == {1: NOBODY, 11: NOBODY, 12: B}


def test_a_cgroup_that_two_attempts_seem_to_live_in_is_neither_s(proc: FalseProc) -> None:
    """The number of a first process that ended was used again, or the engine makes no cgroups."""
    for pid in (1, 2, 3):
        proc.process(pid, v2("/docker/bb"))
    assert proc.whose(2, first={A: 1, B: 2, AttemptId("c"): 3}) == {2: NOBODY}


def test_the_innermost_of_two_attempts_is_the_owner(proc: FalseProc) -> None:
    proc.process(1, v2("/tasks"))
    proc.process(2, v2("/tasks/bb"))
    proc.process(11, v2("/tasks/bb/x"))
    proc.process(12, v2("/tasks/cc"))
    assert proc.whose(11, 12) == {11: B, 12: A}


def test_what_ended_is_left_out_and_an_attempt_whose_first_process_ended_owns_nobody(proc: FalseProc) -> None:
    proc.process(1, v2("/docker/aa"))
    proc.process(11, v2("/docker/bb"))
    assert proc.whose(11, 99) == {11: NOBODY}


def test_a_number_that_was_used_again_after_the_look_is_left_out(proc: FalseProc) -> None:
    proc.process(1, v2("/docker/aa"))
    proc.process(11, v2("/docker/aa"), started_seconds=NOW + 0.5)
    proc.process(12, v2("/docker/aa"), started_seconds=NOW)
    assert proc.whose(11, 12, first={A: 1}) == {12: A}


@pytest.mark.parametrize("name", ["a b", "x) S 0 0", ") ) )", "(sd-pam)", ""])
def test_the_name_of_a_process_does_not_shift_its_start(proc: FalseProc, name: str) -> None:
    proc.process(1, v2("/docker/aa"))
    proc.process(11, v2("/docker/aa"), started_seconds=NOW + 1, name=name)
    proc.process(12, v2("/docker/aa"), started_seconds=NOW - 1, name=name)
    assert proc.whose(11, 12, first={A: 1}) == {12: A}


@pytest.mark.parametrize("stat", ["", "12 (x)", "12 (x) S 0", "12 (x) " + "q " * 40])
def test_a_stat_that_cannot_be_read_is_of_a_process_that_ended(proc: FalseProc, stat: str) -> None:
    proc.process(1, v2("/docker/aa"))
    proc.process(12, v2("/docker/aa"))
    (proc.root / "proc/12/stat").write_text(stat)
    assert proc.whose(12, first={A: 1}) == {}


@pytest.mark.parametrize("text", ["", "\n", "nonsense\n", "::\n", "0:\n"])
def test_a_cgroup_file_without_a_place_is_of_a_process_that_ended(proc: FalseProc, text: str) -> None:
    proc.process(1, v2("/docker/aa"))
    proc.process(12)
    (proc.root / "proc/12/cgroup").write_text(text)
    assert proc.whose(12, first={A: 1}) in ({}, {12: NOBODY})


def test_an_mps_server_is_no_stranger_and_a_task_cannot_pass_for_one(proc: FalseProc) -> None:
    proc.process(1, v2("/docker/aa"))
    proc.process(11, v2("/system.slice/mps.service"), name="nvidia-cuda-mps-server")
    proc.process(12, v2("/docker/aa"), name="nvidia-cuda-mps-server")
    proc.process(13, v2("/system.slice/x"), name="nvidia-cuda-mp")
    assert proc.whose(11, 12, 13, first={A: 1}) == {12: A, 13: NOBODY}


# ---- the cgroup itself ------------------------------------------------------------------------------------------------


def test_the_path_of_a_cgroup_is_that_on_v2(proc: FalseProc) -> None:
    proc.process(1, v2("/task.slice/a.scope"))
    proc.process(2, "12:memory:/docker/bb")
    assert proc.owners.cgroup(1) == "/sys/fs/cgroup/task.slice/a.scope"
    assert proc.owners.cgroup(2) is None
    assert proc.owners.cgroup(99) is None


@pytest.mark.parametrize("place", ["/", "/..", "/../docker-aa"])
def test_no_limit_is_ever_set_on_the_root_or_beside_what_can_be_reached(proc: FalseProc, place: str) -> None:
    proc.process(1, v2(place))
    assert proc.owners.cgroup(1) is None


def test_a_real_process_is_read_from_the_real_proc() -> None:
    owners = ProcOwners()
    child = subprocess.Popen(["sleep", "60"])
    try:
        after, before = (
            owners.owners([child.pid], {}, before_seconds=1e12),
            owners.owners([child.pid], {}, before_seconds=0),
        )
        assert (dict(after), dict(before)) == ({child.pid: NOBODY}, {})
    finally:
        child.kill()
        child.wait()
