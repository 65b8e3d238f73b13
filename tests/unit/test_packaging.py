"""What a package is made from: units, default configuration, maintainer scripts, the wheel, the list of components."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from nodeservice import __version__, build_info
from nodeservice.cli import build_app
from nodeservice.config import load_config
from nodeservice.limits.slices import SlicePlaces
from tests.unit.test_house import ROOT, locked

PACKAGING = ROOT / "packaging"
UNITS = sorted(path.name for path in (PACKAGING / "systemd").iterdir() if path.suffix in {".service", ".slice"})
SCRIPTS = sorted([*PACKAGING.glob("deb/p*"), *ROOT.glob("tools/*.sh")])


def unit(name: str) -> dict[str, dict[str, list[str]]]:
    """Section → key → values, since a key may stand there again."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in (PACKAGING / "systemd" / name).read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return found


# ---- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_each_line_of_a_unit(name: str, tmp_path: Path) -> None:
    """In a root directory of its own, with stand-ins for what the units name, and none of this machine's."""
    units, program = tmp_path / "usr/lib/systemd/system", tmp_path / "usr/bin/nodeservice"
    shutil.copytree(PACKAGING / "systemd", units)
    for stand_in in ("sysinit", "basic", "shutdown", "multi-user", "network-online", "slices"):
        (units / f"{stand_in}.target").write_text("[Unit]\nDescription=Stand-in\nDefaultDependencies=no\n")
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    command = ["systemd-analyze", "verify", "--man=no", f"--root={tmp_path}", name]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_worker_is_kept_alive_and_its_end_is_not_that_of_its_tasks() -> None:
    service = unit("nodeservice.service")["Service"]
    assert service["Type"] == ["notify"]
    assert service["Restart"] == ["always"]
    assert service["KillMode"] == ["mixed"]
    assert unit("nodeservice.service")["Unit"].get("Requires") is None
    assert "docker.service" in unit("nodeservice.service")["Unit"]["After"][0].split()


@pytest.mark.parametrize("name", ["nodeservice.service", "nodeservice-master.service"])
def test_no_core_dump_takes_the_environment_of_tasks_away(name: str) -> None:
    assert unit(name)["Service"]["LimitCORE"] == ["1"], "0 does not keep the kernel from piping it to a program"


def test_no_worker_id_can_be_called_like_the_slice_of_the_service() -> None:
    """`nodeservice-NODE.slice` lies below nodeservice.slice, the service's own beside it."""
    (own,) = unit("nodeservice.service")["Service"]["Slice"]
    assert own in UNITS
    assert not own.startswith("nodeservice-")
    places = SlicePlaces("d")
    assert own not in places.of_node()


def test_no_slice_of_tasks_is_stopped_before_the_worker_and_the_engine_when_the_host_is() -> None:
    """systemd stops what sits in a slice that it stops: tasks would end under the eyes of both, as if by themselves."""
    for name in ("nodeservice.slice", "nodeservice-.slice.d/shutdown.conf"):
        assert unit(name)["Unit"]["DefaultDependencies"] == ["no"]


def test_what_the_kernel_keeps_for_the_worker_its_slice_has_too() -> None:
    """memory.min counts only as far as each ancestor has it."""
    service, above = unit("nodeservice.service")["Service"], unit("nodeserviced.slice")["Slice"]
    assert service["MemoryMin"] == above["MemoryMin"]


# ---- default configuration ----------------------------------------------------------------------------------------------


def commented_in(text: str) -> str:
    """The other choice that the file describes: its comments that are settings, instead of the settings."""
    lines = [line for line in text.splitlines() if line.startswith("# ") and '= "' in line]
    return "\n".join(line.removeprefix("# ") for line in lines)


def test_the_default_worker_is_open_to_its_own_machine_alone() -> None:
    config = load_config(PACKAGING / "config" / "node.toml", {}, {})
    assert (config.listen, config.insecure) == ("127.0.0.1:50052", True)
    assert config.state_dir == Path("/var/lib/nodeservice")


def test_what_the_workers_file_proposes_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(commented_in((PACKAGING / "config" / "node.toml").read_text()))
    config = load_config(file, {}, {})
    assert (config.tls_cert is None, config.insecure, config.master) == (False, False, "master.example.org:50051")


@pytest.mark.parametrize("as_proposed", [False, True])
def test_the_masters_file_holds_only_options_that_it_has(as_proposed: bool) -> None:
    text = (PACKAGING / "config" / "master.toml").read_text()
    keys = tomllib.loads(commented_in(text) if as_proposed else text)
    assert keys["listen"] == ("0.0.0.0:50051" if as_proposed else "127.0.0.1:50051")
    assert keys.get("insecure", False) is not as_proposed
    (command,) = [found for found in build_app().registered_commands if found.name == "master"]
    assert command.callback is not None
    assert set(keys) <= set(command.callback.__annotations__)


@pytest.mark.parametrize(("name", "variables"), [("node.env", 2), ("master.env", 1)])
def test_files_for_secrets_come_without_any(name: str, variables: int) -> None:
    lines = (PACKAGING / "config" / name).read_text().splitlines()
    assert all(line.startswith("#") for line in lines)
    assert sum("=" in line and line[2:3].isupper() and " " not in line[2:] for line in lines) == variables


# ---- scripts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_shell_script_is_one(script: Path) -> None:
    ran = subprocess.run(["sh", "-n", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_purge_keeps_stored_results_and_removes_all_else(tmp_path: Path) -> None:
    """`remove_state` of postrm, on a directory of its own."""
    script = (PACKAGING / "deb" / "postrm").read_text()
    function = script[script.index("remove_state() {") :].partition("\n}\n")[0] + "\n}\n"
    with_results, without = tmp_path / "with", tmp_path / "without"
    for state in (with_results, without):
        for name in ("tasks/t.1/results", "logs", "results", "salvage"):
            (state / name).mkdir(parents=True)
        (state / "journal.sqlite").touch()
    (with_results / "results" / "t").mkdir()
    for state in (with_results, without, tmp_path / "never"):
        subprocess.run(["sh", "-eu", "-c", f'{function}\nremove_state "$1"', "sh", state], check=True)
    assert [path.relative_to(with_results).as_posix() for path in with_results.rglob("*")] == ["results", "results/t"]
    assert not without.exists()


# ---- what was built from what -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would hand to somebody, with one commit of its own."""
    copy = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("nodeservice/", "setup.py", "pyproject.toml", "README.md", "LICENSE", ".gitignore")):
            if not (ROOT / name).is_file():
                continue
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    git(copy, "init", "-q")
    git(copy, "add", ".")
    git(copy, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "all")
    return copy


def git(place: Path, *words: str) -> str:
    alone = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "PATH": os.environ["PATH"]}
    ran = subprocess.run(["git", "-C", place, *words], capture_output=True, text=True, check=True, env=alone)
    return ran.stdout.strip()


def test_a_checkout_tells_its_commit_and_whether_it_was_changed(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert build_info.commit_of(checkout) == head
    readme = checkout / "README.md"
    text = readme.read_text()
    readme.write_text("other")
    assert build_info.commit_of(checkout) == f"{head}-modified"
    readme.write_text(text)


def test_where_there_is_no_history_the_commit_is_unknown(tmp_path: Path) -> None:
    assert build_info.commit_of(tmp_path) == build_info.UNKNOWN
    (tmp_path / ".git").mkdir()
    assert build_info.commit_of(tmp_path) == build_info.UNKNOWN


def test_the_wheel_holds_the_whole_package_and_knows_its_commit(checkout: Path, tmp_path: Path) -> None:
    head = git(checkout, "rev-parse", "--short=12", "HEAD")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "-qq",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--no-index", "-w", tmp_path, checkout], check=True, timeout=120)
    (wheel,) = tmp_path.glob("nodeservice-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        noted = archive.read(f"nodeservice/{build_info.COMMIT_FILE}").decode().strip()
    tracked = set(git(checkout, "ls-files", "nodeservice").splitlines())
    assert names == tracked | {f"nodeservice/{build_info.COMMIT_FILE}"}
    assert noted == head
    program = "import sys; sys.path.insert(0, sys.argv[1]); from nodeservice.build_info import commit; print(commit())"
    asked = subprocess.run(
        [sys.executable, "-P", "-c", program, wheel], capture_output=True, text=True, check=True, cwd="/"
    )
    assert asked.stdout.strip() == head


def test_version_and_commit_are_told() -> None:
    ran = subprocess.run([sys.executable, "-m", "nodeservice", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"nodeservice {__version__} ({build_info.commit()})\n"


def components(version: str) -> Any:
    ran = subprocess.run(
        [sys.executable, ROOT / "tools" / "sbom.py", version, "abc"],
        capture_output=True, text=True, check=True, env=os.environ | {"SOURCE_DATE_EPOCH": "0"},
    )  # fmt: skip
    return json.loads(ran.stdout)


def test_the_list_of_components_is_the_lock_file() -> None:
    told = components("1.2.3")
    pins = locked("runtime.txt")
    here = {name: count for name, (version, count) in pins.items() if "sys_platform" not in version}
    found = {part["name"]: len(part["hashes"]) for part in told["components"]}
    assert {name: found.get(name) for name in here} == here
    assert set(found) <= set(pins)
    own = told["metadata"]["component"]
    assert (own["version"], own["properties"]) == ("1.2.3", [{"name": "commit", "value": "abc"}])


def test_each_component_is_there_because_something_needs_it() -> None:
    told = components("1.2.3")
    edges = {entry["ref"]: entry["dependsOn"] for entry in told["dependencies"]}
    seen: set[str] = set()
    waiting = [told["metadata"]["component"]["bom-ref"]]
    while waiting:
        reference = waiting.pop()
        if reference not in seen:
            seen.add(reference)
            waiting += edges[reference]
    assert {part["bom-ref"] for part in told["components"]} | {"pkg:pypi/nodeservice@1.2.3"} == seen


def test_the_list_of_components_is_the_same_each_time() -> None:
    assert components("1") == components("1")
