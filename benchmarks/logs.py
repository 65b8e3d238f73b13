"""How fast a task's log is captured and followed without loss, beside reading it from the engine."""

from __future__ import annotations

import asyncio
import secrets
import time

from benchmarks.rig.bare_engine import BareEngine
from benchmarks.rig.finding import Finding, median, paired
from benchmarks.rig.scale import Scale
from benchmarks.rig.service import Service, need_image, running_service, sweep
from nodeservice.wire import master_worker_pb2 as pb

LINE_BYTES = 100
CPU_MILLI = 1000
FOLLOWER_ATTEMPTS = 5
LONG_WORDS = "x" * (LINE_BYTES - 1)
ABOUT = (
    f"A task writes lines of {LINE_BYTES} bytes as fast as it can. service: until its report came, every byte checked in "
    "the stored log. engine: docker-py's follower of the same container, until the end of its stream. followers: so many "
    "streams over gRPC (one chunk per line, as the wire has it) follow the same live log to its end; the rate is what all "
    "of them got together, each checked for its lines."
)


async def measure(scale: Scale) -> Finding:
    need_image()
    found = Finding(about=ABOUT)
    home = scale.directory("logs")
    node_id = f"bench-{secrets.token_hex(4)}"
    engine = BareEngine(node_id, home / "bare")
    try:
        async with running_service(home / "node", minio=None) as service:
            await _capture(found, service, engine, scale)
            await _followers(found, service, scale)
    finally:
        engine.close()
        sweep(node_id)
    return found


async def _capture(found: Finding, service: Service, engine: BareEngine, scale: Scale) -> None:
    line_count = scale.pick(50_000, 200_000)
    size_bytes = line_count * LINE_BYTES
    size_mib = size_bytes / 2**20
    rates: dict[str, list[float]] = {"service": [], "engine": []}
    broken: list[int] = []
    for number in range(scale.pick(2, 3)):
        for arm in ("service", "engine") if number % 2 else ("engine", "service"):
            if arm == "service":
                began = time.perf_counter()
                result = await service.run(_name(), _command(line_count), cpu_milli=CPU_MILLI, disk_bytes=2**30)
                rates[arm].append(size_mib / (time.perf_counter() - began))
                if result.usage.log_bytes != size_bytes:
                    raise RuntimeError(f"service: {result.usage.log_bytes} of {size_bytes} bytes came")
            elif seconds := await asyncio.to_thread(_follow_engine, engine, line_count, broken):
                rates[arm].append(size_mib / seconds)
    for arm, samples in rates.items():
        if samples:
            found.add("capture", "MiB/s", f"{size_mib:.0f} MiB", arm, samples, more_is_better=True)
    if broken:
        found.notes.append(
            f"The engine's follower broke off {len(broken)} times, without an error, after {', '.join(map(str, broken))} of "
            f"{size_bytes} bytes; such a round was followed anew."
        )
    if len(rates["engine"]) == len(rates["service"]):
        found.ratios["log_capture_vs_engine"] = median(paired(rates["service"], rates["engine"]))


def _follow_engine(engine: BareEngine, line_count: int, broken: list[int]) -> float | None:
    """Seconds for the whole log. None if no follower saw all of it; what the others saw goes to `broken`."""
    for _ in range(FOLLOWER_ATTEMPTS):
        began = time.perf_counter()
        container = engine.start(_command(line_count), CPU_MILLI)
        seen_bytes = sum(len(piece) for piece in engine.client.logs(container, stream=True, follow=True))
        engine.client.wait(container)
        seconds = time.perf_counter() - began
        engine.client.remove_container(container, v=True)
        if seen_bytes == line_count * LINE_BYTES:
            return seconds
        broken.append(seen_bytes)
    return None


async def _followers(found: Finding, service: Service, scale: Scale) -> None:
    for count in (1, 100):
        line_count = scale.pick(10_000, 50_000) // (20 if count > 1 else 1)
        rates = []
        for _ in range(scale.pick(2, 3)):
            task_id = _name()
            await service.assign(task_id, f"sleep 1; {_command(line_count)}", cpu_milli=CPU_MILLI, disk_bytes=2**30)
            followers = [asyncio.create_task(_follow(service, task_id)) for _ in range(count)]
            seen = await asyncio.gather(*followers)
            if any(lines != line_count for lines, _, _ in seen):
                raise RuntimeError(f"of {line_count} lines the followers got {sorted({lines for lines, _, _ in seen})}")
            seconds = max(last for _, _, last in seen) - min(first for _, first, _ in seen)
            rates.append(count * line_count * LINE_BYTES / 2**20 / seconds)
            await service.master.reported(task_id)
        found.add("followed", "MiB/s", f"{count} followers", "service", rates, x=count, more_is_better=True)


async def _follow(service: Service, task_id: str) -> tuple[int, float, float]:
    """How many lines came, and when the first and the last."""
    lines, first, last = 0, 0.0, 0.0
    async for chunk in service.stub.StreamTaskLogs(pb.TaskLogRequest(task_id=task_id, follow=True)):
        if chunk.is_complete:
            break
        last = time.perf_counter()
        first = first or last
        lines += 1
    return lines, first, last


def _command(line_count: int) -> str:
    return f"yes {LONG_WORDS} | head -n {line_count}"


def _name() -> str:
    return f"log-{secrets.token_hex(6)}"
