"""The summary of a result file for people: tables with medians and quartiles, ratios, and whether the targets hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(told: dict[str, Any], plot_names: Sequence[str] = ()) -> str:
    lines = ["# Measurements", "", *_machine(told), "", *_targets(told["targets"]), *_ratios(told["ratios"])]
    for name, entry in told["runs"].items():
        lines += [f"## {name}", "", entry["about"], "", *_measures(entry["measures"])]
        lines += [f"* {note}" for note in entry["notes"]]
        lines += ["", *(f"![{plot}]({plot})" for plot in plot_names if f"-{name}-" in plot), ""]
    if told["skipped"]:
        lines += ["## Not measured", "", *(f"* {name}: {why}" for name, why in told["skipped"].items()), ""]
    if told["failed"]:
        lines += ["## Failed", "", *(f"* {name}: {why}" for name, why in told["failed"].items()), ""]
    return "\n".join(lines)


def groups(measures: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Measures by what they measure, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for measure in measures:
        found.setdefault(measure["what"], []).append(measure)
    return found


def number(value: float) -> str:
    """Three significant digits, without exponents."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _machine(told: dict[str, Any]) -> list[str]:
    facts = told["machine"]
    before, after = told["load_before"], told["load_after"]
    steal = after["steal_seconds"] - before["steal_seconds"]
    words = (
        f"{'Quick' if told['quick'] else 'Full'} run of {told['seconds']:.0f} s, {told['taken_at']}. "
        f"{facts['cpu_count']} CPUs ({facts['cpu_model']}, {facts['virtual']}), {facts['memory_gib']} GiB, "
        f"{facts['system']}, kernel {facts['kernel']}, Python {facts['python']}, engine {facts['engine']}, "
        f"{facts['file_system']}. Load before {before['1_minute']:.1f}, after {after['1_minute']:.1f}; "
        f"the hypervisor took {steal:.1f} CPU seconds meanwhile."
    )
    return [words, "", "Medians, in brackets the quartiles; a p99 of fewer than 100 samples is the largest."]


def _targets(targets: list[dict[str, Any]]) -> list[str]:
    if not targets:
        return []
    rows = ["## Targets", "", "| target | measured | bound | holds |", "|---|---|---|---|"]
    for target in targets:
        name = f"{target['name']} ({target['case']})" if target["case"] else target["name"]
        holds = "yes" if target["holds"] else "**no**"
        rows.append(f"| {name} | {number(target['measured'])} | {target['kind']} {target['bound']:g} | {holds} |")
    return [*rows, ""]


def _ratios(ratios: dict[str, float]) -> list[str]:
    if not ratios:
        return []
    rows = [f"| {name} | {number(value)} |" for name, value in ratios.items()]
    return ["## Ratios", "", "| ratio | value |", "|---|---|", *rows, ""]


def _measures(measures: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for what, group in groups(measures).items():
        arms = sorted(dict.fromkeys(measure["arm"] for measure in group), key=lambda arm: arm != "service")
        cases = [*dict.fromkeys(measure["case"] for measure in group)]
        cells = {(measure["case"], measure["arm"]): measure for measure in group}
        lines += [f"| {what}, {group[0]['unit']} | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
        lines += [f"| {case} | " + " | ".join(_cell(cells.get((case, arm))) for arm in arms) + " |" for case in cases]
        lines.append("")
    return lines


def _cell(measure: dict[str, Any] | None) -> str:
    if measure is None:
        return ""
    if len(measure["samples"]) == 1:
        return number(measure["median"])
    text = f"{number(measure['median'])} ({number(measure['quartile_low'])}–{number(measure['quartile_high'])})"
    return (
        text if measure["more_is_better"] or len(measure["samples"]) < 10 else f"{text}, p99 {number(measure['p99'])}"
    )
