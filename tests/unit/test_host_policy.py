"""Settings that would make a node useless, seen beside the host it runs on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nodeservice.config import load_config
from nodeservice.core.model import GIB, Resources
from nodeservice.daemon.host_policy import check_reserve, doubts
from nodeservice.daemon.node import build
from nodeservice.errors import ConfigError

HOST = Resources(cpu_milli=4000, memory_bytes=8 * GIB, disk_bytes=100 * GIB)


@pytest.mark.parametrize("name", ["cpu_milli", "memory_bytes", "disk_bytes"])
def test_a_reserve_of_all_that_there_is_is_an_error_that_tells_how_much_that_is(name: str) -> None:
    there = getattr(HOST, name)
    for kept in (there, 10 * there):
        config = load_config(None, {"insecure": True, f"reserve_{name}": kept}, {})
        with pytest.raises(ConfigError, match=f"reserve_{name} = {kept} .*: this host has {there} ") as caught:
            check_reserve(config, HOST)
        assert caught.value.field == f"reserve_{name}"
    check_reserve(load_config(None, {"insecure": True, f"reserve_{name}": there - 1}, {}), HOST)
    check_reserve(load_config(None, {"insecure": True}, {}), replace(HOST, **{name: 0}))


async def test_a_node_does_not_start_with_a_reserve_of_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The process of such a node ends. Here its thread for GPUs would stay, where another test has loaded a false driver.
    monkeypatch.setattr("nodeservice.gpu.nvml.can_load", lambda _library: False)
    flags = {"insecure": True, "state_dir": tmp_path / "state", "docker_host": "unix:///nowhere.sock"}
    with pytest.raises(ConfigError, match="reserve_memory_bytes = 999999999999999 leaves nothing"):
        await build(load_config(None, {**flags, "reserve_memory_bytes": 999_999_999_999_999}, {}))


async def test_a_node_that_tells_of_itself_too_seldom_says_so(tmp_path: Path) -> None:
    flags = {"insecure": True, "state_dir": tmp_path / "state", "docker_host": "unix:///nowhere.sock"}
    node = await build(load_config(None, {**flags, "heartbeat_seconds": 500}, {}))
    try:
        (words,) = node.driver.warnings.values()
        assert "heartbeat_seconds = 500" in words
        assert "--heartbeat-timeout" in words
    finally:
        await node.close()
    assert doubts(load_config(None, {"insecure": True, "heartbeat_seconds": 29}, {})) == {}


def test_a_node_that_speaks_tls_with_anybody_says_so() -> None:
    pair = {"tls_cert": Path("/n.pem"), "tls_key": Path("/n.key"), "listen": "10.0.0.7:50052"}
    (words,) = doubts(load_config(None, pair, {})).values()
    assert "tls_ca is not set, so whoever reaches 10.0.0.7:50052 may assign tasks" in words
    assert doubts(load_config(None, pair | {"tls_ca": Path("/ca.pem")}, {})) == {}
