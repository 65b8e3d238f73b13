"""Which devices a container has and may open, and which GPUs it is shown, beside what its lease granted."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeservice.core.model import AttemptId, Lease, Resources, TaskSpec
from nodeservice.limits.bpf_devices import Program, UnreadableProgramError, rules
from nodeservice.limits.device_nodes import GpuNodes, gpu_nodes, of_words, to_word
from nodeservice.limits.device_rules import forbidden, read_device_rules, rules_of
from nodeservice.limits.gpu_check import foreign_nodes, foreign_uuids, seen_uuids
from nodeservice.limits.receipt import receipt
from nodeservice.ports import Reading

A = GpuNodes(uuid="GPU-a", node=(195, 0), also=frozenset({(226, 128)}))
B = GpuNodes(uuid="GPU-b", node=(195, 1), also=frozenset({(226, 129)}))
MIG_1 = GpuNodes(uuid="MIG-1", node=(195, 2), also=frozenset({(240, 12), (240, 13)}), parent_uuid="GPU-c")
MIG_2 = GpuNodes(uuid="MIG-2", node=(195, 2), also=frozenset({(240, 21), (240, 22)}), parent_uuid="GPU-c")
HOST = (A, B, MIG_1, MIG_2)
SUPPORT = "nvidiactl=195:255 nvidia-uvm=511:0 nvidia-uvm-tools=511:1 nvidia-modeset=195:254"
CAPS_1 = "nvidia-caps/nvidia-cap12=240:12 nvidia-caps/nvidia-cap13=240:13"


# ---- nodes ----


@pytest.mark.parametrize(
    ("granted", "nodes", "said"),
    [
        ((), "null tty", ""),
        ((), "nvidia0=195:0", "nvidia0 (195:0) of GPU-a"),
        ((), "nvidiactl=195:255", "nvidiactl (195:255)"),
        ((), "x=195:9", "x (195:9)"),
        ((), "null=195:1", "null (195:1) of GPU-b"),
        ((), "null=b1:3", "null (1:3)"),
        ((), "mystery", "mystery"),
        (("GPU-a",), f"null nvidia0=195:0 {SUPPORT}", ""),
        (("GPU-a",), f"nvidia0=195:0 dri/renderD128=226:128 {SUPPORT}", ""),
        (("GPU-a",), f"nvidia0=195:0 dri/renderD129=226:129 {SUPPORT}", "dri/renderD129 (226:129) of GPU-b"),
        (("GPU-a",), f"nvidia0=195:0 nvidia1=195:1 {SUPPORT}", "nvidia1 (195:1) of GPU-b"),
        (("GPU-a",), f"nvidia0=195:0 innocent=195:1 {SUPPORT}", "innocent (195:1) of GPU-b"),
        (("GPU-a",), "nvidia0=195:0 nvidiactl=195:1", "nvidiactl (195:1) of GPU-b"),
        (("GPU-a",), "nvidia0=195:0 nvidia7=195:7", "nvidia7 (195:7)"),
        (("GPU-a",), "nvidia0=195:0 sda=b8:0", "sda (8:0)"),
        (("GPU-a",), "nvidia0=195:0 fuse=10:229", "fuse (10:229)"),
        (("GPU-a",), "nvidia0=195:0 nvidia-caps/nvidia-cap1=240:1", "nvidia-caps/nvidia-cap1 (240:1)"),
        (("GPU-a",), f"null {SUPPORT}", "does not see GPU-a"),
        (("GPU-a", "GPU-b"), "nvidia0=195:0 nvidia1=195:1", ""),
        (("GPU-a", "GPU-b"), "nvidia0=195:0", "does not see GPU-b"),
        (("MIG-1",), f"nvidia2=195:2 {CAPS_1} {SUPPORT}", ""),
        (("MIG-1",), f"nvidia2=195:2 {CAPS_1} nvidia-caps/nvidia-cap21=240:21", "nvidia-cap21 (240:21) of MIG-2"),
        (("GPU-z",), f"nvidia3=195:3 {SUPPORT}", ""),
        (("GPU-z",), f"nvidia0=195:0 {SUPPORT}", "nvidia0 (195:0) of GPU-a"),
        (("GPU-z",), f"nvidia3=195:3 nvidia4=195:4 {SUPPORT}", "sees 2 GPUs, was granted 1"),
    ],
)
def test_a_container_has_the_nodes_of_its_own_gpus_and_no_others_under_whatever_name(
    granted: tuple[str, ...], nodes: str, said: str
) -> None:
    found = foreign_nodes(nodes, HOST, granted)
    assert bool(found) is bool(said)
    assert said in found


@pytest.mark.parametrize(
    ("nodes", "fine"),
    [
        ("null nvidia3=195:3 nvidiactl=195:255 nvidia-uvm=500:0 nvidia-caps/nvidia-cap21=240:21", True),
        ("null nvidia0=195:0 nvidia1=195:1", False),
        ("null nvidia0=195:0 dri/card0=226:0", False),
    ],
)
def test_where_nobody_told_of_the_hosts_gpus_their_count_decides(nodes: str, fine: bool) -> None:
    assert (foreign_nodes(nodes, (), ("GPU-a",)) == "") is fine


def test_a_node_goes_to_a_word_and_back() -> None:
    assert to_word("null", (1, 3), is_block=False) == "null"
    assert to_word("console", (136, 4), is_block=False) == "console"
    words = [to_word("a b", (195, 0), is_block=False), to_word("sda", (8, 0), is_block=True)]
    found = [(node.name, node.number, node.is_block) for node in of_words(" ".join(words))]
    assert found == [("a?b", (195, 0), False), ("sda", (8, 0), True)]


# ---- rules ----


@pytest.mark.parametrize(
    ("granted", "rules", "said"),
    [
        ((), "c *:* m, b *:* m, c 1:3 rwm, c 136:* rwm, c 10:200 rwm", ""),
        ((), "", ""),
        ((), "a *:* rwm", "every device"),
        ((), "c *:* rw", "every device"),
        ((), "b *:* r", "every block device"),
        ((), "b 8:0 r", "block devices 8:0"),
        ((), "c 195:0 rw", "195:0 of GPU-a"),
        ((), "c 195:9 rw", "the GPU 195:9"),
        ((), "c 195:* rw", "195:0 of GPU-a"),
        ((), "what is this", "every device"),
        (("GPU-a",), "c 1:3 rwm, c 195:0 rw, c 195:255 rw, c 511:0 rw, c 195:1 m", ""),
        (("GPU-a",), "c 195:0 rw, c 195:1 w", "195:1 of GPU-b"),
        (("GPU-a",), "c 195:* rw", "195:1 of GPU-b"),
        (("GPU-a",), "c 195:0 rw, c 226:129 rw", "226:129 of GPU-b"),
        (("MIG-1",), "c 195:2 rw, c 240:12 r, c 240:13 r", ""),
        (("MIG-1",), "c 195:2 rw, c 240:* r", "240:21 of MIG-2"),
        (("GPU-z",), "c 195:3 rw", ""),
        (("GPU-z",), "c 195:1 rw", "195:1 of GPU-b"),
    ],
)
def test_a_container_may_open_its_own_gpus_and_no_others(granted: tuple[str, ...], rules: str, said: str) -> None:
    found = forbidden(rules, HOST, granted)
    assert bool(found) is bool(said)
    assert said in found


def test_one_who_has_all_gpus_may_open_their_whole_major() -> None:
    assert forbidden("c 195:* rw", (A,), ("GPU-a",)) == ""


# ---- what the driver shows ----

TWO_GPUS = "GPU 0: NVIDIA H200 (UUID: GPU-a)\nGPU 1: NVIDIA H200 (UUID: GPU-b)\n"
MIG_LISTING = """\
GPU 0: NVIDIA H200 (UUID: GPU-c)
  MIG 1g.18gb     Device  0: (UUID: MIG-1)
  MIG 1g.18gb     Device  1: (UUID: MIG-2)
GPU 1: NVIDIA H200 (UUID: GPU-b)
"""


def test_gpus_are_told_and_a_gpu_that_shows_mig_devices_by_these() -> None:
    assert seen_uuids(TWO_GPUS) == ["GPU-a", "GPU-b"]
    assert seen_uuids(MIG_LISTING) == ["MIG-1", "MIG-2", "GPU-b"]


@pytest.mark.parametrize("text", ["", "No devices found.\n", "\x00\xff", "GPU 0: x (UUID: GPU-a b)", "UUID: GPU-a"])
def test_what_is_no_listing_shows_no_gpu(text: str) -> None:
    assert seen_uuids(text) == []


@pytest.mark.parametrize(
    ("granted", "shown", "said"),
    [
        (("GPU-a",), "GPU-a", ""),
        (("GPU-a",), "", ""),
        (("GPU-a",), "GPU-a GPU-b", "shows GPU-b"),
        (("MIG-1",), "MIG-1", ""),
        (("MIG-1",), "GPU-c", ""),
        (("MIG-1",), "MIG-1 MIG-2", "shows MIG-2"),
    ],
)
def test_the_driver_shows_what_was_granted(granted: tuple[str, ...], shown: str, said: str) -> None:
    found = foreign_uuids(shown, HOST, granted)
    assert bool(found) is bool(said)
    assert said in found


# ---- the receipt ----


def test_a_receipt_tells_of_another_gpu_by_its_uuid_wherever_it_shows() -> None:
    spec = TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=8, fingerprint="")
    lease = Lease(granted=Resources(gpu_count=1), gpu_uuids=("GPU-a",))

    def reading(limit: str, value: str) -> Reading:
        return Reading(limit=limit, value=value, source=limit)

    def told(*readings: Reading) -> tuple[str, ...]:
        return receipt(spec, lease, readings=readings, disk=None, engine={}, gpus=HOST).mismatches

    assert told(reading("devices", "nvidia0=195:0"), reading("gpu_uuids", "GPU-a")) == ()
    assert told(
        reading("devices", "nvidia0=195:0 nvidia1=195:1"),
        reading("device_rules", "c 195:0 rw, c 195:1 rw"),
        reading("gpu_uuids", "GPU-a GPU-b"),
    ) == (
        "devices: sees nvidia1 (195:1) of GPU-b, which it was not granted (devices)",
        "device_rules: may open 195:1 of GPU-b, which it was not granted (device_rules)",
        "gpu_uuids: the driver shows GPU-b, which it was not granted (gpu_uuids)",
    )


def test_what_the_driver_shows_is_asked_for_with_gpus_alone_and_unread_is_no_mismatch() -> None:
    spec = TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=8, fingerprint="")
    unread = Reading(limit="gpu_uuids", value=None, source="nvidia-smi -L", readable=False, note="no such program")
    lease = Lease(granted=Resources(gpu_count=1), gpu_uuids=("GPU-a",))
    made = receipt(spec, lease, readings=[unread], disk=None, engine={}, gpus=HOST)
    assert (made.asked["gpu_uuids"], made.unread["gpu_uuids"]) == ("GPU-a", "no such program")
    assert made.mismatches == ()
    assert "gpu_uuids" not in receipt(spec, Lease(granted=Resources()), readings=[], disk=None, engine={}).asked


# ---- the host ----


def test_the_nodes_of_a_gpu_are_looked_up_on_the_host(tmp_path: Path) -> None:
    drm = tmp_path / "sys/bus/pci/devices/0000:0a:00.0/drm"
    for name, number in (("card1", "226:1"), ("renderD128", "226:128")):
        (drm / name).mkdir(parents=True)
        (drm / name / "dev").write_text(f"{number}\n")
    found = gpu_nodes("GPU-a", 3, pci_address="00000000:0A:00.0", root=tmp_path)
    assert found == GpuNodes(uuid="GPU-a", node=(195, 3), also=frozenset({(226, 1), (226, 128)}))
    assert gpu_nodes("GPU-a", 3, pci_address="nonsense", root=tmp_path) == GpuNodes(uuid="GPU-a", node=(195, 3))


def test_a_mig_device_has_the_node_of_its_gpu_and_two_capabilities(tmp_path: Path) -> None:
    instance = tmp_path / "proc/driver/nvidia/capabilities/gpu2/mig/gi5"
    (instance / "ci0").mkdir(parents=True)
    (instance / "access").write_text("DeviceFileMinor: 48\nDeviceFileMode: 292\nDeviceFileModify: 1\n")
    (instance / "ci0/access").write_text("DeviceFileMinor: 49\nDeviceFileMode: 292\nDeviceFileModify: 1\n")
    (tmp_path / "proc/devices").write_text(
        "Character devices:\n195 nvidia\n240 nvidia-caps\n\nBlock devices:\n  7 loop\n"
    )
    found = gpu_nodes("MIG-1", 2, mig_instance=(5, 0), parent_uuid="GPU-c", root=tmp_path)
    assert found.numbers == {(195, 2), (240, 48), (240, 49)}


# ---- rules, read ----

RUNNING = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0\n"


def write_cgroup(root: Path, lines: str, mount: str) -> None:
    (root / "proc/7").mkdir(parents=True)
    (root / "proc/7/stat").write_text(RUNNING)
    (root / "proc/self").mkdir()
    (root / "proc/7/cgroup").write_text(lines)
    (root / "proc/self/mountinfo").write_text(mount)


def test_rules_are_read_where_the_devices_controller_of_v1_is_mounted(tmp_path: Path) -> None:
    write_cgroup(
        tmp_path, "4:cpu:/x\n3:devices,y:/docker/c1\n0::/\n", "30 25 0:26 / /d rw - cgroup cgroup rw,devices\n"
    )
    (tmp_path / "d/docker/c1").mkdir(parents=True)
    (tmp_path / "d/docker/c1/devices.list").write_text("c 1:3 rwm\nc 195:0 rw\n")
    found = read_device_rules(7, tmp_path)
    assert (found.value, found.source) == ("c 1:3 rwm, c 195:0 rw", f"{tmp_path}/d/docker/c1/devices.list")


def test_a_file_of_rules_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    write_cgroup(tmp_path, "3:devices:/c1\n", "30 25 0:26 / /d rw - cgroup cgroup rw,devices\n")
    found = read_device_rules(7, tmp_path)
    assert not found.readable
    assert "devices.list" in found.note


def test_a_process_that_is_ending_is_not_read_in_the_topmost_cgroup_where_the_kernel_shows_it(tmp_path: Path) -> None:
    write_cgroup(tmp_path, "3:devices:/\n", "30 25 0:26 / /d rw - cgroup cgroup rw,devices\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/devices.list").write_text("a *:* rwm\n")
    (tmp_path / "proc/7/stat").write_text(RUNNING.replace("4194560", str(4194560 | 4)))
    with pytest.raises(ProcessLookupError):
        read_device_rules(7, tmp_path)


def test_without_any_hierarchy_nothing_is_read_and_that_is_told(tmp_path: Path) -> None:
    write_cgroup(tmp_path, "0::/c1\n", "")
    found = read_device_rules(7, tmp_path)
    assert (found.readable, found.note) == (False, "no cgroup of it holds rules for devices")


def test_a_directory_that_is_no_cgroup_tells_nothing(tmp_path: Path) -> None:
    write_cgroup(tmp_path, "0::/c1\n", "30 25 0:26 / /u rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "u/c1").mkdir(parents=True)
    found = read_device_rules(7, tmp_path)
    assert not found.readable
    assert "does not tell" in found.note


# ---- programs of cgroup v2 ----


def step(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return bytes([code, target | source << 4]) + offset.to_bytes(2, "little", signed=True) + value.to_bytes(4, "little")


LOAD = step(0x61, 2, 1, 0), step(0x61, 4, 1, 4), step(0x61, 5, 1, 8)
ALLOW, DENY = step(0xB7, 0, value=1) + step(0x95), step(0xB7, 0, value=0) + step(0x95)


def only(kind: int, major: int, minor: int | None) -> bytes:
    """Allow one device or a whole major, and go on otherwise."""
    tests = [step(0x57, 2, value=0xFFFF), step(0x55, 2, offset=5 if minor is not None else 4, value=kind)]
    tests.append(step(0x55, 4, offset=4 if minor is not None else 3, value=major))
    if minor is not None:
        tests.append(step(0x55, 5, offset=3, value=minor))
    return b"".join([step(0xBF, 6, 2), *tests, ALLOW, step(0x05, offset=0)])


def test_a_program_is_turned_back_into_its_rules() -> None:
    program = Program.of(b"".join(LOAD) + only(2, 195, 0) + only(2, 136, None) + only(1, 8, 1) + DENY)
    assert rules([program]) == ["b 8:1 rwm", "c 136:* rwm", "c 195:0 rwm"]


def test_of_several_programs_all_must_allow() -> None:
    narrow = Program.of(b"".join(LOAD) + only(2, 195, 0) + DENY)
    wide = Program.of(b"".join(LOAD) + only(2, 195, None) + DENY)
    assert rules([narrow, wide]) == ["c 195:0 rwm"]
    assert rules([wide]) == ["c 195:* rwm"]


def test_a_program_that_always_allows_guards_nothing() -> None:
    assert rules([Program.of(ALLOW)]) == ["b *:* rwm", "c *:* rwm"]
    assert rules([Program.of(DENY)]) == []
    assert forbidden(", ".join(rules([Program.of(ALLOW)])), HOST, ("GPU-a",))


@pytest.mark.parametrize(
    "code", [step(0x85), step(0x61, 2, 7, 0), step(0x61, 2, 1, 400), b"", step(0x05, offset=-1), step(0x05, offset=99)]
)
def test_a_program_that_does_more_than_compare_cannot_be_told(code: bytes) -> None:
    with pytest.raises(UnreadableProgramError):
        rules([Program.of(code)])


def test_rules_that_make_no_sense_count_as_everything() -> None:
    (rule,) = rules_of("c 195:0")
    assert rule.covers((195, 7))
