"""Shows a diagnosis as tables for people. Pure rendering."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nodeservice.doctor.finding import Diagnosis, State

_COLORS = {State.HARD: "green", State.WATCHED: "yellow", State.MISSING: "red", State.FAILED: "bold red"}


def render_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Text from kernel and engine is shown as it is, never read as markup."""
    facts = Table(title="Machine", title_justify="left", show_header=False, min_width=60)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in diagnosis.facts.items():
        facts.add_row(name, Text(value))
    console.print(facts)
    limits = Table(title="Limits", title_justify="left", min_width=60)
    limits.add_column("limit", no_wrap=True)
    limits.add_column("state", no_wrap=True)
    limits.add_column("evidence", overflow="fold")
    for finding in diagnosis.findings:
        evidence = Text(finding.evidence)
        if finding.remedy:
            evidence.append(f"\n→ {finding.remedy}", style="dim")
        limits.add_row(finding.limit, Text(finding.state.value, style=_COLORS[finding.state]), evidence)
    console.print(limits)
    for sentence in diagnosis.advice:
        console.print(Text(f"advice: {sentence}", style="dim"))
    broken = [finding.limit for finding in diagnosis.findings if not finding.state.is_kept]
    verdict = f"not kept: {', '.join(broken)}" if broken else "every limit is kept"
    console.print(Text(f"{verdict} ({diagnosis.seconds:.1f} s)", style="bold red" if broken else "bold green"))
