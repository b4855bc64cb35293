"""Monitors of numbers over time: the loss, several losses, and metrics that the script tells with `Arc.observe`.

The loss of the step is the series ``loss``; a GAN tells its two as ``loss/generator`` and ``loss/critic``. Each series
has statistics of its own. All are relative to the run's own past, so multiplying a series by a positive constant
changes nothing. What needs an answer in the very step (not finite, explosion) is the `LossMonitor`'s; what is found
here shows itself over several steps and is told.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from arc_dist.monitors.base import Cost, Finding, Histories, Monitor, Sees, middle, register, require
from arc_dist.monitors.window import RobustWindow

_MAX_SERIES = 64
_NOISE_FLOOR = 0.05  # of the median: a window that happens to be very even says nothing about noise


class Point(NamedTuple):
    """One number of a series.

    Attributes:
        name: "loss", or the name given to `Arc.observe`.
        step: updates applied when it was found.
        value: the number.
    """

    name: str
    step: int
    value: float


def is_loss(name: str) -> bool:
    """Whether a series is a loss: ``loss``, ``loss/critic``, ``val_loss``."""
    return name.split("/", maxsplit=1)[0] == "loss" or name.endswith(("_loss", "/loss"))


class _LossSeries(Monitor):
    """A monitor of every series that is a loss; `_judge` sees finite values only."""

    sees = Sees.SERIES
    cost = Cost.CONSTANT

    def __init__(self) -> None:
        self._states: dict[str, dict[str, Any]] = {}

    def look(self, subject: Point) -> Iterable[Finding]:
        known = subject.name in self._states
        if not is_loss(subject.name) or not math.isfinite(subject.value) or (len(self._states) >= _MAX_SERIES > known):
            return []
        return self._judge(subject, self._states.setdefault(subject.name, self._new()))

    def _new(self) -> dict[str, Any]:
        raise NotImplementedError

    def _judge(self, point: Point, state: dict[str, Any]) -> Iterable[Finding]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {name: {key: _plain(value) for key, value in state.items()} for name, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._states = {}
        for name, saved in state.items():
            fresh = self._states[name] = self._new()
            for key, value in saved.items():
                if isinstance(fresh.get(key), RobustWindow):
                    fresh[key].load_state_dict(value)
                else:
                    fresh[key] = value


def _plain(value: Any) -> Any:
    if isinstance(value, RobustWindow):
        return value.state_dict()
    return list(value) if isinstance(value, list) else value


@register
class LossSpike(_LossSeries):
    """A loss that suddenly lost part of what was learned, and does not come back at once.

    `length` accepted values in a row above ``median + max(sigmas x sigma, part x (reference - median), median / 2)``,
    where the reference is the largest median the run ever had. A single hard sample is no spike.

    Args:
        sigmas: distance from the median in robust standard deviations.
        part: share of the fall since the reference that must be lost.
        length: values in a row.
    """

    name = "loss_spike"

    def __init__(self, *, sigmas: float = 10.0, part: float = 0.25, length: int = 4) -> None:
        super().__init__()
        self._sigmas = require("sigmas", sigmas, 1.0, 1e6)
        self._part = require("part", part, 0.0, 1.0)
        self._length = require("length", length, 1, 1000)

    def _new(self) -> dict[str, Any]:
        return {"window": RobustWindow(), "high": [], "told": False}

    def _judge(self, point: Point, state: dict[str, Any]) -> Iterable[Finding]:
        window: RobustWindow = state["window"]
        high: list[float] = state["high"]
        median = window.median
        noise = max(window.sigma, _NOISE_FLOOR * abs(median))
        lost = max(self._sigmas * noise, self._part * (window.reference - median), 0.5 * abs(median))
        if window.count < 16 or point.value <= median + lost:
            for value in (*high, point.value):
                window.add(value)
            high.clear()
            state["told"] = False
            return []
        # Not learned from until it is clear that it stays: this is the level now, or a spike that is told.
        high.append(point.value)
        if len(high) < self._length:
            return []
        if len(high) >= 16 * self._length:
            for value in high:
                window.add(value)
            high.clear()
        if state["told"]:
            return []
        state["told"] = True
        return [self.found(point.name, point.value, median)]


@register
class LossDivergence(_LossSeries):
    """A loss that creeps up for hundreds of steps.

    Medians of `chunk` values each: the last `rises` + 1 rise one after another, and the last lies above the best ever
    by ``max(5 sigma, part x (reference - best), 10 % of the best)``; sigma is the noise of one median.

    Args:
        chunk: values per median.
        rises: rises in a row.
        part: share of the fall since the start that must be lost.
    """

    name = "loss_divergence"

    def __init__(self, *, chunk: int = 64, rises: int = 4, part: float = 0.25) -> None:
        super().__init__()
        self._chunk = int(require("chunk", chunk, 8, 1 << 16))
        self._rises = int(require("rises", rises, 2, 100))
        self._part = require("part", part, 0.0, 1.0)

    def _new(self) -> dict[str, Any]:
        return {"values": [], "medians": [], "best": math.inf, "reference": -math.inf, "noise": 0.0}

    def _judge(self, point: Point, state: dict[str, Any]) -> Iterable[Finding]:
        values: list[float] = state["values"]
        values.append(point.value)
        if len(values) < self._chunk:
            return []
        median = middle(values)
        # The median of n values has about 1.25 / sqrt(n) of their spread.
        noise = 1.4826 * middle(abs(value - median) for value in values) * 1.25 / math.sqrt(len(values))
        values.clear()
        medians: list[float] = state["medians"]
        medians.append(median)
        del medians[: -self._rises - 1]
        best, reference = state["best"], state["reference"]
        if median < best:
            state["best"] = best = median
            state["noise"] = noise
        state["reference"] = reference = max(reference, median)
        lost = max(5.0 * max(state["noise"], noise), self._part * (reference - best), 0.1 * abs(best))
        rising = len(medians) > self._rises and all(a < b for a, b in itertools.pairwise(medians))
        if not rising or median <= best + lost:
            return []
        medians.clear()  # told once; the next finding needs as many rises again
        return [self.found(point.name, median, best)]


@register
class LossPlateau(_LossSeries):
    """A loss that never fell: after `patience` values the best median is still above `level` of the first.

    Said once per series. A model that begins near its best (fine-tuning) may look like this.

    Args:
        patience: values before it is judged.
        level: share of the first median.
        chunk: values per median.
    """

    name = "loss_plateau"

    def __init__(self, *, patience: int = 2000, level: float = 0.95, chunk: int = 64) -> None:
        super().__init__()
        self._patience = require("patience", patience, 16, 1 << 30)
        self._level = require("level", level, 0.0, 1.0)
        self._chunk = int(require("chunk", chunk, 8, 1 << 16))

    def _new(self) -> dict[str, Any]:
        return {"values": [], "count": 0, "first": None, "best": math.inf}

    def _judge(self, point: Point, state: dict[str, Any]) -> Iterable[Finding]:
        values: list[float] = state["values"]
        values.append(point.value)
        state["count"] += 1
        if len(values) >= self._chunk:
            median = middle(values)
            values.clear()
            first = state["first"]
            state["first"] = median if first is None else first
            state["best"] = min(state["best"], median)
        if state["count"] != self._patience or state["first"] is None or state["first"] <= 0.0:
            return []
        if state["best"] < self._level * state["first"]:
            return []
        return [self.found(point.name, state["best"], state["first"])]


@register
class MetricNonfinite(Monitor):
    """A number of the script's own that is not finite. Told when it begins."""

    name = "metric_nonfinite"
    sees = Sees.SERIES
    cost = Cost.CONSTANT

    def __init__(self) -> None:
        self._bad: set[str] = set()

    def look(self, subject: Point) -> Iterable[Finding]:
        if math.isfinite(subject.value):
            self._bad.discard(subject.name)
            return []
        if subject.name in self._bad or len(self._bad) >= _MAX_SERIES:
            return []
        self._bad.add(subject.name)
        return [self.found(subject.name, subject.value)]

    def state_dict(self) -> dict[str, Any]:
        return {"bad": sorted(self._bad)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bad = set(state["bad"])


@register
class MetricCollapse(Monitor):
    """A metric of which more is better, and which fell to a fraction of its best and stays there.

    `length` values in a row below ``part x best median`` and below ``median - 8 sigma``, after eight values. It judges
    names with one of `words` in them: ``accuracy``, ``top1``, ``val/f1``, ``output_entropy``.

    Args:
        part: share of the best median.
        length: values in a row.
        words: which metrics it judges.
    """

    name = "metric_collapse"
    sees = Sees.SERIES
    cost = Cost.CONSTANT
    WORDS = ("accuracy", "acc", "top1", "top5", "f1", "auc", "precision", "recall", "entropy", "diversity")

    def __init__(self, *, part: float = 0.5, length: int = 3, words: Iterable[str] = WORDS) -> None:
        self._part = require("part", part, 0.0, 1.0)
        self._length = int(require("length", length, 1, 1000))
        self._words = {word.lower() for word in words}
        self._past = Histories(32)
        self._best: dict[str, float] = {}
        self._low: dict[str, int] = {}

    def look(self, subject: Point) -> Iterable[Finding]:
        name, value = subject.name, subject.value
        if not math.isfinite(value) or not self._words & set(re.split(r"[^a-z0-9]+", name.lower())):
            return []
        if name not in self._best and len(self._best) >= _MAX_SERIES:
            return []
        past = self._past
        if past.count(name) >= 8:
            best = self._best[name] = max(self._best.get(name, 0.0), past.median(name))
            noise = max(past.spread(name), _NOISE_FLOOR * abs(past.median(name)))
            if best > 0.0 and value < self._part * best and value < past.median(name) - 8.0 * noise:
                low = self._low[name] = self._low.get(name, 0) + 1
                return [self.found(name, value, best)] if low == self._length else []
        self._low[name] = 0
        past.add(name, value)
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"past": self._past.state_dict(), "best": dict(self._best), "low": dict(self._low)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._past.load_state_dict(state["past"])
        self._best, self._low = dict(state["best"]), dict(state["low"])
