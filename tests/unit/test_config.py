"""Where settings come from, what they must be, and how a wrong one is told."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from typer.main import get_command

from nodeservice.cli import build_app
from nodeservice.config import NodeConfig, load_config
from nodeservice.errors import ConfigError
from nodeservice.telemetry.logs import configure_logging

PLAIN = {"insecure": True}
SECRETS = {"MINIO_ACCESS_KEY": "access-hunter2", "MINIO_SECRET_KEY": "secret-hunter2"}


def toml(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


# ---- sources ----------------------------------------------------------------------------------------------------------


def test_defaults_are_enough_but_for_the_choice_of_transport() -> None:
    config = load_config(None, PLAIN, {})
    assert config.listen == "0.0.0.0:50052"
    assert config.master is None
    assert config.state_dir == Path("/var/lib/nodeservice")
    assert config.results_dir == Path("/var/lib/nodeservice/results")
    assert config.result_store == "file"
    assert config.default_timeout_seconds is None
    assert config.worker_id


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = toml(tmp_path, "heartbeat_seconds = 1\nrelist_seconds = 1\nlog_tail_bytes = 1\n")
    env = {"NODESERVICE_HEARTBEAT_SECONDS": "2", "NODESERVICE_RELIST_SECONDS": "2"}
    config = load_config(file, {**PLAIN, "heartbeat_seconds": 3.0}, env)
    assert (config.heartbeat_seconds, config.relist_seconds, config.log_tail_bytes) == (3.0, 2.0, 1)
    assert config.call_deadline_seconds == 35.0


def test_a_flag_that_is_none_and_an_empty_variable_were_not_given(tmp_path: Path) -> None:
    file = toml(tmp_path, 'master = "m:1"\n')
    assert load_config(file, {**PLAIN, "master": None}, {"NODESERVICE_MASTER": ""}).master == "m:1"


def test_false_and_zero_are_given() -> None:
    env = {"NODESERVICE_MINIO_SECURE": "true", "NODESERVICE_DEFAULT_GRACE_SECONDS": "5"}
    config = load_config(None, {**PLAIN, "minio_secure": False, "default_grace_seconds": 0}, env)
    assert config.minio_secure is False
    assert config.default_grace_seconds == 0


def test_only_the_given_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODESERVICE_HEARTBEAT_SECONDS", "99")
    monkeypatch.setenv("NODESERVICE_NO_SUCH_KEY", "1")
    assert load_config(None, PLAIN, {}).heartbeat_seconds == 5.0
    assert NodeConfig().heartbeat_seconds == 5.0


def test_derived_defaults_follow_what_they_derive_from(tmp_path: Path) -> None:
    config = load_config(None, {**PLAIN, "state_dir": str(tmp_path), "minio": "127.0.0.1:9000"}, SECRETS)
    assert config.results_dir == tmp_path / "results"
    assert config.result_store == "s3"
    assert load_config(None, {**PLAIN, "minio": "h:1", "result_store": "file"}, {}).result_store == "file"


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(None, {**PLAIN, "state_dir": "state", "results_dir": "~/results"}, {})
    assert config.state_dir == tmp_path / "state"
    assert config.results_dir == Path("/home/somebody/results")


def test_settings_never_change() -> None:
    config = load_config(None, PLAIN, {})
    with pytest.raises(Exception, match="frozen"):
        config.listen = "x:1"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("file_text", "env", "endpoint"),
    [
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, "http://c:4317"),
        ('otlp_endpoint = "mine:4317"', {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, "mine:4317"),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
    ],
)
def test_the_collector_of_opentelemetry_s_own_variable_is_a_default(
    tmp_path: Path, file_text: str, env: dict[str, str], endpoint: str | None
) -> None:
    assert load_config(toml(tmp_path, file_text), PLAIN, env).otlp_endpoint == endpoint


@pytest.mark.parametrize(
    ("file_text", "env", "endpoint"),
    [
        ("", {}, None),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, "http://c:4317"),
        ('otlp_endpoint = "mine:4317"', {}, "mine:4317"),
        ('otlp_endpoint = "mine:4317"', {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://m:4317"}, "http://m:4317"),
        ("", {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://m:4317"}, "http://m:4317"),
        ('otlp_endpoint = "mine:4317"\notlp_metrics_endpoint = "none"', {}, None),
        ('otlp_endpoint = "mine:4317"', {"OTEL_METRICS_EXPORTER": "otlp, console"}, "mine:4317"),
        ('otlp_endpoint = "mine:4317"', {"OTEL_METRICS_EXPORTER": "none"}, None),
        ('otlp_metrics_endpoint = "mine:4317"', {"OTEL_METRICS_EXPORTER": "prometheus"}, None),
        ('otlp_endpoint = "mine:4317"', {"OTEL_SDK_DISABLED": "True"}, None),
    ],
)
def test_metrics_go_where_spans_go_unless_somebody_says_otherwise(
    tmp_path: Path, file_text: str, env: dict[str, str], endpoint: str | None
) -> None:
    assert load_config(toml(tmp_path, file_text), PLAIN, env).otlp_metrics_endpoint == endpoint


# ---- unknown and malformed --------------------------------------------------------------------------------------------


def test_an_unknown_key_of_the_file_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    file = toml(tmp_path, "heartbeat_secs = 1\n")
    with pytest.raises(ConfigError, match=rf"{file}: heartbeat_secs.*heartbeat_seconds"):
        load_config(file, PLAIN, {})


def test_an_unknown_variable_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"NODESERVICE_STATE_DIRECTORY.*NODESERVICE_STATE_DIR\b"):
        load_config(None, PLAIN, {"NODESERVICE_STATE_DIRECTORY": "/x"})


def test_what_other_commands_and_tasks_have_in_their_environment_is_left_alone() -> None:
    commands = get_command(build_app()).commands.values()  # type: ignore[attr-defined]
    named = {parameter.envvar for command in commands for parameter in command.params} - {None}
    settings = {f"NODESERVICE_{key.upper()}" for key in NodeConfig.model_fields}
    others = dict.fromkeys((named - settings) | {"NODESERVICE_TASK_ID", "NODESERVICE_ATTEMPT"}, "1")
    assert {"NODESERVICE_NODE", "NODESERVICE_HTTP_LISTEN"} <= others.keys()
    assert load_config(None, PLAIN, others) == load_config(None, PLAIN, {})


def test_other_variables_and_the_path_of_the_file_are_left_alone() -> None:
    others = {"NODESERVICES": "1", "PATH": "/bin", "NODESERVICE_CONFIG": "/etc/node.toml"}
    assert load_config(None, PLAIN, others) == load_config(None, PLAIN, {})


@pytest.mark.parametrize("command", [["serve"], ["inspect"], ["doctor"], ["master"]])
@pytest.mark.slow
def test_the_path_of_the_file_is_taken_from_the_environment_too(tmp_path: Path, command: list[str]) -> None:
    file = toml(tmp_path, "no_such_key = 1\n")
    ended = subprocess.run(
        [sys.executable, "-m", "nodeservice", *command],
        env=os.environ | {"NODESERVICE_CONFIG": str(file)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 78
    assert str(file) in ended.stderr
    assert "no_such_key" in ended.stderr


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown option: lisen.*listen"):
        load_config(None, {**PLAIN, "lisen": "x:1"}, {})


def test_a_file_that_is_missing_or_no_toml_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml cannot be read"):
        load_config(tmp_path / "gone.toml", PLAIN, {})
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(toml(tmp_path, "listen: yaml"), PLAIN, {})
    (tmp_path / "node.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "node.toml", PLAIN, {})


WRONG = [
    ("heartbeat_seconds", "abc"),
    ("heartbeat_seconds", 0),
    ("heartbeat_seconds", -1),
    ("heartbeat_seconds", "nan"),
    ("heartbeat_seconds", "inf"),
    ("listen", "50052"),
    ("listen", "host:65536"),
    ("listen", "host:"),
    ("listen", ""),
    ("master", "http://host:1"),
    ("worker_id", "../evil"),
    ("worker_id", "a..b"),
    ("worker_id", "x" * 129),
    ("bucket", "Upper_Case"),
    ("result_store", "ftp"),
    ("log_level", "loud"),
    ("default_memory_bytes", 1000),
    ("default_memory_bytes", "64m"),
    ("docker_host", "/var/run/docker.sock"),
    ("docker_host", "ssh://user@host"),
    ("http_upload_url", "ftp://host/upload"),
    ("http_upload_url", "http:///upload"),
    ("otlp_endpoint", "not an endpoint"),
    ("log_max_bytes", [1]),
    ("state_dir", {"a": 1}),
    ("state_dir", ""),
    ("state_dir", "a\0b"),
    ("tls_key", ""),
    ("results_dir", "~no-such-user/results"),
    ("advertise", "host:65536"),
    ("finished_retention_seconds", 1e300),
    ("results_retention_seconds", 1e11),
    ("default_timeout_seconds", 1e8),
    ("default_grace_seconds", 1e6),
    ("default_pids_limit", 5_000_000),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_told_with_field_value_source_and_remedy(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {**PLAIN, field: value}, {})
    error = caught.value
    assert error.field == field
    assert error.message.startswith(f"{field} = ")
    assert repr(value)[:200] in error.message
    assert "(command line)" in error.message
    assert error.hint is not None
    assert error.hint.startswith(f"{field}: ")
    for noise in ("pydantic", "validation error", "NodeConfig", "<class"):
        assert noise not in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("listen", "[::1]:50052"),
        ("listen", "127.0.0.1:0"),
        ("advertise", "10.0.0.1"),
        ("advertise", "node.example:50052"),
        ("docker_host", "unix:///run/podman/podman.sock"),
        ("docker_host", "tcp://127.0.0.1:2375"),
        ("log_level", "DEBUG"),
        ("otlp_endpoint", "https://collector.example"),
        ("upload_give_up_seconds", "0"),
    ],
)
def test_a_right_value_is_taken(field: str, value: str) -> None:
    load_config(None, {**PLAIN, field: value}, {})


def test_the_source_of_a_wrong_value_is_the_one_that_won(tmp_path: Path) -> None:
    file = toml(tmp_path, 'listen = "wrong"\n')
    with pytest.raises(ConfigError, match=rf"listen = 'wrong' \(file {file}\)"):
        load_config(file, PLAIN, {})
    with pytest.raises(ConfigError, match=r"listen = 'worse' \(environment\)"):
        load_config(file, PLAIN, {"NODESERVICE_LISTEN": "worse"})
    assert load_config(file, PLAIN, {"NODESERVICE_LISTEN": "right:1"}).listen == "right:1"


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="relist_seconds = 'x'") as caught:
        load_config(None, {**PLAIN, "heartbeat_seconds": "y", "relist_seconds": "x"}, {})
    assert "heartbeat_seconds = 'y'" in caught.value.message


@pytest.mark.parametrize("below", ["tasks", "logs/a", "salvage", "."])
def test_results_are_not_put_among_the_node_s_own_files(below: str, tmp_path: Path) -> None:
    """`tasks/job.7` is a work directory of nobody, though the results of a task named job.7 may lie there."""
    with pytest.raises(ConfigError, match="results_dir = ") as caught:
        load_config(None, {**PLAIN, "state_dir": str(tmp_path), "results_dir": str(tmp_path / below)}, {})
    assert caught.value.field == "results_dir"


@pytest.mark.parametrize("file", ["~no-such-user/keys", "a\0b", 3, ""])
def test_a_path_of_credentials_that_is_none_is_told(file: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {**PLAIN, "minio": "host:1", "minio_credentials_file": file}, {})
    assert caught.value.field == "minio_credentials_file"


@pytest.mark.parametrize("kind", ["connect", "report"])
def test_a_longest_wait_below_the_shortest_is_refused(kind: str) -> None:
    flags = {**PLAIN, f"{kind}_backoff_min_seconds": 10, f"{kind}_backoff_max_seconds": 5}
    with pytest.raises(ConfigError, match=f"{kind}_backoff_max_seconds = 5 is less than"):
        load_config(None, flags, {})


# ---- transport --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({}, "neither TLS nor plain text"),
        ({"insecure": True, "tls_cert": "c", "tls_key": "k"}, "insecure = true contradicts tls_cert"),
        ({"tls_cert": "c"}, "tls_key is missing"),
        ({"tls_key": "k"}, "tls_cert is missing"),
        ({"tls_ca": "a"}, "tls_cert is missing"),
    ],
)
def test_the_transport_must_be_chosen_wholly_and_once(flags: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(None, flags, {})


def test_a_command_that_opens_no_port_need_not_choose() -> None:
    assert load_config(None, {}, {}, serving=False).tls_cert is None
    assert load_config(None, {"tls_cert": "c", "tls_key": "k"}, {}).tls_cert is not None


# ---- results and secrets ----------------------------------------------------------------------------------------------


def test_credentials_come_from_their_own_variables() -> None:
    config = load_config(None, {**PLAIN, "minio": "h:9000"}, SECRETS)
    assert config.minio_access_key is not None
    assert config.minio_access_key.get_secret_value() == "access-hunter2"
    assert config.minio_secret_key is not None
    assert config.minio_secret_key.get_secret_value() == "secret-hunter2"


def test_credentials_come_from_a_file_unless_the_environment_has_them(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text('# MinIO\nMINIO_ACCESS_KEY=from-file\n\nMINIO_SECRET_KEY = "a=b"\n')
    flags = {**PLAIN, "minio": "h:9000", "minio_credentials_file": str(file)}
    config = load_config(None, flags, {})
    assert config.minio_access_key is not None
    assert config.minio_secret_key is not None
    assert (config.minio_access_key.get_secret_value(), config.minio_secret_key.get_secret_value()) == (
        "from-file",
        "a=b",
    )
    config = load_config(None, flags, SECRETS)
    assert config.minio_access_key is not None
    assert config.minio_access_key.get_secret_value() == "access-hunter2"


def test_half_a_pair_of_credentials_is_never_completed_from_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("MINIO_ACCESS_KEY=a\nMINIO_SECRET_KEY=b\n")
    flags = {**PLAIN, "minio": "h:9000", "minio_credentials_file": str(file)}
    with pytest.raises(ConfigError, match="minio_secret_key is missing"):
        load_config(None, flags, {"MINIO_ACCESS_KEY": "other"})


def test_a_credentials_file_without_credentials_is_told_without_its_content(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    flags = {**PLAIN, "minio": "h:9000", "minio_credentials_file": str(file)}
    with pytest.raises(ConfigError, match="credentials cannot be read"):
        load_config(None, flags, {})
    file.write_text("MINIO_ACCESS_KEY=hunter2\n")
    with pytest.raises(ConfigError, match="no line MINIO_SECRET_KEY") as caught:
        load_config(None, flags, {})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("field", ["minio_access_key", "minio_secret_key"])
def test_credentials_are_refused_from_file_flags_and_prefixed_variables(tmp_path: Path, field: str) -> None:
    sources: list[tuple[Path | None, dict[str, object], dict[str, str]]] = [
        (toml(tmp_path, f'{field} = "hunter2"\n'), {}, {}),
        (None, {field: "hunter2"}, {}),
        (None, {}, {f"NODESERVICE_{field.upper()}": "hunter2"}),
    ]
    for file, flags, env in sources:
        with pytest.raises(ConfigError, match="must not be given") as caught:
            load_config(file, {**PLAIN, **flags}, env)
        assert "hunter2" not in str(caught.value)
        assert "MINIO_" in str(caught.value.hint)


def test_secrets_are_never_shown() -> None:
    config = load_config(None, {**PLAIN, "minio": "h:9000"}, SECRETS)
    for text in (repr(config), str(config), config.model_dump_json(), f"{config.model_dump()}"):
        assert "hunter2" not in text
    for field in ("http_upload_url", "docker_host", "otlp_endpoint"):
        with pytest.raises(ConfigError) as caught:
            load_config(None, {**PLAIN, field: "http://user:hunter2@host/upload"}, {})
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"result_store": "s3"}, "minio is missing, and result_store is s3"),
        ({"minio": "h:9000"}, "minio_access_key is missing, and result_store is s3"),
        ({"result_store": "http"}, "http_upload_url is missing, and result_store is http"),
    ],
)
def test_a_store_must_have_what_it_needs(flags: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(None, {**PLAIN, **flags}, {})


def test_every_setting_says_what_to_give() -> None:
    assert [name for name, field in NodeConfig.model_fields.items() if not field.description] == []


# ---- logging ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _restored_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler).__name__ == "_LibraryHandler"]:
        root.removeHandler(handler)


@pytest.mark.usefixtures("_restored_logging")
def test_json_logs_are_one_object_a_line_with_an_utc_instant() -> None:
    out = io.StringIO()
    configure_logging("info", "json", out)
    log = structlog.get_logger("test")
    log.debug("not.shown")
    log.info("image.pulled", image="busybox", text="two\nlines \ud800")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("step.failed")
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert (first["event"], first["level"], first["image"]) == ("image.pulled", "info", "busybox")
    assert first["timestamp"].endswith("Z")
    assert second["level"] == "error"
    assert "ValueError: broken" in second["exception"]


@pytest.mark.usefixtures("_restored_logging")
def test_console_logs_are_plain_text_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    configure_logging("debug", "console", out)
    structlog.get_logger("test").debug("image.pulled", image="busybox")
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("test").exception("step.failed")
    assert "\nTraceback (most recent call last):\n" in out.getvalue()
    assert "image.pulled" in out.getvalue()
    assert "image=busybox" in out.getvalue()
    assert "\x1b" not in out.getvalue()


@pytest.mark.usefixtures("_restored_logging")
def test_a_text_from_elsewhere_steers_no_terminal_that_shows_the_log() -> None:
    out = io.StringIO()
    configure_logging("info", "console", out)
    structlog.get_logger("test").info("task.refused", task_id="a\x1b]0;title\x07\x9b2J", message="two\nlines \x1b[2J")
    (line,) = out.getvalue().splitlines()
    assert line.isprintable()
    assert "task_id=a\\x1b]0;title\\x07\\x9b2J" in line


@pytest.mark.usefixtures("_restored_logging")
def test_warnings_of_libraries_come_out_in_the_same_form_once() -> None:
    out = io.StringIO()
    configure_logging("info", "json", io.StringIO())
    configure_logging("info", "json", out)
    logging.getLogger("urllib3").warning("retrying %s", "now")
    talkative = logging.getLogger("talkative")
    talkative.setLevel(logging.INFO)
    talkative.info("chatter")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("urllib3").exception("gave up")
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert (first["event"], first["logger"], first["message"]) == ("library.warning", "urllib3", "retrying now")
    assert (second["event"], second["message"]) == ("library.error", "gave up")
    assert "ValueError: broken" in second["exception"]


@pytest.mark.usefixtures("_restored_logging")
def test_a_stream_that_fails_never_ends_the_caller() -> None:
    out = io.StringIO()
    configure_logging("info", "json", out)
    out.close()
    structlog.get_logger("test").info("nobody.listens")
    full = Path("/dev/full").open("w")  # noqa: SIM115
    configure_logging("info", "json", full)
    structlog.get_logger("test").info("disk.full")
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.usefixtures("_restored_logging")
def test_a_pipe_that_nobody_empties_stops_nobody_and_what_it_lost_is_counted() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as tap, open(writer, "w", encoding="utf-8") as out:
        configure_logging("info", "json", out)
        for number in range(1000):
            structlog.get_logger("test").info("to.nobody", number=number, words="ü" * 1500)
        heard = tap.read(1 << 20)
        for _ in range(2):
            structlog.get_logger("test").info("heard.again")
        lines = [line for line in (heard + tap.read(1 << 20)).decode(errors="replace").splitlines() if line]
    events = [json.loads(line) for line in lines if line.endswith("}")]
    whole = [event["number"] for event in events if event["event"] == "to.nobody"]
    assert 0 < len(whole) < 1000
    assert whole == [*range(len(whole))]
    assert [event.get("count") for event in events[len(whole) :]] == [1000 - len(whole), None, None]
    assert events[-1]["event"] == "heard.again"


def test_logs_go_to_stderr_and_never_to_stdout() -> None:
    code = (
        "import structlog; from nodeservice.telemetry.logs import configure_logging;"
        "configure_logging(); structlog.get_logger().info('a.b')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == ""
    assert json.loads(run.stderr)["event"] == "a.b"


def test_serve_takes_the_engines_address_as_doctor_does() -> None:
    from typer.testing import CliRunner

    from nodeservice.cli import build_app

    ended = CliRunner().invoke(build_app(), ["serve", "--insecure", "--docker-host", "/no/url"])
    assert isinstance(ended.exception, ConfigError)
    assert ended.exception.field == "docker_host"


def test_an_option_whose_path_is_empty_does_not_mean_the_current_directory() -> None:
    from typer.testing import CliRunner

    from nodeservice.cli import build_app

    ended = CliRunner().invoke(build_app(), ["serve", "--insecure", "--state-dir", ""])
    assert isinstance(ended.exception, ConfigError)
    assert ended.exception.field == "state_dir"
