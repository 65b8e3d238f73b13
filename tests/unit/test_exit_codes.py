"""An exit code blames nobody wrongly."""

from __future__ import annotations

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
