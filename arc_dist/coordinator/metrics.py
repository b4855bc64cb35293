"""The state of a job in Prometheus' text format (version 0.0.4), for ``GET /metrics``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from arc_dist.coordinator.board import Reading
from arc_dist.coordinator.view import Facts, health, reached
from arc_dist.protocol.job import Phase

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HEALTH = ("starting", "running", "recovering", *(phase.value for phase in Phase if phase.is_over))
_Labels = Mapping[str, str]


def render(facts: Facts, board: Reading) -> str:
    """All metrics of the job. What is not known yet is left out, as Prometheus wants it."""
    job = facts.job
    page = _Page()
    page.gauge("arc_world_size", "Ranks of the job.", facts.world_size)
    page.gauge("arc_ranks_joined", "Ranks whose supervisor has joined.", len(job.members))
    page.gauge("arc_generation", "The generation that starts, runs or ends.", job.generation)
    now = health(job)
    page.family(
        "arc_health", "gauge", "1 for what the job is doing.", [({"state": s}, float(s == now)) for s in _HEALTH]
    )
    page.gauge("arc_step", "The furthest step committed in this generation.", reached(job, board))
    page.family(
        "arc_rank_step",
        "gauge",
        "The step that each rank has committed, as its supervisor last said.",
        [({"rank": str(rank)}, where.step) for rank, where in sorted(board.whereabouts.items())],
    )
    page.family(
        "arc_incidents_total",
        "counter",
        "Incidents by kind.",
        [({"kind": kind}, count) for kind, count in sorted(board.by_kind.items())],
    )
    page.counter("arc_restarts_total", "Generations started again after a failure.", job.ledger.restarts)
    page.counter("arc_skips_total", "Updates that all ranks skipped.", board.by_action.get("skip", 0))
    page.counter("arc_rollbacks_total", "Rollbacks in memory.", board.by_action.get("rollback", 0))
    page.family(
        "arc_actions_total",
        "counter",
        "What was done about incidents.",
        [({"action": action}, count) for action, count in sorted(board.by_action.items())],
    )
    stored = Counter(entry.url for entry in job.known.committed)
    page.family(
        "arc_checkpoints_committed",
        "gauge",
        "Committed checkpoints that are known in each tier.",
        [({"tier": url}, count) for url, count in sorted(stored.items())],
    )
    age_s = None if board.last_commit_at is None else max(0.0, facts.wall_s - board.last_commit_at)
    page.gauge("arc_last_commit_age_seconds", "Time since the newest commit.", age_s)
    page.gauge("arc_goodput_ratio", "Useful time / wall time so far.", board.goodput)
    page.gauge("arc_journal_ok", "0 when decisions cannot be made durable.", float(facts.journal_error is None))
    page.gauge("arc_coordinator_epoch", "Grows with every restart of the coordinator.", facts.epoch)
    return page.text()


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def gauge(self, name: str, about: str, value: float | None) -> None:
        self.family(name, "gauge", about, [] if value is None else [({}, value)])

    def counter(self, name: str, about: str, value: float) -> None:
        self.family(name, "counter", about, [({}, value)])

    def family(self, name: str, kind: str, about: str, values: Iterable[tuple[_Labels, float]]) -> None:
        self._lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        for labels, value in values:
            inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
            self._lines.append(f"{name}{{{inner}}} {value}" if inner else f"{name} {value}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escaped(text: str) -> str:
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
