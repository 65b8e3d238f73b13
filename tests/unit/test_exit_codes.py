"""An exit code blames nobody wrongly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nodeservice.cli.exit_codes import ExitCode, exit_code_of
from nodeservice.core.model import Outcome, Reason

NODE_FAULTS = {
    Reason.LIMIT_NOT_ENFORCED,
    Reason.HOST_OUT_OF_MEMORY,
    Reason.NODE_DISK_LOW,
    Reason.NODE_DRAINED,
    Reason.MASTER_LOST,
    Reason.GPU_FAULT,
    Reason.ENGINE_FAULT,
    Reason.CONTAINER_LOST,
    Reason.NODE_FAULT,
}


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.COMPLETED])
def test_the_code_for_a_fault_of_the_node_is_for_that_alone(reason: Reason) -> None:
    outcome = Outcome.CANCELLED if reason is Reason.CANCELLED else Outcome.FAILED
    code = exit_code_of(outcome=outcome, reason=reason, exit_code=3)
    assert (code == ExitCode.NODE_FAULT) is (reason in NODE_FAULTS)


def test_a_reason_of_a_newer_node_is_not_taken_for_a_success() -> None:
    assert exit_code_of(outcome="FAILED", reason="NEVER_HEARD_OF", exit_code=0) == ExitCode.NODE_FAULT


def test_ctrl_c_while_the_program_is_still_read_ends_it_without_a_traceback(tmp_path: Path) -> None:
    # The command line begins with this module, which in its place interrupts the process.
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-m", "nodeservice", "ps"],
        env=os.environ | {"PYTHONPATH": path},
        # A shell lets what it runs in the background ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")
