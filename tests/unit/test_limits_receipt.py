"""Plan and receipt: the kernel's rounding, and every way in which what is in force can differ from what was asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core.model import MIB, AttemptId, Lease, Resources, TaskSpec
from nodeservice.limits.asked import Value, allowed_capabilities, asked_limits, capabilities_text, ids_of, ids_text
from nodeservice.limits.plan import PIDS_OVERHEAD, cpu_milli_of, cpu_quota_us, whole_pages
from nodeservice.limits.receipt import Receipt, receipt
from nodeservice.ports import DiskBound, Enforcement, Reading

PAGE_BYTES = 4096
TASK = "/sys/fs/cgroup/memory/nodeservice/n.node/t.1"
ENGINE: dict[str, object] = {
    "cpu_milli": 500,
    "memory_bytes": 64 * MIB,
    "memory_swap_bytes": 64 * MIB,
    "pids_limit": 32,
}
FILES = {
    "cpu_milli": "/sys/fs/cgroup/cpu/nodeservice/n.node/t.1/cpu.cfs_quota_us",
    "memory_bytes": f"{TASK}/memory.limit_in_bytes",
    "memory_swap_bytes": f"{TASK}/memory.memsw.limit_in_bytes",
    "pids_limit": "/sys/fs/cgroup/pids/nodeservice/n.node/t.1/c1/pids.max",
}
DISK = DiskBound(limit_bytes=MIB, enforcement=Enforcement.HARD, places=((Path("/s/work"), Enforcement.HARD),))
RESOURCES = ["cpu_milli", "memory_bytes", "memory_swap_bytes", "pids_limit"]


def spec(**changed: object) -> TaskSpec:
    made = TaskSpec(
        id=AttemptId("t"),
        image="i",
        request=Resources(cpu_milli=500, memory_bytes=64 * MIB, disk_bytes=MIB),
        pids_limit=32,
        fingerprint="",
    )
    return replace(made, **changed)  # type: ignore[arg-type]


def reading(limit: str, value: Value | None, source: str = "") -> Reading:
    return Reading(limit=limit, value=value, source=source or FILES.get(limit, f"/proc/7/{limit}"))


def gone(limit: str) -> Reading:
    return Reading(limit=limit, value=None, source="/proc/7", readable=False, note="it had ended")


def as_promised(task: TaskSpec, lease: Lease) -> list[Reading]:
    """What the kernel shows where every limit was set as asked."""
    values = dict(asked_limits(task, lease))
    values.pop("disk_bytes", None)
    values["devices"] = "full null random tty urandom zero" + "".join(
        f" nvidia{n}=195:{n}" for n in range(len(lease.gpu_uuids))
    )
    values["device_rules"] = "c *:* m, c 1:3 rwm, c 136:* rwm"
    return [reading(name, value) for name, value in values.items()]


def written(
    *changes: Reading,
    task: TaskSpec | None = None,
    lease: Lease | None = None,
    disk: DiskBound | None = DISK,
    engine: dict[str, object] | None = None,
) -> Receipt:
    """A receipt where all is as promised but for the readings given."""
    task, lease = task or spec(), lease or Lease(granted=Resources())
    changed = {change.limit for change in changes}
    kept = [one for one in as_promised(task, lease) if one.limit not in changed]
    return receipt(
        task, lease, readings=[*kept, *changes], disk=disk, engine=engine if engine is not None else ENGINE,
        page_bytes=PAGE_BYTES,
    )  # fmt: skip


@given(st.integers(min_value=10, max_value=1_000_000))
def test_every_cpu_share_that_a_node_admits_survives_the_way_to_the_kernel_and_back(cpu_milli: int) -> None:
    assert cpu_milli_of(cpu_quota_us(cpu_milli), 100_000) == cpu_milli


def test_a_quota_is_never_below_what_the_kernel_takes() -> None:
    assert cpu_quota_us(1) == 1_000


def test_limits_that_hold_make_a_receipt_without_mismatch() -> None:
    made = written()

    assert made.mismatches == ()
    assert made.unread == {}
    assert set(made.asked) == set(made.effective) == set(made.enforcement) == set(made.read_from)
    assert {name: made.effective[name] for name in ENGINE} == ENGINE
    assert {name: made.read_from[name] for name in FILES} == FILES
    assert set(made.enforcement.values()) == {Enforcement.HARD}
    assert made.cgroup == {"version": 1, "path": "/nodeservice/n.node/t.1"}


def test_a_receipt_is_json() -> None:
    document = written(gone("seccomp")).as_dict()

    assert json.loads(json.dumps(document)) == document
    assert set(document) == {
        "asked", "effective", "enforcement", "read_from", "unread", "mismatches", "cgroup",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("/sys/fs/cgroup/nodeservice.slice/nodeservice-t.slice/memory.max", "/nodeservice.slice/nodeservice-t.slice"),
        ("/sys/fs/cgroup/unified/nodeservice/t.1/memory.max", "/nodeservice/t.1"),
    ],
)
def test_the_place_of_the_cgroup_is_told_for_the_unified_hierarchy_too(source: str, path: str) -> None:
    made = receipt(
        spec(), Lease(granted=Resources()), readings=[reading("memory_bytes", 64 * MIB, source)], disk=None, engine={}
    )

    assert made.cgroup == {"version": 2, "path": path}


def test_without_a_cgroup_the_engines_word_counts_and_is_named_as_such() -> None:
    made = receipt(spec(), Lease(granted=Resources()), readings=[], disk=DISK, engine=ENGINE)

    assert {name: made.effective[name] for name in ENGINE} == ENGINE
    assert {made.read_from[name] for name in ENGINE} == {"engine"}
    assert set(ENGINE) <= set(made.unread)
    assert made.mismatches == ()
    assert "cgroup" not in made.as_dict()


def test_the_engines_word_does_not_outweigh_the_kernels() -> None:
    made = written(reading("memory_bytes", None))

    assert made.effective["memory_bytes"] is None
    assert made.enforcement["memory_bytes"] is Enforcement.NONE
    assert made.mismatches == (f"memory_bytes: asked {64 * MIB}, in force no limit ({FILES['memory_bytes']})",)


@pytest.mark.parametrize("nothing", [0, -1, None])
@pytest.mark.parametrize("name", RESOURCES)
def test_a_limit_of_which_the_engine_says_that_nobody_holds_it_is_a_mismatch(name: str, nothing: int | None) -> None:
    made = written(gone(name), engine={**ENGINE, name: nothing})

    assert made.mismatches == (f"{name}: asked {ENGINE[name]}, in force no limit (engine)",)
    assert made.unread[name] == "it had ended"


def test_of_several_places_the_tightest_counts() -> None:
    made = written(
        reading("pids_limit", 32 + PIDS_OVERHEAD, "/sys/fs/cgroup/pids/nodeservice/n.node/t.1/pids.max"),
        reading("pids_limit", 32),
    )

    assert made.mismatches == ()
    assert (made.effective["pids_limit"], made.read_from["pids_limit"]) == (32, FILES["pids_limit"])


def test_a_container_without_a_limit_of_its_own_has_that_of_its_task_with_the_room_for_the_runtime() -> None:
    made = written(reading("pids_limit", 32 + PIDS_OVERHEAD), reading("pids_limit", None))

    assert made.mismatches == (f"pids_limit: asked 32, in force 40 ({FILES['pids_limit']})",)


def test_the_room_for_the_runtime_is_no_breach_where_the_containers_cgroup_has_gone() -> None:
    made = written(reading("pids_limit", 32 + PIDS_OVERHEAD), gone("pids_limit"))

    assert made.mismatches == ()
    assert (made.effective["pids_limit"], made.read_from["pids_limit"]) == (32, "engine")
    assert made.unread["pids_limit"] == "it had ended"


def test_where_the_engine_has_no_word_either_the_room_for_the_runtime_is_not_told_as_the_limit() -> None:
    without = {name: value for name, value in ENGINE.items() if name != "pids_limit"}
    made = written(reading("pids_limit", 32 + PIDS_OVERHEAD), engine=without)

    assert made.mismatches == ()
    assert "pids_limit" not in made.effective
    assert "had ended" in made.unread["pids_limit"]


def test_swap_beside_the_memory_is_a_mismatch() -> None:
    made = written(reading("memory_swap_bytes", 128 * MIB))

    assert made.mismatches == (
        f"memory_swap_bytes: asked {64 * MIB}, in force {128 * MIB} ({FILES['memory_swap_bytes']})",
    )


@pytest.mark.parametrize(("held", "same"), [(64 * MIB + 4096, True), (64 * MIB, False), (64 * MIB + 12288, False)])
def test_memory_is_compared_in_whole_pages(held: int, same: bool) -> None:
    task = spec(request=Resources(cpu_milli=500, memory_bytes=64 * MIB + 5000))

    made = written(reading("memory_bytes", held), reading("memory_swap_bytes", held), task=task)

    assert (made.mismatches == ()) is same


@pytest.mark.parametrize(("asked", "held"), [(3, 10), (123, 130), (500, 500)])
def test_a_share_that_the_kernel_or_systemd_rounds_is_the_share_that_was_asked(asked: int, held: int) -> None:
    task = spec(request=Resources(cpu_milli=asked, memory_bytes=64 * MIB))

    assert written(reading("cpu_milli", held), task=task).mismatches == ()


@pytest.mark.parametrize(
    ("name", "held"),
    [("cpu_milli", 250), ("cpu_milli", 511), ("memory_bytes", 32 * MIB), ("pids_limit", 31), ("shm_bytes", 1)],
)
def test_what_was_not_set_as_promised_is_a_mismatch_be_it_laxer_or_tighter(name: str, held: int) -> None:
    (mismatch,) = written(reading(name, held)).mismatches

    assert mismatch.startswith(f"{name}: asked ")
    assert f"in force {held} " in mismatch


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("open_files_limit", 100),
        ("no_new_privileges", 1),
        ("oom_score_adj", 1000),
        ("seccomp", 1),
        ("capabilities", "0000000000000000"),
        ("devices", ""),
    ],
)
def test_a_process_may_take_less_than_it_was_given(name: str, held: Value) -> None:
    assert written(reading(name, held)).mismatches == ()


@pytest.mark.parametrize(
    ("name", "held", "said"),
    [
        ("open_files_limit", 65_537, "asked 65536, in force 65537"),
        ("open_files_limit", None, "in force no limit"),
        ("core_file_bytes", 4096, "asked 1, in force 4096"),
        ("no_new_privileges", 0, "asked 1, in force 0"),
        ("oom_score_adj", -1, "asked 0, in force -1"),
        ("seccomp", 0, "asked 2, in force 0"),
        ("devices", "null sda=b8:0", "sees sda (8:0), which it was not granted"),
        ("devices", "null nvidia0=195:0", "sees nvidia0 (195:0), which it was not granted"),
        ("devices", "nvidiactl=195:255", "sees nvidiactl (195:255), which it was not granted"),
        ("device_rules", "a *:* rwm", "may open every device, which it was not granted"),
        ("capabilities", capabilities_text(allowed_capabilities() | 1 << 13 | 1 << 21), "NET_RAW, capability 21"),
    ],
)
def test_a_process_that_may_do_more_than_it_was_given_is_a_mismatch(name: str, held: Value | None, said: str) -> None:
    (mismatch,) = written(reading(name, held)).mismatches

    assert mismatch.startswith(f"{name}: ")
    assert said in mismatch


def test_what_could_be_regained_counts_as_a_capability() -> None:
    made = written(
        reading("capabilities", capabilities_text(0), "/proc/7/status CapEff"),
        reading("capabilities", capabilities_text(1 << 21), "/proc/7/status CapBnd"),
    )

    assert made.mismatches == ("capabilities: may also use capability 21 (/proc/7/status CapBnd)",)


@pytest.mark.parametrize(("held", "fine"), [("2-3", True), ("2,3", True), ("0-3", False), ("2", False), ("0,1", False)])
def test_exclusive_cpus_are_those_of_the_lease_and_no_others(held: str, fine: bool) -> None:
    lease = Lease(granted=Resources(), cpu_ids=(2, 3))

    assert (written(reading("cpu_ids", held), lease=lease).mismatches == ()) is fine


def test_what_nobody_asked_for_is_told_and_is_no_mismatch() -> None:
    made = written(reading("cpu_ids", "0-1"), reading("oom_group", 0), reading("read_bytes_per_second", 4096))

    assert made.mismatches == ()
    assert "cpu_ids" not in made.asked
    assert (made.effective["cpu_ids"], made.effective["read_bytes_per_second"]) == ("0-1", 4096)
    assert made.enforcement["oom_group"] is Enforcement.NONE
    assert "write_bytes_per_second" not in written(reading("write_bytes_per_second", None)).effective


def test_a_rate_that_was_asked_for_must_be_in_force() -> None:
    task = spec(read_bytes_per_second=MIB)

    assert written(task=task).mismatches == ()
    assert len(written(reading("read_bytes_per_second", None), task=task).mismatches) == 1


def test_a_watched_disk_is_told_with_what_is_missing_and_is_no_mismatch() -> None:
    watched = replace(DISK, enforcement=Enforcement.WATCHED, why_watched="no project quota")
    made = written(disk=watched)

    assert made.mismatches == ()
    assert made.enforcement["disk_bytes"] is Enforcement.WATCHED
    assert made.as_dict()["why_watched"] == "no project quota"


@pytest.mark.parametrize(
    ("bound", "fine"),
    [
        (replace(DISK, limit_bytes=MIB + 1024), True),
        (replace(DISK, limit_bytes=2 * MIB), False),
        (replace(DISK, enforcement=Enforcement.NONE), False),
    ],
)
def test_the_bound_on_the_disk_is_held_to_what_was_asked(bound: DiskBound, fine: bool) -> None:
    assert (written(disk=bound).mismatches == ()) is fine


def test_a_disk_that_nobody_looked_at_is_told() -> None:
    made = written(disk=None)

    assert "disk_bytes" in made.unread
    assert "disk_bytes" not in made.effective


CPUS = st.integers(10, 256_000)
TASKS = st.builds(
    lambda cpu, memory, pids, disk, files, rate: spec(
        request=Resources(cpu_milli=cpu, memory_bytes=memory, disk_bytes=disk),
        pids_limit=pids,
        open_files_limit=files,
        write_bytes_per_second=rate,
    ),
    CPUS,
    st.integers(6 * MIB, 2**42),
    st.integers(1, 100_000),
    st.integers(1, 2**42),
    st.integers(1, 2**20),
    st.none() | st.integers(4096, 2**40),
)
LEASES = st.builds(
    lambda cpus: Lease(granted=Resources(), cpu_ids=tuple(cpus)), st.lists(st.integers(0, 200), unique=True)
)


def as_the_kernel_rounds(one: Reading) -> Reading:
    if one.limit in ("memory_bytes", "memory_swap_bytes") and isinstance(one.value, int):
        return replace(one, value=whole_pages(one.value, page_bytes=PAGE_BYTES))
    if one.limit == "cpu_milli" and isinstance(one.value, int):
        return replace(one, value=cpu_milli_of(cpu_quota_us(one.value), 100_000))
    return one


@given(TASKS, LEASES)
def test_whatever_is_asked_and_set_as_asked_is_no_mismatch(task: TaskSpec, lease: Lease) -> None:
    disk = replace(DISK, limit_bytes=task.request.disk_bytes)
    readings = [as_the_kernel_rounds(one) for one in as_promised(task, lease)]

    made = receipt(task, lease, readings=readings, disk=disk, engine={}, page_bytes=PAGE_BYTES)

    assert made.mismatches == ()
    assert made.unread == {}


@given(TASKS, LEASES, st.data())
def test_whichever_limit_is_lifted_is_the_one_that_is_told(task: TaskSpec, lease: Lease, data: st.DataObject) -> None:
    disk = replace(DISK, limit_bytes=task.request.disk_bytes)
    readings = as_promised(task, lease)
    lifted = data.draw(st.sampled_from(readings))

    made = receipt(
        task, lease, readings=[replace(one, value=None) if one is lifted else one for one in readings], disk=disk,
        engine=ENGINE, page_bytes=PAGE_BYTES,
    )  # fmt: skip

    assert [mismatch.split(":")[0] for mismatch in made.mismatches] == [lifted.limit]


@given(TASKS, LEASES, st.data())
def test_what_could_not_be_read_is_told_and_never_a_mismatch(task: TaskSpec, lease: Lease, data: st.DataObject) -> None:
    readings = as_promised(task, lease)
    lost = data.draw(st.sets(st.sampled_from([one.limit for one in readings])))

    made = receipt(
        task, lease, readings=[gone(one.limit) if one.limit in lost else one for one in readings],
        disk=replace(DISK, limit_bytes=task.request.disk_bytes), engine={}, page_bytes=PAGE_BYTES,
    )  # fmt: skip

    assert made.mismatches == ()
    assert set(made.unread) == lost
    assert lost.isdisjoint(made.effective)


@given(TASKS, LEASES, st.randoms(use_true_random=False))
def test_the_order_of_the_readings_does_not_matter(task: TaskSpec, lease: Lease, order: object) -> None:
    readings = [*as_promised(task, lease), reading("memory_bytes", 8 * MIB, "/a"), reading("cpu_milli", 10, "/b")]
    shuffled = list(readings)
    order.shuffle(shuffled)  # type: ignore[attr-defined]

    def made(given_: list[Reading]) -> dict[str, object]:
        document = receipt(task, lease, readings=given_, disk=None, engine={}, page_bytes=PAGE_BYTES).as_dict()
        return {name: document[name] for name in ("asked", "effective", "enforcement", "mismatches")}

    assert made(readings) == made(shuffled)


@given(st.frozensets(st.integers(0, 4096)))
def test_a_list_of_cpus_survives_the_way_to_text_and_back(ids: frozenset[int]) -> None:
    assert ids_of(ids_text(ids)) == ids


def test_the_runtime_drops_what_the_receipt_does_not_allow_and_sizes_shared_memory_as_it_expects() -> None:
    from nodeservice.limits import asked
    from nodeservice.runtime import docker_spec

    assert asked.DROPPED_CAPABILITIES == docker_spec.DROPPED_CAPABILITIES
