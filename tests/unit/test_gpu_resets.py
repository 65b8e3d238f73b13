"""What is written down of GPUs that wait for a reset."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeservice.gpu.health import AwaitedReset, HealthBoard
from nodeservice.lifecycle.gpu_resets import GpuResets

AWAITED = {
    "GPU-a": AwaitedReset(words="XID 95", energy_millijoules=7),
    "GPU-b": AwaitedReset(words="XID 62", energy_millijoules=None),
}
ERRORS = {"GPU-a": 3}


@pytest.fixture
def boot_id(tmp_path: Path) -> Path:
    path = tmp_path / "boot_id"
    path.write_text("one\n")
    return path


async def test_what_was_written_is_read_until_the_host_starts_anew(tmp_path: Path, boot_id: Path) -> None:
    path = tmp_path / "gpus.json"
    assert GpuResets(path, boot_id=boot_id).read() == {}
    await GpuResets(path, boot_id=boot_id).write(AWAITED, ERRORS)
    assert GpuResets(path, boot_id=boot_id).read() == AWAITED
    boot_id.write_text("two\n")
    assert GpuResets(path, boot_id=boot_id).read() == {}


async def test_nothing_is_written_while_nothing_changes(tmp_path: Path, boot_id: Path) -> None:
    path = tmp_path / "gpus.json"
    resets = GpuResets(path, boot_id=boot_id)
    await resets.write({}, {})
    assert not path.exists()
    await resets.write(AWAITED, ERRORS)
    path.unlink()
    await resets.write(AWAITED, ERRORS)
    assert not path.exists()
    await resets.write(AWAITED, {"GPU-a": 4})
    path.unlink()
    await resets.write({}, {"GPU-a": 4})
    path.unlink()
    await resets.write({}, {})
    assert GpuResets(path, boot_id=boot_id).read() == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"boot_id": "one\\n"}',
        '{"boot_id": "one\\n", "gpus": []}',
        '{"boot_id": "one\\n", "gpus": {"GPU-a": {"words": 1, "energy_millijoules": 2}}}',
        '{"boot_id": "one\\n", "gpus": {"GPU-a": {"words": "x", "energy_millijoules": "y"}}}',
        '{"boot_id": "one\\n", "gpus": {"GPU-a": {"words": "x"}}}',
    ],
)
def test_a_file_that_is_none_of_these_is_as_none(tmp_path: Path, boot_id: Path, text: str) -> None:
    path = tmp_path / "gpus.json"
    path.write_text(text)
    assert GpuResets(path, boot_id=boot_id).read() == {}


async def test_a_directory_that_cannot_be_written_holds_up_nothing(tmp_path: Path, boot_id: Path) -> None:
    resets = GpuResets(tmp_path / "absent" / "gpus.json", boot_id=boot_id)
    await resets.write(AWAITED, ERRORS)
    assert resets.read() == {}


async def test_memory_errors_are_remembered_and_what_is_written_without_them_is_read(
    tmp_path: Path, boot_id: Path
) -> None:
    path = tmp_path / "gpus.json"
    await GpuResets(path, boot_id=boot_id).write(AWAITED, ERRORS)
    board = HealthBoard()
    GpuResets(path, boot_id=boot_id).tell(board, now_seconds=0.0)
    assert board.memory_errors() == ERRORS
    assert board.awaited_resets() == AWAITED
    path.write_text('{"boot_id": "one\\n", "gpus": {"GPU-a": {"words": "x", "energy_millijoules": 2}}}')
    assert GpuResets(path, boot_id=boot_id).read() == {"GPU-a": AwaitedReset(words="x", energy_millijoules=2)}
