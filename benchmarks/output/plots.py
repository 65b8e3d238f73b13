"""Draws the measures as SVG: lines over an axis of doublings where cases have numbers, else bars; whiskers are quartiles."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from benchmarks.output.markdown import groups, number

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 40, 60
_COLORS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#7d5ba6", "#5c5c5c", "#b5838d", "#2a9d8f")


def plots(told: dict[str, Any]) -> dict[str, str]:
    """SVG text by a name that is good for a file."""
    drawn: dict[str, str] = {}
    for benchmark, entry in told["runs"].items():
        for what, group in groups(entry["measures"]).items():
            if len({measure["case"] for measure in group}) * len({measure["arm"] for measure in group}) < 2:
                continue
            name = f"{benchmark}-{'-'.join(re.findall('[a-z0-9]+', what.lower()))}"
            drawn[name] = _drawing(f"{benchmark}: {what}, {group[0]['unit']}", group)
    return drawn


def _drawing(title: str, group: Sequence[dict[str, Any]]) -> str:
    arms = sorted(dict.fromkeys(measure["arm"] for measure in group), key=lambda arm: arm != "service")
    highest = max(measure["quartile_high"] for measure in group) or 1.0
    lowest = min(measure["quartile_low"] for measure in group)
    is_log = lowest > 0 and highest / lowest > 50
    scale_y = _scale_y(lowest, highest, is_log=is_log)
    body = [*_axis_y(lowest, highest, scale_y, is_log=is_log), *_legend(arms)]
    if all(measure["x"] is not None for measure in group) and len({measure["x"] for measure in group}) > 1:
        body += _lines(group, arms, scale_y)
    else:
        body += _bars(group, arms, scale_y)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="#fff"/>{_text(_LEFT, 18, title, size=13)}'
    )
    return "\n".join([head, *body, "</svg>", ""])


def _scale_y(lowest: float, highest: float, *, is_log: bool) -> Callable[[float], float]:
    top, bottom = float(_TOP), float(_HEIGHT - _BOTTOM)
    if not is_log:
        return lambda value: bottom - (bottom - top) * value / (highest * 1.05)
    low, high = math.log10(lowest / 1.5), math.log10(highest * 1.2)
    return lambda value: bottom - (bottom - top) * (math.log10(max(value, lowest / 1.5)) - low) / (high - low)


def _axis_y(lowest: float, highest: float, scale: Callable[[float], float], *, is_log: bool) -> list[str]:
    if is_log:
        first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
        ticks = [10.0**power for power in range(first, last + 1) if lowest / 1.5 <= 10.0**power <= highest * 1.2]
    else:
        raw = highest / 4
        step = next(
            m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10) if m * 10 ** math.floor(math.log10(raw)) >= raw
        )
        ticks = [step * index for index in range(6) if step * index <= highest * 1.05]
    rows = []
    for tick in ticks:
        y = scale(tick)
        rows.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        rows.append(_text(_LEFT - 6, y + 4, number(tick), anchor="end"))
    return rows


def _lines(group: Sequence[dict[str, Any]], arms: Sequence[str], scale_y: Callable[[float], float]) -> list[str]:
    positions = sorted({float(measure["x"]) for measure in group})
    low, high = math.log2(max(positions[0], 0.5)), math.log2(positions[-1])
    width = _WIDTH - _LEFT - _RIGHT - 40

    def scale_x(value: float) -> float:
        return _LEFT + 20 + width * (math.log2(max(value, 0.5)) - low) / ((high - low) or 1)

    rows = [_text(scale_x(x), _HEIGHT - _BOTTOM + 16, f"{x:,g}", anchor="middle") for x in positions]
    for arm, color in zip(arms, _COLORS * 3, strict=False):
        points = sorted((measure for measure in group if measure["arm"] == arm), key=lambda measure: measure["x"])
        path = " ".join(f"{scale_x(point['x']):.1f},{scale_y(point['median']):.1f}" for point in points)
        rows.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for point in points:
            x = scale_x(point["x"])
            rows.append(f'<circle cx="{x:.1f}" cy="{scale_y(point["median"]):.1f}" r="3" fill="{color}"/>')
            rows.append(_whisker(x, point, scale_y, color))
    return rows


def _bars(group: Sequence[dict[str, Any]], arms: Sequence[str], scale_y: Callable[[float], float]) -> list[str]:
    cases = [*dict.fromkeys(measure["case"] for measure in group)]
    slot = (_WIDTH - _LEFT - _RIGHT) / len(cases)
    bar = slot * 0.8 / len(arms)
    bottom = _HEIGHT - _BOTTOM
    rows = [
        _text(_LEFT + slot * (index + 0.5), bottom + 16 + 13 * (index % 2), case, anchor="middle")
        for index, case in enumerate(cases)
    ]
    for measure in group:
        left = _LEFT + slot * (cases.index(measure["case"]) + 0.1) + bar * arms.index(measure["arm"])
        top = scale_y(measure["median"])
        color = _COLORS[arms.index(measure["arm"]) % len(_COLORS)]
        rows.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{bar * 0.9:.1f}" height="{bottom - top:.1f}" fill="{color}"/>'
        )
        rows.append(_whisker(left + bar * 0.45, measure, scale_y, "#222"))
    return rows


def _whisker(x: float, measure: dict[str, Any], scale_y: Callable[[float], float], color: str) -> str:
    low, high = scale_y(measure["quartile_low"]), scale_y(measure["quartile_high"])
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{color}"/>'


def _legend(arms: Sequence[str]) -> list[str]:
    rows, x = [], float(_LEFT)
    for arm, color in zip(arms, _COLORS * 3, strict=False):
        rows.append(f'<rect x="{x:.1f}" y="{_HEIGHT - 16}" width="10" height="10" fill="{color}"/>')
        rows.append(_text(x + 14, _HEIGHT - 7, arm))
        x += 26 + 6.5 * len(arm)
    return rows


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'
