"""Fault points around calls of every kind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from nodeservice.errors import ConfigError, TransientError
from nodeservice.fault_points import VARIABLE, FaultTable


class Port:
    def __init__(self) -> None:
        self.reached: list[str] = []

    async def waits(self) -> str:
        self.reached.append("waits")
        return "waited"

    def answers_later(self) -> Awaitable[str]:
        """As a gRPC stub's method: a plain call whose answer is waited for."""
        self.reached.append("answers_later")
        return asyncio.get_running_loop().create_task(self.waits())

    def blocks(self) -> str:
        self.reached.append("blocks")
        return "blocked"


def table() -> FaultTable:
    return FaultTable({"port": ("waits", "answers_later", "blocks")})


def test_without_the_variable_the_port_is_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    port = Port()
    assert table().armed(port, "port") is port


@pytest.mark.parametrize("call", ["waits", "answers_later", "blocks"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_call_of_any_kind_fails_before_or_after_it_was_made(
    call: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f"port.{call}.{when}:fail:2")
    port = Port()
    watched = table().armed(port, "port")

    async def made() -> object:
        answer = getattr(watched, call)()
        return await answer if isinstance(answer, Awaitable) else answer

    assert await made() in ("waited", "blocked")
    with pytest.raises(TransientError):
        await made()
    assert port.reached.count(call) == (1 if when == "before" else 2)
    assert await made() in ("waited", "blocked"), "it acts once"


def test_a_point_that_does_not_exist_is_refused_with_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "port.nothing.after:kill")
    with pytest.raises(ConfigError, match=r"port\.waits\.before"):
        table().armed(Port(), "port")
