"""Named points at which a test can kill this process, freeze it, or fail a call. Without the variable, nothing of it exists.

`TEST_FAULT_POINT=runtime.create.after:kill` ends the process by SIGKILL when the engine has just made a container and nobody
knows of it yet; `:kill:3` at the third time; `:stop` freezes it by SIGSTOP; `:fail` lets the call fail as if its other side
were away. The points lie around calls that leave something outside of this process: no moment in between could be told
apart from these by a crash. Which calls those are is said where a process is composed.
"""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from nodeservice.errors import ConfigError, TransientError

T = TypeVar("T")

VARIABLE = "TEST_FAULT_POINT"
ACTIONS = ("kill", "stop", "fail")


class FaultPoint:
    """The one that is armed."""

    def __init__(self, text: str, points: Sequence[str]) -> None:
        """`POINT:ACTION[:COUNT]`; raises ConfigError naming what is wrong."""
        name, _, rest = text.partition(":")
        action, _, count = rest.partition(":")
        if name not in points:
            raise ConfigError(f"{VARIABLE} names {name!r}", field=VARIABLE, hint=f"use one of {', '.join(points)}")
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


class FaultTable:
    """The calls of one process that can be made to fail, by port."""

    def __init__(self, calls: Mapping[str, tuple[str, ...]]) -> None:
        self._calls = calls
        self._point: FaultPoint | None = None
        self.points = tuple(
            f"{port}.{call}.{when}" for port, names in calls.items() for call in names for when in ("before", "after")
        )

    def armed(self, port: T, name: str) -> T:
        """The port itself, unless the variable is set. Raises ConfigError for a point that does not exist."""
        text = os.environ.get(VARIABLE)
        if not text:
            return port
        if self._point is None:  # one for all ports, since it counts
            self._point = FaultPoint(text, self.points)
        watched: Any = _Watched(port, name, self._calls[name], self._point)
        return watched  # type: ignore[no-any-return]


class _Watched:
    """A port whose calls pass the points on their way out and back."""

    def __init__(self, port: Any, name: str, calls: tuple[str, ...], point: FaultPoint) -> None:
        self._port = port
        self._name = name
        self._calls = calls
        self._point = point

    def __getattr__(self, call: str) -> Any:
        target = getattr(self._port, call)
        if call not in self._calls:
            return target
        return self._passing(f"{self._name}.{call}", target)

    def _passing(self, name: str, target: Callable[..., Any]) -> Callable[..., Any]:
        async def passing(*args: Any, **kwargs: Any) -> Any:
            self._point.reached(f"{name}.before")
            return await self._ending(name, target(*args, **kwargs))

        def calling(*args: Any, **kwargs: Any) -> Any:
            self._point.reached(f"{name}.before")
            answer = target(*args, **kwargs)
            if inspect.isawaitable(answer):
                return self._ending(name, answer)
            self._point.reached(f"{name}.after")
            return answer

        return passing if inspect.iscoroutinefunction(target) else calling

    async def _ending(self, name: str, answer: Awaitable[T]) -> T:
        ended = await answer
        self._point.reached(f"{name}.after")
        return ended
