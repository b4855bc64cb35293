"""The forecast as text with plots made of letters, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from arc_dist.planner.cluster import Cluster
from arc_dist.planner.forecast import Arm, Forecast
from arc_dist.planner.units import format_size, format_time

_BAR_WIDTH = 40
_PLOT_HEIGHT = 12
_MARKS = "o*"
_SMALLEST_PART = 5e-5


def render(cluster: Cluster, answer: Forecast) -> str:
    """The whole answer, under 100 columns wide."""
    sections = [
        _header(cluster, answer),
        _goodputs(answer),
        *(_losses(arm) for arm in answer.arms),
        _fault_table(answer),
        _intervals(answer),
        _plot(answer),
    ]
    return "\n\n".join(sections)


def _header(cluster: Cluster, answer: Forecast) -> str:
    kinds = ", ".join(f"{name} {format_time(mtbf_s)}" for name, mtbf_s in answer.mtbf_s.items())
    job = (
        f"{cluster.nodes:,} nodes x {cluster.gpus} GPUs, {format_size(cluster.state_bytes)} of state,"
        f" {format_time(answer.duration_s)}, {answer.num_lives} lives, seed {answer.seed}"
    )
    lines = [
        job,
        f"a fault every {format_time(answer.job_mtbf_s)}: {kinds}" if kinds else "no faults",
        f"a snapshot stops training for {format_time(cluster.stall_s)}; one checkpoint takes "
        + ", ".join(f"{format_time(cluster.write_s(tier))} to {tier.name}" for tier in cluster.tiers),
    ]
    if cluster.spares is None:
        lines.append("a spare node is always there (--spares gives their number)")
    used = {copy.name for copy in answer.arms[0].plan.copies}
    unused = [tier.name for tier in cluster.tiers if tier.name not in used]
    if unused:
        lines.append(f"left out, as none of these faults is recovered from there: {', '.join(unused)}")
    return "\n".join(lines)


def _goodputs(answer: Forecast) -> str:
    lines: list[str] = []
    for arm in answer.arms:
        intervals = ", ".join(f"{c.name} every {format_time(c.interval_s)}" for c in arm.plan.copies if not c.is_fixed)
        name = arm.plan.name
        lines.append(f"goodput with {name:9} {arm.goodput:6.2%}  [{arm.low:.2%}, {arm.high:.2%}]   {intervals}")
    return "\n".join(lines)


def _losses(arm: Arm) -> str:
    """Bars of what the wall time was spent on besides useful work, the longest first."""
    lost = sorted(((s, n) for n, s in arm.parts.items() if n != "useful work" and s >= _SMALLEST_PART), reverse=True)
    lines = [f"where time is lost with {arm.plan.name} ({1 - arm.goodput:.2%}):"]
    most = lost[0][0] if lost else 1.0
    for share, name in lost:
        lines.append(f"  {name:20} {share:7.2%} {'#' * max(1, round(_BAR_WIDTH * share / most))}")
    return "\n".join(lines if lost else [*lines, "  nowhere"])


def _fault_table(answer: Forecast) -> str:
    heads = [f"{arm.plan.name}: {what}" for arm in answer.arms for what in ("redone", "down")]
    rows: list[Sequence[str]] = [("fault", "per life", *heads)]
    for name in dict.fromkeys(name for arm in answer.arms for name in arm.faults):
        costs = [arm.faults.get(name, {}) for arm in answer.arms]
        shares = [f"{cost.get(what, 0.0):.2%}" for cost in costs for what in ("lost_work", "down")]
        rows.append((name, " / ".join(f"{cost.get('number', 0.0):.1f}" for cost in costs), *shares))
    if len(rows) == 1:
        return "no fault struck"
    return _table(rows)


def _intervals(answer: Forecast) -> str:
    rows: list[Sequence[str]] = [("interval", "simulated", "best found", "Young")]
    for arm in answer.arms:
        for copy in arm.plan.copies:
            if not copy.is_fixed:
                times = (copy.interval_s, arm.best_s[copy.name], arm.young_s[copy.name])
                rows.append((f"{arm.plan.name}: {copy.name}", *(format_time(s) for s in times)))
    daly = f"Daly's interval for torchrun: {format_time(answer.daly_s)}"
    best = ", ".join(f"{arm.plan.name} {arm.best_goodput:.2%}" for arm in answer.arms)
    return f"{_table(rows)}\ngoodput with the best found: {best}. {daly}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _plot(answer: Forecast) -> str:
    """Goodput over the interval of the last place, both arms, on a logarithmic axis."""
    if math.isinf(answer.job_mtbf_s):
        return "nothing ever fails: the fewer copies the better"
    points = [(x, y, mark) for arm, mark in zip(answer.arms, _MARKS) for x, y in arm.curve]
    low_x, high_x = min(x for x, _, _ in points), max(x for x, _, _ in points)
    low_y, high_y = min(y for _, y, _ in points), max(y for _, y, _ in points)
    span_x, span_y = math.log(high_x / low_x) or 1.0, (high_y - low_y) or 1.0
    width = 60
    grid = [[" "] * (width + 1) for _ in range(_PLOT_HEIGHT + 1)]
    for x, y, mark in reversed(points):
        column = round(width * math.log(x / low_x) / span_x)
        grid[_PLOT_HEIGHT - round(_PLOT_HEIGHT * (y - low_y) / span_y)][column] = mark
    lines = [f"goodput by the time between checkpoints in {answer.arms[0].plan.copies[-1].name}:"]
    for row, cells in enumerate(grid):
        share = high_y - span_y * row / _PLOT_HEIGHT
        label = f"{share:7.2%}" if row % 4 == 0 else " " * 7
        lines.append(f"{label} |{''.join(cells)}".rstrip())
    left, right = format_time(low_x), format_time(high_x)
    lines.append(f"{'':8}+{'-' * (width + 1)}")
    lines.append(f"{'':9}{left}{right.rjust(width + 1 - len(left))}")
    lines.append(f"{'':9}" + "   ".join(f"{mark} {arm.plan.name}" for arm, mark in zip(answer.arms, _MARKS)))
    return "\n".join(lines)


def as_json(cluster: Cluster, answer: Forecast) -> dict[str, Any]:
    """The same for scripts: seconds, bytes and shares; null where something never happens."""
    arms = []
    for arm in answer.arms:
        fields = {field.name: getattr(arm, field.name) for field in dataclasses.fields(arm) if field.name != "plan"}
        intervals = {copy.name: copy.interval_s for copy in arm.plan.copies if not copy.is_fixed}
        arms.append({"name": arm.plan.name, "interval_s": intervals, **fields})
    top = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer) if field.name != "arms"}
    return _finite({"cluster": dataclasses.asdict(cluster), **top, "arms": arms})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
