"""`nodeservice master` and its client commands as processes, the way a person uses them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nodeservice.wire import master_worker_pb2 as pb
from tests.integration.master_process import MasterProcess, environment
from tests.integration.node_process import NodeProcess
from tests.integration.scripted_node import ScriptedNode


class Done:
    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out.decode(), err.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def run(*arguments: str, **extra: str) -> Done:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nodeservice", *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment(**extra),
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return Done(process.returncode, out, err)


@pytest.fixture
async def master(tmp_path: Path) -> AsyncIterator[MasterProcess]:
    process = await MasterProcess(tmp_path).start()
    yield process
    if process.process is not None and process.process.poll() is None:
        assert await process.end() == 0


async def test_the_whole_life_of_a_task_from_the_command_line(master: MasterProcess) -> None:
    at = ("--master", master.address, "--insecure")
    async with ScriptedNode(master.address) as node:
        await node.register()
        submitted = await run(
            "submit", *at, "--task-id", "t1", "--name", "count words", "--cpus", "0.5", "--memory", "64m", "--disk", "10m",
            "--timeout", "20s", "--env", "A=1", "busybox", "--", "sh", "-c", "echo hi",
        )  # fmt: skip
        assert (submitted.code, submitted.out) == (0, "t1\n")
        await node.got("t1")
        sent = node.assigned[0]
        assert (sent.cpu_milli, sent.memory_bytes, sent.req_cpu, sent.req_memory) == (500, 64 * 2**20, 0.5, 0.0625)
        assert (list(sent.argv), sent.timeout_seconds) == (["sh", "-c", "echo hi"], 20.0)
        node.lines["t1"], node.log_ended["t1"] = ["hi", "[bold]not markup[/]"], "failed"
        await node.report(
            "t1", status="failed", outcome="FAILED", reason="EXIT_NONZERO", message="exit code 3", exit_code=3,
            result_location="file:///r/t1/1", trace_id="ab" * 16, limits_json='{"memory_bytes": 5}', manifest_sha256="cd",
            phases=[pb.PhaseTiming(name="pull", started_at_unix_ns=10**18, duration_ns=1_500_000_000)],
            usage=pb.Usage(memory_peak_bytes=1024), image_digest="busybox@sha256:1",
        )  # fmt: skip

        shown = (await run("show", *at, "t1", "--json")).json
        assert shown["outcome"] == "FAILED"
        assert (shown["reason"], shown["message"], shown["exit_code"]) == ("EXIT_NONZERO", "exit code 3", 3)
        assert shown["phases"] == [{"name": "pull", "start": "2001-09-09T01:46:40.000+00:00", "duration": 1.5}]
        assert shown["usage"]["memory_peak_bytes"] == 1024
        assert shown["limits"] == {"memory_bytes": 5}
        assert (shown["result_location"], shown["trace_id"]) == ("file:///r/t1/1", "ab" * 16)
        words = await run("show", *at, "t1")
        for part in ("EXIT_NONZERO", "exit code 3", "pull", "1.500", "file:///r/t1/1", "ab" * 16, "1 KiB"):
            assert part in words.out

        logs = await run("logs", *at, "-f", "t1")
        assert logs.out == "hi\n[bold]not markup[/]\n"
        objects = [json.loads(line) for line in (await run("logs", *at, "t1", "--json")).out.splitlines()]
        assert [line.get("content") for line in objects] == ["hi", "[bold]not markup[/]", None]

        waited = await run("wait", *at, "t1", "--json")
        assert (waited.code, [task["outcome"] for task in waited.json]) == (3, ["FAILED"])
        assert "exit code 3" in waited.err
        listed = (await run("ps", *at, "--json")).json
        assert [(task["task_id"], task["state"], task["name"]) for task in listed] == [("t1", "FAILED", "count words")]
        table = (await run("ps", *at)).out
        assert all(word in table for word in ("t1", "FAILED", "w1", "EXIT_NONZERO"))
        cancelled = await run("cancel", *at, "t1", "--json")
        assert (cancelled.code, cancelled.json["reason"]) == (75, "ALREADY_ENDED")
        nodes = (await run("nodes", *at, "--json")).json
        assert [(one["worker_id"], one["state"], one["allocatable"]["cpu_milli"]) for one in nodes] == [
            ("w1", "ACTIVE", 4000)
        ]
        assert "ACTIVE" in (await run("nodes", *at, "w1")).out
        assert (await run("nodes", *at, "w1", "w9", "--json")).json["message"] == "the master knows no node w9"


async def test_the_log_of_a_node_that_does_not_answer_is_told_apart_from_an_empty_one(master: MasterProcess) -> None:
    at = ("--master", master.address, "--insecure")
    async with ScriptedNode(master.address) as node:
        await node.register()
        assert (await run("submit", *at, "--task-id", "t1", "--memory", "8m", "img")).code == 0
        await node.got("t1")
        node.lines["t1"] = ["one"]
        assert (await run("logs", *at, "t1")).out == "one\n"
        await node.deaf()
        away = await run("logs", *at, "t1")
        assert (away.code, away.out, away.err) == (69, "", "nodeservice: node w1 does not answer (ask again later)\n")
        away = await run("logs", *at, "t1", "--json")
        assert (away.code, away.json["reason"]) == (69, "NODE_UNANSWERED")
        await node.listen()
        await node.report("t1", logs="one\n")
        await node.deaf()
        reported = await run("logs", *at, "-f", "t1")
        assert (reported.code, reported.out) == (0, "one\n")
        assert "node w1 does not answer; this is what its report has of the log" in reported.err
        objects = [json.loads(line) for line in (await run("logs", *at, "t1", "--json")).out.splitlines()]
        assert [sorted(one) for one in objects] == [
            ["notice", "task_id", "timestamp"], ["content", "task_id", "timestamp"], ["is_complete", "status", "task_id"],
        ]  # fmt: skip


@pytest.mark.engine
async def test_each_attempt_of_a_task_has_its_own_log(
    master: MasterProcess, tmp_path: Path, node_id: str, demo_image: str
) -> None:
    at = ("--master", master.address, "--insecure")
    node = await NodeProcess(tmp_path / "node", node_id, ("--master", master.address)).start()
    try:
        submitted = await run(
            "submit", *at, "--task-id", "t1", "--memory", "32m", "--cpus", "0.1", "--max-retries", "1",
            "--retry-own-failures", "--shell", "echo attempt $NODESERVICE_ATTEMPT; exit 3", demo_image,
        )  # fmt: skip
        assert submitted.code == 0, submitted.err
        assert (await run("wait", *at, "t1")).code == 3
        for options, attempt in ((("--attempt", "1"), 1), (("--attempt", "2"), 2), ((), 2)):
            assert (await run("logs", *at, "t1", *options)).out == f"attempt {attempt}\n"
        unknown = await run("logs", *at, "t1", "--attempt", "3")
        assert (unknown.code, unknown.out, unknown.err) == (66, "", "nodeservice: there is no attempt 3 of task t1\n")
    finally:
        await node.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--node", "foo"), "--node is 'foo' (give HOST:PORT, such as gpu1:50052)"),
        (("--listen", "foo"), "--listen is 'foo' (give HOST:PORT, such as 0.0.0.0:50051)"),
        (("--http-listen", "foo"), "--http-listen is 'foo' (give HOST:PORT"),
        (("--heartbeat-timeout", "x"), "--heartbeat-timeout is 'x' (give a duration"),
        (("--http-limit", "x"), "--http-limit is 'x' (give bytes"),
        (("--heartbeat-timeout", "0"), "--heartbeat-timeout is 0: every node would be silent"),
        (("--gone-after", "29s"), "--gone-after is 29s: nodes would be given up before they are silent"),
        (("--push-limit", "x"), "--push-limit is 'x' (give bytes"),
        (("--certified-worker-ids",), "--certified-worker-ids without --tls-ca: nobody is asked for a certificate"),
        (
            ("--finished-retention", "5s"),
            "--finished-retention is 5s: who waits for a task may not hear its end (give a day",
        ),
        (("--log-level", "loud"), "--log-level is 'loud' (use one of debug"),
        (("--results-dir", ""), "--results-dir is empty"),
    ],
)
async def test_a_master_that_is_configured_wrongly_says_what_to_give_and_ends_with_78(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    ended = await run("master", "--listen", "127.0.0.1:0", "--insecure", "--state-dir", str(tmp_path), *options)
    assert ended.code == 78
    assert f"nodeservice: {words}" in ended.err


async def test_waiting_for_several_succeeds_only_if_all_did(master: MasterProcess) -> None:
    env = {"NODESERVICE_MASTER": master.address, "NODESERVICE_INSECURE": "1"}
    async with ScriptedNode(master.address) as node:
        await node.register()
        for name in ("a", "b"):
            assert (await run("submit", "--task-id", name, "--cpus", "0.1", "--memory", "8m", "img", **env)).code == 0
        await node.got("a", "b")
        late = await run("wait", "a", "b", "--timeout", "0.1s", "--json", **env)
        assert (late.code, late.json) == (124, [])
        await node.report("a")
        await node.report("b", status="failed", reason="MEMORY_LIMIT", outcome="FAILED")
        assert (await run("wait", "a", **env)).code == 0
        assert (await run("wait", "b", **env)).code == 137
        assert (await run("wait", "a", "b", **env)).code == 1
        failed = await run("ps", "--state", "failed", "--node", "w1", "--since", "1h", "--json", **env)
        assert ([task["task_id"] for task in failed.json], failed.err) == (["b"], "")
        newest = await run("ps", "-n", "1", "--json", **env)
        assert (len(newest.json), "there may be more" in newest.err) == (1, True)
        assert (await run("ps", "--state", "OVER", **env)).code == 2


async def test_what_a_task_or_node_says_steers_no_terminal(master: MasterProcess) -> None:
    at = ("--master", master.address, "--insecure")
    async with ScriptedNode(master.address) as node:
        await node.register()
        assert (await run("submit", *at, "--task-id", "t1", "--memory", "8m", "img")).code == 0
        await node.got("t1")
        await node.report(
            "t1", status="failed", reason="X\x1b[2J", message="exec: \x1b]0;title\x07\x9b1m", outcome="FAILED"
        )
        waited = await run("wait", *at, "t1")
        assert waited.err == "nodeservice: t1 FAILED X\\x1b[2J: exec: \\x1b]0;title\\x07\\x9b1m\n"
        for command in (("ps",), ("show", "t1")):
            shown = await run(*command[:1], *at, *command[1:])
            assert not set(shown.out + shown.err) & {"\x1b", "\x07", "\x9b"}


async def test_refusals_and_mistakes_have_a_reason_and_a_code_and_keep_stdout_clean(master: MasterProcess) -> None:
    at = ("--master", master.address, "--insecure")
    bad = await run("submit", *at, "--memory", "lots", "img")
    assert (bad.code, bad.out) == (75, "")
    assert "--memory is 'lots'" in bad.err
    bad = await run("submit", *at, "--task-id", "../x", "--json", "img")
    assert (bad.code, bad.json["accepted"], bad.json["reason"]) == (75, False, "INVALID_REQUEST")
    unknown = await run("show", *at, "nobody", "--json")
    assert (unknown.code, unknown.json["reason"]) == (66, "NOT_FOUND")
    assert "there is no task nobody" in unknown.err
    assert (await run("ps", "--master", "127.0.0.1:1", "--insecure")).code == 69
    both = await run("ps", *at, "--tls-ca", "x")
    assert both.code == 78
    assert "exclude each other" in both.err


async def test_a_master_killed_without_warning_has_every_submission_that_it_acknowledged(tmp_path: Path) -> None:
    master = await MasterProcess(tmp_path).start()
    ids = [f"t{number}" for number in range(3)]
    for task_id in ids:
        assert (await run("submit", "--master", master.address, "--insecure", "--task-id", task_id, "img")).code == 0
    await master.end(signal.SIGKILL)
    await master.start()
    listed = (await run("ps", "--master", master.address, "--insecure", "--json")).json
    assert sorted(task["task_id"] for task in listed) == ids
    assert {task["state"] for task in listed} == {"QUEUED"}
    assert await master.end() == 0


async def test_a_master_without_tls_needs_insecure_and_refuses_half_a_pair(tmp_path: Path) -> None:
    options = ("--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state"))
    for extra in ((), ("--tls-cert", "x")):
        done = await run("master", *options, *extra)
        assert done.code == 78
        assert "--insecure" in done.err
    assert not (tmp_path / "state").exists()


async def test_every_option_is_a_key_of_the_file_and_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "master.toml"
    config.write_text(f'results_dir = "{tmp_path}/elsewhere"\nhttp_listen = "127.0.0.1:0"\nhttp_limit = 1000\n')
    master = await MasterProcess(tmp_path, "--config", str(config)).start()
    try:
        assert master.ready["results_dir"] == f"{tmp_path}/elsewhere"
        assert master.ready["http_address"]
    finally:
        assert await master.end() == 0
    for wrong, words in (
        ("colour = 3", f"{config} has an unknown key 'colour'"),
        ('node_loss_retries = "x"', f"{config}: node_loss_retries is 'x'"),
        ('node = "gpu1:50052"', f"{config}: node is 'gpu1:50052'"),
    ):
        config.write_text(f"{wrong}\n")
        done = await run("master", "--config", str(config), "--insecure")
        assert done.code == 78
        assert f"nodeservice: {words}" in done.err


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A certificate of its own for 127.0.0.1, which is also whom to trust."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return tmp_path


async def test_tls_works_from_the_start_and_plain_text_is_not_answered(tmp_path: Path, certificates: Path) -> None:
    cert, key = str(certificates / "cert.pem"), str(certificates / "key.pem")
    pair = ("--tls-cert", cert, "--tls-key", key, "--tls-ca", cert)
    master = await MasterProcess(tmp_path, *pair, "--http-listen", "127.0.0.1:0", insecure=False).start()
    try:
        assert master.ready["tls"] is True
        assert (await run("nodes", "--master", master.address, *pair, "--json")).json == []
        assert (await run("nodes", "--master", master.address, "--insecure")).code == 69
        stranger = await run("nodes", "--master", master.address, "--tls-ca", cert)
        assert stranger.code == 69, "a client without a certificate is not let in"
    finally:
        assert await master.end() == 0
