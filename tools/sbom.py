"""Prints what a node is made of as CycloneDX JSON, from the lock file and what the packages in .venv tell of themselves.

Source: CycloneDX 1.5 JSON reference. A component's hashes are those of every archive that the lock file lets pip install.
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageMetadata, metadata, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "runtime.txt"
EXTRAS = ("master", "postgresql")
"""What the lock file was made with."""


def locked(text: str) -> Iterator[tuple[Requirement, list[str]]]:
    """What applies to this platform, with its hashes."""
    for entry in re.split(r"\n(?=\S)", text.strip()):
        pin, *rest = entry.split("\\\n")
        requirement = Requirement(pin.strip())
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement, re.findall(r"--hash=sha256:([0-9a-f]{64})", "".join(rest))


def purl(name: str, version: str) -> str:
    return f"pkg:pypi/{canonicalize_name(name)}@{version}"


def licences(told: PackageMetadata) -> list[dict[str, Any]]:
    if expression := told.get("License-Expression"):
        return [{"expression": expression}]
    classified = [c.rpartition(" :: ")[2] for c in told.get_all("Classifier") or () if c.startswith("License :: ")]
    short = (told.get("License") or "").strip()
    names = classified or ([short] if short and "\n" not in short else [])
    return [{"license": {"name": name}} for name in names]


def edges() -> dict[str, set[str]]:
    """What requires what here, by name, from ourselves down, each with the extras that are asked of it."""
    found: dict[str, set[str]] = {}
    asked: dict[str, set[str]] = {}
    waiting = [("nodeservice", {"", *EXTRAS})]
    while waiting:
        name, extras = waiting.pop()
        if name in found and extras <= asked[name]:
            continue
        asked[name] = asked.get(name, set()) | extras
        needed = [Requirement(text) for text in requires(name) or ()]
        here = [r for r in needed if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in asked[name])]
        found[name] = {canonicalize_name(requirement.name) for requirement in here}
        waiting += [(canonicalize_name(requirement.name), {"", *requirement.extras}) for requirement in here]
    return found


def bill(version: str, commit: str) -> dict[str, Any]:
    own = purl("nodeservice", version)
    components, references = [], {"nodeservice": own}
    for requirement, hashes in locked(LOCK.read_text()):
        (pinned,) = [found.version for found in requirement.specifier]
        told = metadata(requirement.name)
        if told["Version"] != pinned:
            raise SystemExit(
                f"error: .venv has {requirement.name} {told['Version']}, the lock file {pinned}: make setup"
            )
        references[canonicalize_name(requirement.name)] = purl(requirement.name, pinned)
        component = {"type": "library", "bom-ref": purl(requirement.name, pinned), "name": requirement.name}
        component |= {"version": pinned, "purl": purl(requirement.name, pinned)}
        component["hashes"] = [{"alg": "SHA-256", "content": digest} for digest in hashes]
        if found := licences(told):
            component["licenses"] = found
        components.append(component)
    made_at = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH") or datetime.now(UTC).timestamp()), UTC)
    found = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": made_at.isoformat(),
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": "nodeservice",
                "version": version,
                "purl": own,
                "licenses": [{"expression": "Apache-2.0"}],
                "properties": [{"name": "commit", "value": commit}],
            },
        },
        "components": components,
        "dependencies": [
            {"ref": references[name], "dependsOn": sorted(references[other] for other in needed)}
            for name, needed in edges().items()
        ],
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(found, sort_keys=True))
    return {"serialNumber": f"urn:uuid:{number}", **found}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: sbom.py VERSION COMMIT")
    json.dump(bill(sys.argv[1], sys.argv[2]), sys.stdout, indent=1)
    sys.stdout.write("\n")
