"""Tells whether the engine took a container with it when it went: from its process, and from when it answered.

What Docker does (20.10, tried; daemon/daemon.go, cmd/dockerd/daemon.go): one that is shut down closes its socket first and
then ends its containers, while streams that are open go on. One that was killed leaves them running, and the next ends them
before it serves. With live restore neither happens. What a new engine finds gone it writes down as ended just then: with
code 255 (a power cut), and with code 0 where the former was killed after it had taken the exit from containerd and before
it noted it. So an exit code alone tells nothing: what ended while there was no engine at all ended by itself.
"""

from __future__ import annotations

import asyncio
import http.client
import os
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from nodeservice.errors import TransientError
from nodeservice.http_wire import read_body, read_head, send_request
from nodeservice.ports import ContainerState
from nodeservice.runtime.endpoint import Endpoint
from nodeservice.runtime.engine_process import peer_pid
from nodeservice.runtime.errors import engine_unavailable
from nodeservice.threads import Threads

log = structlog.get_logger(__name__)

_STARTED = 19
"""Field 22 of /proc/PID/stat, starttime, counted behind the name, which may hold spaces and parentheses (proc(5))."""
_SLACK = timedelta(seconds=0.25)
_LONGEST_START = timedelta(seconds=60)
_LONGEST_CLEARING = timedelta(minutes=10)
"""Of what a former engine had left running, where nobody saw how long it took."""
_ENDED_BY_SIGNAL = (128 + 15, 128 + 9)
_LOST = 255
_FOUND_GONE = (_LOST, 0)
"""What a new engine writes down for what it finds gone. A task that ends well by itself just then looks the same."""
_REMEMBERED = 16
_THREADS = 4
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStart:
    """One process of the engine. `started_at` is by the clock that the engine writes its instants with."""

    pid: int
    ticks: int
    started_at: datetime = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Absence:
    """The engine could not be asked. `heard_at`: when it last could before; `gone_at`: when its process had ended.

    `now`: the process that serves since `back_at`; None where it cannot be seen, and then nor could the one before.
    """

    heard_at: datetime
    lost_at: datetime
    gone_at: datetime | None
    now: EngineStart | None
    back_at: datetime
    live_restore: bool

    def took(self, state: ContainerState, *, live_restore: bool) -> bool:
        """`live_restore` is the setting of the engine that came back; that of the former is known."""
        started_at, finished_at, code = state.started_at, state.finished_at, state.exit_code
        if started_at is None or finished_at is None or started_at > self.back_at:
            return False
        ended_by_signal = code in _ENDED_BY_SIGNAL
        if self.now is None:
            window = self.lost_at - _SLACK <= finished_at <= self.back_at + _SLACK
            return window and ended_by_signal and not self.live_restore
        if started_at >= self.now.started_at:
            return False
        if (
            self.now.started_at - _SLACK
            <= finished_at
            <= min(self.back_at, self.now.started_at + _LONGEST_START) + _SLACK
        ):
            return not live_restore or code in _FOUND_GONE
        # From the moment that it took no connections any more to its end; when that moment was noticed may be late.
        noticed_at = min(self.heard_at, self.lost_at) if ended_by_signal else self.lost_at
        if self.gone_at is None:
            return ended_by_signal and not self.live_restore and noticed_at <= finished_at < self.now.started_at
        return not self.live_restore and noticed_at - _SLACK <= finished_at <= self.gone_at + _SLACK


class EngineLife:
    """Belongs to one event loop. `look` at least when a container was seen to have ended, before `took` is asked."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._threads = Threads(_THREADS, name="engine-look")
        self._process: EngineStart | None = None
        self._first: EngineStart | None = None
        self._first_at: datetime | None = None
        self._heard_at: datetime | None = None
        self._lost_at: datetime | None = None
        self._silent_at: datetime | None = None
        """A connection of then was taken, perhaps by systemd, and got no answer."""
        self._gone_at: datetime | None = None
        self._absences: deque[Absence] = deque(maxlen=_REMEMBERED)
        self._watched: int | None = None
        self.live_restore = False
        """As the engine last said of itself."""
        self.host_stops: Mapping[str, datetime] = {}
        """Containers that ran when the host was shut down, each with when that began."""

    @property
    def is_known(self) -> bool:
        return self._first_at is not None

    async def look(self) -> None:
        """Ask whether it is there. Raises as `ask` does."""
        await self.ask(lambda: "/_ping")

    async def ask(self, path: Callable[[], str]) -> tuple[int, bytes]:
        """Ask it something over a fresh connection: the status and the body of its answer.

        `path` may block. Raises what it raises, and TransientError while the engine takes no connection or does not answer.
        """
        asked_at = _now()
        try:
            process, status, body = await self._threads.run(lambda: self._ask(path))
        except TimeoutError as error:
            self._silent_at = self._silent_at or asked_at
            raise TransientError("the container engine does not answer", reason="ENGINE_TIMEOUT") from error
        except (OSError, http.client.HTTPException) as error:
            self._lost_at = self._lost_at or asked_at
            raise engine_unavailable(error) from error
        self._note(process, asked_at)
        return status, body

    def took(self, state: ContainerState) -> bool:
        """Whether this container, which has ended, was ended by the engine's own going or coming."""
        if any(absence.took(state, live_restore=self.live_restore) for absence in self._absences):
            return True
        before_us = self._first_at is not None and state.finished_at is not None and state.finished_at < self._first_at
        return before_us and self._took_unseen(state)

    def fell_with_the_host(self, state: ContainerState) -> bool:
        """Whether this container, which has ended, ran when its host was shut down.

        Then its exit code may be any: one that ends well when it is told to has not come to its end.
        """
        stopped_at = self.host_stops.get(state.id)
        return stopped_at is not None and state.finished_at is not None and stopped_at <= state.finished_at

    def was_away(self, state: ContainerState) -> bool:
        """Whether this container, which has ended, had another engine at its start than after its end.

        What it printed while there was none is lost where it ended before the next one came, and a killed one may take some
        lines with it (Docker 20.10, tried).
        """
        started_at, finished_at = state.started_at, state.finished_at
        if started_at is None or finished_at is None:
            return False
        if self._first is not None and started_at < self._first.started_at:
            return True
        # When it went may have been noticed late: it was there for certain only as long as it was heard.
        return any(
            started_at < absence.back_at and min(absence.heard_at, absence.lost_at) <= finished_at
            for absence in self._absences
        )

    def close(self) -> None:
        self._unwatch()
        self._threads.close()

    def _took_unseen(self, state: ContainerState) -> bool:
        """It had ended when we first looked, perhaps with an engine before the one that we found."""
        if self._first is None or state.started_at is None or state.finished_at is None:
            return False
        began_at = self._first.started_at
        if state.started_at >= began_at:
            return False
        if state.finished_at >= began_at - _SLACK:
            after_start = state.finished_at - began_at
            if self.live_restore:
                return after_start <= _LONGEST_START and state.exit_code in _FOUND_GONE
            # One that ran on for longer with this engine began after it, by a clock that was set forward since.
            return after_start <= _LONGEST_CLEARING or state.exit_code in (*_ENDED_BY_SIGNAL, _LOST)
        # An engine between its end and ours may have found it gone: then 255 is no exit code of its own.
        return state.exit_code == _LOST or (not self.live_restore and state.exit_code in _ENDED_BY_SIGNAL)

    def _note(self, process: EngineStart | None, asked_at: datetime) -> None:
        now = _now()
        if self._first_at is None or self._heard_at is None:
            # A question that waited for an engine that was just starting was answered after that had put all in order.
            self._first, self._first_at = process, now
        elif process != self._process or (process is None and self._lost_at is not None):
            self._absences.append(
                Absence(
                    heard_at=self._heard_at,
                    lost_at=self._lost_at or self._silent_at or asked_at,
                    gone_at=self._gone_at,
                    now=process,
                    back_at=now,
                    live_restore=self.live_restore,
                )
            )
            log.warning("engine.restarted", away_since=self._absences[-1].lost_at.isoformat())
        if process != self._process:
            self._watch(process)
        # It may have answered at once, and this process have come to note it late.
        self._process, self._heard_at, self._lost_at, self._silent_at = process, asked_at, None, None

    def _watch(self, process: EngineStart | None) -> None:
        """Learn of its end from the kernel (pidfd_open(2)): the descriptor becomes readable then."""
        self._unwatch()
        self._gone_at = None
        if process is None:
            return
        with suppress(OSError):
            self._watched = os.pidfd_open(process.pid)
            asyncio.get_running_loop().add_reader(self._watched, self._has_gone)

    def _has_gone(self) -> None:
        self._gone_at = _now()
        self._unwatch()

    def _unwatch(self) -> None:
        if self._watched is not None:
            with suppress(RuntimeError):  # the loop was closed before us
                asyncio.get_running_loop().remove_reader(self._watched)
            os.close(self._watched)
            self._watched = None

    # ---- in a thread ----

    def _ask(self, path: Callable[[], str]) -> tuple[EngineStart | None, int, bytes]:
        """Blocks until it answers: one that is being started by a socket of systemd's is waited for."""
        target = path()
        with self._endpoint.connect(timeout_seconds=_ANSWER_SECONDS) as connection:
            connection.settimeout(_ANSWER_SECONDS)
            send_request(connection, "GET", target, fields={"Connection": "close"})
            with connection.makefile("rb") as reader:
                head = read_head(reader)
                body = read_body(reader, head)
            pid = None if self._endpoint.socket_path is None else peer_pid(connection)
            # The process that answers now may have been started by this very question.
            return None if pid is None else read_start(pid), head.status, body


def read_start(pid: int) -> EngineStart | None:
    """None for one that can't be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        up_seconds = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        ticks = int(stat.rpartition(b")")[2].split()[_STARTED])
    except (OSError, ValueError, IndexError):
        return None
    age_seconds = up_seconds - ticks / os.sysconf("SC_CLK_TCK")
    return EngineStart(pid=pid, ticks=ticks, started_at=_now() - timedelta(seconds=age_seconds))


def _now() -> datetime:
    return datetime.now(UTC)
