"""What the checks found, as evidence: JSON for machines, Markdown for people."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "not run"


class CannotRunError(Exception):
    """The check cannot run here, for the reason that it carries."""


@dataclass
class Finding:
    """One check: what was expected and did not hold, and what was seen."""

    name: str
    about: str
    outcome: str = PASSED
    reasons: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def expect(self, holds: bool, sentence: str) -> bool:
        """`sentence` says what is wrong when it does not hold; the check goes on."""
        if not holds:
            self.outcome = FAILED
            self.reasons.append(sentence)
        return holds

    def fact(self, name: str, value: Any) -> Any:
        self.facts[name] = value
        return value


def run(name: str, about: str, check: Callable[[Finding], None]) -> Finding:
    """The finding of one check. It never raises: an exception that nobody foresaw is a failure."""
    finding = Finding(name=name, about=about)
    began = time.monotonic()
    try:
        check(finding)
    except CannotRunError as reason:
        # What had failed by then has failed all the same.
        finding.outcome = FAILED if finding.outcome == FAILED else SKIPPED
        finding.reasons.append(str(reason))
    except Exception as error:
        finding.outcome = FAILED
        frame = traceback.extract_tb(error.__traceback__)[-1]
        finding.reasons.append(f"{type(error).__name__}: {error} (in {frame.name}, line {frame.lineno})")
    finding.seconds = round(time.monotonic() - began, 3)
    return finding


def write(folder: Path, machine: dict[str, Any], findings: list[Finding]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    evidence = {"machine": machine, "checks": [asdict(finding) for finding in findings]}
    (folder / "evidence.json").write_text(json.dumps(evidence, indent=2, default=str) + "\n")
    (folder / "report.md").write_text(markdown(machine, findings))


def markdown(machine: dict[str, Any], findings: list[Finding]) -> str:
    pretended = machine["pretended"]
    lines = [f"# {'PRETENDED: ' if pretended else ''}{machine['title']}", ""]
    if pretended:
        lines += [
            f"**This is no evidence. The library that answered is the false driver, machine `{pretended}`:",
            "every figure below is made up. The run shows only that the checks themselves work.**",
            "",
        ]
    lines += [
        f"`make test-gpu` on {machine['date']}. The figures are in `evidence.json`.",
        "",
        "| machine | |",
        "|---|---|",
    ]
    lines += [
        f"| {key} | {_cell(value)} |" for key, value in machine.items() if key not in ("title", "pretended", "date")
    ]
    lines += ["", "| check | outcome | seconds | |", "|---|---|---|---|"]
    for finding in findings:
        remark = _cell("; ".join(finding.reasons) or finding.about)
        lines.append(f"| {finding.name} | {finding.outcome} | {finding.seconds:g} | {remark} |")
    for finding in findings:
        if finding.facts:
            lines += ["", f"## {finding.name}", "", finding.about, "", *_table(finding.facts)]
    return "\n".join(lines) + "\n"


def _table(facts: dict[str, Any]) -> list[str]:
    rows = list(facts.values())
    if rows and all(isinstance(row, dict) for row in rows):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        return lines + [
            f"| {name} | " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |"
            for name, row in facts.items()
        ]
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items())]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        text = ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        text = ", ".join(_cell(item) for item in value) or "none"
    else:
        text = str(value)
    return text.replace("|", "\\|").replace("\n", " ")
