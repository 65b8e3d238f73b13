"""What a task asks of GPUs, as options that `run` and `submit` share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated

import typer

from nodeservice.cli.task_options import OPTIONS
from nodeservice.cli.units import parse_bytes
from nodeservice.core.gpu_request import check_gpu_request
from nodeservice.core.gpus import GpuRequest, GpuShare
from nodeservice.errors import RequestError
from nodeservice.task_bounds import capability_of

Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        help="Number of whole GPUs, or a part of one such as 0.5. Default: 0, or 1 where another option describes it.",
    ),
]
GpuModel = Annotated[str | None, typer.Option(help="A part of the product name, such as H200.")]
GpuMinMemory = Annotated[str | None, typer.Option(help="Memory that the GPU has to have, such as 40g.")]
GpuCapability = Annotated[str | None, typer.Option(help="Least compute capability, such as 9.0.")]
GpuMig = Annotated[str | None, typer.Option(help="MIG instances of this profile, such as 1g.18gb.")]
GpuUuid = Annotated[
    list[str] | None, typer.Option("--gpu-uuid", help="This very GPU or MIG instance; repeat it for several.")
]
GpuMemory = Annotated[str | None, typer.Option(help="So much memory of one GPU, such as 10g, instead of a whole one.")]
GpuSms = Annotated[int | None, typer.Option(help="Beside --gpu-memory: percent of that GPU's SMs.")]

_COUNT = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?|\.[0-9]{1,6}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAsk:
    """`count` whole GPUs, or none and a part in `request`."""

    count: int = 0
    request: GpuRequest = field(default_factory=GpuRequest)


def gpus_asked(
    *,
    gpus: str | None = None,
    model: str | None = None,
    min_memory: str | None = None,
    capability: str | None = None,
    mig: str | None = None,
    uuids: list[str] | None = None,
    memory: str | None = None,
    sms: int | None = None,
) -> GpuAsk:
    """Raises RequestError (INVALID_REQUEST) naming the option."""
    count, milli = (None, 0) if gpus is None else _count(gpus)
    share = GpuShare(milli=milli) if milli else None
    if sms is not None and memory is None:
        raise _refused("--gpu-sms", "is given without --gpu-memory", "say how much memory too")
    if memory is not None:
        if milli:
            raise _refused("--gpu-memory", f"is given beside --gpus {gpus}", "give one of the two")
        share = GpuShare(memory_bytes=parse_bytes(memory, option="--gpu-memory"), sm_percent=_percent(sms))
    request = GpuRequest(
        model=model or "",
        min_memory_bytes=0 if min_memory is None else parse_bytes(min_memory, option="--gpu-min-memory"),
        min_compute_capability=None if capability is None else _capability(capability),
        mig_profile=mig or "",
        uuids=tuple(uuids or ()),
        share=share,
    )
    if count is None:
        count = 0 if share is not None or request == GpuRequest() else max(1, len(request.uuids))
    try:
        check_gpu_request(request, gpu_count=count)
    except RequestError as error:
        option = OPTIONS.get(error.field or "", "--gpus")
        if option == "--gpu-memory" and memory is None:
            option = "--gpus"  # the part was asked for as a fraction
        what = error.message.removeprefix(error.field or "").strip()
        raise _refused(option, what, error.hint or "") from error
    return GpuAsk(count=count, request=request)


def _count(text: str) -> tuple[int, int]:
    """Whole GPUs, or thousandths of one."""
    stripped = text.strip()
    number = Decimal(stripped) if _COUNT.fullmatch(stripped) else None
    if number is not None and number == int(number):
        return int(number), 0
    if number is not None and number < 1 and number * 1000 == int(number * 1000):
        return 0, int(number * 1000)
    raise _refused(
        "--gpus", f"is {text[:40]!a}", "give a whole number, or a part of one GPU with at most three decimals"
    )


def _capability(text: str) -> tuple[int, int]:
    found = capability_of(text.strip())
    if found is None:
        raise _refused("--gpu-capability", f"is {text[:40]!a}", "give it as NVIDIA does, such as 9.0")
    return found


def _percent(sms: int | None) -> int:
    if sms is not None and not 1 <= sms <= 100:
        raise _refused("--gpu-sms", f"is {sms}", "use 1 to 100, or leave it out")
    return sms or 0


def _refused(option: str, what: str, remedy: str) -> RequestError:
    return RequestError(f"{option} {what}", reason="INVALID_REQUEST", field=option.lstrip("-"), hint=remedy)
