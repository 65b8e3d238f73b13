"""Prints debian/copyright for the package: its own licence, and that of each Python package that it brings along.

Source: "Machine-readable debian/copyright file", version 1.0. The texts that packages ship stay beside them.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PathDistribution, distributions
from pathlib import Path

_HEAD = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: nodeservice

Files: *
Copyright: the authors of nodeservice
License: Apache-2.0
 On Debian systems the text of the Apache License, Version 2.0, is in
 /usr/share/common-licenses/Apache-2.0.
"""


def paragraph(found: Distribution, folder: str) -> str:
    told = found.metadata
    classified = [c.rpartition(" :: ")[2] for c in told.get_all("Classifier") or () if c.startswith("License :: ")]
    short = (told.get("License") or "").strip()
    licence = told.get("License-Expression") or ", ".join(classified) or (short if "\n" not in short else "")
    assert isinstance(found, PathDistribution)
    texts = sorted(
        str(file) for file in found.files or () if ".dist-info/" in str(file) and "licen" in str(file).lower()
    )
    where = [f" {folder}/{text}" for text in texts] or [" Its text is not shipped with the package."]
    author = told.get("Author") or told.get("Author-email") or f"the authors of {told['Name']}"
    lines = [
        f"Files: {folder.lstrip('/')}/*",
        f"Comment: {told['Name']} {told['Version']}",
        f"Copyright: {' '.join(author.split())}",
        f"License: {licence or 'as its text says'}",
        *where,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    site = Path(sys.argv[1])
    installed = f"/usr/lib/nodeservice/lib/{site.parent.name}/site-packages"
    others = sorted(
        (found for found in distributions(path=[str(site)]) if found.metadata["Name"] != "nodeservice"),
        key=lambda found: found.metadata["Name"].lower(),
    )
    print("\n".join([_HEAD, *(paragraph(found, installed) for found in others)]))
