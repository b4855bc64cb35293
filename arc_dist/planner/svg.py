"""The forecast as one picture: goodput by interval, and where the time goes. Plain SVG, no library."""

from __future__ import annotations

import math
from html import escape

from arc_dist.planner.forecast import Arm, Forecast
from arc_dist.planner.units import format_time

_WIDTH, _HEIGHT = 860, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 830, 50, 290
_ARM_COLOURS = ("#1b6ca8", "#c0504d")
_PART_COLOURS = ("#4f9d69", "#e0a030", "#8e6bbf", "#c0504d", "#7f7f7f", "#1b6ca8", "#b07050", "#50a0a0", "#a05080")


def picture(answer: Forecast) -> str:
    """The SVG document."""
    name = answer.arms[0].plan.copies[-1].name
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 28, f"Goodput by the time between checkpoints in {name}", size=16),
        *_axes_and_curves(answer),
    ]
    colours = _part_colours(answer)
    for row, arm in enumerate(answer.arms):
        parts += _bar(arm, 345 + 50 * row, colours)
    parts += _legend(colours)
    return "\n".join([*parts, "</svg>", ""])


def _axes_and_curves(answer: Forecast) -> list[str]:
    points = [point for arm in answer.arms for point in arm.curve]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    span_x, span_y = math.log(high_x / low_x) or 1.0, (high_y - low_y) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (_RIGHT - _LEFT) * math.log(x / low_x) / span_x
        return round(across, 1), round(_BOTTOM - (_BOTTOM - _TOP) * (y - low_y) / span_y, 1)

    parts: list[str] = []
    for i in range(5):
        share, interval_s = low_y + span_y * i / 4, low_x * math.exp(span_x * i / 4)
        across, up = place(interval_s, share)
        parts.append(f'<line x1="{_LEFT}" y1="{up}" x2="{_RIGHT}" y2="{up}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 8, up + 4, f"{share:.1%}", anchor="end"))
        parts.append(_text(across, _BOTTOM + 20, format_time(interval_s), anchor="middle"))
    for number, (arm, colour) in enumerate(zip(answer.arms, _ARM_COLOURS)):
        line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in arm.curve))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(_RIGHT - 200 + 100 * number, 28, arm.plan.name, colour=colour))
    return parts


def _part_colours(answer: Forecast) -> dict[str, str]:
    names = dict.fromkeys(name for arm in answer.arms for name, share in arm.parts.items() if share >= 5e-4)
    return {name: _PART_COLOURS[i % len(_PART_COLOURS)] for i, name in enumerate(names)}


def _bar(arm: Arm, top: float, colours: dict[str, str]) -> list[str]:
    parts = [_text(_LEFT - 8, top + 20, arm.plan.name, anchor="end")]
    left = float(_LEFT)
    for name, colour in colours.items():
        width = (_RIGHT - _LEFT) * arm.parts.get(name, 0.0)
        title = escape(f"{name} {arm.parts.get(name, 0.0):.2%}")
        box = f'x="{left:.1f}" y="{top}" width="{width:.1f}" height="30"'
        parts.append(f'<rect {box} fill="{colour}"><title>{title}</title></rect>')
        left += width
    parts.append(_text(_LEFT + 8, top + 20, f"{arm.goodput:.2%}", colour="white"))
    return parts


def _legend(colours: dict[str, str]) -> list[str]:
    parts: list[str] = []
    for i, (name, colour) in enumerate(colours.items()):
        x, y = _LEFT + 190 * (i % 4), 460 + 24 * (i // 4)
        parts.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 18, y, name))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, colour: str = "#222") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
