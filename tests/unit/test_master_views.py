"""What clients are shown of tasks, whatever their nodes sent."""

from __future__ import annotations

from nodeservice.master.rows import State, TaskRow
from nodeservice.master.views import task_view
from nodeservice.wire import master_worker_pb2 as pb


def ended(**told: object) -> TaskRow:
    result = pb.TaskResult(task_id="t", worker_id="w", exit_code=3, **told)  # type: ignore[arg-type]
    return TaskRow(
        task_id="t", attempt=1, sequence=1, task=pb.Task(task_id="t"), state=State.FAILED, worker_id="w",
        reason="EXIT_NONZERO", result=result, submitted_at_ms=0, queued_at_ms=0,
    )  # fmt: skip


def test_a_list_shows_of_a_result_what_fits_a_list() -> None:
    shown = task_view(ended(result_location="file:///r", logs="x" * 8000), brief=True).result
    assert (shown.exit_code, shown.result_location, shown.logs) == (3, "file:///r", "")


def test_an_enormous_result_leaves_room_for_the_others_in_a_list_and_is_shown_by_itself() -> None:
    for told in ({"message": "m" * 3_000_000}, {"result_location": "r" * 3_000_000}, {"gpu_uuids": ["u" * 3_000_000]}):
        row = ended(**told)
        brief = task_view(row, brief=True)
        assert brief.ByteSize() < 1000
        assert (brief.state, brief.reason, brief.result.exit_code) == ("FAILED", "EXIT_NONZERO", 3)
        assert task_view(row).result == row.result
