"""What the benchmarks share: medians with a 95 % interval, and the setting that every figure is printed with."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its distribution-free 95 % interval, from order statistics of the binomial distribution.

    With fewer than six values no such interval exists; the range of the values stands for it.
    """
    ordered = sorted(values)
    n = len(ordered)
    cumulative, below = 0.0, 0
    for k in range(n):
        cumulative += math.comb(n, k) * 0.5**n
        if cumulative > 0.025:
            below = k
            break
    low, high = (ordered[below - 1], ordered[n - below]) if below >= 1 else (ordered[0], ordered[-1])
    return statistics.median(ordered), low, high


def describe(values: Sequence[float], unit: str, digits: int = 3) -> str:
    """``0.142 s [0.131, 0.155], n=50``."""
    if not values:
        return "no value"
    middle, low, high = median_interval(values)
    return f"{middle:.{digits}f} {unit} [{low:.{digits}f}, {high:.{digits}f}], n={len(values)}"


def setting() -> str:
    """The machine and the versions, in one line."""
    load = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} cores of {_cpu_name()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, gloo, load {load:.1f}"
    )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
