"""A sliding window with robust statistics that cost next to nothing at every step."""

from __future__ import annotations

from typing import Any

_MAD_TO_SIGMA = 1.4826  # the MAD of a normal distribution is sigma / 1.4826


class RobustWindow:
    """Median and median absolute deviation (MAD) of the last `size` values.

    They are renewed at each of the first values, and then once in `renew_every` values: adding one is an append, and a
    threshold lags behind by a few steps at most.
    """

    def __init__(self, size: int = 64, *, renew_every: int = 8) -> None:
        self._size = size
        self._renew_every = renew_every
        self._values: list[float] = []
        self._num_fresh = 0
        self.count = 0  # values ever added
        self.median = 0.0
        self.sigma = 0.0  # a robust standard deviation: 1.4826 x MAD
        self.reference = 0.0  # largest |median| ever reached: the scale of the run's own past

    def add(self, value: float) -> bool:
        """Adds a finite value; True when the statistics were renewed."""
        self._values.append(value)
        self.count += 1
        self._num_fresh += 1
        if self._num_fresh < self._renew_every < self.count:
            return False
        self._num_fresh = 0
        del self._values[: -self._size]
        ordered = sorted(self._values)
        self.median = median = ordered[len(ordered) // 2]
        deviations = sorted([abs(value - median) for value in ordered])
        self.sigma = _MAD_TO_SIGMA * deviations[len(deviations) // 2]
        self.reference = max(self.reference, abs(median))
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": list(self._values),
            "num_fresh": self._num_fresh,
            "count": self.count,
            "median": self.median,
            "sigma": self.sigma,
            "reference": self.reference,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values = list(state["values"])
        self._num_fresh = state["num_fresh"]
        self.count = state["count"]
        self.median = state["median"]
        self.sigma = state["sigma"]
        self.reference = state["reference"]
