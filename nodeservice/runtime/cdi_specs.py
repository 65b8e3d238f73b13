"""Reads which devices the CDI specifications of an engine name, for engines that do not tell themselves.

Source: SPEC.md of the Container Device Interface (file names, precedence of directories, qualified names).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
_MAX_FILE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CdiDevices:
    """`versions` has, for each qualified name, the specification version of its file, `0.5.0` being (0, 5, 0).

    `problems` are sentences on files that could not be used, and on names that two files of one directory claim.
    """

    versions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_cdi_specs(root: Path, directories: Sequence[str] = DEFAULT_DIRECTORIES) -> CdiDevices:
    """Blocking. `root` is the engine's own root directory. Of two directories the later one wins. Never raises."""
    found: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for directory in directories:
        here: dict[str, tuple[int, ...]] = {}
        claimed_twice: set[str] = set()
        for path in _files(_inside(root, directory)):
            try:
                names, version = _names(path)
            except (OSError, ValueError) as error:
                problems.append(
                    f"{directory}/{path.name} is no CDI specification: {' '.join(str(error).split())[:200]}"
                )
                continue
            claimed_twice |= names & here.keys()
            here |= dict.fromkeys(names, version)
        if claimed_twice:
            problems.append(f"two files in {directory} name {', '.join(sorted(claimed_twice))}")
        found |= here
        for name in claimed_twice:
            del found[name]
    return CdiDevices(versions=found, problems=tuple(problems))


def _inside(root: Path, directory: str) -> Path:
    """Below the engine's root: /var/run is a link to /run on most systems, and would lead out of it."""
    if directory.startswith("/var/run/") and (root / "var/run").is_symlink():
        directory = directory.removeprefix("/var")
    return root / directory.lstrip("/")


def _files(directory: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in directory.iterdir() if path.suffix in {".json", ".yaml"} and path.is_file())
    except OSError:
        return


def _names(path: Path) -> tuple[set[str], tuple[int, ...]]:
    """Raises OSError and ValueError."""
    with path.open("rb") as file:
        text = file.read(_MAX_FILE_BYTES + 1)
    if len(text) > _MAX_FILE_BYTES:
        raise ValueError(f"it is longer than {_MAX_FILE_BYTES} bytes")
    spec = json.loads(text) if path.suffix == ".json" else _yaml(text)
    if not isinstance(spec, dict) or not isinstance(spec.get("devices"), list):
        raise ValueError("it has no list of devices")
    kind, devices = str(spec.get("kind", "")), spec["devices"]
    names = {f"{kind}={device['name']}" for device in devices if isinstance(device, dict) and "name" in device}
    return names, tuple(int(part) for part in str(spec.get("cdiVersion", "")).removeprefix("v").split("."))


def _yaml(text: bytes) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 both are safe loaders
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
