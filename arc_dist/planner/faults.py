"""When faults strike: a seeded trace of one life, the same for every plan that is played against it."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultRate:
    """How often one kind of fault strikes.

    Attributes:
        name: of the kind.
        num_units: how many things (nodes, ranks, or the one job) can fail so.
        mtbf_s: mean time between failures of one of them; infinity for never.
        shape: 1 for exponential times between failures; otherwise the shape of a Weibull distribution per unit,
            below 1 for failures that come early in a unit's life or in bursts. All units are new at the beginning,
            and a unit that failed is as good as new.
    """

    name: str
    num_units: int
    mtbf_s: float
    shape: float = 1.0

    @property
    def job_mtbf_s(self) -> float:
        """Mean time between such faults anywhere in the job."""
        return self.mtbf_s / self.num_units


def trace(rates: Sequence[FaultRate], duration_s: float, seed: str) -> list[tuple[float, str]]:
    """All faults of one life as (seconds, kind), ordered by time.

    Each kind has its own stream of random numbers, so that adding one does not move the others.
    """
    faults: list[tuple[float, str]] = []
    for rate in rates:
        if math.isfinite(rate.mtbf_s):
            rng = random.Random(f"{seed}:{rate.name}")
            times = _poisson(rate, duration_s, rng) if rate.shape == 1.0 else _weibull(rate, duration_s, rng)
            faults += [(at_s, rate.name) for at_s in times]
    faults.sort()
    return faults


def _poisson(rate: FaultRate, duration_s: float, rng: random.Random) -> list[float]:
    times: list[float] = []
    at_s = rng.expovariate(1.0 / rate.job_mtbf_s)
    while at_s < duration_s:
        times.append(at_s)
        at_s += rng.expovariate(1.0 / rate.job_mtbf_s)
    return times


def _weibull(rate: FaultRate, duration_s: float, rng: random.Random) -> list[float]:
    scale_s = rate.mtbf_s / math.gamma(1.0 + 1.0 / rate.shape)
    times: list[float] = []
    for _ in range(rate.num_units):
        at_s = rng.weibullvariate(scale_s, rate.shape)
        while at_s < duration_s:
            times.append(at_s)
            at_s += rng.weibullvariate(scale_s, rate.shape)
    return times
