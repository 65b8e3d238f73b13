"""The benchmarks' numbers, tables, plots and comparisons, on results made by hand."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.output.compare import compare
from benchmarks.output.markdown import markdown
from benchmarks.output.plots import plots
from benchmarks.rig.finding import Finding, Target, paired, percentile, spread


def result(rates: list[float], **changes: Any) -> dict[str, Any]:
    found = Finding(about="One beside the other.")
    for count, factor in ((1, 1.0), (8, 2.0)):
        samples = [rate * factor for rate in rates]
        found.add("rate", "tasks/s", f"{count} at a time", "service", samples, x=count, more_is_better=True)
        found.add("rate", "tasks/s", f"{count} at a time", "engine", [10.0] * 5, x=count, more_is_better=True)
    found.add("size", "MiB", "idle", "service", [70.0])
    found.add("size", "MiB", "busy", "service", [90.0])
    found.ratios["rate_vs_engine"] = 0.9
    found.targets.append(Target(name="rate_vs_engine", measured=0.9, bound=0.95, kind="at least", case="1 at a time"))
    entry = found.as_dict() | {"seconds": 1.0}
    load = {"1_minute": 0.5, "5_minutes": 0.5, "15_minutes": 0.5, "steal_seconds": 0.0}
    machine = dict.fromkeys(("cpu_model", "virtual", "system", "kernel", "python", "engine", "file_system"), "x")
    return {
        "quick": True, "taken_at": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "load_before": load, "load_after": load,
        "machine": {**machine, "cpu_count": 2, "memory_gib": 4}, "runs": {"speed": entry},
        "ratios": entry["ratios"], "targets": entry["targets"], "skipped": {"upload": "no MinIO"}, "failed": {},
    } | changes  # fmt: skip


def test_a_percentile_is_a_sample_that_was_measured() -> None:
    samples = [float(number) for number in range(1, 101)]
    assert (percentile(samples, 50), percentile(samples, 99), percentile(samples, 100)) == (50, 99, 100)
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0


def test_the_spread_of_one_sample_is_that_sample() -> None:
    assert set(spread([4.0]).values()) == {4.0}


def test_what_disturbs_a_whole_round_falls_out_of_the_paired_ratio() -> None:
    assert paired([10.0, 1.0], [20.0, 2.0]) == [0.5, 0.5]


@pytest.mark.parametrize(("kind", "measured", "holds"), [("at least", 0.94, False), ("at most", 0.94, True)])
def test_a_target_knows_its_direction(kind: str, measured: float, holds: bool) -> None:
    assert Target(name="t", measured=measured, bound=0.95, kind=kind).holds is holds


def test_the_summary_names_the_target_that_does_not_hold_and_what_was_not_measured() -> None:
    text = markdown(result([8.0, 9.0, 10.0]), ["r-speed-rate.svg"])
    assert "| rate_vs_engine (1 at a time) | 0.90 | at least 0.95 | **no** |" in text
    assert "| 8 at a time | 18.0 (16.0–20.0) | 10.0 (10.0–10.0) |" in text
    assert "upload: no MinIO" in text
    assert "![r-speed-rate.svg]" in text


def test_a_change_is_called_one_only_outside_of_both_spreads() -> None:
    old = result([8.0, 9.0, 10.0])
    assert "better" not in compare(old, result([8.5, 9.5, 10.5]))
    assert compare(old, result([20.0, 21.0, 22.0])).count("| better |") == 2
    assert compare(old, result([2.0, 2.1, 2.2])).count("| worse |") == 2


def test_results_of_two_machines_are_not_compared_silently() -> None:
    other = result([8.0, 9.0, 10.0])
    other["machine"]["cpu_count"] = 64
    assert "Not the same machine**: cpu_count differ" in compare(result([8.0, 9.0, 10.0]), other)


def test_plots_are_svg_with_a_line_for_each_arm_or_a_bar_for_each_case() -> None:
    drawn = {name: ElementTree.fromstring(text) for name, text in plots(result([8.0, 9.0, 10.0])).items()}
    assert drawn.keys() == {"speed-rate", "speed-size"}
    assert len(drawn["speed-rate"].findall("{*}polyline")) == 2
    assert len([one for one in drawn["speed-size"].findall("{*}rect") if one.get("fill") == "#1b6ca8"]) == 3
