"""CPU, memory and disk facts over saved trees of /proc and /sys: v1 hybrid, v2 with nested limits, no limits, namespaces."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from nodeservice.capacity.cpu import read_cpu
from nodeservice.capacity.disk import nearest_existing, read_disk, read_space
from nodeservice.capacity.memory import read_memory
from nodeservice.capacity.topology import read_cpus
from nodeservice.capacity.usage import CpuMeter, disk_percent, gpu_percent, memory_percent
from nodeservice.core.cpus import Cpu
from nodeservice.core.model import GIB, MIB
from nodeservice.limits.free_space import _room
from nodeservice.limits.hierarchy import host_cgroup_version
from nodeservice.ports import GpuInventory
from nodeservice.testing.fake_gpu import fake_gpu

V1_MOUNTS = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2_MOUNTS = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
"""
V1_PLACE = "5:cpuset:/a\n4:memory:/a/b\n1:cpu,cpuacct:/a/b\n3:name=systemd:/a\n0::/a/b\n"
V2_PLACE = "0::/outer/inner\n"


class Tree:
    """A saved host below one directory: 16 CPUs in 8 cores, 64 GiB."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 * 1024**2} kB\nMemFree: 1024 kB\nMemAvailable: {48 * 1024**2} kB\n")
        self.write("proc/cpuinfo", "processor\t: 0\nmodel name\t: Test CPU @ 3 GHz\n")
        self.write("sys/devices/system/cpu/present", "0-15\n")
        for cpu in range(16):
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/core_id", f"{cpu % 4}\n")
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", f"{cpu // 4 % 2}\n")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def cgroup(self, path: str, **files: str) -> None:
        for name, text in files.items():
            self.write(f"sys/fs/cgroup/{path}/{name.replace('__', '.')}", f"{text}\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def v1(tree: Tree) -> Tree:
    tree.write("proc/self/mountinfo", V1_MOUNTS)
    tree.write("proc/self/cgroup", V1_PLACE)
    for place in ("", "a", "a/b"):
        tree.cgroup(f"cpu,cpuacct/{place}", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
        tree.cgroup(f"memory/{place}", memory__limit_in_bytes="9223372036854771712")
    tree.cgroup("cpuset", cpuset__cpus="0-15")
    tree.cgroup("cpuset/a", cpuset__cpus="0-15", cpuset__effective_cpus="0-15")
    (tree.root / "sys/fs/cgroup/unified/a/b").mkdir(parents=True)
    return tree


@pytest.fixture
def v2(tree: Tree) -> Tree:
    tree.write("proc/self/mountinfo", V2_MOUNTS)
    tree.write("proc/self/cgroup", V2_PLACE)
    tree.cgroup("", cpuset__cpus__effective="0-15")
    tree.cgroup("outer", cpu__max="max 100000", memory__max="max", memory__high="max", memory__current="0")
    tree.cgroup("outer/inner", cpu__max="max 100000", memory__max="max", memory__high="max", memory__current="0")
    return tree


def usable_milli(tree: Tree, affinity_count: int = 16, tasks_place: str | None = None) -> int:
    return read_cpu(tree.root, tasks_place=tasks_place, affinity=range(affinity_count)).usable_milli


def test_the_board_is_told_from_its_topology(tree: Tree) -> None:
    cpu = read_cpu(tree.root, affinity=range(16))

    assert (cpu.model, cpu.logical_count, cpu.physical_count) == ("Test CPU @ 3 GHz", 16, 8)
    for core in tree.root.glob("sys/devices/system/cpu/cpu*/topology/core_id"):
        core.unlink()
    assert read_cpu(tree.root, affinity=range(16)).physical_count == 16
    (tree.root / "sys/devices/system/cpu/present").unlink()
    (tree.root / "proc/cpuinfo").unlink()
    cpu = read_cpu(tree.root, affinity=range(16))
    assert (cpu.model, cpu.logical_count) == (platform.machine(), os.cpu_count())


def test_cpus_are_told_with_their_core_and_memory_node(tree: Tree) -> None:
    tree.write("sys/devices/system/cpu/cpu5/node1/cpulist", "5")
    tree.write("sys/devices/system/cpu/cpu2/topology/physical_package_id", "-1\n")
    (tree.root / "sys/devices/system/cpu/cpu3/topology/physical_package_id").unlink()
    tree.write("sys/devices/system/cpu/cpu9/topology/core_id", "")

    assert read_cpus(tree.root, {9, 5, 3, 2}) == (
        Cpu(id=2, core=2, numa_node=0),
        Cpu(id=3, core=3, numa_node=0),
        Cpu(id=5, core=(1 << 16) + 1, numa_node=1),
        Cpu(id=9, core=-10, numa_node=0),
    )


@pytest.mark.parametrize("text", ["", "\n", "nonsense"])
def test_what_is_no_list_of_cpus_limits_nothing(v2: Tree, text: str) -> None:
    v2.cgroup("outer", cpuset__cpus__effective=text)
    v2.write("sys/devices/system/cpu/online", text)

    assert usable_milli(v2) == 16_000


@pytest.mark.parametrize("fixture", ["tree", "v1", "v2"])
def test_without_limits_all_of_the_board_is_usable(fixture: str, request: pytest.FixtureRequest) -> None:
    tree: Tree = request.getfixturevalue(fixture)

    assert usable_milli(tree) == 16_000
    assert read_memory(tree.root).limit_bytes == 64 * GIB


def test_affinity_limits(v1: Tree) -> None:
    assert usable_milli(v1, affinity_count=3) == 3_000


def test_a_v1_cpuset_limits(v1: Tree) -> None:
    v1.cgroup("cpuset/a", cpuset__effective_cpus="0-3,8")

    assert usable_milli(v1) == 5_000


def test_a_v2_cpuset_limits_from_the_nearest_cgroup_that_has_one(v2: Tree) -> None:
    v2.cgroup("outer", cpuset__cpus__effective="0-3,8")
    v2.cgroup("nodeservice", cpuset__cpus__effective="4-5")

    assert usable_milli(v2) == 5_000
    assert usable_milli(v2, affinity_count=9, tasks_place="nodeservice") == 2_000


@pytest.mark.parametrize("place", ["a", "a/b"])
def test_a_v1_quota_limits_wherever_it_sits_above_us(v1: Tree, place: str) -> None:
    v1.cgroup(f"cpu,cpuacct/{place}", cpu__cfs_quota_us="250000")

    assert usable_milli(v1) == 2_500


def test_of_nested_v2_quotas_the_tightest_counts(v2: Tree) -> None:
    v2.cgroup("outer", cpu__max="150000 100000")
    v2.cgroup("outer/inner", cpu__max="400000 100000")

    assert usable_milli(v2) == 1_500


def test_a_quota_in_a_cgroup_beside_us_is_not_ours(v2: Tree) -> None:
    v2.cgroup("outer/other", cpu__max="10000 100000")

    assert usable_milli(v2) == 16_000


def test_a_v1_memory_limit_above_us_limits_total_and_available(v1: Tree) -> None:
    v1.cgroup(
        "memory/a",
        memory__limit_in_bytes=str(8 * GIB),
        memory__usage_in_bytes=str(3 * GIB),
        memory__stat=f"total_inactive_file {1 * GIB}\nhierarchical_memory_limit {8 * GIB}",
    )

    memory = read_memory(v1.root)

    assert (memory.total_bytes, memory.limit_bytes, memory.available_bytes) == (64 * GIB, 8 * GIB, 6 * GIB)


def test_a_v1_limit_of_an_ancestor_out_of_sight_is_found_in_the_statistics(v1: Tree) -> None:
    v1.cgroup("memory/a/b", memory__stat=f"hierarchical_memory_limit {4 * GIB}")

    assert read_memory(v1.root).limit_bytes == 4 * GIB


@pytest.mark.parametrize("name", ["memory__max", "memory__high"])
def test_of_nested_v2_memory_limits_the_tightest_counts(v2: Tree, name: str) -> None:
    used = {"memory__current": str(768 * MIB), "memory__stat": f"inactive_file {256 * MIB}"}
    v2.cgroup("outer", **{name: str(2 * GIB), **used})
    v2.cgroup("outer/inner", memory__max=str(10 * GIB))

    memory = read_memory(v2.root)

    assert memory.limit_bytes == 2 * GIB
    assert memory.available_bytes == 2 * GIB - 512 * MIB
    for count, left in ((3 * GIB, 0), (0, 2 * GIB)):
        v2.cgroup("outer", memory__current=str(count))
        assert read_memory(v2.root).available_bytes == left


@pytest.mark.parametrize("place", ["", "nodeservice"])
def test_a_v1_limit_above_the_tasks_counts_and_ours_does_not(v1: Tree, place: str) -> None:
    v1.cgroup("memory/a", memory__limit_in_bytes=str(GIB))
    v1.cgroup("cpu,cpuacct/a", cpu__cfs_quota_us="50000")
    v1.cgroup("cpuset/a", cpuset__effective_cpus="0-1")
    for name in ("memory", "cpu,cpuacct", "cpuset"):
        (v1.root / "sys/fs/cgroup" / name / "nodeservice").mkdir()
    v1.cgroup(f"memory/{place}", memory__limit_in_bytes=str(8 * GIB))
    v1.cgroup(f"cpu,cpuacct/{place}", cpu__cfs_quota_us="350000", cpu__cfs_period_us="100000")
    v1.cgroup("cpuset", cpuset__effective_cpus="4-9")

    cpu = read_cpu(v1.root, tasks_place="nodeservice", affinity=range(2))

    assert (cpu.usable_milli, cpu.usable_ids) == (3_500, frozenset(range(4, 10)))
    assert read_memory(v1.root, tasks_place="nodeservice").limit_bytes == 8 * GIB


def test_a_v2_limit_above_the_tasks_counts_and_ours_does_not(v2: Tree) -> None:
    v2.cgroup("outer/inner", cpu__max="50000 100000", memory__max=str(GIB), cpuset__cpus__effective="0")
    v2.cgroup("nodeservice.slice", cpu__max="350000 100000", memory__high=str(8 * GIB), memory__max=str(9 * GIB))
    v2.cgroup("nodeservice.slice", cpuset__cpus__effective="4-9")
    v2.cgroup("nodeservice.slice/nodeservice-n.slice", cpu__max="100000 100000", memory__max=str(2 * GIB))

    cpu = read_cpu(v2.root, tasks_place="nodeservice.slice", affinity=[0])

    assert (cpu.usable_milli, cpu.usable_ids) == (3_500, frozenset(range(4, 10)))
    assert read_memory(v2.root, tasks_place="nodeservice.slice").limit_bytes == 8 * GIB


def test_before_their_cgroup_is_made_tasks_are_limited_by_what_will_be_above_it(v2: Tree) -> None:
    v2.cgroup("outer", memory__max=str(GIB))
    v2.cgroup("", memory__max=str(4 * GIB), cpu__max="250000 100000")  # of the container that the engine runs in

    assert read_memory(v2.root, tasks_place="nodeservice").limit_bytes == 4 * GIB
    assert usable_milli(v2, tasks_place="nodeservice") == 2_500


def test_what_is_kept_out_of_our_affinity_is_kept_from_tasks_too(v2: Tree) -> None:
    v2.cgroup("outer/inner", cpuset__cpus__effective="0-7")

    assert usable_milli(v2, affinity_count=8, tasks_place="nodeservice.slice") == 16_000
    assert usable_milli(v2, affinity_count=6, tasks_place="nodeservice.slice") == 14_000


def test_a_cpu_that_is_offline_is_not_there_for_tasks(v1: Tree) -> None:
    v1.write("sys/devices/system/cpu/online", "0-10,12-14\n")

    cpu = read_cpu(v1.root, affinity=range(16))

    assert (cpu.logical_count, cpu.usable_milli) == (16, 14_000)
    assert 11 not in cpu.usable_ids


def test_a_cpu_that_came_back_is_there_again_though_a_v1_cpuset_of_ours_lacks_it_still(v1: Tree) -> None:
    v1.cgroup("cpuset/nodeservice", cpuset__cpus="0-14", cpuset__effective_cpus="0-14")

    assert usable_milli(v1, tasks_place="nodeservice") == 16_000


def test_where_a_part_of_the_hierarchy_is_mounted_tasks_lie_below_us(tree: Tree) -> None:
    tree.write("proc/self/mountinfo", V1_MOUNTS.replace("0:32 / /sys", "0:32 /docker/abc /sys"))
    tree.write("proc/self/cgroup", "4:memory:/docker/abc\n")
    tree.cgroup("memory", memory__limit_in_bytes=str(GIB))

    assert read_memory(tree.root, tasks_place="nodeservice").limit_bytes == GIB


def test_memory_that_is_reserved_as_huge_pages_is_not_there_for_tasks(tree: Tree) -> None:
    gib_kb = 1024**2
    meminfo = f"MemTotal: {64 * gib_kb} kB\nMemAvailable: {30 * gib_kb} kB\nHugetlb: {32 * gib_kb} kB\n"
    tree.write("proc/meminfo", meminfo)

    memory = read_memory(tree.root)

    assert (memory.total_bytes, memory.limit_bytes, memory.available_bytes) == (64 * GIB, 32 * GIB, 30 * GIB)


def test_a_limit_above_what_the_board_has_is_none(v2: Tree) -> None:
    v2.cgroup("outer", memory__max=str(512 * GIB))

    memory = read_memory(v2.root)

    assert (memory.limit_bytes, memory.available_bytes) == (64 * GIB, 48 * GIB)


def test_in_a_container_that_sees_the_hosts_paths_the_mounted_part_is_read(tree: Tree) -> None:
    tree.write("proc/self/mountinfo", V1_MOUNTS.replace("0:32 / /sys", "0:32 /docker/abc /sys"))
    tree.write("proc/self/cgroup", "4:memory:/docker/abc\n")
    tree.cgroup("memory", memory__limit_in_bytes=str(GIB))

    assert read_memory(tree.root).limit_bytes == GIB


def test_a_place_outside_the_namespace_falls_back_to_what_is_mounted(tree: Tree) -> None:
    tree.write("proc/self/mountinfo", V2_MOUNTS)
    tree.write("proc/self/cgroup", "0::/../../elsewhere\n")
    tree.cgroup("", memory__max=str(GIB), cpu__max="50000 100000")

    assert read_memory(tree.root).limit_bytes == GIB
    assert usable_milli(tree) == 500


def test_the_cgroup_version_is_told_from_the_mounts(tree: Tree) -> None:
    assert host_cgroup_version(tree.root) == 0
    tree.write("proc/self/mountinfo", V2_MOUNTS)
    assert host_cgroup_version(tree.root) == 2
    tree.write("proc/self/mountinfo", V1_MOUNTS)
    assert host_cgroup_version(tree.root) == 1


def test_disk_of_a_path_that_does_not_exist_yet_is_that_of_its_nearest_parent(tmp_path: Path) -> None:
    disk = read_disk(tmp_path / "not" / "yet")
    space = os.statvfs(tmp_path)

    assert disk.path == tmp_path / "not" / "yet"
    assert disk.total_bytes == space.f_blocks * space.f_frsize
    assert 0 < disk.free_bytes <= space.f_bfree * space.f_frsize + 2 * GIB
    assert disk.filesystem != "unknown"


@pytest.mark.parametrize(("files", "left", "is_free"), [(5000, 1000, True), (5000, 999, False), (0, 0, True)])
def test_where_hardly_a_file_can_be_made_no_disk_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, left: int, is_free: bool
) -> None:
    told = os.statvfs_result((2**20, 4096, 1000, 900, 800, files, left, left, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _path: told)

    room = _room(tmp_path)

    assert read_space(tmp_path) == (1000 * 4096, 800 * 4096 if is_free else 0)
    assert disk_percent(tmp_path) == (20.0 if is_free else 100.0)
    assert room is not None
    assert room.free_bytes == (800 * 4096 if is_free else 0)


def test_the_longest_mount_point_names_the_filesystem_and_the_later_hides_the_earlier(tmp_path: Path) -> None:
    state = tmp_path / "with blank" / "state"
    state.mkdir(parents=True)
    point = str(state.parent.resolve()).replace(" ", "\\040")
    root = tmp_path / "saved"
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"2 1 8:2 / {point} rw - xfs /dev/sdb1 rw\n"
        f"3 2 8:3 / {point} rw - btrfs /dev/sdc1 rw\n"
        f"4 1 8:4 / {point}-beside rw - zfs tank rw\n"
    )

    (tmp_path / "link").symlink_to(state)
    disk = read_disk(tmp_path / "link" / "deeper", root=root)

    assert (disk.filesystem, disk.device) == ("btrfs", "/dev/sdc1")


def test_a_link_is_followed_before_the_mount_is_sought(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert nearest_existing(tmp_path / "link" / "x" / "y") == (tmp_path / "real").resolve()


def test_cpu_load_counts_since_the_last_sample(tree: Tree) -> None:
    tree.write("proc/stat", "cpu  100 0 100 800 0 0 0 0 50 0\n")
    meter = CpuMeter(tree.root)
    tree.write("proc/stat", "cpu  110 0 110 860 10 0 0 10 60 0\n")
    assert meter.percent() == 30.0

    assert meter.percent() == 30.0, "no tick has passed: the last value again"
    tree.write("proc/stat", "cpu  110 0 110 960 10 0 0 10 60 0\n")
    assert meter.percent() == 0.0


def test_cpu_load_stays_in_bounds_when_the_kernels_counts_go_back(tree: Tree) -> None:
    tree.write("proc/stat", "cpu  100 0 0 100 50 0 0 0\n")
    meter = CpuMeter(tree.root)
    tree.write("proc/stat", "cpu  150 0 0 100 20 0 0 0\n")

    assert meter.percent() == 100.0
    tree.write("proc/stat", "cpu  140 0 0 200 20 0 0 0\n")
    assert meter.percent() == 0.0


def test_memory_load_is_what_is_not_available(tree: Tree) -> None:
    assert memory_percent(tree.root) == 25.0


def test_gpu_load_is_the_mean_over_those_that_tell() -> None:
    gpus = tuple(fake_gpu(number, utilization_percent=load) for number, load in enumerate((100.0, 0.0, None)))

    assert gpu_percent(GpuInventory(gpus=gpus)) == 50.0
    assert gpu_percent(GpuInventory()) == 0.0
    assert gpu_percent(GpuInventory(gpus=gpus, error="NVML has not answered for 5 s")) == 0.0
