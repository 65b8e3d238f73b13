"""`nodeservice run` as a shell uses it: in pipes that close, with JSON for every way to fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import docker
import pytest

from nodeservice.cli.exit_codes import ExitCode
from nodeservice.runtime.endpoint import resolve_endpoint
from nodeservice.runtime.engine_process import read_engine_process

RUN = [sys.executable, "-m", "nodeservice", "run"]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")} | more


def containers_of(client: docker.APIClient, task_id: str) -> list[str]:
    found = client.containers(all=True, filters={"label": [f"nodeservice.task={task_id}"]})
    return [entry["Id"] for entry in found] + [
        entry["Id"] for entry in client.containers(all=True, filters={"name": [f"nodeservice.{task_id}"]})
    ]


@pytest.mark.engine
def test_a_reader_who_has_enough_ends_the_task_and_nothing_is_left(
    tmp_path: Path, demo_image: str, docker_client: docker.APIClient, node_id: str
) -> None:
    command = [*RUN, "--task-id", node_id, demo_image, "--", "sh", "-c", "while :; do echo line; sleep 0.1; done"]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        words = process.stderr.read()
        assert process.wait(60) == ExitCode.OUTPUT_CLOSED, words
    assert "nobody takes its log" in words
    assert containers_of(docker_client, node_id) == []
    assert list((tmp_path / "state/nodeservice/run").iterdir()) == []


@pytest.mark.engine
def test_an_id_that_has_results_is_refused_before_anything_runs(tmp_path: Path, demo_image: str, node_id: str) -> None:
    def run(words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RUN, "--task-id", node_id, demo_image, "--", "sh", "-c", f"echo {words}"],
            env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    assert run("one").returncode == 0
    again = run("two")
    assert (again.returncode, again.stdout) == (ExitCode.REJECTED, "")
    assert f"--task-id is {node_id}, of which there are results in" in again.stderr
    assert "choose another" in again.stderr


@pytest.mark.engine
def test_words_that_nobody_reads_do_not_stop_the_task(
    tmp_path: Path, demo_image: str, docker_client: docker.APIClient, node_id: str
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        ended = subprocess.run(
            [*RUN, "--task-id", node_id, demo_image, "--", "sh", "-c", "echo done"],
            env=environment(tmp_path), stdout=subprocess.PIPE, stderr=write_end, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(write_end)
    assert (ended.returncode, ended.stdout) == (0, "done\n")
    assert containers_of(docker_client, node_id) == []


@pytest.mark.parametrize(
    ("options", "env", "code", "reason"),
    [
        ([], {"DOCKER_HOST": "unix:///nowhere.sock"}, ExitCode.UNAVAILABLE, "ENGINE_UNAVAILABLE"),
        (["--results", "s3://b"], {}, ExitCode.CONFIG, "CONFIG"),
        (["--memory", "much"], {}, ExitCode.REJECTED, "INVALID_REQUEST"),
        (["--results", "ftp://host/path"], {}, ExitCode.CONFIG, "CONFIG"),
        ([], {"XDG_STATE_HOME": "~no-such-user"}, ExitCode.CONFIG, "CONFIG"),
        ([], {"XDG_STATE_HOME": "/dev/null"}, ExitCode.CONFIG, "CONFIG"),
        (["--no-such-option"], {}, ExitCode.USAGE, "USAGE"),
        (["--name", os.fsdecode(b"\xff")], {}, ExitCode.USAGE, "USAGE"),
        (["--env", "BYTES"], {"BYTES": os.fsdecode(b"\xff")}, ExitCode.REJECTED, "INVALID_REQUEST"),
    ],
)
def test_each_way_not_to_begin_is_told_as_json_too(
    tmp_path: Path, options: list[str], env: dict[str, str], code: ExitCode, reason: str
) -> None:
    ended = subprocess.run(
        [*RUN, "--json", *options, "image"],
        env=environment(tmp_path, **env), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    told = json.loads(ended.stdout)
    assert (ended.returncode, told["outcome"], told["reason"]) == (code, "REJECTED", reason)
    assert told["message"]
    assert told["message"] in ended.stderr


@pytest.mark.engine
def test_a_running_time_of_zero_is_no_limit_as_it_is_for_submit(
    tmp_path: Path, demo_image: str, docker_client: docker.APIClient, node_id: str
) -> None:
    ended = subprocess.run(
        [*RUN, "--json", "--task-id", node_id, "--timeout", "0s", demo_image, "--", "true"],
        env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, json.loads(ended.stdout)["limits"]["timeout_seconds"]) == (0, None)
    assert containers_of(docker_client, node_id) == []


@pytest.mark.engine
def test_open_files_are_given_as_asked_or_the_task_is_refused(
    tmp_path: Path, demo_image: str, docker_client: docker.APIClient, node_id: str
) -> None:
    def run(files: int) -> tuple[int, dict[str, Any]]:
        options = ["--json", "--task-id", f"{node_id}-{files}", "--open-files", str(files)]
        ended = subprocess.run(
            [*RUN, *options, demo_image, "--", "sh", "-c", f"test $(ulimit -Hn) = {files}"],
            env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return ended.returncode, json.loads(ended.stdout)

    most = read_engine_process(resolve_endpoint(None)).open_files_max
    assert most is not None
    assert run(1000)[0] == 0
    if most >= 1_048_576:
        pytest.skip("this engine may give all that a task can ask for")
    assert run(most)[0] == 0
    code, told = run(most + 1)
    assert (code, told["reason"]) == (ExitCode.NODE_FAULT, "LIMIT_NOT_ENFORCED")
    assert f"open_files_limit is {most + 1}: docker on this node can give {most}" in told["message"]
    assert "LimitNOFILE" in told["message"]
    assert containers_of(docker_client, f"{node_id}-{most + 1}") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.engine
def test_a_signal_cancels_and_a_second_one_does_not_wait_for_the_grace_period(
    tmp_path: Path, demo_image: str, docker_client: docker.APIClient, node_id: str, number: signal.Signals
) -> None:
    deaf = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]
    command = [*RUN, "--json", "--task-id", node_id, "--grace", "1h", demo_image, "--", *deaf]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        read_until(process.stderr, "ready")
        process.send_signal(number)
        read_until(process.stderr, "Once more kills it")
        process.send_signal(number)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.CANCELLED
    assert (json.loads(told)["outcome"], json.loads(told)["exit_code"]) == ("CANCELLED", 137)
    assert containers_of(docker_client, node_id) == []


@pytest.mark.engine
def test_the_next_run_removes_all_that_a_killed_one_left(
    tmp_path: Path, demo_image: str, docker_client: docker.APIClient, node_id: str
) -> None:
    command = [*RUN, "--json", "--task-id", node_id, demo_image, "--", "sh", "-c", "echo ready; sleep 1000"]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        read_until(process.stderr, "ready")
        process.kill()
    assert len(set(containers_of(docker_client, node_id))) == 1
    ended = subprocess.run(
        [*RUN, "--task-id", f"{node_id}-next", demo_image, "--", "true"],
        env=environment(tmp_path), check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f"removed the container of {node_id}, which still ran" in ended.stderr
    assert containers_of(docker_client, node_id) == []
    assert list((tmp_path / "state/nodeservice/run").iterdir()) == []
    assert list(Path("/sys/fs/cgroup").glob(f"**/{node_id}*")) == []


@pytest.mark.engine
def test_results_that_a_killed_run_had_collected_outlive_the_next(
    tmp_path: Path, demo_image: str, docker_client: docker.APIClient, node_id: str
) -> None:
    write = ["sh", "-c", "echo of worth > /results/a"]
    killed = subprocess.run(
        [*RUN, "--task-id", node_id, demo_image, "--", *write],
        env=environment(tmp_path, TEST_FAULT_POINT="store.put.before:kill"), check=False, timeout=60,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    place = tmp_path / "state/nodeservice/run" / node_id / "salvage"
    for told in (f"what the task of {node_id} wrote stays in {place}", ""):
        ended = subprocess.run(
            [*RUN, demo_image, "--", "true"],
            env=environment(tmp_path), check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert told in ended.stderr
        assert (place / f"{node_id}.1/results/a").read_text() == "of worth\n"
    assert f"{node_id} wrote" not in ended.stderr, "once is enough"
    assert [entry.name for entry in place.parent.iterdir()] == ["salvage"]


@pytest.mark.engine
def test_a_run_whose_results_nothing_takes_ends_and_leaves_them_aside(
    tmp_path: Path, demo_image: str, docker_client: docker.APIClient, node_id: str
) -> None:
    results = tmp_path / "results"
    command = [*RUN, "--json", "--task-id", node_id, "--results", str(results), demo_image, "--"]
    with subprocess.Popen(
        [*command, "sh", "-c", "echo of worth > /results/a; echo ready; sleep 1"],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        read_until(process.stderr, "ready")
        results.rmdir()
        results.write_text("no directory any more")
        told, _ = process.communicate(timeout=60)
    place = tmp_path / "state/nodeservice/run" / node_id / f"salvage/{node_id}.1"
    assert process.returncode == ExitCode.RESULTS
    assert json.loads(told)["result_location"] == place.as_uri()
    assert (place / "results/a").read_text() == "of worth\n"


def read_until(stream: IO[str], words: str) -> None:
    for line in stream:
        if words in line:
            return
    raise AssertionError(f"the stream ended without {words!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_task_is_accepted_is_told_as_json_too(tmp_path: Path, number: signal.Signals) -> None:
    """The engine takes the connection and never answers, so the command waits for it; a second signal gives up."""
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(path))
        engine.listen()
        engine.settimeout(60)
        with subprocess.Popen(
            [*RUN, "--json", "image"],
            env=environment(tmp_path, DOCKER_HOST=f"unix://{path}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            connection, _ = engine.accept()
            with connection:
                process.send_signal(number)
                process.send_signal(number)
                told, words = process.communicate(timeout=60)
    assert process.returncode == ExitCode.CANCELLED, words
    assert (json.loads(told)["outcome"], json.loads(told)["reason"]) == ("CANCELLED", "CANCELLED")


@pytest.mark.engine
@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_an_output_that_takes_nothing_is_told_by_the_exit_code(
    tmp_path: Path, demo_image: str, docker_client: docker.APIClient, node_id: str, redirection: str
) -> None:
    """Started with a closed standard output, Python has no sys.stdout, and the next file would take its place."""
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *RUN, "--json", "--task-id", node_id, demo_image, "--", "true"],
        env=environment(tmp_path), stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == ExitCode.OUTPUT_CLOSED, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "the output takes nothing" in ended.stderr
    assert containers_of(docker_client, node_id) == []


def test_a_client_that_reaches_nobody_says_so_as_json_too() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "nodeservice", "show", "--json", "--insecure", "--master", "127.0.0.1:1", "x"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, json.loads(ended.stdout)["reason"]) == (ExitCode.UNAVAILABLE, "MASTER_UNREACHABLE")
    ended = subprocess.run(
        [sys.executable, "-m", "nodeservice", "ps", "--insecure", "--master", "no address"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == ExitCode.CONFIG
    assert "--master is 'no address'" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["ps", "--json", "--insecure", "--master", "no address"], ExitCode.CONFIG, "CONFIG"),
        (["ps", "--json", "--insecure", "--master", "http://127.0.0.1:50051"], ExitCode.CONFIG, "CONFIG"),
        (["wait", "--json", "--insecure", "--timeout", "soon", "x"], ExitCode.REJECTED, "INVALID_REQUEST"),
        (["nodes", "--json", "--no-such-option"], ExitCode.USAGE, "USAGE"),
        (["submit", "--json", "--insecure", os.fsdecode(b"\xff")], ExitCode.USAGE, "USAGE"),
    ],
)
def test_each_way_a_client_gets_nowhere_is_told_as_json_too(arguments: list[str], code: ExitCode, reason: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "nodeservice", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    told = json.loads(ended.stdout)
    assert (ended.returncode, told["outcome"], told["reason"]) == (code, None, reason)
    assert told["message"] in ended.stderr


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_command_whose_output_takes_nothing_ends_without_a_traceback(tmp_path: Path, options: list[str]) -> None:
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" >/dev/full', "sh", sys.executable, "-m", "nodeservice", "inspect", *options],
        env=environment(tmp_path), stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (ExitCode.OUTPUT_CLOSED, "")


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_reader_who_went_away_is_told_apart_from_a_failure(tmp_path: Path, options: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "nodeservice", "inspect", *options],
            env=environment(tmp_path), stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(write_end)
    assert (ended.returncode, ended.stderr) == (ExitCode.OUTPUT_CLOSED, "")


def test_an_engine_that_is_not_there_is_told_with_its_address_and_what_the_kernel_said(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*RUN, "image"],
        env=environment(tmp_path, DOCKER_HOST="unix:///nowhere.sock"), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    told = "the container engine at unix:///nowhere.sock cannot be reached: No such file or directory (is it running"
    assert told in ended.stderr
