"""What nvidia-smi in a container says, and what it means when it says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nodeservice.errors import NodeFaultError, NodeServiceError, RequestError, TransientError
from nodeservice.limits.gpu_view import COMMAND, read_gpu_uuids

PID = 7
LISTING = "GPU 0: NVIDIA H200 (UUID: GPU-a)\nGPU 1: NVIDIA H200 (UUID: GPU-b)\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A container that has the program."""
    program = tmp_path / f"proc/{PID}/root/usr/bin/nvidia-smi"
    program.parent.mkdir(parents=True)
    program.write_text("")
    return tmp_path


async def lists(argv: Sequence[str]) -> str:
    assert tuple(argv) == COMMAND
    return LISTING


async def must_not_run(argv: Sequence[str]) -> str:
    raise AssertionError(argv)


async def test_the_uuids_that_the_driver_shows_are_read(root: Path) -> None:
    found = await read_gpu_uuids(PID, lists, root=root)
    assert (found.limit, found.value, found.readable) == ("gpu_uuids", "GPU-a GPU-b", True)


async def test_nothing_is_run_where_the_program_is_not_there_or_is_a_link(root: Path) -> None:
    program = root / f"proc/{PID}/root/usr/bin/nvidia-smi"
    program.unlink()
    found = await read_gpu_uuids(PID, must_not_run, root=root)
    assert (found.readable, found.note) == (False, "/usr/bin/nvidia-smi is not in the container")
    program.symlink_to("/bin/sh")
    assert not (await read_gpu_uuids(PID, must_not_run, root=root)).readable


async def test_a_container_that_has_gone_is_not_read(tmp_path: Path) -> None:
    found = await read_gpu_uuids(PID, must_not_run, root=tmp_path)
    assert not found.readable
    assert found.note


@pytest.mark.parametrize(
    "error",
    [
        RequestError("it ended with 6", reason="EXEC_FAILED"),
        TransientError("it takes too long", reason="EXEC_TIMEOUT"),
        NodeFaultError("it does not run", reason="CONTAINER_LOST"),
    ],
)
async def test_a_failure_is_told_and_no_more(root: Path, error: NodeServiceError) -> None:
    async def fails(_argv: Sequence[str]) -> str:
        raise error

    found = await read_gpu_uuids(PID, fails, root=root)
    assert (found.readable, found.note) == (False, str(error))


async def test_a_listing_without_gpus_is_not_read(root: Path) -> None:
    async def says_nothing(_argv: Sequence[str]) -> str:
        return "No devices found.\n"

    found = await read_gpu_uuids(PID, says_nothing, root=root)
    assert (found.readable, found.note) == (False, "it listed no GPU")
