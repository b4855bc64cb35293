"""One answer: the goodput to expect from each plan, where time is lost, and which intervals are best."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from arc_dist.errors import ConfigError
from arc_dist.planner.closed_form import daly_interval_s
from arc_dist.planner.cluster import MEMORY, Cluster, arc_plan, check_interval, torchrun_plan
from arc_dist.planner.faults import FaultRate, trace
from arc_dist.planner.model import Account, Plan, live
from arc_dist.planner.search import Search
from arc_dist.planner.units import YEAR_S, format_time

_SEARCH_FAULTS = 2000
_CURVE_POINTS = 13
_CURVE_REACH = 16.0  # the curve goes from the best interval by this factor down and up
_LONGEST_INTERVAL_S = YEAR_S


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """What to expect from one way of running the job.

    Attributes:
        plan: with the intervals that were simulated.
        best_s: interval by copy with the best goodput that the search found.
        young_s: Young's interval by copy, for the faults that are recovered from it.
        best_goodput: with `best_s`, over the search's long trace.
        goodput, low, high: mean over the lives, and their 5th and 95th percentile.
        parts: shares of the wall time, mean over the lives.
        faults: per kind: number per life, share of the wall time lost, both means.
        curve: (interval of the last copy in seconds, goodput).
    """

    plan: Plan
    best_s: dict[str, float]
    young_s: dict[str, float]
    best_goodput: float
    goodput: float
    low: float
    high: float
    parts: dict[str, float]
    faults: dict[str, dict[str, float]]
    curve: list[tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """The answer of `arc simulate`.

    Attributes:
        duration_s: of each life.
        num_lives: that were played.
        seed: of all randomness.
        job_mtbf_s: mean time between faults of the whole job.
        mtbf_s: the same by kind, for those that strike.
        daly_s: Daly's interval for plain torchrun's checkpoints.
        arms: arc-dist first.
    """

    duration_s: float
    num_lives: int
    seed: str
    job_mtbf_s: float
    mtbf_s: dict[str, float]
    daly_s: float
    arms: tuple[Arm, ...]


def forecast(
    cluster: Cluster,
    *,
    snapshot_s: float | None,
    persist_s: Mapping[str, float],
    torchrun_persist_s: float | None,
    torchrun_async: bool,
    duration_s: float,
    num_lives: int,
    seed: str,
) -> Forecast:
    """Simulates arc-dist and plain torchrun on a cluster against the same faults.

    Args:
        cluster: what is known of it.
        snapshot_s: work between two snapshots in memory, in seconds; None for the best that the search finds.
        persist_s: the same between two checkpoints of arc-dist, per tier; a tier that is missing gets the best.
        torchrun_persist_s: the same between two checkpoints under plain torchrun.
        torchrun_async: torchrun's checkpoints do not stop training but for a copy in memory.
        duration_s: wall time of each life.
        num_lives: how many are played; more give a steadier mean.
        seed: of the faults.

    Raises:
        ConfigError: an interval is shorter than what has to be written in it, or names no tier.
    """
    if not 0 < duration_s < math.inf or num_lives < 1:
        raise ConfigError("--time must be above 0, and a time; --lives must be 1 or more.")
    given_s = dict(persist_s)
    shortest_s = {tier.name: max(cluster.step_s, cluster.write_s(tier)) for tier in cluster.tiers} | {
        MEMORY: cluster.step_s
    }
    if snapshot_s is not None:
        given_s[MEMORY] = snapshot_s
    for name, interval_s in given_s.items():
        if name not in shortest_s:
            raise ConfigError(
                f"--persist {name}: there is no such tier; there are {', '.join(t.name for t in cluster.tiers)}."
            )
        check_interval(name, interval_s, shortest_s[name])
    remote = cluster.tiers[-1].name
    if torchrun_persist_s is not None:
        check_interval(f"torchrun's {remote}", torchrun_persist_s, shortest_s[remote])
    rates = cluster.rates()
    _bound_faults(rates, duration_s, num_lives)
    search = Search(rates, num_faults=_SEARCH_FAULTS, seed=seed)
    traces = [trace(rates, duration_s, f"{seed}:{number}") for number in range(num_lives)]
    ours = arc_plan(cluster, given_s)
    theirs = torchrun_plan(cluster, torchrun_persist_s or _LONGEST_INTERVAL_S, is_async=torchrun_async)
    theirs_given = {} if torchrun_persist_s is None else {remote: torchrun_persist_s}
    down_s = {rate.name: rate.job_mtbf_s for rate in rates if math.isfinite(rate.mtbf_s)}
    return Forecast(
        duration_s=duration_s,
        num_lives=num_lives,
        seed=seed,
        job_mtbf_s=search.job_mtbf_s,
        mtbf_s=down_s,
        daly_s=daly_interval_s(theirs.copies[0].stall_s, search.job_mtbf_s) if down_s else math.inf,
        arms=tuple(
            _arm(plan, search, traces, duration_s, shortest_s, given)
            for plan, given in ((ours, given_s), (theirs, theirs_given))
        ),
    )


def _arm(
    plan: Plan,
    search: Search,
    traces: Sequence[Sequence[tuple[float, str]]],
    duration_s: float,
    shortest_s: Mapping[str, float],
    given_s: Mapping[str, float],
) -> Arm:
    best, best_goodput = search.best(plan, shortest_s=shortest_s, longest_s=_LONGEST_INTERVAL_S, given_s={})
    chosen = best.with_intervals(given_s)
    accounts = [live(chosen, faults, duration_s) for faults in traces]
    goodputs = sorted(account.goodput for account in accounts)
    last = chosen.copies[-1]
    return Arm(
        plan=chosen,
        best_s={copy.name: copy.interval_s for copy in best.copies if not copy.is_fixed},
        young_s=search.young(plan, shortest_s, _LONGEST_INTERVAL_S),
        best_goodput=best_goodput,
        goodput=statistics.fmean(goodputs),
        low=goodputs[int(0.05 * len(goodputs))],
        high=goodputs[-1 - int(0.05 * len(goodputs))],
        parts=_mean([account.parts() for account in accounts]),
        faults=_fault_costs(accounts),
        curve=search.curve(chosen, last.name, _around(best.copies[-1].interval_s, shortest_s[last.name])),
    )


def _around(middle_s: float, shortest_s: float) -> list[float]:
    low_s, high_s = max(middle_s / _CURVE_REACH, shortest_s), min(middle_s * _CURVE_REACH, _LONGEST_INTERVAL_S)
    return [low_s * (high_s / low_s) ** (i / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)]


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}


def _fault_costs(accounts: Sequence[Account]) -> dict[str, dict[str, float]]:
    costs: dict[str, dict[str, float]] = {}
    for name in accounts[0].faults:
        rows = [account.faults[name] for account in accounts]
        wall_s = accounts[0].wall_s
        if any(row.number for row in rows):
            costs[name] = {
                "number": statistics.fmean(row.number for row in rows),
                "lost_work": statistics.fmean(row.lost_work_s for row in rows) / wall_s,
                "down": statistics.fmean(row.down_s for row in rows) / wall_s,
            }
    return costs


_MAX_FAULTS = 3_000_000


def _bound_faults(rates: Sequence[FaultRate], duration_s: float, num_lives: int) -> None:
    """A job that is struck every second for years would be simulated for hours; its goodput is no question."""
    number = num_lives * sum(duration_s / rate.job_mtbf_s for rate in rates)
    if number > _MAX_FAULTS:
        mtbf_s = num_lives * duration_s / number
        raise ConfigError(
            f"a fault every {format_time(mtbf_s)} for {format_time(duration_s)}, {num_lives} times, is too much to"
            " play. Give a shorter --time, fewer --lives, or longer --mtbf-*."
        )
