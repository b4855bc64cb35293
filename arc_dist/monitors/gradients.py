"""Monitors of gradients by layer (ARC paper, section 3.2.1), after the reduction and before the update.

They look at a few thousand values of one layer at a time. Clipping has been done by then and scales all layers alike,
so what is compared are shapes (coefficient of variation, entropy, direction) and sizes relative to the layer's own
past. Statistics of single layers have heavy tails in healthy runs, so each rule asks for several looks in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from arc_dist.monitors.base import Cost, Finding, Histories, Monitor, Part, Sees, register, require

_MIN_NUMEL = 16  # the shape of a distribution cannot be told from fewer values
_TINY = 1e-30


class Streaks:
    """How often in a row something was so, by name; each streak is told once."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._runs: dict[str, int] = {}

    def reached(self, name: str, is_so: bool) -> bool:
        """Counts; True at the moment the streak is long enough."""
        if not is_so:
            self._runs.pop(name, None)
            return False
        run = self._runs[name] = self._runs.get(name, 0) + 1
        return run == self.length

    def is_running(self, name: str) -> bool:
        return name in self._runs

    def state_dict(self) -> dict[str, Any]:
        return dict(self._runs)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._runs = dict(state)


@register
class GradientLayers(Monitor):
    """A layer whose gradient exploded, vanished, or lost its shape, by its variance and coefficient of variation.

    With Var the variance of the layer's values and CV = sigma / |mu|, and medians of the layer's own last looks:

    * explosion: ``Var > factor^2 x`` the largest median ever;
    * vanishing: ``Var < Var's median / vanishing^2``, where there was a gradient;
    * ``CV > 10`` (the paper's limit) and a thousand times its median.

    Args:
        factor: growth of the layer's standard deviation that counts as an explosion.
        vanishing: fall of it that counts as vanishing.
        length: looks in a row.
    """

    name = "gradient_layers"
    sees = Sees.GRADIENT

    def __init__(self, *, factor: float = 100.0, vanishing: float = 1e6, length: int = 3) -> None:
        self._explosion = require("factor", factor, 2.0, 1e9) ** 2
        self._vanishing = require("vanishing", vanishing, 2.0, 1e12) ** 2
        self._variances, self._cvs = Histories(), Histories()
        self._largest: dict[str, float] = {}
        self._streaks = Streaks(int(require("length", length, 1, 1000)))

    def look(self, subject: Part) -> Iterable[Finding]:
        values = subject.sample().float()
        if values.numel() < _MIN_NUMEL:
            return []
        name = subject.name
        total, squares = torch.stack((values.sum(), torch.dot(values, values))).tolist()
        mean = total / values.numel()
        variance = squares / values.numel() - mean * mean
        if not math.isfinite(variance):
            return []  # the norm of the whole gradient says so, in the same step
        variance = max(variance, 0.0)
        cv = math.sqrt(variance) / max(abs(mean), _TINY)
        found = self._judge(name, variance, cv) if self._variances.count(name) >= 8 else []
        if not any(self._streaks.is_running(f"{name} {kind}") for kind in ("variance", "vanished", "cv")):
            self._variances.add(name, variance)
            self._cvs.add(name, math.log(max(cv, _TINY)))
            self._largest[name] = max(self._largest.get(name, 0.0), self._variances.median(name))
        return found

    def _judge(self, name: str, variance: float, cv: float) -> list[Finding]:
        median, largest = self._variances.median(name), self._largest[name]
        usual_cv = math.exp(self._cvs.median(name))
        reached = self._streaks.reached
        found = []
        if reached(f"{name} variance", variance > self._explosion * largest > 0.0):
            found.append(self.found(f"{name} explodes", math.sqrt(variance), math.sqrt(median)))
        if reached(f"{name} vanished", median > _TINY and variance < median / self._vanishing):
            found.append(self.found(f"{name} vanishes", math.sqrt(variance), math.sqrt(median)))
        # A gradient of nothing but zeros has no shape; a mean near zero by chance does not last for several looks.
        if reached(f"{name} cv", variance > 0.0 and cv > max(10.0, 1000.0 * usual_cv)):
            found.append(self.found(f"{name} coefficient of variation", cv, usual_cv))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "variances": self._variances.state_dict(),
            "cvs": self._cvs.state_dict(),
            "largest": dict(self._largest),
            "streaks": self._streaks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._variances.load_state_dict(state["variances"])
        self._cvs.load_state_dict(state["cvs"])
        self._largest = dict(state["largest"])
        self._streaks.load_state_dict(state["streaks"])


def normalised_entropy(values: torch.Tensor, bins: int = 64) -> float:
    """Shannon entropy of the histogram of `values` over log(bins): 1 is uniform, 0 is one bin. Flat and finite."""
    low, high = values.min(), values.max()
    if not bool(high > low):
        return 0.0
    counts = torch.histc(values, bins=bins, min=float(low), max=float(high))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum()) / math.log(bins)


@register
class GradientEntropy(Monitor):
    """A layer whose gradient comes to lie in a few values: normalised entropy of its histogram.

    Found when it falls below `part` of its own median, in `length` looks in a row, for layers whose median is above
    0.1. Embeddings are left out: most of their rows have no gradient.

    Args:
        part: share of the median.
        bins: of the histogram.
        length: looks in a row.
    """

    name = "gradient_entropy"
    sees = Sees.GRADIENT

    def __init__(self, *, part: float = 0.25, bins: int = 64, length: int = 4) -> None:
        self._part = require("part", part, 0.0, 1.0)
        self._bins = int(require("bins", bins, 2, 4096))
        self._past = Histories()
        self._streaks = Streaks(int(require("length", length, 1, 1000)))

    def look(self, subject: Part) -> Iterable[Finding]:
        values = subject.sample().float()
        if subject.is_embedding or values.numel() < 4 * self._bins or not bool(values.isfinite().all()):
            return []
        name, entropy = subject.name, normalised_entropy(values, self._bins)
        past = self._past
        if past.count(name) >= 8:
            median = past.median(name)
            low = median > 0.1 and entropy < self._part * median
            if self._streaks.reached(name, low):
                return [self.found(name, entropy, median)]
            if low:
                return []
        past.add(name, entropy)
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"past": self._past.state_dict(), "streaks": self._streaks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._past.load_state_dict(state["past"])
        self._streaks.load_state_dict(state["streaks"])


@register
class GradientConsistency(Monitor):
    """The direction of a layer's gradient from one step to the next: cosine of a sample of it.

    * the median of the last eight cosines is below `opposite`: the run jumps to and fro across a valley;
    * the sample is bit for bit that of the step before, `length` times: the data or the reduction is stuck.

    Args:
        opposite: cosine below which steps undo each other.
        length: repetitions in a row.
    """

    name = "gradient_consistency"
    sees = Sees.GRADIENT

    def __init__(self, *, opposite: float = -0.9, length: int = 3) -> None:
        self._opposite = require("opposite", opposite, -1.0, 0.0)
        self._past = Histories(8)
        self._streaks = Streaks(int(require("length", length, 1, 1000)))
        self._last: tuple[str, int, torch.Tensor] | None = None
        self._wants_more = False

    def look(self, subject: Part) -> Iterable[Finding]:
        values = subject.sample()
        last, self._last = self._last, (subject.name, subject.step, values.clone())
        follows = last is not None and last[0] == subject.name and last[1] == subject.step - 1
        self._wants_more = not follows and values.numel() >= _MIN_NUMEL
        if last is None or not follows or values.numel() < _MIN_NUMEL:
            return []
        before = last[2].float()
        product, mine, theirs = torch.stack(
            [torch.dot(values.float(), before), values.float().norm(), before.norm()]
        ).tolist()
        if not mine * theirs > _TINY or not math.isfinite(product):
            return []
        name, cosine = subject.name, product / (mine * theirs)
        self._past.add(name, cosine)
        found = []
        recent = self._past.last(name)
        if self._streaks.reached(f"{name} repeated", torch.equal(values, last[2])):
            found.append(self.found(f"{name} is the same again", cosine))
        opposed = len(recent) == 8 and self._past.median(name) < self._opposite
        if opposed and not self._streaks.is_running(f"{name} opposed"):
            found.append(self.found(f"{name} turns round at every step", cosine, self._past.median(name)))
        self._streaks.reached(f"{name} opposed", opposed)
        return found

    def again(self) -> bool:
        return self._wants_more

    def forget(self) -> None:
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        return {"past": self._past.state_dict(), "streaks": self._streaks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._past.load_state_dict(state["past"])
        self._streaks.load_state_dict(state["streaks"])
        self._last = None


@register
class DeadNeurons(Monitor):
    """Output units that get no gradient any more: rows of a layer's gradient that are exactly zero.

    Found when the share of rows that were zero in each of the last `length` looks exceeds that of the first looks by
    `margin`. Embeddings are left out.

    Args:
        margin: share of a layer's units.
        length: looks in a row.
    """

    name = "dead_neurons"
    sees = Sees.GRADIENT
    cost = Cost.PASS

    def __init__(self, *, margin: float = 0.5, length: int = 8) -> None:
        self._margin = require("margin", margin, 0.0, 1.0)
        self._length = int(require("length", length, 2, 1000))
        self._zeros: dict[str, torch.Tensor] = {}  # by layer: looks in a row in which each row was zero
        self._baseline: dict[str, float] = {}
        self._looks: dict[str, int] = {}
        self._told: set[str] = set()

    def look(self, subject: Part) -> Iterable[Finding]:
        rows, name = subject.rows(), subject.name
        if rows is None or rows.shape[0] < 8 or subject.is_embedding:
            return []
        is_zero = (torch.linalg.vector_norm(rows, dim=1) == 0).cpu()
        past = self._zeros.get(name)
        runs = torch.zeros(len(is_zero), dtype=torch.int64) if past is None or len(past) != len(is_zero) else past
        self._zeros[name] = runs = (runs + 1) * is_zero
        looks = self._looks[name] = self._looks.get(name, 0) + 1
        if looks < self._length:
            return []
        share = float((runs >= self._length).float().mean())
        baseline = self._baseline.setdefault(name, share)
        if share <= baseline + self._margin:
            self._told.discard(name)
            return []
        if name in self._told:
            return []
        self._told.add(name)
        return [self.found(name, share, baseline)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "zeros": dict(self._zeros),
            "baseline": dict(self._baseline),
            "looks": dict(self._looks),
            "told": sorted(self._told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._zeros, self._baseline = dict(state["zeros"]), dict(state["baseline"])
        self._looks, self._told = dict(state["looks"]), set(state["told"])
