"""Composes the master from its parts, runs it, and takes it down in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
from collections.abc import Coroutine
from datetime import UTC, datetime

import grpc.aio
import structlog

from nodeservice.certificates import doubts_about
from nodeservice.errors import ConfigError, InvariantError, RequestError, TransientError
from nodeservice.listening import not_bound, server_options
from nodeservice.master.announce import announce
from nodeservice.master.checks import check_address, shown
from nodeservice.master.clock import MasterClock
from nodeservice.master.dialing import NodeDialer
from nodeservice.master.fault_points import armed
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.retention import Retention
from nodeservice.master.rows import State, Wanted
from nodeservice.master.scheduler import Scheduler
from nodeservice.master.service import MasterServicer
from nodeservice.master.settings import MasterSettings
from nodeservice.master.store import MasterStore, sqlite_url
from nodeservice.master.tasks import TaskBook
from nodeservice.master.uploads import ResultUploads
from nodeservice.service_manager import ServiceManager
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)

_WILDCARDS = ("0.0.0.0", "[::]", "::", "*", "")  # noqa: S104
_CALLS_GRACE_SECONDS = 2.0
_USABLE = "choose a directory that this user may write to"
_MOST_FILES = 65_536


class Master:
    """A running master: `await start()`, then `await stop()` once. A `start` that raises leaves nothing."""

    def __init__(self, settings: MasterSettings) -> None:
        self.settings = settings
        self.address = ""
        self.http_address: str | None = None
        self.broken = asyncio.Event()
        """Set when a part ended that never should; the master is then best restarted."""
        clock = MasterClock()
        state_dir = settings.state_dir.absolute()
        self._state_dir = state_dir
        self._results_dir = (settings.results_dir or state_dir / "results").absolute()
        self._store = armed(MasterStore(settings.database_url or sqlite_url(state_dir)), "store")
        self._dialer = NodeDialer(settings.dial_credentials)
        self._book = TaskBook(self._store, clock, node_retries=settings.node_loss_retries)
        self._nodes = NodeRegistry(
            self._store,
            self._dialer,
            clock,
            timeout_seconds=settings.heartbeat_timeout_seconds,
            gone_after_seconds=settings.gone_after_seconds,
        )
        self._scheduler = Scheduler(self._book, self._nodes, clock, settings.scheduler)
        self._uploads = ResultUploads(self._book, self._results_dir, push_limit_bytes=settings.push_limit_bytes)
        self._closing = contextlib.AsyncExitStack()

    async def start(self) -> None:
        async with contextlib.AsyncExitStack() as opened:
            self._take_state_dir(opened)
            opened.push_async_callback(self._store.close)
            await self._store.open()
            await self._book.load()
            await self._nodes.load()
            opened.push_async_callback(self._uploads.close)
            await self._open_results()
            opened.push_async_callback(self._dialer.close)
            await self._listen(opened)
            await self._listen_http(opened)
            self._spawn(opened, self._nodes.run(), "nodes")
            self._spawn(opened, self._scheduler.run(), "scheduler")
            self._spawn(opened, self._watch_certificates(), "certificates")
            if self.settings.finished_retention_seconds is not None:
                seconds, newest = self.settings.finished_retention_seconds, await self._book.newest(1, Wanted())
                known_ms = newest[0].queued_at_ms if newest else None
                parts = (self._book, self._nodes, self._store, MasterClock())
                retention = Retention(*parts, seconds=seconds, known_ms=known_ms)
                self._spawn(opened, retention.run(), "retention")
            if self.settings.nodes:
                self._announce(opened)
            self._closing = opened.pop_all()
        log.info(
            "master.ready",
            address=self.address,
            http_address=self.http_address,
            results_dir=str(self._results_dir),
            tls=self.settings.server_credentials is not None,
        )

    async def stop(self) -> None:
        """Take no more calls, let those under way end for 2 s, and close. The queue stays in the store."""
        await self._closing.aclose()
        log.info("master.stopped")

    async def come_round(self) -> None:
        await self._store.come_round()

    def standing(self) -> str:
        """How it stands, in one line for a person."""
        rows = self._book.open_rows()
        queued = sum(row.state is State.QUEUED for row in rows)
        views = self._nodes.views({})
        active = sum(is_active for _, is_active, _ in views)
        doubts = "".join(f"; {words}" for words in self._doubts().values())
        return f"{queued} tasks queued, {len(rows) - queued} with nodes; {active} of {len(views)} nodes active{doubts}"

    def _doubts(self) -> dict[str, str]:
        return doubts_about(self.settings.certificates, datetime.now(UTC))

    # ---- parts --------------------------------------------------------------------------------------------------------

    def _take_state_dir(self, opened: contextlib.AsyncExitStack) -> None:
        try:
            self._state_dir.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._state_dir / "master.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            words = f"state_dir {self._state_dir} cannot be used: {error.strerror}"
            raise ConfigError(words, field="state_dir", hint=_USABLE) from error
        opened.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TransientError(
                f"state_dir {self._state_dir} belongs to a master that is running",
                reason="STATE_DIR_IN_USE",
                field="state_dir",
                hint="stop it, or give this one its own directory",
            ) from error

    async def _open_results(self) -> None:
        try:
            await self._uploads.open()
        except OSError as error:
            words = f"results_dir {self._results_dir} cannot be used: {error.strerror}"
            raise ConfigError(words, field="results_dir", hint=_USABLE) from error

    async def _listen(self, opened: contextlib.AsyncExitStack) -> None:
        host, _ = _split(self.settings.listen, "listen")
        server = grpc.aio.server(options=server_options())
        servicer = MasterServicer(
            book=self._book,
            nodes=self._nodes,
            scheduler=self._scheduler,
            uploads=self._uploads,
            certified=self.settings.certified_worker_ids,
        )
        pb_grpc.add_MasterWorkerServicer_to_server(servicer, server)
        try:
            if self.settings.server_credentials is None:
                port = server.add_insecure_port(self.settings.listen)
            else:
                port = server.add_secure_port(self.settings.listen, self.settings.server_credentials)
        except RuntimeError as error:
            raise not_bound("listen", self.settings.listen) from error
        await server.start()
        opened.push_async_callback(server.stop, _CALLS_GRACE_SECONDS)
        self.address = f"{host}:{port}"

    async def _listen_http(self, opened: contextlib.AsyncExitStack) -> None:
        if self.settings.http_listen is None:
            return
        from nodeservice.master.upload_http import UploadEndpoint

        host, port = _split(self.settings.http_listen, "http_listen")
        endpoint = UploadEndpoint(
            self._uploads, limit_bytes=self.settings.http_limit_bytes, certified=self.settings.certified_worker_ids
        )
        opened.push_async_callback(endpoint.close)
        try:
            bound = await endpoint.start(host.strip("[]"), port, self.settings.http_tls)
        except OSError as error:
            raise not_bound("http_listen", self.settings.http_listen) from error
        self.http_address = f"{host}:{bound}"

    async def _watch_certificates(self) -> None:
        """Until cancelled; what is doubtful is said once a day."""
        while True:
            for name, words in self._doubts().items():
                log.warning("certificate.doubtful", name=name, words=words)
            await asyncio.sleep(86400)

    def _announce(self, opened: contextlib.AsyncExitStack) -> None:
        addresses = tuple(map(_node_address, self.settings.nodes))
        advertised = self.settings.advertise or self.address
        if _split(advertised, "advertise")[0] in _WILDCARDS:
            raise ConfigError(
                f"nodes cannot dial {advertised}", field="advertise", hint="give --advertise HOST:PORT as nodes see it"
            )
        work = announce(
            addresses,
            self._dialer,
            master_id=advertised,
            master_address=advertised,
            every_seconds=self.settings.announce_seconds,
        )
        self._spawn(opened, work, "announce")

    def _spawn(self, opened: contextlib.AsyncExitStack, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)

        def ended(done: asyncio.Task[None]) -> None:
            if not done.cancelled():
                log.critical("master.part_ended", part=name, error=repr(done.exception()))
                self.broken.set()

        async def end() -> None:
            task.cancel()
            await asyncio.wait({task})

        task.add_done_callback(ended)
        opened.push_async_callback(end)


async def serve_master(settings: MasterSettings, manager: ServiceManager | None = None) -> None:
    """Run until SIGTERM or SIGINT; `manager` is told when it is ready and that it gets on.

    Raises ConfigError or TransientError (no database, no port) when it can't start, InvariantError when a part broke.
    """
    manager = manager or ServiceManager()
    _allow_files()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    master = Master(settings)
    await master.start()
    ends = [asyncio.create_task(stop.wait()), asyncio.create_task(master.broken.wait())]
    manager.ready(master.standing())
    try:
        async with manager.watching(master.come_round, master.standing):
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        manager.stopping("stops; the queue stays in the store")
        for end in ends:
            end.cancel()
        await master.stop()
    if master.broken.is_set():
        raise InvariantError("a part of the master ended by itself; see the log")


def _allow_files() -> None:
    """As many as are allowed: each node takes two, one for each direction."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _MOST_FILES if most == resource.RLIM_INFINITY else min(most, _MOST_FILES)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, most))


def _split(address: str, field: str) -> tuple[str, int]:
    """Host and port of an address to listen on; the host may be empty or a wildcard, the port 0."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port[:6]) > 65535:
        option = field.replace("_", "-")
        raise ConfigError(f"--{option} is {shown(address)}", field=field, hint="give HOST:PORT, such as 0.0.0.0:50051")
    return host, int(port)


def _node_address(text: str) -> str:
    """With its port: one that is forgotten would be somebody else's, and dialled for ever."""
    try:
        address = check_address("node", text, default_port=0)
    except RequestError as error:
        raise ConfigError(
            f"--node is {shown(text)}", field="node", hint="give HOST:PORT, such as gpu1:50052"
        ) from error
    return address
