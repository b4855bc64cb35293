"""The classic answers in closed form, for one kind of copy and faults that are exponential in time.

Sources: J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974; J. T. Daly, A
higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006, equations 20 and 37.
What stops training at each copy is their cost of a checkpoint; what is written while training goes on is not.
"""

from __future__ import annotations

import math


def young_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Work between two copies that costs the least, to first order: sqrt(2 x stall x MTBF)."""
    return math.sqrt(2.0 * stall_s * mtbf_s)


def daly_interval_s(stall_s: float, mtbf_s: float) -> float:
    """The same to a higher order; the MTBF itself where the stall is twice as long as that or longer."""
    if stall_s >= 2.0 * mtbf_s:
        return mtbf_s
    ratio = stall_s / (2.0 * mtbf_s)
    return young_interval_s(stall_s, mtbf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - stall_s


def daly_goodput(interval_s: float, stall_s: float, mtbf_s: float, down_s: float) -> float:
    """Useful time / wall time of a long job.

    Args:
        interval_s: work between two copies.
        stall_s: for how long training stops at each.
        mtbf_s: mean time between faults, which also strike while the job is down.
        down_s: from a fault until the job works again.
    """
    cycle_s = mtbf_s * math.exp(down_s / mtbf_s) * math.expm1((interval_s + stall_s) / mtbf_s)
    return interval_s / cycle_s
