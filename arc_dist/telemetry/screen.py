"""The state of a job as text for a terminal: pure, and as long for 10,000 ranks as for 64."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from arc_dist.checkpoint_store.progress import clean
from arc_dist.telemetry import report

MAX_RANKS = 16
_MAX_STEPS = 8
_MAX_CELL = 40


def render(status: Mapping[str, Any], *, width: int = 120) -> str:
    """What ``GET /v1/status`` answered, as lines of at most `width` columns. Control characters in it are harmless."""
    lines = [_headline(status), *_ranks(status), *_checkpoints(status["checkpoints"]), *_incidents(status)]
    if status["stop"] is not None:
        lines.append(f"stopped with exit code {status['stop']['exit_code']}: {status['stop']['reason']}")
    if status["journal_error"]:
        lines.append(f"decisions are not durable: {status['journal_error']}")
    return "\n".join(clean(line)[:width].rstrip() for line in lines)


def one_line(status: Mapping[str, Any]) -> str:
    """A job in a list of jobs."""
    return clean(_headline(status))


def _headline(status: Mapping[str, Any]) -> str:
    parts = [
        f"job {status['job_id']}",
        f"{status['health']} for {_duration(status['phase_s'])}",
        f"generation {status['generation']}",
        "no step yet" if status["step"] is None else f"step {status['step']}",
        f"{status['world_size']} ranks",
        f"{status['restarts']} restarts",
    ]
    if status["goodput"] is not None:
        parts.append(f"goodput {status['goodput']:.1%}")
    return ", ".join(parts)


def _ranks(status: Mapping[str, Any]) -> list[str]:
    ranks = status["ranks"]
    summary = [f"{ranks['joined']['count']} joined"]
    summary += [
        f"{ranks[state]['count']} {state} ({ranks[state]['ranks']})"
        for state in ("missing", "ready", "finished")
        if ranks[state]["count"]
    ]
    if ranks["step_min"] is not None:
        summary.append(f"steps {ranks['step_min']} to {ranks['step_max']}")
    lines = ["", f"ranks: {', '.join(summary)}"]
    lines += [f"  ended: {death}" for death in status["deaths"][:_MAX_STEPS]]
    by_interest = sorted(ranks["listed"], key=lambda rank: (rank["state"] == "running", _step(rank), rank["rank"]))
    shown = sorted(by_interest[:MAX_RANKS], key=lambda rank: rank["rank"])
    rows = [("rank", "host", "state", "step", "quiet for"), *(_rank_row(rank) for rank in shown)]
    lines += _table(rows)
    more = status["world_size"] - len(shown)
    return [*lines, f"  and {more} more"] if more else lines


def _step(rank: Mapping[str, Any]) -> int:
    return -1 if rank["step"] is None else rank["step"]


def _rank_row(rank: Mapping[str, Any]) -> tuple[str, ...]:
    quiet_s = None if rank["quiet_s"] is None else rank["quiet_s"] + rank["heard_s"]
    return (str(rank["rank"]), rank["host"] or "", rank["state"], _text(rank["step"]), _duration(quiet_s))


def _checkpoints(checkpoints: Mapping[str, Any]) -> list[str]:
    lines = ["", "checkpoints: none" if not checkpoints["tiers"] else "checkpoints:"]
    if checkpoints["last_commit_s"] is not None:
        lines[-1] += f" the last was committed {_duration(checkpoints['last_commit_s'])} ago"
    tiers = [tier["tier"] for tier in checkpoints["tiers"]]
    if not tiers:
        return lines
    counts = [str(tier["count"]) for tier in checkpoints["tiers"]]
    rows = [("step", *(_end_of(tier) for tier in tiers)), ("in all", *counts)]
    rows += [(str(row["step"]), *(row["in"].get(tier, "") for tier in tiers)) for row in checkpoints["steps"]]
    return [*lines, *_table(rows[: _MAX_STEPS + 2])]


def _incidents(status: Mapping[str, Any]) -> list[str]:
    verdicts, incidents = status["verdicts"], status["incidents"]
    counts = (
        f"{verdicts['skipped']} updates skipped, {verdicts['rolled_back']} rollbacks, {incidents['count']} incidents"
    )
    if not incidents["last"]:
        return ["", counts]
    cleaned: list[dict[str, Any]] = [
        {key: clean(value) if isinstance(value, str) else value for key, value in incident.items()}
        for incident in incidents["last"]
    ]
    table = report.render({"incidents": cleaned, "goodput": None}).splitlines()
    times = ["", "", *(_clock(incident["time"]) for incident in cleaned)]
    return ["", counts, *(f"  {at:8}  {line}" for at, line in zip(times, table, strict=True))]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell[:_MAX_CELL] for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _end_of(text: str) -> str:
    """The end of a long path tells more than its beginning."""
    return text if len(text) <= _MAX_CELL else f"...{text[3 - _MAX_CELL :]}"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {int(seconds) % 60:02} s"


def _clock(at: float) -> str:
    return dt.datetime.fromtimestamp(at).strftime("%H:%M:%S")
