"""What the coordinator knows of the ranks' progress: limits, speed, and the inquiry when one of them is overdue.

Reports come from the supervisors every few seconds. When one says that its rank is overdue, also by the limits that
other ranks learned, every rank is asked where it is; `protocol.hangs.judge` decides on the answers, and the condemned
are told with the next answer to their supervisors. Used under the service's lock; `publish` is called without it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arc_dist.coordinator.speed import Speed, read_spent
from arc_dist.coordinator.wire import Fields
from arc_dist.errors import ConfigError
from arc_dist.protocol.hangs import Conduct, Inquiry, Kind, Patience, Section, Sighting, Verdict, judge, merge_limits
from arc_dist.protocol.job import Job, Phase
from arc_dist.protocol.stragglers import Slow, Streaks, compare

logger = logging.getLogger("arc_dist.coordinator")

_FOREVER_S = 1e9
_MAX_BUSY = 1e6
_AGAIN_S = 10.0  # after a verdict, for a culprit that went on by itself in the last moment
_SHOWN_RANKS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Testimony:
    """What a rank's supervisor said of it: see `supervisor.watcher`."""

    seen: Sighting
    writes: int
    frames: str
    text: str
    kernel: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Finding:
    """A hang, to be written down."""

    generation: int
    verdict: Verdict
    told: Mapping[int, _Testimony]


class HangDesk:
    """See the module's text.

    Args:
        world_size: number of ranks.
        run_dir: where stacks go; None keeps none.
        clock: monotonic seconds.
        record: takes an incident's line.
    """

    def __init__(
        self,
        world_size: int,
        run_dir: Path | None,
        clock: Callable[[], float],
        record: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._world_size = world_size
        self._run_dir = run_dir
        self._clock = clock
        self._record = record
        self._number = 0
        self._findings: list[_Finding] = []
        self._slow: list[tuple[int, Slow]] = []
        self._streaks = Streaks()
        self._patience = Patience()
        self._begin(-1)

    def _begin(self, generation: int) -> None:
        self._generation = generation
        self._limits: dict[int, Mapping[str, float]] = {}
        self._inquiry: Inquiry | None = None
        self._told: dict[int, _Testimony] = {}
        self._condemned: dict[int, dict[str, Any]] = {}
        self._quiet_until_s = 0.0
        self._speed = Speed(self._world_size)

    def take(self, rank: int, fields: Fields, job: Job) -> dict[str, Any]:
        """Takes a report; answers ``{"inquiry", "condemned"}``: a question to answer, and whether to end the rank."""
        generation = fields.integer("generation")
        report = Fields("watched", fields.mapping("report"))
        if job.phase is not Phase.RUNNING or generation != job.generation:
            return {"inquiry": 0, "condemned": None}
        if generation != self._generation:
            self._begin(generation)
        now_s = self._clock()
        if (spent := report.mapping_or_none("spent")) is not None:
            self._learn(rank, spent)
        seen = self._agreed(_read_sighting(rank, Fields("watched", report.mapping("seen"))))
        if self._inquiry is not None:
            self._hear(report, seen, now_s)
        elif seen.is_overdue and now_s >= self._quiet_until_s:
            self._open(job, now_s)
        return {
            "inquiry": self._inquiry.number if self._inquiry is not None else 0,
            "condemned": self._condemned.pop(rank, None),
        }

    def _learn(self, rank: int, fields: Mapping[str, Any]) -> None:
        spent = read_spent(Fields("watched", fields))
        self._limits[rank] = spent.limits_s
        window = self._speed.take(rank, spent)
        if window is None:
            return
        slow = compare(window.work, window.step_s, window.factor)
        self._streaks, reported = self._streaks.after(slow, frozenset(window.work))
        self._slow += [(window.step, one) for one in reported]

    def _agreed(self, seen: Sighting) -> Sighting:
        """With the largest limit that any rank learned, and patience; neither helps a stopped process."""
        if seen.limit_s == 0 or seen.conduct is Conduct.STOPPED:
            return seen
        merged = functools.reduce(merge_limits, self._limits.values(), {})
        limit_s = max(seen.limit_s, merged.get(seen.name, 0.0)) * self._patience.at(seen.step)
        return dataclasses.replace(seen, limit_s=limit_s)

    # ------------------------------------------------------------------ the inquiry

    def _open(self, job: Job, now_s: float) -> None:
        self._number += 1
        awaited = frozenset(range(self._world_size)) - job.finished
        self._inquiry = Inquiry(number=self._number, opened_s=now_s, awaited=awaited, told={})
        self._told = {}

    def _hear(self, report: Fields, seen: Sighting, now_s: float) -> None:
        inquiry = self._inquiry
        assert inquiry is not None
        number = report.integer("inquiry", default=0)
        after = inquiry.take(number, seen)
        if after is not inquiry:
            self._inquiry = inquiry = after
            self._told[seen.rank] = _Testimony(
                seen=seen,
                writes=report.integer("writes"),
                frames=report.text("frames", default=""),
                text=report.text("text", default=""),
                kernel=report.text("kernel", default=""),
            )
        if inquiry.is_over(now_s):
            self._conclude(inquiry, now_s)

    def _conclude(self, inquiry: Inquiry, now_s: float) -> None:
        verdict = judge(tuple(inquiry.told.values()), inquiry.silent)
        self._inquiry = None
        if verdict.kind is not Kind.HANG:
            logger.info("no hang: %s", verdict.reason)
            self._quiet_until_s = now_s + verdict.pause_s
            return
        self._quiet_until_s = now_s + _AGAIN_S
        self._patience = self._patience.after_hang(min(seen.step for seen in inquiry.told.values()))
        self._findings.append(_Finding(generation=self._generation, verdict=verdict, told=dict(self._told)))
        reason = verdict.reason if verdict.culprits else f"culprit unknown: {verdict.reason}"
        self._condemned = {rank: {"writes": self._told[rank].writes, "reason": reason} for rank in verdict.condemned}

    # ------------------------------------------------------------------ writing it down

    def publish(self) -> None:
        """Writes and logs what was found since the last call."""
        findings, self._findings = self._findings, []
        slow, self._slow = self._slow, []
        for finding in findings:
            self._publish_hang(finding)
        for step, one in slow:
            reason = (
                f"its own work takes {one.ratio:.1f} times the median, {one.excess_s:.4f} s more per step: {one.part}"
            )
            logger.warning("rank %d is slow: %s", one.rank, reason)
            self._record(
                {"kind": "straggler", "ranks": [one.rank], "generation": self._generation, "step": step}
                | {"reason": reason, "part": one.part, "ratio": one.ratio, "excess_s": one.excess_s, "seen_by": "watch"}
            )

    def _publish_hang(self, finding: _Finding) -> None:
        verdict, told = finding.verdict, finding.told
        text = describe_stacks(told, verdict)
        step = min(testimony.seen.step for testimony in told.values())
        path = None if self._run_dir is None else self._run_dir / f"hang-{finding.generation}-{step}.txt"
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.write_text(text + _all_threads(told), encoding="utf-8")
            except OSError as error:
                logger.warning("the stacks of the hang were not written: %s", error)
        logger.warning("hang in step %d: %s\n%s", step, verdict.reason, text)
        blamed = [told[rank].seen for rank in verdict.culprits if rank in told] or [t.seen for t in told.values()]
        self._record(
            {
                "kind": "hang",
                "ranks": list(verdict.culprits),
                "generation": finding.generation,
                "step": step,
                "section": blamed[0].name,
                "cause": f"hang: {verdict.reason}",
                "seen_by": "watch",
                "seen_after_s": max(seen.elapsed_s for seen in blamed),
                "limit_s": max(seen.limit_s for seen in blamed),
                "where": {str(rank): str(testimony.seen) for rank, testimony in sorted(told.items())},
                "stacks": None if path is None else str(path),
                "action": f"kill {', '.join(f'rank {rank}' for rank in verdict.condemned)}",
            }
        )


def describe_stacks(told: Mapping[int, _Testimony], verdict: Verdict) -> str:
    """Where each rank is, ranks with equal stacks together; those that are blamed last."""
    groups: dict[tuple[bool, str], list[int]] = {}
    for rank, testimony in sorted(told.items()):
        shown = testimony.frames or testimony.kernel
        groups.setdefault((rank in verdict.culprits, shown), []).append(rank)
    lines: list[str] = []
    for (_, shown), ranks in sorted(groups.items(), key=lambda group: group[0][0]):
        for rank in ranks[:_SHOWN_RANKS]:
            lines.append(f"rank {rank}: {told[rank].seen}")
        if len(ranks) > _SHOWN_RANKS:
            lines.append(f"... and {len(ranks) - _SHOWN_RANKS} more ranks with the same stack")
        lines.append(shown or "  (no stack: the process did not answer)")
    return "\n".join(lines) + "\n"


def _all_threads(told: Mapping[int, _Testimony]) -> str:
    parts = [f"\n--- all threads of rank {rank}\n{testimony.text}" for rank, testimony in sorted(told.items())]
    return "".join(part for part in parts)


def _read_sighting(rank: int, fields: Fields) -> Sighting:
    try:
        section, conduct = Section(fields.integer("section")), Conduct(fields.text("conduct"))
    except ValueError as error:
        raise ConfigError(f"watched: {error}") from None
    return Sighting(
        rank=rank,
        step=fields.integer("step"),
        section=section,
        name=fields.text("name"),
        elapsed_s=fields.number("elapsed_s", default=0.0, maximum=_FOREVER_S),
        limit_s=fields.number("limit_s", default=0.0, maximum=_FOREVER_S),
        conduct=conduct,
        busy=fields.number("busy", default=0.0, maximum=_MAX_BUSY),
        collective=fields.boolean("collective", default=False),
        compiling=fields.boolean("compiling", default=False),
        stack=fields.text("stack", default=""),
    )
