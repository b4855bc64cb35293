"""Monitors of weights by layer (ARC paper, section 3.2.3): norm, sparsity, effective rank, and a score of the three.

What destroys a weight at once (not finite, thirtyfold within a round) is the `StateProbe`'s, which acts. Here it is
told what creeps. References are the layer's own, from the run's first looks, kept across restarts. Layers that begin at
zero (zero-initialised projections) get theirs once they have left it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from arc_dist.monitors.base import Cost, Finding, Histories, Monitor, Part, Sees, register, require

_MIN_NUMEL = 64
_TINY = 1e-30
_SETTLING = 16  # looks in which a layer's norm finds its scale


class _Baselines(Monitor):
    """A monitor with one reference value per layer; what crosses its limit is told once, until it comes back."""

    sees = Sees.WEIGHT

    def __init__(self) -> None:
        self._baseline: dict[str, float] = {}
        self._told: set[str] = set()

    def _tell(self, name: str, is_bad: bool, value: float, before: float | None) -> list[Finding]:
        if not is_bad:
            self._told.discard(name)
            return []
        if name in self._told:
            return []
        self._told.add(name)
        return [self.found(name, value, before)]

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": dict(self._baseline), "told": sorted(self._told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._baseline, self._told = dict(state["baseline"]), set(state["told"])


@register
class WeightNorm(_Baselines):
    """The Frobenius norm of a matrix against what it began with, and how fast it grows.

    W0 is the largest norm of its first 16 looks: a matrix that begins at or near zero grows a hundredfold soundly.

    * explosion: ``|W| > explosion x |W0|``; collapse: ``|W| < collapse x |W0|``;
    * runaway growth: ``|W|`` grew by more than `growth` from one look to the next, `length` times in a row.

    Vectors (biases, norms' gains) are left out: they begin at zero or one, and may go anywhere.

    Args:
        explosion: multiple of the first norm.
        collapse: share of the first norm.
        growth: factor from one look to the next.
        length: looks in a row.
    """

    name = "weight_norm"
    cost = Cost.PASS

    def __init__(
        self, *, explosion: float = 100.0, collapse: float = 1e-3, growth: float = 2.0, length: int = 3
    ) -> None:
        super().__init__()
        self._explosion = require("explosion", explosion, 1.0, 1e12)
        self._collapse = require("collapse", collapse, 0.0, 1.0)
        self._growth = require("growth", growth, 1.0, 1e12)
        self._length = int(require("length", length, 2, 15))
        self._past = Histories()

    def look(self, subject: Part) -> Iterable[Finding]:
        tensor, name = subject.tensor, subject.name
        if tensor.dim() < 2 or tensor.numel() < _MIN_NUMEL:
            return []
        norm = float(torch.linalg.vector_norm(tensor))
        if not math.isfinite(norm):
            return []  # the state probe's
        self._past.add(name, norm)
        if self._past.count(name) <= _SETTLING:
            self._baseline[name] = max(self._baseline.get(name, 0.0), norm)
            return []
        first = self._baseline[name]
        if first <= _TINY:
            return []
        found = self._tell(f"{name} explodes", norm > self._explosion * first, norm, first)
        found += self._tell(f"{name} collapses", norm < self._collapse * first, norm, first)
        recent = self._past.last(name)[-self._length - 1 :]
        runaway = len(recent) > self._length and all(b > self._growth * a for a, b in itertools.pairwise(recent))
        return found + self._tell(f"{name} grows", runaway, norm, recent[0])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "past": self._past.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._past.load_state_dict(state["past"])


def sparsity(values: torch.Tensor, relative: float = 1e-7) -> float:
    """Share of `values` (flat) that are zero, or smaller than `relative` times their root mean square."""
    scale = float(torch.linalg.vector_norm(values)) / math.sqrt(values.numel())
    return float((values.abs() <= relative * scale).float().mean())


@register
class WeightSparsity(_Baselines):
    """Weights that become exactly zero: a share that exceeds the layer's first by `margin` (the paper's 0.1).

    "Zero" is below 1e-7 of the layer's root mean square, so that the scale of a layer does not matter.

    Args:
        margin: share of a layer's values.
    """

    name = "weight_sparsity"

    def __init__(self, *, margin: float = 0.1) -> None:
        super().__init__()
        self._margin = require("margin", margin, 0.0, 1.0)

    def look(self, subject: Part) -> Iterable[Finding]:
        values = subject.sample()
        if subject.tensor.dim() < 2 or values.numel() < _MIN_NUMEL:
            return []
        share = sparsity(values)
        name = subject.name
        first = self._baseline.setdefault(name, share)
        if first > share:
            self._baseline[name] = first = share  # a layer that began at zero has left it
        return self._tell(name, share > first + self._margin, share, first)


def effective_rank(matrix: torch.Tensor) -> float:
    """The exponential of the entropy of the normalised singular values: 1 for a matrix of rank one, n for n equal ones.

    0 for a matrix of zeros, or one that is not finite.
    """
    values = torch.linalg.svdvals(matrix.float()) if bool(matrix.isfinite().all()) else torch.zeros(1)
    total = values.sum()
    if not float(total) > 0.0:
        return 0.0
    shares = values / total
    shares = shares[shares > 0]
    return math.exp(float(-(shares * shares.log()).sum()))


def block(part: Part, size: int) -> torch.Tensor | None:
    """A block of at most size x size of the layer's matrix, taken evenly across it; None where there is no matrix."""
    rows = part.rows()
    if rows is None or min(rows.shape) < 8:
        return None
    taken = rows[:: max(1, rows.shape[0] // size), :: max(1, rows.shape[1] // size)]
    return taken[:size, :size]


@register
class EffectiveRank(_Baselines):
    """A layer that degenerates to few directions: effective rank of a block of it, by the spectral entropy.

    ``rank = exp(-sum p ln p)`` with ``p`` the singular values over their sum, of a block of `size` x `size` taken
    evenly across the matrix. Found when it falls below `part` of the layer's largest so far. Learning itself lowers
    it somewhat; a fifth is what only a collapse reaches.

    Args:
        part: share of the largest effective rank.
        size: of the block; a look costs about its third power.
    """

    name = "effective_rank"

    def __init__(self, *, part: float = 0.2, size: int = 64) -> None:
        super().__init__()
        self._part = require("part", part, 0.0, 1.0)
        self._size = int(require("size", size, 8, 2048))

    def look(self, subject: Part) -> Iterable[Finding]:
        matrix = block(subject, self._size)
        if matrix is None or subject.is_embedding:
            return []
        rank, name = effective_rank(matrix), subject.name
        best = self._baseline[name] = max(self._baseline.get(name, 0.0), rank)
        return self._tell(name, best > 4.0 and rank < self._part * best, rank, best)


@register
class WeightHealth(_Baselines):
    """The paper's weighted score of a layer: ``w1 x norm + w2 x rank + w3 x sparsity``, each in [0, 1], 1 is healthy.

    * norm: ``1 - |ln(|W| / |W0|)| / ln 100``, the distance from the first norm in orders of magnitude;
    * rank: effective rank over the first one;
    * sparsity: ``1 - (sparsity - first) / (1 - first)``.

    Found when the score falls below `least`. It weighs together what is too little for one monitor alone.

    Args:
        weights: of norm, rank and sparsity; they must add up to 1.
        least: score below which a layer is told of.
        size: of the block whose rank is taken.
    """

    name = "weight_health"

    def __init__(
        self, *, weights: tuple[float, float, float] = (0.4, 0.3, 0.3), least: float = 0.4, size: int = 64
    ) -> None:
        super().__init__()
        if len(weights) != 3 or min(weights) < 0.0 or abs(sum(weights) - 1.0) > 1e-6:
            raise ValueError(f"weights={weights!r} must be three numbers of at least 0 that add up to 1")
        self._weights = tuple(weights)
        self._least = require("least", least, 0.0, 1.0)
        self._size = int(require("size", size, 8, 2048))
        self._first: dict[str, list[float]] = {}
        self.scores: dict[str, float] = {}  # the newest score of each layer

    def look(self, subject: Part) -> Iterable[Finding]:
        matrix, name = block(subject, self._size), subject.name
        if matrix is None or subject.is_embedding:
            return []
        flat = matrix.reshape(-1)
        now = [float(torch.linalg.vector_norm(flat)), effective_rank(matrix), sparsity(flat)]
        if name not in self._first:
            if math.isfinite(now[0]) and now[0] > _TINY and now[1] > 0.0:
                self._first[name] = now
            return []
        score = self.scores[name] = self._score(self._first[name], now)
        return self._tell(name, score < self._least, score, 1.0)

    def _score(self, first: list[float], now: list[float]) -> float:
        if not math.isfinite(now[0]) or now[0] <= _TINY:
            return 0.0
        norm = 1.0 - abs(math.log(now[0] / first[0])) / math.log(100.0)
        rank = now[1] / first[1]
        zeros = 1.0 - (now[2] - first[2]) / max(1.0 - first[2], _TINY)
        parts = [min(1.0, max(0.0, part)) for part in (norm, rank, zeros)]
        return sum(weight * part for weight, part in zip(self._weights, parts, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "first": {name: list(values) for name, values in self._first.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._first = {name: list(values) for name, values in state["first"].items()}
