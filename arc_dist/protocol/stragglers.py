"""Stragglers: ranks that make the others wait, step after step.

In a synchronous job all ranks' steps take equally long, since the fast ones wait for the slow one in the collectives.
So ranks are compared by the time of their *own work* per step, in parts (data wait, forward, ...), waiting left out. A
rank is slow when its own work takes `factor` times the median of all, in `PATIENCE` comparisons in a row. It is
reported once; after as many comparisons at full speed it may be reported again.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

PATIENCE = 3
_LEAST_SHARE = 0.02  # of a step: what is less than this is noise, whatever the ratio

Work = Mapping[str, float]
"""Seconds per step of each part of a rank's own work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow:
    """A rank that lags behind.

    Attributes:
        rank: which.
        ratio: its own work / the median of all ranks'.
        part: where most of the difference arises.
        excess_s: the difference, in seconds per step.
    """

    rank: int
    ratio: float
    part: str
    excess_s: float


def compare(work: Mapping[int, Work], step_s: float, factor: float) -> tuple[Slow, ...]:
    """The ranks that are slow in one comparison, slowest first.

    Args:
        work: of each rank.
        step_s: wall time of a step; all ranks' are equal.
        factor: how many times the median makes slow; 0 finds nothing.
    """
    if len(work) < 2 or factor <= 0:
        return ()
    totals = {rank: sum(parts.values()) for rank, parts in work.items()}
    # Of two ranks the faster one is the measure.
    median = statistics.median_low(totals.values())
    found: list[Slow] = []
    for rank, total in totals.items():
        if total > factor * median and total - median > _LEAST_SHARE * step_s:
            part = _slowest_part(work, rank)
            ratio = total / median if median > 0 else float("inf")
            found.append(Slow(rank=rank, ratio=ratio, part=part, excess_s=total - median))
    return tuple(sorted(found, key=lambda slow: (-slow.excess_s, slow.rank)))


def _slowest_part(work: Mapping[int, Work], rank: int) -> str:
    def excess(part: str) -> float:
        return work[rank][part] - statistics.median_low(parts.get(part, 0.0) for parts in work.values())

    return max(sorted(work[rank]), key=excess)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaks:
    """How often in a row each rank was slow (positive), or fast again after it was reported (negative)."""

    counts: Mapping[int, int] = dataclasses.field(default_factory=dict[int, int])

    @property
    def slow(self) -> frozenset[int]:
        """Those that were reported, and are still slow."""
        return frozenset(rank for rank, count in self.counts.items() if count >= PATIENCE)

    def without(self, rank: int) -> Streaks:
        """The same without what is known of `rank`."""
        return Streaks(counts={other: count for other, count in self.counts.items() if other != rank})

    def after(self, slow: tuple[Slow, ...], ranks: frozenset[int]) -> tuple[Streaks, tuple[Slow, ...]]:
        """The streaks after one more comparison of `ranks`, and who is to be reported now."""
        by_rank = {one.rank: one for one in slow}
        counts: dict[int, int] = {}
        reported: list[Slow] = []
        for rank in sorted(ranks):
            before = self.counts.get(rank, 0)
            was_reported = before >= PATIENCE or before < 0
            if rank in by_rank:
                counts[rank] = PATIENCE if was_reported else before + 1
                if counts[rank] == PATIENCE and not was_reported:
                    reported.append(by_rank[rank])
            elif was_reported:
                after = min(before, 0) - 1
                counts[rank] = after if after > -PATIENCE else 0
            # else: a streak that was not long enough is forgotten
        return Streaks(counts={rank: count for rank, count in counts.items() if count}), tuple(reported)
