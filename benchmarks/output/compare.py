"""What changed between two result files, and what of it is more than the spread within each."""

from __future__ import annotations

from typing import Any

from benchmarks.output.markdown import number


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A Markdown table. `better` and `worse` are said only where the quartiles of the two don't overlap."""
    lines = [f"From {before['taken_at']} to {after['taken_at']}.", ""]
    differing = [key for key in before["machine"] if before["machine"][key] != after["machine"].get(key)]
    if differing:
        lines += [f"**Not the same machine**: {', '.join(differing)} differ; compare ratios only.", ""]
    if before["quick"] != after["quick"]:
        lines += ["**Not the same scale**: one is quick, the other full.", ""]
    lines += ["| benchmark | measure | case | arm | before | after | change | |", "|---|---|---|---|---|---|---|---|"]
    there = _by_key(before)
    for key, new in _by_key(after).items():
        if (old := there.get(key)) is not None:
            lines.append(f"| {' | '.join(key)} | {_shown(old)} | {_shown(new)} | {_change(old, new)} |")
    lines += ["", "| ratio | before | after |", "|---|---|---|"]
    for name, value in after["ratios"].items():
        if name in before["ratios"]:
            lines.append(f"| {name} | {number(before['ratios'][name])} | {number(value)} |")
    return "\n".join(lines) + "\n"


def _by_key(told: dict[str, Any]) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    return {
        (name, measure["what"], measure["case"], measure["arm"]): measure
        for name, entry in told["runs"].items()
        for measure in entry["measures"]
    }


def _shown(measure: dict[str, Any]) -> str:
    return f"{number(measure['median'])} {measure['unit']}"


def _change(old: dict[str, Any], new: dict[str, Any]) -> str:
    if not old["median"]:
        return "– |"
    change = f"{100 * (new['median'] / old['median'] - 1):+.1f} %"
    is_higher = new["quartile_low"] > old["quartile_high"]
    is_lower = new["quartile_high"] < old["quartile_low"]
    if len(old["samples"]) < 3 or len(new["samples"]) < 3 or not (is_higher or is_lower):
        return f"{change} |"
    return f"{change} | {'better' if is_higher == new['more_is_better'] else 'worse'}"
