"""`make demo-gpu`, which the README names, as a person runs it: it judges itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nodeservice.testing.false_driver.build import compiler
from tests.integration.docker_daemon import require_docker_daemon

ROOT = Path(__file__).resolve().parents[2]
GIVE_UP_SECONDS = 300.0
"""The demo itself gives up earlier, and then tells why."""

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(GIVE_UP_SECONDS + 60)]


def test_the_demo_of_gpus_finds_that_all_went_as_it_promises() -> None:
    require_docker_daemon()
    if compiler() is None:
        pytest.skip("NO C COMPILER for the false driver (install gcc)")

    told, code = _run(ROOT / "tools/demo_gpu.py")

    assert code == 0, told
    assert "16 of 16 tasks ended as they should" in told
    assert "try 2" in told, "the task whose GPU fell off the bus was not tried again"


def _run(script: Path) -> tuple[str, int]:
    """What it wrote, and its exit code. It removes what it made, also where it is ended."""
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    ) as process:
        try:
            told, _ = process.communicate(timeout=GIVE_UP_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            told, _ = process.communicate()
    return told, process.returncode
