"""The pure parts of the Docker runtime: names, bodies, states, errors, frames, endpoints."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from docker.errors import APIError
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core.model import MIB
from nodeservice.errors import ConfigError, NodeFaultError, NodeServiceError, RequestError, TransientError
from nodeservice.http_wire import dechunk
from nodeservice.ports import ContainerSpec
from nodeservice.runtime.docker_spec import create_body
from nodeservice.runtime.docker_state import init_failure, read_instant, read_state, read_status
from nodeservice.runtime.endpoint import resolve_endpoint
from nodeservice.runtime.engine_process import EngineProcess
from nodeservice.runtime.errors import create_error, pull_error, start_error, translate
from nodeservice.runtime.frames import Reread, read_frames, read_records
from nodeservice.runtime.images import choose_digest, parse_image
from nodeservice.runtime.profile import EngineProfile, read_profile

DIGEST = "sha256:" + "a" * 64
OTHER_DIGEST = "sha256:" + "b" * 64
IMAGE_ID = "sha256:" + "c" * 64

INFO: dict[str, Any] = {
    "Plugins": {"Log": ["json-file", "local"]},
    "InitBinary": "docker-init",
    "DockerRootDir": "/var/lib/docker",
    "CgroupVersion": "2",
    "NCPU": 4,
    "MemTotal": 8 << 30,
}
VERSION: dict[str, Any] = {
    "Version": "20.10.24",
    "ApiVersion": "1.41",
    "Components": [{"Name": "Engine"}, {"Name": "docker-init", "Version": "0.19.0"}],
}
NETWORKS = [{"Name": "bridge"}, {"Name": "none"}]
PROFILE = read_profile(INFO, VERSION, NETWORKS)
SPEC = ContainerSpec(
    name="nodeservice.t.1",
    image="demo",
    argv=None,
    shell=None,
    env=(),
    labels={"nodeservice.spec": "x"},
    cpu_milli=500,
    memory_bytes=64 * MIB,
    pids_limit=10,
    mounts=(),
    gpu_uuids=(),
    log_max_bytes=MIB,
    grace_seconds=2.5,
)


def body(spec: ContainerSpec, profile: EngineProfile = PROFILE) -> dict[str, Any]:
    return create_body(spec, profile, node_id="n1")


def api_error(status: int, explanation: str) -> APIError:
    response = SimpleNamespace(status_code=status, url="u", reason="r")
    return APIError("message", response=cast(Any, response), explanation=explanation)


def frame(record: bytes, stream: int = 1) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(record).to_bytes(4, "big") + record


def stamped(record: bytes, stream: int = 1) -> bytes:
    return frame(b"2026-01-01T00:00:00.000000001Z " + record, stream)


def cut(data: bytes, sizes: Iterable[int]) -> list[bytes]:
    """The data in pieces of these sizes, the last as long as it is."""
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [piece for piece in [*pieces, data] if piece]


# ---- image names ----


@pytest.mark.parametrize(
    ("text", "canonical", "pull_tag"),
    [
        ("busybox", "docker.io/library/busybox", "latest"),
        ("docker.io/busybox:1", "docker.io/library/busybox", "1"),
        ("index.docker.io/a/b", "docker.io/a/b", "latest"),
        ("nodeservice/demo:latest", "docker.io/nodeservice/demo", "latest"),
        ("localhost/x", "localhost/x", "latest"),
        ("127.0.0.1:5000/a/b-c__d:v1.0", "127.0.0.1:5000/a/b-c__d", "v1.0"),
        ("[::1]:5000/a", "[::1]:5000/a", "latest"),
        (f"registry.example/a:1@{DIGEST}", "registry.example/a", DIGEST),
    ],
)
def test_an_image_name_is_taken_apart_as_the_engine_does(text: str, canonical: str, pull_tag: str) -> None:
    name = parse_image(text)
    assert (name.canonical, name.pull_tag) == (canonical, pull_tag)


def test_spellings_of_one_image_share_one_key_and_another_tag_does_not() -> None:
    assert parse_image("busybox").key == parse_image("docker.io/library/busybox:latest").key
    assert parse_image("busybox").key != parse_image("busybox:1").key


@given(st.text(max_size=600))
def test_any_text_is_a_name_or_a_clear_refusal(text: str) -> None:
    try:
        assert parse_image(text).canonical
    except RequestError as error:
        assert error.reason == "IMAGE_NOT_FOUND"  # noqa: PT017
        assert len(error.message) < 4000  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "repo_digests", "announced", "expected"),
    [
        ("a.io/x:1", [f"a.io/x@{DIGEST}"], None, f"a.io/x@{DIGEST}"),
        ("a.io/x:1", [f"b.io/x@{DIGEST}"], None, IMAGE_ID),
        ("a.io/x:1", [f"a.io/x@{OTHER_DIGEST}", f"a.io/x@{DIGEST}"], DIGEST, f"a.io/x@{DIGEST}"),
        (f"a.io/x@{DIGEST}", [f"a.io/x@{OTHER_DIGEST}", f"a.io/x@{DIGEST}"], None, f"a.io/x@{DIGEST}"),
        ("busybox", [f"docker.io/library/busybox@{DIGEST}"], None, f"docker.io/library/busybox@{DIGEST}"),
        ("x", [f"<none>@{DIGEST}"], None, IMAGE_ID),
        ("x", [], DIGEST, IMAGE_ID),
    ],
)
def test_the_digest_is_that_of_the_repository_asked_for(
    text: str, repo_digests: list[str], announced: str | None, expected: str
) -> None:
    chosen = choose_digest(parse_image(text), image_id=IMAGE_ID, repo_digests=repo_digests, announced=announced)
    assert chosen == expected


# ---- the create body ----


def test_a_shell_replaces_the_entrypoint_and_an_argv_keeps_it() -> None:
    shell = body(replace(SPEC, shell="a | b"))
    assert (shell["Entrypoint"], shell["Cmd"]) == (["/bin/sh", "-c"], ["a | b"])
    argv = body(replace(SPEC, argv=("a", "b")))
    assert argv["Cmd"] == ["a", "b"]
    assert "Entrypoint" not in argv
    assert not {"Cmd", "Entrypoint"} & body(SPEC).keys()


@given(st.integers(min_value=10, max_value=1_000_000), st.sampled_from([None, "/nodeservice/t"]))
def test_every_share_of_a_cpu_is_exact_and_within_what_the_kernel_takes(cpu_milli: int, parent: str | None) -> None:
    config = body(replace(SPEC, cpu_milli=cpu_milli, cgroup_parent=parent))["HostConfig"]
    period, quota = config["CpuPeriod"], config["CpuQuota"]
    assert quota * 1000 == cpu_milli * period
    assert quota >= 1000
    assert 1000 <= period <= 1_000_000


def test_below_a_cgroup_of_the_task_the_container_is_not_what_runs_out_of_cpu_first() -> None:
    alone = body(SPEC)["HostConfig"]
    below = body(replace(SPEC, cgroup_parent="/nodeservice/t"))["HostConfig"]
    assert below["CpuPeriod"] == 10 * alone["CpuPeriod"]
    assert below["CpuQuota"] == 10 * alone["CpuQuota"]


def test_on_cgroup_v2_the_cgroup_of_the_task_is_what_runs_out_of_memory_first() -> None:
    task, v1 = (
        replace(SPEC, cgroup_parent="/nodeservice/t"),
        read_profile(INFO | {"CgroupVersion": "1"}, VERSION, NETWORKS),
    )
    memory = [
        body(*made)["HostConfig"]["Memory"] for made in ((SPEC, PROFILE), (task, PROFILE), (task, v1), (SPEC, v1))
    ]
    assert memory == [64 * MIB, 65 * MIB, 64 * MIB, 64 * MIB]


def test_cpus_and_rates_are_asked_of_the_engine() -> None:
    asked = replace(SPEC, cpu_ids=(0, 1, 3), read_bytes_per_second=5, rate_devices=(Path("/dev/a"), Path("/dev/b")))
    config = body(asked)["HostConfig"]
    assert config["CpusetCpus"] == "0-1,3"
    assert config["BlkioDeviceReadBps"] == [{"Path": "/dev/a", "Rate": 5}, {"Path": "/dev/b", "Rate": 5}]
    other = body(replace(asked, cpu_ids=(), read_bytes_per_second=None, write_bytes_per_second=7))["HostConfig"]
    assert other["BlkioDeviceWriteBps"] == [{"Path": "/dev/a", "Rate": 7}, {"Path": "/dev/b", "Rate": 7}]
    assert not {"CpusetCpus", "BlkioDeviceReadBps"} & other.keys()


@pytest.mark.parametrize("field", ["cpu_milli", "memory_bytes", "pids_limit"])
@pytest.mark.parametrize("value", [0, -1])
def test_an_amount_that_the_engine_takes_for_no_limit_is_refused(field: str, value: int) -> None:
    with pytest.raises(RequestError) as caught:
        body(replace(SPEC, **{field: value}))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_the_body_is_json_and_carries_grace_node_and_cgroup() -> None:
    made = body(replace(SPEC, cgroup_parent="/nodeservice/t"))
    assert json.loads(json.dumps(made)) == made
    assert made["StopTimeout"] == 3
    assert made["Healthcheck"] == {"Test": ["NONE"]}
    assert made["Labels"] == {"nodeservice.spec": "x", "nodeservice.node": "n1"}
    assert made["HostConfig"]["CgroupParent"] == "/nodeservice/t"
    assert "CgroupParent" not in body(SPEC)["HostConfig"]


# ---- engines ----


def test_a_full_engine_degrades_nothing() -> None:
    assert (PROFILE.log_driver, PROFILE.network, PROFILE.has_init, PROFILE.degraded) == ("local", "bridge", True, ())


def test_what_an_engine_lacks_is_left_out_and_told() -> None:
    version = {**VERSION, "Components": [{"Name": "Engine"}]}
    profile = read_profile({**INFO, "Plugins": {"Log": ["json-file"]}}, version, [{"Name": "host"}])
    assert (profile.log_driver, profile.network, profile.has_init) == ("json-file", "none", False)
    assert len(profile.degraded) == 3
    host = body(SPEC, profile)["HostConfig"]
    assert "Init" not in host
    assert host["NetworkMode"] == "none"


def with_open_files(most: int | None) -> EngineProfile:
    return read_profile(INFO, VERSION, NETWORKS, process=EngineProcess(open_files_max=most))


def test_open_files_that_were_asked_for_are_given_or_refused_with_the_remedy() -> None:
    asked = replace(SPEC, open_files_limit=65_536, open_files_asked=True)
    with pytest.raises(NodeFaultError, match=r"is 65536: docker on this node can give 20000 \(ask") as caught:
        body(asked, with_open_files(20_000))
    assert (caught.value.reason, caught.value.field) == ("LIMIT_NOT_ENFORCED", "open_files_limit")
    assert "LimitNOFILE" in str(caught.value)
    for most in (65_536, None):
        assert {"Name": "nofile", "Soft": 65_536, "Hard": 65_536} in body(asked, with_open_files(most))["HostConfig"][
            "Ulimits"
        ]


def test_of_the_default_of_open_files_an_engine_gives_what_it_can_and_that_is_told() -> None:
    small = with_open_files(20_000)
    assert {"Name": "nofile", "Soft": 20_000, "Hard": 20_000} in body(SPEC, small)["HostConfig"]["Ulimits"]
    assert [sentence for sentence in small.degraded if "20000 open files" in sentence and "LimitNOFILE" in sentence]
    assert with_open_files(65_536).degraded == ()


def test_podman_is_known_by_its_component() -> None:
    info = {**INFO, "Plugins": {"Log": ["k8s-file", "journald"]}, "InitBinary": None}
    profile = read_profile(info, {"Components": [{"Name": "Podman Engine"}]}, [{"Name": "podman"}])
    assert (profile.facts.name, profile.log_driver, profile.network, profile.has_init) == (
        "podman",
        "k8s-file",
        "bridge",
        True,
    )
    assert set(body(SPEC, profile)["HostConfig"]["LogConfig"]["Config"]) == {"max-size"}
    assert body(SPEC, profile)["HostConfig"]["Init"] is True
    assert profile.degraded == ()


def test_podman_without_an_init_program_runs_containers_without_one() -> None:
    profile = read_profile(INFO, {"Components": [{"Name": "Podman Engine"}]}, [], lacks_init=True)
    assert "Init" not in body(SPEC, profile)["HostConfig"]
    assert any("catatonit" in sentence for sentence in profile.degraded)


@pytest.mark.parametrize(
    ("base_url", "environment", "expected"),
    [
        ("unix:///a/b.sock", {}, "unix:///a/b.sock"),
        (None, {"DOCKER_HOST": "unix:///c.sock"}, "unix:///c.sock"),
        ("tcp://127.0.0.1:2375", {"DOCKER_HOST": "unix:///c.sock"}, "tcp://127.0.0.1:2375"),
    ],
)
def test_the_engine_is_where_it_was_said_to_be(
    base_url: str | None, environment: dict[str, str], expected: str
) -> None:
    assert resolve_endpoint(base_url, environment=environment).url == expected


@pytest.mark.parametrize("url", ["ssh://a@b", "tcp://host", "tcp://host:notaport", "nonsense", "https://h:1"])
def test_an_engine_that_cannot_be_spoken_to_is_an_error_of_the_configuration(url: str) -> None:
    with pytest.raises(ConfigError):
        resolve_endpoint(url, environment={})
    with pytest.raises(ConfigError):
        resolve_endpoint("tcp://h:1", environment={"DOCKER_TLS_VERIFY": "1"})


# ---- states ----


def test_instants_of_the_engine_are_utc_and_the_year_one_is_never() -> None:
    assert read_instant("2026-01-02T03:04:05.123456789Z") == datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)
    assert read_instant("2026-01-02T03:04:05+02:00") == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)
    assert read_instant("2026-01-02T03:04:05.5Z") == datetime(2026, 1, 2, 3, 4, 5, 500_000, tzinfo=UTC)
    for never in ("0001-01-01T00:00:00Z", "", None, "yesterday"):
        assert read_instant(never) is None


def test_an_unknown_status_is_never_taken_for_an_end() -> None:
    assert read_status("levitating") == "running"
    assert read_status("paused") == "running"


def test_volumes_and_the_engines_own_files_are_told_beside_the_layer() -> None:
    state = read_state(
        {
            "Id": "i",
            "State": {"Status": "running"},
            "Mounts": [{"Type": "volume", "Source": "/v/1/_data"}, {"Type": "bind", "Source": "/state/results"}],
            "HostsPath": "/c/hosts",
            "HostnamePath": "",
            "ResolvConfPath": "/c/resolv.conf",
        }
    )
    assert [str(place) for place in state.beside] == ["/v/1/_data", "/c/hosts", "/c/resolv.conf"]


def test_a_run_never_ends_before_it_started() -> None:
    state = read_state(
        {
            "Id": "i",
            "State": {
                "Status": "exited",
                "StartedAt": "2026-01-01T00:00:00.2Z",
                "FinishedAt": "2026-01-01T00:00:00.1Z",
            },
        }
    )
    assert state.finished_at == state.started_at
    assert state.exit_code == 0


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (b"[FATAL tini (7)] exec /no/x failed: No such file or directory\n", "exec /no/x: No such file or directory"),
        (b"[FATAL tini (7)] exec x failed: Permission denied\n", "exec x: Permission denied"),
        (b"ERROR (catatonit:2): failed to exec pid1: No such file or directory\n", "exec No such file or directory"),
        (b"output\n[FATAL tini (7)] exec x failed: Permission denied\n", None),
        (b"sh: x: not found\n", None),
        (b"", None),
    ],
)
def test_only_the_init_process_alone_in_the_log_tells_of_a_missing_command(log: bytes, expected: str | None) -> None:
    assert init_failure(log) == expected


# ---- errors ----


@pytest.mark.parametrize(
    ("message", "status", "kind", "reason"),
    [
        ("manifest for a/b:1 not found: manifest unknown: manifest unknown", None, RequestError, "IMAGE_NOT_FOUND"),
        ("pull access denied for a/b, repository does not exist", 404, RequestError, "IMAGE_ACCESS_DENIED"),
        ("Get https://r/v2/: no basic auth credentials", 500, RequestError, "IMAGE_ACCESS_DENIED"),
        ("toomanyrequests: You have reached your pull rate limit", 500, TransientError, "IMAGE_PULL_FAILED"),
        ("dial tcp: lookup r: no such host", 500, TransientError, "IMAGE_PULL_FAILED"),
        ("received unexpected HTTP status: 503 Service Unavailable", 500, TransientError, "IMAGE_PULL_FAILED"),
        ("unexpected EOF", None, TransientError, "IMAGE_PULL_FAILED"),
        ("something never seen before", 500, TransientError, "IMAGE_PULL_FAILED"),
        ("write /var/lib/x: no space left on device", None, NodeFaultError, "IMAGE_PULL_FAILED"),
        ("no matching manifest for linux/amd64 in the manifest list entries", None, RequestError, "IMAGE_NOT_FOUND"),
        ("unsupported media type application/vnd.cncf.helm.config.v1+json", None, RequestError, "IMAGE_NOT_FOUND"),
        ('image operating system "windows" cannot be used on this platform', None, RequestError, "IMAGE_NOT_FOUND"),
        ("failed to register layer: max depth exceeded", None, RequestError, "IMAGE_NOT_FOUND"),
        ("filesystem layer verification failed for digest sha256:0", None, TransientError, "IMAGE_PULL_FAILED"),
    ],
)
def test_a_failed_pull_tells_whose_move_is_next(
    message: str, status: int | None, kind: type[NodeServiceError], reason: str
) -> None:
    error = pull_error("a/b:1", message, status=status)
    assert (type(error), error.reason) == (kind, reason)


@pytest.mark.parametrize(
    ("image", "message", "reason"),
    [
        ("timeout", "pull access denied for timeout, repository does not exist", "IMAGE_ACCESS_DENIED"),
        ("r.io:5000/tls:1", "manifest for r.io:5000/tls:1 not found: manifest unknown", "IMAGE_NOT_FOUND"),
        ("r.io/a/eof:1", 'Head "https://r.io/v2/a/eof/manifests/1": unauthorized: no', "IMAGE_ACCESS_DENIED"),
        ("timeout.io/x509", "pull access denied for timeout.io/x509, repository", "IMAGE_ACCESS_DENIED"),
        ("a/b", "pull access denied: net/http: timeout awaiting response", "IMAGE_PULL_FAILED"),
        ("timeout", "context deadline exceeded: timeout", "IMAGE_PULL_FAILED"),
    ],
)
def test_a_word_in_the_name_of_an_image_is_not_taken_for_trouble_of_the_registry(
    image: str, message: str, reason: str
) -> None:
    assert pull_error(image, message).reason == reason


@pytest.mark.parametrize(
    ("status", "message", "kind", "reason"),
    [
        (
            400,
            'OCI runtime create failed: unable to start container process: exec: "x": executable file not found in $PATH',
            RequestError,
            "COMMAND_NOT_FOUND",
        ),
        (400, 'starting container process caused: exec: "/x": permission denied', RequestError, "COMMAND_NOT_FOUND"),
        (500, 'exec: "docker-init": executable file not found in $PATH', NodeFaultError, "NODE_FAULT"),
        (500, 'could not select device driver "nvidia" with capabilities: [[gpu]]', NodeFaultError, "NODE_FAULT"),
        (500, "error mounting /x to rootfs: no such file or directory", RequestError, "START_FAILED"),
        (500, "id already in use", NodeFaultError, "ENGINE_FAULT"),
        (503, "shutting down", TransientError, "ENGINE_UNAVAILABLE"),
        (500, "transport is closing: unavailable", TransientError, "ENGINE_UNAVAILABLE"),
        (500, "no unavailable device", RequestError, "START_FAILED"),
    ],
)
def test_a_failed_start_tells_whose_move_is_next(
    status: int, message: str, kind: type[NodeServiceError], reason: str
) -> None:
    error = start_error("c", api_error(status, message), init_binary="docker-init")
    assert (type(error), error.reason) == (kind, reason)


def test_a_failed_create_tells_whose_move_is_next() -> None:
    missing = create_error("n", "demo:1", api_error(404, "No such image: demo:1"))
    assert (type(missing), missing.reason) == (RequestError, "IMAGE_NOT_FOUND")
    no_command = create_error("n", "demo:1", api_error(400, "No command specified"))
    assert (type(no_command), no_command.reason) == (RequestError, "CREATE_FAILED")
    assert no_command.hint
    broken = create_error("n", "demo:1", api_error(500, "layer store on fire"))
    assert (type(broken), broken.reason) == (NodeFaultError, "ENGINE_ERROR")


def test_an_engine_that_is_silent_or_gone_is_transient() -> None:
    assert translate(TimeoutError(), doing="x").reason == "ENGINE_TIMEOUT"
    assert translate(ConnectionRefusedError(), doing="x").reason == "ENGINE_UNAVAILABLE"
    assert isinstance(translate(api_error(503, "busy"), doing="x"), TransientError)
    assert isinstance(translate(api_error(500, "broken"), doing="x"), NodeFaultError)


# ---- streams ----


@given(st.lists(st.binary(max_size=50)), st.lists(st.integers(min_value=1, max_value=20)))
def test_frames_are_put_together_wherever_they_are_cut(records: list[bytes], sizes: list[int]) -> None:
    data = b"".join(frame(record) for record in records)
    assert b"".join(read_frames(cut(data, sizes))) == b"".join(records)


@given(st.lists(st.binary(min_size=1, max_size=50)), st.lists(st.integers(min_value=1, max_value=20)))
def test_chunks_are_put_together_wherever_they_are_cut(chunks: list[bytes], sizes: list[int]) -> None:
    data = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    assert b"".join(dechunk(cut(data, sizes))) == b"".join(chunks)


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1), st.data())
def test_a_body_that_ends_early_is_an_error(chunks: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n"
    end = data.draw(st.integers(min_value=0, max_value=len(whole) - 1))
    with pytest.raises(http.client.IncompleteRead):
        list(dechunk([whole[:end]]))


def test_a_frame_that_is_cut_is_an_error() -> None:
    with pytest.raises(http.client.IncompleteRead):
        list(read_frames([frame(b"whole\n"), frame(b"cut")[:-1]]))


FULL = b"x" * 16384


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([(1, b"a\n"), (1, b"b\n")], b"a\nb\n"),
        ([(1, FULL), (1, b"rest"), (1, b"next\n")], FULL + b"rest\nnext\n"),
        ([(1, FULL), (1, b""), (1, b"next\n")], FULL + b"\nnext\n"),
        ([(1, FULL), (1, FULL), (1, b"rest")], FULL + FULL + b"rest\n"),
        ([(1, FULL), (2, b"other\n"), (1, b"rest")], FULL + b"other\nrest\n"),
        ([(1, FULL), (1, b"rest\n")], FULL + b"rest\n"),
        ([(1, FULL)], FULL),
        ([(1, b"a\n"), (1, b"end")], b"a\nend"),
    ],
)
def test_the_ends_of_lines_that_the_engine_had_to_cut_are_put_back(
    frames: list[tuple[int, bytes]], expected: bytes
) -> None:
    data = b"".join(stamped(record, stream) for stream, record in frames)
    assert b"".join(text for records in read_records([data]) for text in records.texts) == expected


@given(st.lists(st.integers(min_value=1, max_value=40)))
def test_what_the_engine_says_of_its_own_trouble_is_no_line_of_the_log(sizes: list[int]) -> None:
    trouble = frame(b"Error grabbing logs: unexpected EOF\n", stream=3)
    plain = read_frames(cut(frame(b"a\n") + frame(b"b\n") + trouble, sizes))
    of_local = read_records(cut(stamped(b"a\n") + stamped(b"b\n") + trouble, sizes))
    texts = (text for records in of_local for text in records.texts)
    for pieces in (plain, texts):
        read = [next(pieces)]
        with pytest.raises(http.client.HTTPException, match=r"^Error grabbing logs: unexpected EOF$"):
            read.extend(pieces)
        assert b"".join(read) == b"a\nb\n"


@given(st.binary(max_size=60), st.integers(min_value=0, max_value=60), st.lists(st.integers(min_value=1, max_value=20)))
def test_a_second_reading_adds_just_what_the_first_has_missed(data: bytes, read: int, sizes: list[int]) -> None:
    reread = Reread()
    first = b"".join(reread.noted(cut(data[:read], sizes)))
    assert first + b"".join(reread.missed(cut(data, sizes[::-1]))) == data


def test_a_second_reading_that_lost_its_beginning_adds_nothing() -> None:
    reread = Reread()
    assert b"".join(reread.noted([b"0123456789"])) == b"0123456789"
    assert list(reread.missed([b"56789abcdef", b"x"])) == []
