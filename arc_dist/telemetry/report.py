"""The report: what happened in a run, as a table for people and JSON for scripts."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from arc_dist.errors import ConfigError
from arc_dist.telemetry.recorder import INCIDENTS_FILE, NOT_INCIDENTS

_COLUMNS = ("step", "incident", "rank", "seen by", "after", "action", "steps lost", "back after")
_MAX_CAUSE_CHARS = 72


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's incident file, oldest first; a torn last line is left out.

    Raises:
        ConfigError: there is no such file.
    """
    path = run_dir / INCIDENTS_FILE
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. Give the run directory that was printed when the job ended.")
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # the job was killed while this line was being written
    return sorted(lines, key=_heard_at)


def _heard_at(line: dict[str, Any]) -> float:
    """When a line was written, on the clock of the one host that wrote them all, where that is known."""
    return line.get("heard_at", line.get("time", 0.0))


def summarize(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Incidents with their cost, and the goodput.

    Goodput is useful time / wall time: (steps gained x median step time) / (last line - first line).
    """
    incidents = [dict(line) for line in lines if line.get("kind") not in NOT_INCIDENTS]
    resumed = [line for line in lines if line.get("kind") == "resumed"]
    for incident in incidents:
        _attach_resumption(incident, resumed)
    progress = [line for line in lines if line.get("kind") in ("started", "progress", "finished")]
    summary: dict[str, Any] = {"incidents": incidents, "goodput": None, "steps": None, "wall_s": None}
    step_times = [line["median_step_s"] for line in progress if line.get("median_step_s")]
    if progress and step_times:
        gained = max(line["step"] for line in progress) - min(line["step"] for line in progress)
        wall_s = progress[-1]["time"] - progress[0]["time"]
        summary["steps"], summary["wall_s"] = gained, wall_s
        summary["goodput"] = min(1.0, gained * statistics.median(step_times) / wall_s) if wall_s > 0 else None
    return summary


def _attach_resumption(incident: dict[str, Any], resumed: Iterable[dict[str, Any]]) -> None:
    """A restart is over when a later generation commits its first step; that line is joined to the incident."""
    if incident.get("kind") != "rank_died":
        return
    for line in resumed:
        if line["generation"] > incident.get("generation", -1) and _heard_at(line) >= _heard_at(incident) - 1.0:
            incident["resumed_after_s"] = _heard_at(line) - _died_at(incident)
            incident["steps_lost"] = max(0, incident.get("step", line["restored_step"]) - line["restored_step"])
            incident["restored_step"] = line["restored_step"]
            incident["tier"] = line.get("tier")
            return


def _died_at(incident: dict[str, Any]) -> float:
    """The death's time on the clock of `_heard_at`; its supervisor told of it when the next process was forked."""
    if "heard_at" in incident and incident.get("resumed_after_s") is not None:
        return incident["heard_at"] - incident["resumed_after_s"]
    return incident.get("died_at", incident["time"])


def _seconds(value: Any) -> str:
    return "" if value is None else f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def _cause(incident: dict[str, Any]) -> str:
    if incident.get("cause"):
        return str(incident["cause"])
    kind = str(incident.get("kind", "")).replace("_", " ")
    return f"{kind}: {incident['reason']}" if incident.get("reason") else kind


def _shortened(text: str) -> str:
    """The first line, cut at a width that leaves a table readable; the whole is in the JSON."""
    line = text.partition("\n")[0]
    return line if len(line) <= _MAX_CAUSE_CHARS else line[: _MAX_CAUSE_CHARS - 3] + "..."


def _row(incident: dict[str, Any]) -> tuple[str, ...]:
    ranks = incident.get("ranks", [incident["rank"]] if "rank" in incident else [])
    action = str(incident.get("action", ""))
    if incident.get("restored_step") is not None:
        tier = f" ({incident['tier']})" if incident.get("tier") else ""
        action += f" to step {incident['restored_step']}{tier}"
    after = incident.get("seen_after_s")
    seen_after = _seconds(after) if after is not None else str(incident.get("seen_after", ""))
    lost = incident.get("steps_lost")
    return (
        str(incident.get("step", "")),
        _shortened(_cause(incident)),
        ",".join(str(rank) for rank in ranks),
        str(incident.get("seen_by", "")),
        seen_after,
        action,
        "" if lost is None else str(lost),
        _seconds(incident.get("resumed_after_s")),
    )


def render(summary: dict[str, Any]) -> str:
    """The table as text, aligned, with the goodput below it."""
    rows = [_COLUMNS, *(_row(incident) for incident in summary["incidents"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    text.insert(1, "  ".join("-" * width for width in widths))
    if not summary["incidents"]:
        text = ["no incidents"]
    if summary["goodput"] is not None:
        text.append(f"goodput {summary['goodput']:.1%}: {summary['steps']} steps in {summary['wall_s']:.1f} s")
    return "\n".join(text)


def add_command(subparsers: Any) -> None:
    """Registers ``arc report``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report", help="what happened in a run", description="Prints each incident of a run, its cost, and the goodput."
    )
    parser.add_argument("run_dir", type=Path, help="the run directory (printed when the job ends; ARC_RUN_DIR)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    summary = summarize(read_lines(args.run_dir))
    print(json.dumps(summary, indent=2, default=str) if args.json else render(summary))
    return 0
