"""What no node takes for its value alone: node and master refuse it by the same checks, so that neither passes it on.

Each raises RequestError (INVALID_REQUEST) naming the field, the value and the remedy. None is what was not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nodeservice.errors import invalid_request

TIMES = (
    "timeout_seconds",
    "wait_timeout_seconds",
    "pull_timeout_seconds",
    "total_timeout_seconds",
    "disconnect_limit_seconds",
)
ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
"""Of a task or a node: it becomes the name of containers, directories and objects."""
_MIN_MEMORY_BYTES = 6 * 1024**2
"""Docker Engine refuses less than 6 MiB."""
_MIN_CPU_MILLI = 10
"""The kernel's least quota is 1 ms in a period of 100 ms."""
DAY_SECONDS = 86_400.0
MAX_SECONDS = 366 * DAY_SECONDS
MOST_PIDS = 4_000_000
"""The kernel takes at most 4,194,304 (PID_MAX_LIMIT) in pids.max, and the runtime needs some beside."""
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL")
_MAX_OPEN_FILES = 1_048_576
"""Linux's fs.nr_open unless the host raised it."""
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}\Z")
_MAX_WORD_BYTES = 128 * 1024
"""Linux passes at most 128 KiB in one argument (MAX_ARG_STRLEN, linux/binfmts.h)."""
_MAX_ENV_COUNT = 1_000
_MIN_BYTES_PER_SECOND = 4096
"""One block a second: less would never end."""
MOST_GPUS = 1024
_GPU_UUID = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
"""In lower case, as the driver gives them: one in upper case would be taken for a GPU that is not here."""
_MIG_PROFILE = re.compile(r"([0-9]c\.)?[0-9]g\.[0-9]{1,4}gb([+-][a-z.]{1,12}){0,2}\Z")
"""Such as 1g.18gb, 1c.3g.71gb, 1g.24gb+me.all, 1g.24gb-me (docs.nvidia.com: MIG User Guide, Supported MIG Profiles)."""
_GPU_MODEL = re.compile(r"[ -~]{0,96}\Z")
_CAPABILITY = re.compile(r"([0-9]{1,2})\.([0-9]{1,2})\Z")
_MOST_GPU_BYTES = 2**60
_LEAST_PART_BYTES = 1024**2


def check_cpu(cpu_milli: int, *, exclusive: bool) -> None:
    if cpu_milli < _MIN_CPU_MILLI:
        raise invalid_request("req_cpu", f"is {cpu_milli / 1000:g} cores", "ask for at least 0.01 cores")
    if exclusive and cpu_milli % 1000:
        raise invalid_request("exclusive_cpus", f"goes with {cpu_milli / 1000:g} cores", "ask for whole cores")


def check_memory(memory_bytes: int) -> None:
    if memory_bytes < _MIN_MEMORY_BYTES:
        raise invalid_request("req_memory", f"is {memory_bytes} bytes", "ask for at least 6 MiB")


def check_pids(limit: int) -> None:
    if not 1 <= limit <= MOST_PIDS:
        raise invalid_request("pids_limit", f"is {limit}", f"allow 1 to {MOST_PIDS} processes")


def check_seconds(field: str, seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds <= MAX_SECONDS:
        raise invalid_request(field, f"is {seconds:.15g}", "use more than 0 and at most a year")


def check_grace(seconds: float) -> None:
    if not 0 <= seconds <= DAY_SECONDS:
        raise invalid_request("grace_seconds", f"is {seconds:.15g}", "use 0 to a day")


def check_stop_signal(name: str) -> None:
    if name not in STOP_SIGNALS:
        raise invalid_request("stop_signal", f"is {name[:64]!a}", f"use one of {', '.join(STOP_SIGNALS)}")


def check_open_files(limit: int) -> None:
    if not 16 <= limit <= _MAX_OPEN_FILES:
        raise invalid_request("open_files_limit", f"is {limit}", f"use 16 to {_MAX_OPEN_FILES}")


def check_rate(field: str, bytes_per_second: int | None) -> None:
    if bytes_per_second is not None and bytes_per_second < _MIN_BYTES_PER_SECOND:
        raise invalid_request(field, f"is {bytes_per_second}", f"use at least {_MIN_BYTES_PER_SECOND} bytes per second")


def check_words(command: str, argv: Iterable[str], env: Iterable[tuple[str, str]]) -> None:
    """What a process is started with."""
    for field, text in (("command", command), *(("argv", word) for word in argv)):
        if not _can_be_passed(text):
            raise invalid_request(
                field, f"is {shown(text)}", "use less than 128 KiB of UTF-8 and no NUL; put long scripts in the image"
            )
    variables = tuple(env)
    if len(variables) > _MAX_ENV_COUNT:
        raise invalid_request("env", f"has {len(variables)} variables", f"use at most {_MAX_ENV_COUNT}")
    for name, value in variables:
        if not _ENV_NAME.match(name):
            raise invalid_request("env", f"has a variable named {shown(name)}", "use letters, digits and _ in names")
        if not _can_be_passed(value):
            raise invalid_request("env", f"has a bad value for {name}", "use less than 128 KiB of UTF-8 and no NUL")


def check_gpu(*, model: str, min_memory_bytes: int, mig_profile: str) -> None:
    if not _GPU_MODEL.match(model):
        raise invalid_request("gpu.model", f"is {shown(model)}", "use a part of the product name, such as H200")
    if not 0 <= min_memory_bytes <= _MOST_GPU_BYTES:
        raise invalid_request("gpu.min_memory_bytes", f"is {min_memory_bytes}", "give the bytes that a GPU can have")
    if mig_profile and not _MIG_PROFILE.match(mig_profile):
        raise invalid_request(
            "gpu.mig_profile", f"is {shown(mig_profile)}", "name it as nvidia-smi does, such as 1g.18gb"
        )


def check_gpu_uuids(uuids: Sequence[str], *, count: int) -> None:
    """`count` of them are asked for."""
    if len(uuids) > MOST_GPUS:
        raise invalid_request("gpu.uuids", f"names {len(uuids)}", f"name at most {MOST_GPUS}")
    for uuid in uuids:
        if not _GPU_UUID.match(uuid):
            raise invalid_request(
                "gpu.uuids", f"has {shown(uuid)}", "name GPUs and MIG instances as nvidia-smi -L does"
            )
    if len(set(uuids)) < len(uuids):
        raise invalid_request("gpu.uuids", "names a GPU twice", "name each once")
    if uuids and len(uuids) < count:
        raise invalid_request(
            "gpu.uuids", f"names {len(uuids)} of the {count} GPUs asked", "name as many, or more to choose from"
        )


def check_gpu_part(memory_bytes: int, sm_percent: int) -> None:
    if not _LEAST_PART_BYTES <= memory_bytes <= _MOST_GPU_BYTES:
        raise invalid_request("gpu.share.memory_bytes", f"is {memory_bytes}", "ask for at least 1 MiB")
    if not 0 <= sm_percent <= 100:
        raise invalid_request("gpu.share.sm_percent", f"is {sm_percent}", "use 1 to 100, or leave it out")


def gpu_capability(text: str) -> tuple[int, int]:
    """Of `9.0`."""
    found = capability_of(text)
    if found is None:
        raise invalid_request("gpu.min_compute_capability", f"is {shown(text)}", "give it as NVIDIA does, such as 9.0")
    return found


def capability_of(text: str) -> tuple[int, int] | None:
    """`9.0`; None for anything else."""
    found = _CAPABILITY.match(text)
    return (int(found[1]), int(found[2])) if found else None


def is_utf8(text: str) -> bool:
    """Python keeps other bytes, of arguments or the environment, as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str) -> str:
    """A hostile text, fit to be shown: short and without control characters."""
    return repr(text[:40]) + (f"… ({len(text)} characters)" if len(text) > 40 else "")


def _can_be_passed(text: str) -> bool:
    """Whether it fits into one argument."""
    return "\0" not in text and is_utf8(text) and len(text.encode()) < _MAX_WORD_BYTES
