"""GPUs in tables for people, from the objects of `gpu_json`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nodeservice.cli.cells import bytes_text, color_of, printable, state, text
from nodeservice.cli.fitted import FittedTable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Gpu = Mapping[str, Any]

_SHORT = 12
"""Of a UUID, where all of it has been shown already."""


def gpu_tables(gpus: Sequence[Gpu], *, title: str) -> Iterator[RenderableType]:
    """How each GPU is and how much of it is held; then why one is not well; then what hardware it is."""
    yield _states(gpus, title)
    yield from complaints(gpus)
    yield _hardware(gpus)


def complaints(gpus: Sequence[Gpu]) -> Iterator[Text]:
    """Why each is not well, where one isn't."""
    from rich.text import Text

    for gpu in gpus:
        if gpu["state_reason"]:
            words = f"{gpu['uuid']} {gpu['state']}: {gpu['state_reason']}"
            yield Text(printable(words), style=color_of(gpu["state"]))
        if gpu["throttle_reasons"]:
            words = f"{gpu['uuid']}: its clocks are held back by {', '.join(gpu['throttle_reasons'])}"
            yield Text(printable(words), style="yellow")


def driver_words(driver: str | None, cuda: str | None) -> str:
    """`driver 580.95.05, CUDA 13.0`; empty without a driver."""
    return ", ".join(filter(None, (f"driver {driver}" if driver else "", f"CUDA {cuda}" if cuda else "")))


def bill_table(bill: Iterable[Gpu]) -> FittedTable:
    """What a task used of each GPU. Their whole names stand elsewhere."""
    made = FittedTable(
        ("GPU", "NAME", "SECONDS", "LOAD", "PEAK", "MEMORY", "ENERGY", "THROTTLED", "XID"),
        text="NAME",
        spare=("NAME", "PEAK", "THROTTLED"),
    )
    for gpu in bill:
        made.add_row(
            text(gpu["uuid"][:_SHORT]),
            _name(gpu),
            f"{gpu['seconds']:.1f}",
            _percent(gpu["utilization_mean_percent"]),
            _percent(gpu["utilization_peak_percent"]),
            _bytes(gpu["memory_peak_bytes"]),
            _energy(gpu["energy_joules"]),
            "?" if gpu["throttled_seconds"] is None else f"{gpu['throttled_seconds']:.1f} s",
            ", ".join(map(str, gpu["xids"])) or "none",
        )
    return made


def bill_words(bill: Iterable[Gpu]) -> Iterator[str]:
    """The same in a sentence for each GPU; what is not known is left out."""
    for gpu in bill:
        mean, peak, throttled = (
            gpu[name] for name in ("utilization_mean_percent", "utilization_peak_percent", "throttled_seconds")
        )
        known = [
            f"{gpu['seconds']:.4g} s",
            f"load {_percent(mean)} (peak {_percent(peak)})" if mean is not None else "",
            f"memory {_bytes(gpu['memory_peak_bytes'])}" if gpu["memory_peak_bytes"] is not None else "",
            _energy(gpu["energy_joules"]) if gpu["energy_joules"] is not None else "",
            f"{throttled:.4g} s throttled" if throttled else "",
            f"XID {' and '.join(map(str, gpu['xids']))}" if gpu["xids"] else "",
        ]
        yield f"{gpu['uuid']}: {', '.join(filter(None, known))}"


def asked_words(count: int, gpu: Mapping[str, Any] | None, *, brief: bool = False) -> str:
    """`2 GPU (model H200)`, `0.5 of a GPU`, `10 GiB and 30 % of the SMs of a GPU`. `brief`: `2 H200`, `0.5`, `10 GiB`."""
    gpu = gpu or {}
    share = gpu.get("share") or {}
    size = f"{count} GPU"
    if share.get("milli"):
        size = f"{share['milli'] / 1000:g} of a GPU"
    elif share:
        sms = f" and {share['sm_percent']} % of the SMs" if share.get("sm_percent") else ""
        size = f"{bytes_text(share.get('memory_bytes') or 0)}{sms} of a GPU"
    if brief:
        kind = gpu.get("model") or gpu.get("mig_profile") or ""
        return f"{size.removesuffix(' of a GPU').removesuffix(' GPU').split(' and ')[0]} {kind}".rstrip()
    told = [
        f"model {gpu['model']}" if gpu.get("model") else "",
        f"at least {bytes_text(gpu['min_memory_bytes'])}" if gpu.get("min_memory_bytes") else "",
        f"capability {gpu['min_compute_capability']}" if gpu.get("min_compute_capability") else "",
        f"MIG {gpu['mig_profile']}" if gpu.get("mig_profile") else "",
        f"of {', '.join(gpu['uuids'])}" if gpu.get("uuids") else "",
    ]
    described = ", ".join(filter(None, told))
    return f"{size} ({described})" if described else size


def part_words(part: Mapping[str, Any]) -> str:
    """`10 GiB and 30 % of the SMs, kept by mps`."""
    sms = f" and {part['sm_percent']} % of the SMs" if part["sm_percent"] else ""
    return f"{bytes_text(part['memory_bytes'])}{sms}, kept by {part['method']}"


# ---- the tables --------------------------------------------------------------------------------------------------------


def _states(gpus: Sequence[Gpu], title: str) -> FittedTable:
    columns = ("GPU", "NAME", "STATE", "HELD", "LOAD", "USED", "MEMORY")
    made = FittedTable(columns, text="NAME", spare=("LOAD", "USED", "NAME", "MEMORY"), title=title)
    for gpu in gpus:
        split = bool(gpu["mig_instances"])
        made.add_row(
            text(gpu["uuid"]),
            _name(gpu),
            state(gpu["state"]),
            "split" if split else _held(gpu),
            "" if split else _percent(gpu["utilization_percent"]),
            _bytes(gpu["memory_used_bytes"]),
            _bytes(gpu["memory_total_bytes"]),
        )
        for instance in gpu["mig_instances"]:
            made.add_row(
                f"  {text(instance['uuid'])}",
                f"MIG {text(instance['mig_profile'])}",
                state(instance["state"]),
                _held(instance),
                "",
                _bytes(instance["memory_used_bytes"]),
                _bytes(instance["memory_total_bytes"]),
            )
    return made


def _hardware(gpus: Sequence[Gpu]) -> FittedTable:
    made = FittedTable(
        ("GPU", "ADDRESS", "CAPABILITY", "NUMA", "NVLINKS", "ECC", "POWER", "TEMP", "PARTS"),
        text="PARTS",
        spare=("ADDRESS", "NVLINKS", "NUMA", "POWER"),
    )
    for gpu in gpus:
        errors = gpu["ecc_uncorrected_count"]
        made.add_row(
            text(gpu["uuid"])[:_SHORT],
            text(gpu["pci_address"] or "?"),
            text(gpu["compute_capability"] or "?"),
            "?" if gpu["numa_node"] is None else str(gpu["numa_node"]),
            "?" if gpu["nvlink_count"] is None else str(gpu["nvlink_count"]),
            {None: "?", True: "on", False: "off"}[gpu["ecc_enabled"]] + (f", {errors} errors" if errors else ""),
            _power(gpu),
            "?" if gpu["temperature_celsius"] is None else f"{gpu['temperature_celsius']:.0f} °C",
            text(_parts(gpu)),
        )
    return made


# ---- cells -------------------------------------------------------------------------------------------------------------


def _name(gpu: Gpu) -> str:
    return text(str(gpu["name"]).removeprefix("NVIDIA "))


def _held(gpu: Gpu) -> str:
    if not gpu["leasable"]:
        return "no" if gpu["state"] else "?"
    held = gpu["held_milli"]
    return "free" if not held else "all" if held >= 1000 else f"{held / 10:g} %"


def _parts(gpu: Gpu) -> str:
    """What keeps tasks to parts of it."""
    return "mig" if gpu["mig_instances"] else ", ".join(gpu["share_methods"]) or "none"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f} %"


def _bytes(value: int | None) -> str:
    return "?" if value is None else bytes_text(value)


def _power(gpu: Gpu) -> str:
    now, limit = gpu["power_watts"], gpu["power_limit_watts"]
    if now is None and limit is None:
        return "?"
    return f"{'?' if now is None else f'{now:.0f}'} of {'?' if limit is None else f'{limit:.0f}'} W"


def _energy(joules: float | None) -> str:
    """Joules as people count them."""
    if joules is None:
        return "?"
    return f"{joules / 1000:.4g} kJ" if joules >= 1000 else f"{joules:.4g} J"
