"""Limits and environment of a task as they are typed, and how a refusal names what was typed."""

from __future__ import annotations

import pytest

from nodeservice.cli.submission import Submission
from nodeservice.cli.task_options import by_option, limits_given, variables
from nodeservice.core import admission
from nodeservice.core.model import AttemptId, Resources, TaskSpec
from nodeservice.errors import RequestError

NOTHING = dict.fromkeys(
    ("wait_timeout", "pull_timeout", "total_timeout", "stop_signal", "open_files", "read_rate", "write_rate")
) | {"exclusive_cpus": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"request": Resources(cpu_milli=1000, memory_bytes=64)}, "--memory is 64 bytes (ask for at least 6 MiB)"),
        ({"request": Resources(cpu_milli=1, memory_bytes=2**30)}, "--cpus is 0.001 cores"),
        ({"pids_limit": 0}, "--pids is 0 "),
        ({"stop_signal": "SIGFOO"}, "--stop-signal is 'SIGFOO'"),
        ({"open_files_limit": 3}, "--open-files is 3 (use 16 to"),
        ({"read_bytes_per_second": 5}, "--read-rate is 5 "),
        ({"grace_seconds": 1e6}, "--grace is 1000000 "),
        ({"env": (("1A", ""),)}, "--env has a variable named '1A'"),
    ],
)
def test_a_refusal_of_the_node_names_the_option_that_was_typed(change: dict[str, object], words: str) -> None:
    sound = {"request": Resources(cpu_milli=1000, memory_bytes=2**30), "pids_limit": 100}
    spec = TaskSpec(id=AttemptId("t"), image="demo", fingerprint="f", **sound | change)  # type: ignore[arg-type]
    with pytest.raises(RequestError) as caught:
        admission.check(spec)
    assert by_option(str(caught.value)).startswith(words)


def test_the_masters_way_to_name_a_field_is_understood_too_and_other_words_stay() -> None:
    assert by_option("memory_bytes: 5 contradicts") == "--memory: 5 contradicts"
    assert by_option("no node is that large") == "no node is that large"
    assert by_option("") == ""


def test_what_can_be_no_limit_is_refused_before_it_is_sent() -> None:
    for open_files in (3, 10**12):
        with pytest.raises(RequestError) as caught:
            limits_given(**NOTHING | {"open_files": open_files})  # type: ignore[arg-type]
        assert by_option(str(caught.value)).startswith(f"--open-files is {open_files} ")
    with pytest.raises(RequestError, match="pids_limit is 1000000000000"):
        Submission(image="i", cpus="1", memory="64m", disk="1m", pids=10**12).task()


def test_a_bare_name_takes_the_value_of_this_process_and_is_left_out_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HERE", "a=b")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOSUCHVAR", raising=False)
    asked = ["HERE", "NOSUCHVAR", "EMPTY", "NOSUCHVAR=given", "X="]
    assert variables(asked) == [("HERE", "a=b"), ("EMPTY", ""), ("NOSUCHVAR", "given"), ("X", "")]
    for wrong in ("", "=x"):
        with pytest.raises(RequestError, match="--env is"):
            variables([wrong])
