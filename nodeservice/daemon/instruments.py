"""All metrics of a node: their names, kinds, units and attributes. docs/operations.md says the same to people.

Names with `hw.`, `process.` and `cpu.` are those of OpenTelemetry's semantic conventions.
"""

from __future__ import annotations

from nodeservice.telemetry.metrics import Instrument, Kind

PHASE_DURATION = "nodeservice.task.phase.duration"
_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 21_600.0, 86_400.0)
_PHASE, _OUTCOME, _REASON = "nodeservice.phase", "nodeservice.outcome", "nodeservice.reason"
_GPU = ("hw.id", "hw.type", "hw.model")

_TASKS = (
    Instrument("nodeservice.task.unfinished", Kind.LEVEL, "{task}", (_PHASE,), "Attempts that are in a phase now."),
    Instrument(
        "nodeservice.task.phase.age", Kind.GAUGE, "s", (_PHASE,), "How long the one has been in it that is longest."
    ),
    Instrument(PHASE_DURATION, Kind.HISTOGRAM, "s", (_PHASE,), "How long phases lasted that have ended.", _SECONDS),
    Instrument("nodeservice.task.finished", Kind.COUNTER, "{task}", (_OUTCOME, _REASON), "Attempts that have ended."),
    Instrument("nodeservice.task.refused", Kind.COUNTER, "{task}", (_REASON,), "Assignments that were not accepted."),
    Instrument("nodeservice.result.stored", Kind.COUNTER, "By", (), "Results that the configured store has taken."),
    Instrument("nodeservice.result.retained", Kind.LEVEL, "By", (), "Results kept here until the store takes them."),
)
_NODE = (
    Instrument("nodeservice.node.mode", Kind.LEVEL, "1", ("nodeservice.mode",), "1 for the mode that is in force."),
    Instrument("nodeservice.node.accepting", Kind.LEVEL, "1", (), "1 while it takes tasks."),
    Instrument(
        "nodeservice.node.condition", Kind.LEVEL, "1", ("nodeservice.condition",), "1 while it holds back all tasks."
    ),
    Instrument("nodeservice.node.warning", Kind.LEVEL, "1", ("nodeservice.warning",), "1 while it is told."),
    Instrument("nodeservice.engine.reachable", Kind.LEVEL, "1", (), "1 if the engine answered when last asked."),
    Instrument("nodeservice.master.registered", Kind.LEVEL, "1", (), "1 while the master knows this node."),
    Instrument("nodeservice.master.silence", Kind.GAUGE, "s", (), "How long ago the master last answered anything."),
    Instrument("nodeservice.image.removed", Kind.COUNTER, "By", (), "Images removed to make room on the disk."),
)
_AMOUNTS = tuple(
    Instrument(f"nodeservice.{what}.{part}", Kind.LEVEL, unit, (), meaning)
    for what, unit in (("cpu", "{cpu}"), ("memory", "By"), ("disk", "By"), ("gpu", "{gpu}"))
    for part, meaning in (
        ("capacity", "What there is."),
        ("allocatable", "What tasks may have."),
        ("granted", "What tasks hold."),
    )
)
_GPUS = (
    Instrument("hw.status", Kind.LEVEL, "1", (*_GPU, "hw.state"), "1 for the state that a GPU is in."),
    Instrument("hw.errors", Kind.COUNTER, "{error}", (*_GPU, "error.type"), "Error events, and memory errors."),
    Instrument("hw.temperature", Kind.GAUGE, "Cel", _GPU, "Temperature of a GPU."),
    Instrument("hw.power", Kind.GAUGE, "W", _GPU, "Power that a GPU draws."),
    Instrument("hw.energy", Kind.COUNTER, "J", _GPU, "Energy of a GPU since its driver was loaded."),
    Instrument("hw.gpu.utilization", Kind.GAUGE, "1", _GPU, "Share of the time in which a GPU computed."),
    Instrument("hw.gpu.memory.usage", Kind.LEVEL, "By", _GPU, "Memory of a GPU that is in use."),
    Instrument("hw.gpu.memory.limit", Kind.LEVEL, "By", _GPU, "Memory of a GPU."),
    Instrument(
        "nodeservice.gpu.throttled",
        Kind.LEVEL,
        "1",
        (*_GPU, "nodeservice.throttle_reason"),
        "1 while that holds back the clocks of a GPU.",
    ),
    Instrument("nodeservice.gpu.tasks", Kind.LEVEL, "{task}", _GPU, "Attempts that hold a GPU, or a part of it."),
)
_PROCESS = (
    Instrument("process.cpu.time", Kind.COUNTER, "s", ("cpu.mode",), "CPU time of the daemon."),
    Instrument("process.memory.usage", Kind.LEVEL, "By", (), "Resident memory of the daemon."),
    Instrument("process.uptime", Kind.GAUGE, "s", (), "How long the daemon has run."),
)
INSTRUMENTS = (*_TASKS, *_NODE, *_AMOUNTS, *_GPUS, *_PROCESS)
