"""The stand-in for NVIDIA's hook, as far as it can be tried without a container: what it makes of an environment."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeservice.testing.false_driver import FalseDriver, Machine
from nodeservice.testing.false_driver import hook as hook_module
from nodeservice.testing.false_driver.hook import calls, hook_script, main

NO_SUCH = "GPU-00000000-0000-0000-0000-000000000000"


class Bundle:
    """A container that is about to start, whose files lie in a folder, and whose first process is this one."""

    def __init__(self, path: Path, drivers: Path) -> None:
        self.path, self.drivers, self.record = path, drivers, path / "record"
        (path / "rootfs" / "dev").mkdir(parents=True)
        self.record.mkdir()

    def started(self, monkeypatch: pytest.MonkeyPatch, *env: str) -> None:
        config = {"process": {"env": list(env)}, "root": {"path": str(self.path / "rootfs")}}
        (self.path / "config.json").write_text(json.dumps(config))
        state = {"id": "c1", "pid": os.getpid(), "bundle": str(self.path)}
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(state)))
        main(["--drivers", str(self.drivers), "--record", str(self.record), "prestart"])

    @property
    def listing(self) -> list[str]:
        done = subprocess.run(
            [self.path / "rootfs/usr/bin/nvidia-smi", "-L"], capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """The nodes that were asked for, in the place of making and allowing them, which needs a container and root."""
    nodes: dict[str, tuple[int, int]] = {}
    monkeypatch.setattr(hook_module, "_make", lambda node, number: nodes.update({node.name: number}))
    monkeypatch.setattr(hook_module, "_allow", lambda _pid, _numbers: "")
    monkeypatch.setattr(hook_module, "_characters", lambda: iter([(1, "mem"), (511, "taken")]))
    return nodes


@pytest.fixture
def machine(tmp_path: Path, false_driver_cache: Path) -> Callable[[str | Machine], FalseDriver]:
    return lambda name: FalseDriver.build(tmp_path / "drivers" / "one", name, cache=false_driver_cache)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path / "bundle", tmp_path / "drivers")


Build = Callable[[str | Machine], FalseDriver]
Nodes = dict[str, tuple[int, int]]


def test_a_container_gets_the_nodes_of_exactly_the_gpus_that_its_last_word_names(
    machine: Build, bundle: Bundle, made: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = machine("h200x8").gpus
    bundle.started(monkeypatch, "NVIDIA_VISIBLE_DEVICES=all", f"NVIDIA_VISIBLE_DEVICES={gpus[6]},{gpus[2]}")
    assert made == {"nvidia6": (195, 6), "nvidia2": (195, 2), "nvidiactl": (195, 255), "nvidia-uvm": (510, 0)}
    assert bundle.listing == [
        f"GPU 0: NVIDIA H200 (UUID: {gpus[6]})",
        f"GPU 1: NVIDIA H200 (UUID: {gpus[2]})",
    ]
    (call,) = calls(bundle.record)
    assert (call.container_id, call.uuids) == ("c1", (gpus[6], gpus[2]))


def test_a_mig_device_comes_with_the_node_of_its_gpu_and_is_listed_below_it(
    machine: Build, bundle: Bundle, made: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = machine("h200-mig")
    mig, gpu = next(iter(driver.migs.items()))
    bundle.started(monkeypatch, f"NVIDIA_VISIBLE_DEVICES={mig}")
    assert set(made) == {f"nvidia{driver.facts(gpu)['minor']}", "nvidiactl", "nvidia-uvm"}
    first, second = bundle.listing
    assert gpu in first
    assert (mig in second, second.startswith("  MIG")) == (True, True)


@pytest.mark.parametrize("env", [(), ("NVIDIA_VISIBLE_DEVICES=void",), ("NVIDIA_VISIBLE_DEVICES=",)])
def test_a_container_that_names_none_gets_nothing_and_is_noted(
    machine: Build, bundle: Bundle, made: Nodes, monkeypatch: pytest.MonkeyPatch, env: tuple[str, ...]
) -> None:
    machine("h200x8")
    bundle.started(monkeypatch, *env)
    assert made == {}
    assert not (bundle.path / "rootfs/usr").exists()
    assert [call.uuids for call in calls(bundle.record)] == [()]


def test_a_gpu_that_no_machine_has_keeps_the_container_from_its_start(
    machine: Build, bundle: Bundle, made: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("h200x8")
    with pytest.raises(RuntimeError, match=NO_SUCH):
        bundle.started(monkeypatch, f"NVIDIA_VISIBLE_DEVICES={NO_SUCH}")
    assert (made, calls(bundle.record)) == ({}, [])


def test_on_a_host_with_a_real_driver_nothing_is_handed_out(
    machine: Build, bundle: Bundle, made: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = machine("h200x8").gpus
    monkeypatch.setattr(hook_module, "_characters", lambda: iter([(195, "nvidia-frontend")]))
    with pytest.raises(RuntimeError, match="real NVIDIA driver"):
        bundle.started(monkeypatch, f"NVIDIA_VISIBLE_DEVICES={gpus[0]}")
    assert made == {}


def test_the_script_for_an_engines_path_runs_the_hook_and_does_nothing_for_other_stages(tmp_path: Path) -> None:
    script = tmp_path / "hook"
    script.write_text(hook_script(tmp_path, tmp_path))
    script.chmod(0o755)
    assert subprocess.run([script, "poststart"], stdin=subprocess.DEVNULL, check=False, timeout=60).returncode == 0
    done = subprocess.run([script, "prestart"], input="{}", capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
