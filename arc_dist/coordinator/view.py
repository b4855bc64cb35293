"""The state of a job as people and programs read it: ``GET /v1/status`` and ``GET /v1/history``. Bounded at any size.

Pure: made from values that do not change, so no lock is held while it is made, however many ranks there are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from arc_dist.coordinator.board import Reading, Whereabouts
from arc_dist.protocol.job import Job, Phase

STATUS_VERSION = 1
MAX_RANKS_SHOWN = 64
_MAX_STEPS_SHOWN = 50
_MAX_INCIDENTS_SHOWN = 10
_MAX_DEATHS_SHOWN = 16
_MAX_SAVES_SHOWN = 16
_MAX_RANGES = 16
_MAX_TEXT = 500
MEMORY = "memory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a description is made of.

    Attributes:
        job_id: the job's name.
        epoch: the coordinator's.
        world_size: number of ranks.
        job: the state of the rules.
        saves: the saves that are remembered, oldest first.
        journal_error: why decisions are not durable; None when they are.
        now_s: monotonic, as in `job.since_s`.
        wall_s: wall clock.
    """

    job_id: str
    epoch: int
    world_size: int
    job: Job
    saves: list[dict[str, Any]]
    journal_error: str | None
    now_s: float
    wall_s: float


def health(job: Job) -> str:
    """One word: ``running``, ``starting``, ``recovering``, ``done`` or ``stopped``."""
    if job.phase in (Phase.STARTING, Phase.ENDING):
        return "starting" if job.generation == job.first and job.phase is Phase.STARTING else "recovering"
    return job.phase.value


def status(facts: Facts, board: Reading) -> dict[str, Any]:
    """The answer of ``GET /v1/status``; its size does not grow with the number of ranks."""
    job = facts.job
    present = {rank: where for rank, where in board.whereabouts.items() if where.generation == job.generation}
    plan = job.plan
    return {
        "version": STATUS_VERSION,
        "job_id": facts.job_id,
        "epoch": facts.epoch,
        "time": facts.wall_s,
        "world_size": facts.world_size,
        "health": health(job),
        "phase": job.phase.value,
        "phase_s": max(0.0, facts.now_s - job.since_s),
        "generation": job.generation,
        "step": reached(job, board),
        "ranks": _ranks(facts, present),
        "deaths": [str(death)[:_MAX_TEXT] for death in job.deaths[:_MAX_DEATHS_SHOWN]],
        "restarts": job.ledger.restarts,
        "fruitless_generations": job.ledger.fruitless,
        "preempted": job.preempted,
        "plan": None if plan is None else {"step": plan.step, "tier": plan.tier.value, "reason": plan.reason},
        "stop": dataclasses.asdict(job.stop) if job.stop else None,
        "checkpoints": _checkpoints(facts, present, board),
        "verdicts": {"skipped": board.by_action.get("skip", 0), "rolled_back": board.by_action.get("rollback", 0)},
        "incidents": {
            "count": board.num_incidents,
            "by_kind": dict(board.by_kind),
            "last": [dict(incident) for incident in board.incidents[-_MAX_INCIDENTS_SHOWN:]],
        },
        "goodput": board.goodput,
        "journal_error": facts.journal_error,
    }


def history(facts: Facts, board: Reading) -> dict[str, Any]:
    """The answer of ``GET /v1/history``: samples of (time, step, loss), thinned, and what happened between them."""
    return {
        "epoch": facts.epoch,
        "samples": [dataclasses.astuple(sample) for sample in board.samples],
        "events": [dict(event) for event in board.events],
    }


def reached(job: Job, board: Reading) -> int | None:
    """The furthest step that is known to be committed in the present generation; None before any."""
    known = [where.step for where in board.whereabouts.values() if where.generation == job.generation]
    if board.samples and board.samples[-1].generation == job.generation:
        known.append(board.samples[-1].step)
    if job.reached:
        known.append(job.reached)
    if job.plan is not None and job.plan.step is not None:
        known.append(job.plan.step)
    return max(known, default=None)


def ranges(ranks: Iterable[int]) -> str:
    """Ranks as people write them, ``0-7,9``; at most `_MAX_RANGES` ranges, then an ellipsis."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_MAX_RANGES]]
    return ",".join([*text, "..."] if len(runs) > _MAX_RANGES else text)


def _ranks(facts: Facts, present: Mapping[int, Whereabouts]) -> dict[str, Any]:
    """Counts, and the ranks worth a line: the dead, the silent, those behind; in a small job all of them."""
    job = facts.job
    everyone = range(facts.world_size)
    dead = {death.rank for death in job.deaths} if job.phase is not Phase.RUNNING else set[int]()
    steps = [where.step for where in present.values()]
    order = sorted(
        everyone,
        key=lambda rank: (
            rank not in dead,
            rank in job.members,
            present[rank].step if rank in present else -1,
            rank,
        ),
    )
    shown = sorted(order[:MAX_RANKS_SHOWN])
    return {
        "joined": _counted(job.members),
        "missing": _counted(rank for rank in everyone if rank not in job.members),
        "ready": _counted(job.ready),
        "finished": _counted(job.finished),
        "step_min": min(steps, default=None),
        "step_max": max(steps, default=None),
        "listed": [_rank(facts, rank, present.get(rank), rank in dead) for rank in shown],
        "num_not_listed": facts.world_size - len(shown),
    }


def _rank(facts: Facts, rank: int, where: Whereabouts | None, is_dead: bool) -> dict[str, Any]:
    member = facts.job.members.get(rank)
    return {
        "rank": rank,
        "host": member.host[:_MAX_TEXT] if member else None,
        "state": _state(facts.job, rank, is_dead),
        "step": where.step if where else None,
        "quiet_s": where.quiet_s if where else None,
        "heard_s": max(0.0, facts.wall_s - where.heard_at) if where else None,
    }


def _state(job: Job, rank: int, is_dead: bool) -> str:
    if rank not in job.members:
        return "missing"
    if rank in job.finished:
        return "finished"
    if rank in job.ready:
        return "ready"
    if is_dead:
        return "dead"
    return {Phase.RUNNING: "running", Phase.ENDING: "ending"}.get(job.phase, job.phase.value)


def _counted(ranks: Iterable[int]) -> dict[str, Any]:
    listed = list(ranks)
    return {"count": len(listed), "ranks": ranges(listed)}


def _checkpoints(facts: Facts, present: Mapping[int, Whereabouts], board: Reading) -> dict[str, Any]:
    """Which steps are where: a row per step, newest first, and a summary per tier."""
    by_step: dict[int, dict[str, str]] = {}
    totals: dict[str, list[int]] = {}
    for entry in facts.job.known.committed:
        totals.setdefault(entry.url, []).append(entry.step)
        mark = "committed" if entry.certified else "uncertified"
        poisoned = any(poison.covers(entry.step, entry.generation) for poison in facts.job.known.poison)
        by_step.setdefault(entry.step, {})[entry.url] = "poisoned" if poisoned else mark
    in_memory = Counter(step for where in present.values() for step in set(where.held))
    for step, count in in_memory.items():
        by_step.setdefault(step, {})[MEMORY] = (
            "whole" if count >= facts.world_size else f"{count} of {facts.world_size}"
        )
    whole = sorted(step for step, count in in_memory.items() if count >= facts.world_size)
    tiers: list[dict[str, Any]] = [
        {"tier": url, "count": len(steps), "newest": max(steps)} for url, steps in sorted(totals.items())
    ]
    if in_memory:
        tiers.insert(0, {"tier": MEMORY, "count": len(whole), "newest": whole[-1] if whole else None})
    return {
        "tiers": tiers,
        "steps": [{"step": step, "in": by_step[step]} for step in sorted(by_step, reverse=True)[:_MAX_STEPS_SHOWN]],
        "num_steps": len(by_step),
        "saving": facts.saves[-_MAX_SAVES_SHOWN:],
        "last_commit_s": None if board.last_commit_at is None else max(0.0, facts.wall_s - board.last_commit_at),
    }
