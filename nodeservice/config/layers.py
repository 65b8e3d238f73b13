"""Finds the settings in force: command line over environment over TOML file over defaults.

The keys are the same everywhere: `state_dir` in the file is `NODESERVICE_STATE_DIR` and `--state-dir`. The exceptions are
the object store's credentials, which come from `MINIO_ACCESS_KEY` and `MINIO_SECRET_KEY` or from a file of their own, so
that they never stand on a command line or in a file that is handed around.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from nodeservice.config.settings import CREDENTIALS, PREFIX, NodeConfig
from nodeservice.errors import ConfigError

OTHER_VARIABLES = frozenset(
    PREFIX + name
    for name in (
        "CONFIG", "NODE", "CERTIFIED_WORKER_IDS", "DATABASE_URL", "FINISHED_RETENTION", "GONE_AFTER", "HEARTBEAT_TIMEOUT",
        "HTTP_LIMIT", "HTTP_LISTEN", "NODE_LOSS_RETRIES", "PUSH_LIMIT", "TASK_ID", "ATTEMPT",
    )
)  # fmt: skip
"""Variables with our prefix that are no settings of a node: options of other commands, and what a task finds set."""

_COLLECTORS = {
    "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT",
    "otlp_metrics_endpoint": "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
}
_PASSWORD = re.compile(r"//[^/]*:[^/]*@")


def load_config(
    file: Path | None, flags: Mapping[str, object], env: Mapping[str, str], *, serving: bool = True
) -> NodeConfig:
    """The settings in force. A flag that is None was not given; an empty variable counts as unset.

    `serving` False is for commands that open no port: the choice between TLS and plain text is not asked for.
    Raises ConfigError that names each wrong field, its value, where it came from, and what to give. Secrets are not shown.
    """
    layers = [
        *(({field: env.get(variable) or None}, variable) for field, variable in _COLLECTORS.items()),
        (_from_file(file), f"file {file}"),
        (_from_environment(env), "environment"),
        (_known(flags, "option"), "command line"),
        ({"otlp_metrics_endpoint": "none" if _wants_no_metrics(env) else None}, "OTEL_METRICS_EXPORTER"),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer, origin in layers:
        for name, value in layer.items():
            if value is not None:
                values[name], origins[name] = value, origin
    try:
        values.update(_credentials(env, values.get("minio_credentials_file")))
        config = NodeConfig(**values)
    except ValidationError as error:
        raise _translated(error, origins) from None
    if serving:
        config.check_transport()
    return config


def _wants_no_metrics(env: Mapping[str, str]) -> bool:
    """By OpenTelemetry's own variables: all of it is switched off, or these go by another way than OTLP."""
    ways = env.get("OTEL_METRICS_EXPORTER") or "otlp"
    return env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or "otlp" not in re.split(r"[\s,]+", ways.lower())


def _from_file(file: Path | None) -> Mapping[str, Any]:
    if file is None:
        return {}
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {file} cannot be read: {error.strerror}", field="config") from error
    except ValueError as error:  # what tomllib raises, and what bad UTF-8 raises
        raise ConfigError(
            f"config {file} is not TOML: {error}", field="config", hint='write lines such as listen = "0.0.0.0:50052"'
        ) from error
    return _known(values, f"key in {file}")


class _Variables(EnvSettingsSource):
    """Reads a given mapping instead of the process's own environment."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        super().__init__(NodeConfig)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._env.items() if value}


def _from_environment(env: Mapping[str, str]) -> Mapping[str, Any]:
    ours = {name: value for name, value in env.items() if name.startswith(PREFIX) and name not in OTHER_VARIABLES}
    _known({name.removeprefix(PREFIX).lower(): None for name in ours}, "environment variable", spelled=_variable)
    return _Variables(ours)()


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


def _known(values: Mapping[str, Any], kind: str, *, spelled: Callable[[str], str] = str) -> Mapping[str, Any]:
    """`values` again. Raises ConfigError for a name that is no setting or may not be given in this way."""
    allowed = NodeConfig.model_fields.keys() - CREDENTIALS.keys()
    for name in values:
        if name in CREDENTIALS:
            raise ConfigError(
                f"{spelled(name)} must not be given as {kind}",
                field=name,
                hint=NodeConfig.model_fields[name].description,
            )
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0)
            raise ConfigError(
                f"unknown {kind}: {spelled(name)}", field=name, hint=f"the nearest known one is {spelled(near[0])}"
            )
    return values


def _credentials(env: Mapping[str, str], file: Any) -> Mapping[str, str]:
    """The environment's pair, else the file's; never half of one and half of the other."""
    if any(env.get(variable) for variable in CREDENTIALS.values()):
        return {field: value for field, variable in CREDENTIALS.items() if (value := env.get(variable))}
    if file is None:
        return {}
    try:
        lines: Iterable[str] = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last three: no text, or no path
        why = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(
            f"minio_credentials_file {file} cannot be read: {why}", field="minio_credentials_file"
        ) from None
    pairs = dict(line.strip().split("=", 1) for line in lines if "=" in line and not line.lstrip().startswith("#"))
    found = {name.strip(): value.strip().strip("\"'") for name, value in pairs.items()}
    for variable in CREDENTIALS.values():
        if not found.get(variable):
            raise ConfigError(
                f"minio_credentials_file {file} has no line {variable}=…",
                field="minio_credentials_file",
                hint=NodeConfig.model_fields["minio_credentials_file"].description,
            )
    return {field: found[variable] for field, variable in CREDENTIALS.items()}


def _translated(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    problems = []
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":
            continue  # follows from another problem
        field = str(problem["loc"][0])
        what = problem["msg"].removeprefix("Value error, ").partition(" for <class")[0]
        hidden = field in CREDENTIALS or _PASSWORD.search(str(problem["input"]))
        shown = "(hidden)" if hidden else f"{problem['input']!r}"[:200]
        origin = f" ({origins[field]})" if field in origins else ""
        problems.append((field, f"{field} = {shown}{origin}: {what[0].lower()}{what[1:]}"))
    first = problems[0][0]
    description = NodeConfig.model_fields[first].description
    return ConfigError("; ".join(text for _, text in problems), field=first, hint=f"{first}: {description}")
