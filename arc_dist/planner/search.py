"""The intervals with the best goodput, found by playing many faults against plans that differ in nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from arc_dist.planner.closed_form import young_interval_s
from arc_dist.planner.faults import FaultRate, trace
from arc_dist.planner.model import Copy, Plan, live

_COARSE = (0.25, 0.4, 0.63, 1.6, 2.5, 4.0)
_FINE = (0.8, 0.9, 1.12, 1.25)
_NUM_INTERVALS = 10.0  # with no faults at all, this many times the longest interval is played
_WORTH = 1e-3  # share of what is lost that another interval has to save to be preferred


class Search:
    """Goodput of plans against one long trace of faults, the same for all, so that small differences show.

    Args:
        rates: how often faults strike.
        num_faults: about how many are played; the error of an interval found is some 1/sqrt of it.
        seed: of the trace.
    """

    def __init__(self, rates: Sequence[FaultRate], *, num_faults: int, seed: str) -> None:
        self._rates = rates
        self.job_mtbf_s = _together([rate.job_mtbf_s for rate in rates])
        self.duration_s = num_faults * self.job_mtbf_s
        self._trace = trace(rates, self.duration_s, f"{seed}:search") if math.isfinite(self.duration_s) else []

    def goodput(self, plan: Plan) -> float:
        duration_s = self.duration_s
        if not math.isfinite(duration_s):
            duration_s = _NUM_INTERVALS * max(copy.interval_s for copy in plan.copies)
        return live(plan, self._trace, duration_s).goodput

    def young(self, plan: Plan, shortest_s: Mapping[str, float], longest_s: float) -> dict[str, float]:
        """Young's interval for each copy, with the rate of the faults that are recovered from it."""
        rates = {rate.name: rate.job_mtbf_s for rate in self._rates}
        intervals: dict[str, float] = {}
        for copy in _free(plan):
            mtbf_s = _together([rates[f.name] for f in plan.faults if plan.source(f) is copy and f.name in rates])
            best_s = young_interval_s(copy.stall_s, mtbf_s) if copy.stall_s > 0 else 0.0
            intervals[copy.name] = min(max(best_s, shortest_s.get(copy.name, 0.0)), longest_s)
        return intervals

    def best(
        self, plan: Plan, *, shortest_s: Mapping[str, float], longest_s: float, given_s: Mapping[str, float]
    ) -> tuple[Plan, float]:
        """The plan with the best intervals found, and its goodput.

        From Young's intervals, one copy after the other is tried longer and shorter. What makes no difference stays.

        Args:
            plan: how the job is run.
            shortest_s: per copy, what no interval may be shorter than.
            longest_s: what none may be longer than.
            given_s: intervals that are not searched for.
        """
        best = plan.with_intervals({**self.young(plan, shortest_s, longest_s), **given_s})
        best_goodput = self.goodput(best)
        for factors in (_COARSE, _FINE):
            for copy in _free(plan):
                if copy.name in given_s:
                    continue
                middle_s = next(c.interval_s for c in best.copies if c.name == copy.name)
                tried: set[float] = {middle_s}
                for factor in factors:
                    interval_s = min(max(middle_s * factor, shortest_s.get(copy.name, 0.0)), longest_s)
                    if interval_s in tried:
                        continue
                    tried.add(interval_s)
                    other = best.with_intervals({copy.name: interval_s})
                    goodput = self.goodput(other)
                    if goodput > best_goodput + _WORTH * (1.0 - best_goodput):
                        best, best_goodput = other, goodput
        return best, best_goodput

    def curve(self, plan: Plan, name: str, intervals_s: Sequence[float]) -> list[tuple[float, float]]:
        """(interval of one copy, goodput), the other intervals staying as they are."""
        return [(s, self.goodput(plan.with_intervals({name: s}))) for s in intervals_s]


def _free(plan: Plan) -> list[Copy]:
    return [copy for copy in plan.copies if not copy.is_fixed]


def _together(mtbfs_s: Sequence[float]) -> float:
    rate = sum(1.0 / mtbf_s for mtbf_s in mtbfs_s)
    return 1.0 / rate if rate > 0 else math.inf
