"""Registry credentials from whatever the Docker configuration and its helpers say."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeservice.runtime import credentials
from nodeservice.runtime.credentials import registry_auth


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Docker configuration's directory, in which helpers are looked for too."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def configure(home: Path, text: str, helper: str = "") -> None:
    (home / "config.json").write_text(text)
    program = home / "docker-credential-own"
    program.write_text(f"#!/bin/sh\n{helper}\n")
    program.chmod(0o755)


def told(repository: str) -> dict[str, str]:
    header = registry_auth(repository).header
    assert header is not None
    found: dict[str, str] = json.loads(base64.urlsafe_b64decode(header))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "[]", "null", '"x"', '{"auths": 5}', '{"auths": {"r.example": {"auth": 5}}}',
        '{"auths": {"r.example": {"auth": "!"}}}',
        '{"credsStore": 5}', '{"credHelpers": {"r.example": 5}}', '{"credsStore": "not-installed"}',
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_told_and_stops_nothing(home: Path, text: str) -> None:
    configure(home, text)
    found = registry_auth("r.example/a/b")
    assert found.header is None
    assert found.trouble


@pytest.mark.parametrize("helper", ["echo '[]'", "echo 5", "true", "echo '{}'", r"printf '\377'", "echo oops; exit 1"])
def test_a_helper_that_makes_no_sense_is_told_and_stops_nothing(home: Path, helper: str) -> None:
    configure(home, '{"credsStore": "own"}', helper)
    found = registry_auth("r.example/a/b")
    assert found.header is None
    assert found.trouble


def test_a_helper_that_hangs_is_ended_with_all_that_it_started(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_HELPER_SECONDS", 0.5)
    configure(home, '{"credsStore": "own"}', "sleep 3600 & wait")
    monkeypatch.setenv("HELPER_MARK", mark := f"mark-{uuid.uuid4().hex}")
    assert "did not answer within 0.5 s" in registry_auth("r.example/a/b").trouble
    give_up = time.monotonic() + 60
    while left := [*living_with(mark)]:
        assert time.monotonic() < give_up, f"still there: {left}"
        time.sleep(0.02)


def living_with(mark: str) -> Iterator[str]:
    """Processes, but this one, that have it in their environment; of dead ones the kernel shows none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.name != str(os.getpid()) and mark.encode() in (process / "environ").read_bytes():
                yield process.name


def test_what_a_helper_knows_comes_first_and_what_it_does_not_know_may_be_in_the_file(home: Path) -> None:
    auth = base64.b64encode(b"user:in-the-file").decode()
    text = json.dumps({"auths": {"r.example": {"auth": auth}}, "credsStore": "own"})
    configure(home, text, """read server; echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"$server\\"}\"""")
    assert (told("r.example/a/b")["username"], told("r.example/a/b")["password"]) == ("u", "r.example")
    assert told("busybox")["password"] == "https://index.docker.io/v1/"
    configure(home, text, "echo credentials not found in native keychain; exit 1")
    assert told("r.example/a/b")["password"] == "in-the-file"
    configure(home, text, """echo '{"Username": "<token>", "Secret": "s"}'""")
    assert told("r.example/a/b")["identitytoken"] == "s"


def test_a_registry_that_nothing_is_known_of_is_asked_without_credentials(home: Path) -> None:
    configure(home, "{}")
    found = registry_auth("r.example/a/b")
    assert (found.header, found.trouble) == (None, "")
