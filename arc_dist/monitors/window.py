"""A sliding window with robust statistics that are cheap enough to consult at every step."""

from __future__ import annotations

import bisect
import collections
from typing import Any

_MAD_TO_SIGMA = 1.4826  # the MAD of a normal distribution is sigma / 1.4826


class RobustWindow:
    """Median and median absolute deviation (MAD) of the last `size` values.

    The median is exact at every step (the values are kept sorted, O(log n)). The MAD costs O(n log n), so it is
    renewed every `renew_every` values; a threshold may lag behind by that many steps.
    """

    def __init__(self, size: int = 64, *, renew_every: int = 8) -> None:
        self._size = size
        self._renew_every = renew_every
        self._recent: collections.deque[float] = collections.deque()
        self._sorted: list[float] = []
        self._sigma = 0.0
        self._since_renewal = 0
        self.count = 0  # values ever added
        self.reference = 0.0  # largest median of |value| ever reached: the scale of the run's own past

    def add(self, value: float) -> None:
        """Adds a finite value."""
        if len(self._recent) == self._size:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(value)
        bisect.insort(self._sorted, value)
        self.count += 1
        self._since_renewal += 1
        if self._since_renewal >= self._renew_every or self.count <= self._renew_every:
            self._renew()

    @property
    def median(self) -> float:
        return self._sorted[len(self._sorted) // 2] if self._sorted else 0.0

    @property
    def sigma(self) -> float:
        """A robust standard deviation: 1.4826 x MAD."""
        return self._sigma

    def _renew(self) -> None:
        self._since_renewal = 0
        median = self.median
        deviations = sorted(abs(value - median) for value in self._sorted)
        self._sigma = _MAD_TO_SIGMA * deviations[len(deviations) // 2]
        self.reference = max(self.reference, abs(median))

    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": list(self._recent),
            "sigma": self._sigma,
            "since_renewal": self._since_renewal,
            "count": self.count,
            "reference": self.reference,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recent = collections.deque(state["recent"])
        self._sorted = sorted(self._recent)
        self._sigma = state["sigma"]
        self._since_renewal = state["since_renewal"]
        self.count = state["count"]
        self.reference = state["reference"]
