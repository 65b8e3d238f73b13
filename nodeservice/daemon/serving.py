"""The daemon itself: start, signals, and the order of the shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Sequence

import grpc
import structlog

from nodeservice import __version__
from nodeservice.certificates import EXPIRED, EXPIRES, Term, doubts_about, read_terms
from nodeservice.config import NodeConfig
from nodeservice.core.model import Phase
from nodeservice.core.retry import Backoff
from nodeservice.daemon.measured import Measured
from nodeservice.daemon.node import Node, build, working
from nodeservice.daemon.settings import open_store, task_defaults
from nodeservice.daemon.standing import standing
from nodeservice.daemon.told import telling, told
from nodeservice.errors import ConfigError, NodeServiceError
from nodeservice.lifecycle.work import while_all_work
from nodeservice.ports import EngineFacts, ResultStore
from nodeservice.rpc.result_push import MasterPushResultStore
from nodeservice.rpc.server import NodeServicer, bind_server
from nodeservice.rpc.status import NodeStatus
from nodeservice.rpc.tls import channel_credentials, server_credentials
from nodeservice.rpc.uplink import MasterLink
from nodeservice.service_manager import ServiceManager, host_is_stopping
from nodeservice.telemetry.tracing import new_trace_ids

log = structlog.get_logger(__name__)

MASTER_NOTE = "master_address"
_LOOK_AT_CERTIFICATES_SECONDS = 3600.0
_STOP_SECONDS = 1.0
"""For calls that are under way at the end; followers of logs are cut off then and ask again."""


async def serve(
    config: NodeConfig, *, manager: ServiceManager | None = None, on_ready: Callable[[int], None] | None = None
) -> None:
    """Run the node until SIGTERM or SIGINT. `on_ready` gets the bound port.

    `manager` is told that the node is ready once it serves, or once all that it still waits for is the engine.
    """
    manager = manager or ServiceManager()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        stopping.set()
        manager.stopping("stops; containers that run now run on")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    node = await build(config)
    noting = asyncio.create_task(_note_stop_of_host(node, stopping), name="stop of the host")
    measured = Measured(node)
    try:
        measured.open()
        _credentials(config)  # what is wrong with them is not to be found only when the engine answers
        async with (
            telling(config.state_dir, lambda: told(node)),
            manager.watching(lambda: _come_round(node), lambda: standing(node)),
        ):
            facts = await _until(stopping, _engine(node, manager))
            if facts is not None:
                await _serve(node, facts, stopping, manager, on_ready, measured)
    finally:
        if not stopping.is_set():
            noting.cancel()
        await asyncio.gather(noting, return_exceptions=True)
        await asyncio.gather(node.close(), measured.close())
        log.info("node.stopped", worker_id=config.worker_id)


async def _note_stop_of_host(node: Node, stopping: asyncio.Event) -> None:
    """At once, beside all that is taken down: systemd gives a unit that stops so many seconds and no more."""
    await stopping.wait()
    at = node.clock.now()
    if await host_is_stopping():
        running = [record for record in node.driver.live() if record.phase <= Phase.RUNNING]
        await node.host_stops.note(at, [record.container_id for record in running if record.container_id])


async def _serve(
    node: Node,
    facts: EngineFacts,
    stopping: asyncio.Event,
    manager: ServiceManager,
    on_ready: Callable[[int], None] | None,
    measured: Measured,
) -> None:
    config = node.config
    terms = read_terms(config.tls_cert, config.tls_ca)
    server, port = bind_server(config.listen, _credentials(config))
    status = NodeStatus(
        worker_id=config.worker_id,
        advertise=config.advertise or "",
        listen=f"{config.listen.rpartition(':')[0]}:{port}",
        version=__version__,
        capacity=node.capacity,
        disk=node.disk,
        driver=node.driver,
        gpus=node.keeper,
    )
    credentials = None
    if not config.insecure:
        credentials = channel_credentials(config.tls_ca, config.tls_cert, config.tls_key)
    link = MasterLink(
        status,
        clock=node.clock,
        credentials=credentials,
        heartbeat_seconds=config.heartbeat_seconds,
        call_deadline_seconds=config.call_deadline_seconds,
        backoff=Backoff(
            first_seconds=config.connect_backoff_min_seconds, max_seconds=config.connect_backoff_max_seconds
        ),
    )
    measured.link = link
    node.driver.on_change(link.note_release)
    node.disk.look_again = link.register_again
    known_master = config.master or await node.journal.get_note(MASTER_NOTE)
    if known_master:
        link.set_master(known_master)
    servicer = NodeServicer(
        driver=node.driver,
        logs=node.logs,
        dirs=node.dirs,
        clock=node.clock,
        defaults=task_defaults(config),
        new_trace=new_trace_ids,
        mode=node.mode,
        on_master=lambda address: _master_called(node, link, address),
        report_again=link.report_again,
        on_refusal=node.tally.note_refusal,
    )
    servicer.serve_on(server)
    async with working(
        node, uplink=link, store=_store(config, link), facts=facts, on_capacity_change=link.register_again
    ) as tasks:
        tasks.append(asyncio.create_task(link.run(), name="master link"))
        tasks.append(asyncio.create_task(node.mode.run(), name="node mode"))
        tasks.append(asyncio.create_task(node.disk.run(node.clock), name="capacity"))
        tasks.append(asyncio.create_task(_watch_certificates(node, terms), name="certificates"))
        await server.start()
        log.info("node.ready", worker_id=config.worker_id, port=port, master=known_master, version=__version__)
        manager.ready(standing(node))
        if on_ready is not None:
            on_ready(port)
        try:
            await while_all_work(tasks, stopping.wait())
        finally:
            node.driver.draining = True
            await server.stop(grace=_STOP_SECONDS if stopping.is_set() else None)


async def _watch_certificates(node: Node, terms: Sequence[Term]) -> None:
    """Until cancelled: warn of those in use, which are what the files had when they were read."""
    while True:
        doubts = doubts_about(terms, node.clock.now())
        for name in (EXPIRES, EXPIRED):
            words = doubts.get(name)
            if words is None:
                node.driver.warnings.pop(name, None)
            elif node.driver.warnings.get(name) != words:
                node.driver.warnings[name] = words
                log.warning("certificate.doubtful", name=name, words=words)
        await node.clock.sleep(_LOOK_AT_CERTIFICATES_SECONDS)


def _master_called(node: Node, link: MasterLink, address: str) -> None:
    """A configured master's address wins over what a caller says of itself; else the caller's is remembered."""
    if node.config.master:
        link.set_master(node.config.master)
        return
    if address != link.address:
        task = asyncio.create_task(node.journal.set_note(MASTER_NOTE, address))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
    link.set_master(address)


async def _come_round(node: Node) -> None:
    """Return once the journal's thread has come round; that it can't read just now is its own trouble."""
    with contextlib.suppress(NodeServiceError):
        await node.journal.get_note(MASTER_NOTE)


async def _engine(node: Node, manager: ServiceManager) -> EngineFacts:
    """The engine's facts, as soon as it answers."""
    told = False
    while True:
        try:
            return await node.runtime.facts()
        except NodeServiceError as error:
            if not told:
                log.warning("engine.awaited", error=str(error))
                manager.ready(standing(node))
            told = True
            await node.clock.sleep(2.0)


async def _until(stopping: asyncio.Event, work: Coroutine[None, None, EngineFacts]) -> EngineFacts | None:
    """The result, or None when the node is told to stop first."""
    task = asyncio.create_task(work)
    waiter = asyncio.create_task(stopping.wait())
    await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if task.done():
        return task.result()
    task.cancel()
    return None


def _credentials(config: NodeConfig) -> grpc.ServerCredentials | None:
    if config.insecure:
        return None
    if config.tls_cert is None or config.tls_key is None:
        raise ConfigError("tls_cert and tls_key are needed", field="tls_cert", hint="or set insecure")
    return server_credentials(config.tls_cert, config.tls_key, config.tls_ca)


def _store(config: NodeConfig, link: MasterLink) -> ResultStore:
    if config.result_store == "master":
        return MasterPushResultStore(link.stub)
    return open_store(config)
