"""Which GPUs are well, suspect or faulty, whose tasks fail for it, and when they are well again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.gpu.health import GpuFault, GpuState, HealthBoard
from nodeservice.gpu.xid import Blame, blame, words
from nodeservice.ports import Gpu, GpuXid
from nodeservice.testing.fake_gpu import fake_gpu

WELL, SUSPECT, FAULTY = GpuState.WELL, GpuState.SUSPECT, GpuState.FAULTY
ONE, TWO = fake_gpu(0), fake_gpu(1)
OLD = replace(ONE, recovery_action=None, energy_millijoules=9_000)
"""Under a driver that does not say which recovery it asks for."""
POWER_CAP, HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, POWER_BRAKE = 0x04, 0x08, 0x20, 0x40, 0x80


class Story:
    """A board, and looks at it."""

    def __init__(self, gpu: Gpu = ONE) -> None:
        self.board = HealthBoard(quarantine_seconds=60.0, throttle_patience_seconds=30.0)
        self.gpu = gpu

    def look(self, at: float, *xids: int | GpuXid, **facts: object) -> list[str]:
        """The words of the faults. What is said of the GPU stays so at the next look."""
        self.gpu = replace(self.gpu, **facts)  # type: ignore[arg-type]
        events = [xid if isinstance(xid, GpuXid) else GpuXid(uuid=self.gpu.uuid, code=xid) for xid in xids]
        return [fault.words for fault in self.board.observe([self.gpu], events, now_seconds=at)]

    @property
    def state(self) -> GpuState:
        return self.board.state(self.gpu.uuid)[0]

    @property
    def why(self) -> str:
        return self.board.state(self.gpu.uuid)[1]


# ---- the driver's events ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [13, 31, 43, 45, 68, 109])
def test_what_nvidia_s_device_plugin_takes_for_the_application_s_own_doing_is_taken_so_here(code: int) -> None:
    assert blame(code) is Blame.APPLICATION


@pytest.mark.parametrize(
    ("codes", "whose"),
    [
        ((8, 13, 25, 31, 39, 43, 45, 60, 68, 69, 70, 82, 86, 99, 105, 109, 126, 135, 139), Blame.APPLICATION),
        ((37, 38, 63, 92, 93, 106, 121, 123, 137, 144, 149, 150, 154, 160, 163, 171), Blame.NOTICE),
        ((94,), Blame.TASK),
        ((32, 61, 80, 999, 7, 12345, -1), Blame.GPU),
        ((46, 48, 62, 64, 74, 79, 95, 110, 119, 120, 136, 140, 143, 156, 158, 167), Blame.RESET),
    ],
)
def test_each_event_is_what_nvidia_s_catalogue_says_to_do_about_it(codes: tuple[int, ...], whose: Blame) -> None:
    assert {code: blame(code) for code in codes} == dict.fromkeys(codes, whose)


def test_an_event_is_named_in_words_where_it_is_known() -> None:
    assert words(79) == "XID 79 (GPU has fallen off the bus)"
    assert words(12345) == "XID 12345"


@pytest.mark.parametrize("code", [13, 31, 43, 45, 63, 92, 121, 149, 154])
def test_an_event_of_the_application_or_a_notice_fails_nobody_and_leaves_the_gpu_well(code: int) -> None:
    story = Story()
    assert story.look(0, code) == []
    assert (story.state, story.why) == (WELL, "")


def test_a_contained_memory_error_fails_the_tasks_and_leaves_the_gpu_well() -> None:
    story = Story()
    assert story.look(0, 94) == ["XID 94 (contained memory error)"]
    assert story.state is WELL
    assert story.look(1, 94) == ["XID 94 (contained memory error)"], "the next task's error is its own"


def test_an_unknown_event_fails_the_tasks_and_the_gpu_comes_back_after_a_quiet_while() -> None:
    story = Story(OLD)
    assert story.look(0, 999) == ["XID 999"]
    assert (story.state, story.board.awaited_resets()) == (FAULTY, {})
    story.look(59)
    assert story.state is FAULTY
    story.look(60)
    assert (story.state, story.why) == (WELL, "")


def test_xid_79_fails_the_holders_once_however_often_it_is_told() -> None:
    story = Story()
    assert story.look(0, 79, 79) == ["XID 79 (GPU has fallen off the bus)"]
    assert story.look(1, 79, lost="GPU is lost") == []
    assert story.look(2, 48) == []
    assert story.board.unwell() == {ONE.uuid: story.why}


def test_after_a_fault_was_over_the_next_one_is_told_again() -> None:
    story = Story(OLD)
    assert story.look(0, 999)
    story.look(60)
    assert story.look(61, 999) == ["XID 999"]


def test_an_event_of_a_gpu_that_was_never_seen_is_told_and_kept() -> None:
    board = HealthBoard()
    (fault,) = board.observe([], [GpuXid(uuid="GPU-x", code=79)], now_seconds=0)
    assert fault.uuid == "GPU-x"
    assert board.state("GPU-x")[0] is FAULTY


def test_an_event_says_nothing_of_other_gpus() -> None:
    board = HealthBoard()
    faults = board.observe([ONE, TWO], [GpuXid(uuid=TWO.uuid, code=79)], now_seconds=0)
    assert [fault.uuid for fault in faults] == [TWO.uuid]
    assert [board.state(gpu.uuid)[0] for gpu in (ONE, TWO)] == [WELL, FAULTY]


# ---- MIG --------------------------------------------------------------------------------------------------------------


def in_instance(code: int, instance: int) -> GpuXid:
    return GpuXid(uuid=ONE.uuid, code=code, gpu_instance_id=instance)


def test_an_error_of_one_instance_is_told_of_that_instance_and_takes_its_siblings_out_of_service() -> None:
    board = HealthBoard()
    assert board.observe([ONE], [in_instance(95, 7)], now_seconds=0) == [
        GpuFault(uuid=ONE.uuid, words="XID 95 (uncontained memory error)", gpu_instance_id=7)
    ]
    assert board.state(ONE.uuid)[0] is FAULTY


def test_siblings_hear_of_their_own_error_and_of_one_of_the_whole_gpu() -> None:
    story = Story()
    story.look(0, in_instance(95, 7))
    assert story.look(1, in_instance(95, 7)) == []
    assert story.look(2, in_instance(95, 8)) == ["XID 95 (uncontained memory error)"]
    assert story.look(3, lost="GPU is lost") == ["GPU is lost"], "the third sibling has not heard of anything yet"
    assert story.look(4, in_instance(95, 9)) == []


# ---- until it is well again -------------------------------------------------------------------------------------------


def test_what_needs_a_reset_waits_for_a_sign_of_one_beside_the_quiet_while() -> None:
    story = Story(OLD)
    story.look(0, 48)
    assert "nvidia-smi --gpu-reset" in story.why
    story.look(10_000)
    assert story.state is FAULTY
    story.look(10_001, energy_millijoules=50)
    assert story.state is WELL, "its counter of energy began anew"


def test_what_the_driver_asked_for_before_a_fault_is_no_sign_of_a_reset_after_it() -> None:
    """It is read now and then; the fault is told at once."""
    story = Story()
    story.look(0, 48, recovery_action=0)
    assert "reset" in story.why
    story.look(59)
    assert story.state is FAULTY
    story.look(60)
    assert story.state is WELL, "the driver asks for nothing even so long after"


def test_while_the_driver_asks_for_a_reset_the_gpu_stays_out_of_service_and_for_a_while_after() -> None:
    story = Story()
    story.look(0, 48)
    story.look(5, recovery_action=1)
    story.look(500)
    assert story.state is FAULTY
    story.look(501, recovery_action=0)
    assert story.state is FAULTY
    story.look(560)
    assert story.state is WELL


def test_a_lost_gpu_fails_its_tasks_once_and_is_well_some_time_after_it_came_back() -> None:
    story = Story(OLD)
    assert story.look(0, lost="GPU is lost") == ["GPU is lost"]
    assert story.look(1) == []
    assert story.look(2, lost="the driver lists it no more") == []
    story.look(100, lost="")
    assert story.state is WELL, "nothing has been wrong with it since the look at 2 s"
    story = Story(OLD)
    story.look(0, lost="GPU is lost")
    story.look(1, lost="", minor=5)
    assert story.state is FAULTY
    story.look(60, lost="")
    assert story.state is WELL


def test_a_gpu_that_fell_off_the_bus_and_came_back_had_its_reset() -> None:
    story = Story(OLD)
    story.look(0, 79, lost="GPU is lost")
    story.look(1)
    assert "reset" in story.why
    story.look(10, lost="")
    assert "reset" not in story.why
    assert story.state is FAULTY
    story.look(69)
    assert story.state is WELL
    story.look(70, 48)
    story.look(71)
    assert "reset" in story.why, "that was before"


def test_a_reading_that_is_missing_for_a_moment_hides_neither_a_reset_nor_an_error() -> None:
    story = Story(replace(OLD, ecc_uncorrected_count=3))
    story.look(0, 48)
    story.look(1, energy_millijoules=None, ecc_uncorrected_count=None)
    assert story.look(2, energy_millijoules=5, ecc_uncorrected_count=4) == [], "its tasks have heard of it"
    assert "reset" not in story.why
    story.look(61.9)
    assert story.state is FAULTY, "the error at 2 s was seen"


def test_of_two_causes_the_one_that_needs_a_reset_is_told_with_the_remedy() -> None:
    story = Story(OLD)
    assert story.look(0, 32, 79) == ["XID 32 (corrupted push buffer stream)"]
    assert story.why.startswith("XID 79 (GPU has fallen off the bus); reset it")
    story.look(1, 32)
    story.look(2, 48)
    assert story.why.startswith("XID 79 (GPU has fallen off the bus); reset it")


def test_a_later_trouble_begins_the_quiet_while_anew_and_one_of_an_application_does_not() -> None:
    story = Story(OLD)
    story.look(0, 999)
    story.look(40, 999)
    story.look(60, 31)
    assert story.state is FAULTY
    story.look(100)
    assert story.state is WELL


# ---- what is read -----------------------------------------------------------------------------------------------------


def test_uncorrected_memory_errors_of_before_are_nobody_s_fault_and_new_ones_are() -> None:
    story = Story()
    assert story.look(0, ecc_uncorrected_count=7) == []
    assert story.look(1, ecc_uncorrected_count=9) == ["uncorrected memory errors (2 more)"]
    assert story.look(2) == []
    assert story.state is FAULTY
    story.look(61)
    assert story.state is WELL


def test_a_counter_of_memory_errors_that_began_anew_is_no_error() -> None:
    story = Story()
    story.look(0, ecc_uncorrected_count=7)
    assert story.look(1, ecc_uncorrected_count=0) == []
    assert story.board.memory_errors() == {ONE.uuid: 0}
    assert story.look(2, ecc_uncorrected_count=1) != []
    story = Story()
    story.look(0, ecc_uncorrected_count=7)
    assert story.look(1, ecc_uncorrected_count=2) == ["uncorrected memory errors (2 more)"]


@pytest.mark.parametrize("action", [1, 2, 6, 7])
def test_a_gpu_that_the_driver_wants_reset_is_faulty(action: int) -> None:
    story = Story()
    (what,) = story.look(0, recovery_action=action)
    assert "the driver asks for a re" in what
    assert story.state is FAULTY
    assert story.look(1) == []


@pytest.mark.parametrize("action", [3, 4, 5, 42])
def test_a_gpu_that_the_driver_wants_drained_takes_no_new_task_and_what_runs_goes_on(action: int) -> None:
    """4 is reduced capacity, where what is not touched may go on; 42 is one that we do not know."""
    story = Story()
    assert story.look(0, recovery_action=action) == []
    assert (story.state, "the driver asks" in story.why) == (SUSPECT, True)
    story.look(1, recovery_action=0)
    assert story.state is WELL


def test_memory_rows_that_wait_for_a_reset_or_cannot_be_replaced_make_a_gpu_suspect_and_fail_nobody() -> None:
    story = Story()
    assert story.look(0, remap_pending=True) == []
    assert (story.state, "wait to be replaced" in story.why) == (SUSPECT, True)
    story.look(1, remap_pending=False, remap_failed=True)
    assert (story.state, "exchanged" in story.why) == (SUSPECT, True)
    story.look(2, remap_pending=None, remap_failed=None)
    assert story.state is WELL


@pytest.mark.parametrize(
    ("reasons", "name"),
    [
        (HW_SLOWDOWN, "HW_SLOWDOWN"),
        (SW_THERMAL, "SW_THERMAL"),
        (HW_THERMAL, "HW_THERMAL"),
        (POWER_BRAKE, "HW_POWER_BRAKE"),
        (HW_THERMAL | POWER_CAP, "HW_THERMAL"),
    ],
)
def test_clocks_that_are_held_back_for_long_make_a_gpu_suspect(reasons: int, name: str) -> None:
    story = Story()
    story.look(0, throttle_reasons=reasons)
    story.look(29)
    assert story.state is WELL
    assert story.look(30) == []
    assert story.state is SUSPECT
    assert f"({name})" in story.why
    story.look(31, throttle_reasons=0)
    assert story.state is WELL
    story.look(32, throttle_reasons=reasons)
    assert story.state is WELL, "its patience begins anew"


def test_a_cap_on_the_power_and_clocks_that_somebody_chose_are_no_fault() -> None:
    story = Story()
    for at in range(0, 600, 10):
        story.look(at, throttle_reasons=POWER_CAP | 0x01 | 0x02 | 0x10)
    assert story.state is WELL


# ---- suspicions -------------------------------------------------------------------------------------------------------


def test_a_suspicion_from_outside_stays_until_it_is_taken_back_by_who_raised_it() -> None:
    story = Story()
    story.board.suspect(ONE.uuid, "stranger", "process 7 uses it")
    story.board.suspect(ONE.uuid, "left behind", "4 bytes are in use")
    story.look(0)
    story.look(1_000)
    assert (story.state, story.why) == (SUSPECT, "process 7 uses it")
    story.board.suspect(ONE.uuid, "stranger", "")
    assert (story.state, story.why) == (SUSPECT, "4 bytes are in use")
    story.board.suspect(ONE.uuid, "left behind", "")
    story.board.suspect(ONE.uuid, "left behind", "")
    assert story.state is WELL
    assert story.board.unwell() == {}


def test_a_fault_is_told_before_a_suspicion_which_is_still_there_when_the_fault_is_over() -> None:
    story = Story(OLD)
    story.board.suspect(ONE.uuid, "stranger", "process 7 uses it")
    story.look(0, 999)
    assert (story.state, story.why) == (FAULTY, "XID 999")
    story.look(60)
    assert (story.state, story.why) == (SUSPECT, "process 7 uses it")


def test_a_gpu_that_nobody_knows_is_well() -> None:
    assert HealthBoard().state("GPU-x") == (WELL, "")


# ---- whatever happens -------------------------------------------------------------------------------------------------

looks = st.lists(
    st.tuples(
        st.lists(st.sampled_from([13, 31, 48, 63, 74, 79, 94, 95, 999]), max_size=2),
        st.sampled_from(["", "", "", "GPU is lost"]),
        st.sampled_from([None, 0, 0, 1, 3, 4]),
        st.one_of(st.none(), st.integers(0, 3)),
        st.one_of(st.none(), st.integers(0, 3)),
        st.sampled_from([0, POWER_CAP, HW_THERMAL]),
    ),
    max_size=12,
)


@given(looks)
def test_whatever_happens_a_gpu_that_was_reset_and_is_quiet_is_well_in_the_end_and_says_why_until_then(
    story_of: list[tuple[list[int], str, int | None, int | None, int | None, int]],
) -> None:
    story = Story()
    for at, (xids, lost, action, ecc, energy, reasons) in enumerate(story_of):
        faults = story.look(
            at,
            *xids,
            lost=lost,
            recovery_action=action,
            ecc_uncorrected_count=ecc,
            energy_millijoules=energy,
            throttle_reasons=reasons,
        )
        assert len([what for what in faults if "XID 94" not in what]) <= 1
        assert (story.state is WELL) == (story.why == "")
        assert (story.state is not WELL) == (ONE.uuid in story.board.unwell())
    quiet = {"lost": "", "recovery_action": 0, "ecc_uncorrected_count": 0, "throttle_reasons": 0}
    assert story.look(100, **quiet) == story.look(200, **quiet) == []
    assert (story.state, story.why) == (WELL, "")
