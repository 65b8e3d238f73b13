"""Named points at which a test can kill the node, freeze it, or fail a call. Without the variable, nothing of it exists.

`TEST_FAULT_POINT=runtime.create.after:kill` ends the process by SIGKILL when the engine has just made a container and nobody
knows of it yet; `:kill:3` at the third time; `:stop` freezes it by SIGSTOP; `:fail` lets the call fail as if its other side
were away. The points lie around each call through a port that leaves something outside of this process: no moment in
between could be told apart from these by a crash.
"""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from nodeservice.errors import ConfigError, TransientError

T = TypeVar("T")

VARIABLE = "TEST_FAULT_POINT"
_CALLS: Mapping[str, tuple[str, ...]] = {
    "journal": ("save", "forget"),
    "runtime": ("pull", "create", "start", "wait_exited", "stop", "kill", "remove", "list_owned"),
    "cgroups": ("prepare", "usage", "remove"),
    "disk": ("prepare", "remove"),
    "bundles": ("collect", "discard_kept"),
    "store": ("put",),
    "fallback": ("put",),
    "uplink": ("report",),
}
POINTS = tuple(
    f"{port}.{call}.{when}" for port, calls in _CALLS.items() for call in calls for when in ("before", "after")
)
ACTIONS = ("kill", "stop", "fail")


class FaultPoint:
    """The one that is armed."""

    def __init__(self, text: str) -> None:
        """`POINT:ACTION[:COUNT]`; raises ConfigError naming what is wrong."""
        name, _, rest = text.partition(":")
        action, _, count = rest.partition(":")
        if name not in POINTS:
            raise ConfigError(f"{VARIABLE} names {name!r}", field=VARIABLE, hint=f"use one of {', '.join(POINTS)}")
        if action not in ACTIONS or not (count or "1").isdecimal():
            raise ConfigError(
                f"{VARIABLE} is {text!r}", field=VARIABLE, hint="use POINT:kill, POINT:stop or POINT:fail"
            )
        self._name = name
        self._action = action
        self._left = int(count or 1)

    def reached(self, name: str) -> None:
        if name != self._name:
            return
        self._left -= 1
        if self._left != 0:
            return
        match self._action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case _:
                raise TransientError(f"{name} fails on request", reason="FAULT_INJECTED")


class _Watched:
    """A port whose calls pass the points on their way out and back."""

    def __init__(self, port: Any, name: str, point: FaultPoint) -> None:
        self._port = port
        self._name = name
        self._point = point

    def __getattr__(self, call: str) -> Any:
        target = getattr(self._port, call)
        if call not in _CALLS[self._name]:
            return target
        return self._passing(call, target)

    def _passing(self, call: str, target: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{self._name}.{call}"

        async def passing(*args: Any, **kwargs: Any) -> Any:
            self._point.reached(f"{name}.before")
            answer = await target(*args, **kwargs)
            self._point.reached(f"{name}.after")
            return answer

        def blocking(*args: Any, **kwargs: Any) -> Any:
            self._point.reached(f"{name}.before")
            answer = target(*args, **kwargs)
            self._point.reached(f"{name}.after")
            return answer

        return passing if inspect.iscoroutinefunction(target) else blocking


def armed(port: T, name: str) -> T:
    """The port itself, unless the variable is set."""
    point = _armed_point()
    if point is None:
        return port
    watched: Any = _Watched(port, name, point)
    return watched  # type: ignore[no-any-return]


_point: FaultPoint | None = None


def _armed_point() -> FaultPoint | None:
    """One for all ports, since it counts."""
    global _point  # noqa: PLW0603
    text = os.environ.get(VARIABLE)
    if text and _point is None:
        _point = FaultPoint(text)
    return _point
