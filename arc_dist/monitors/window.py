"""A sliding window with robust statistics that cost next to nothing at every step."""

from __future__ import annotations

from typing import Any

_MAD_TO_SIGMA = 1.4826  # the MAD of a normal distribution is sigma / 1.4826


class RobustWindow:
    """Median and median absolute deviation (MAD) of the last `size` values.

    They are renewed at each of the first `renew_every` values, and then once in so many: adding one is an append, and a
    threshold lags behind by a few steps at most. The arithmetic stays inside C functions, for the shortest steps' sake.
    """

    def __init__(self, size: int = 64, *, renew_every: int = 16) -> None:
        self._size = size
        self._renew_every = renew_every
        self._values: list[float] = []
        self._num_fresh = 0  # values since the last renewal
        self._num_renewed = 0  # values before it
        self._is_warm = False
        self.median = 0.0
        self.sigma = 0.0  # a robust standard deviation: 1.4826 x MAD
        self.reference = 0.0  # largest |median| ever reached: the scale of the run's own past

    def add(self, value: float) -> bool:
        """Adds a finite value; True when the statistics were renewed."""
        self._values.append(value)
        self._num_fresh += 1
        if self._num_fresh < self._renew_every and self._is_warm:
            return False
        self._renew()
        return True

    @property
    def count(self) -> int:
        """Values ever added."""
        return self._num_renewed + self._num_fresh

    def _renew(self) -> None:
        self._num_renewed += self._num_fresh
        self._num_fresh = 0
        self._is_warm = self._num_renewed >= self._renew_every
        del self._values[: -self._size]
        ordered = sorted(self._values)
        self.median = median = ordered[len(ordered) // 2]
        deviations = sorted(map(abs, map((-median).__add__, ordered)))
        self.sigma = _MAD_TO_SIGMA * deviations[len(deviations) // 2]
        self.reference = max(self.reference, abs(median))

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": list(self._values),
            "num_fresh": self._num_fresh,
            "num_renewed": self._num_renewed,
            "median": self.median,
            "sigma": self.sigma,
            "reference": self.reference,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values = list(state["values"])
        self._num_fresh = state["num_fresh"]
        self._num_renewed = state["num_renewed"]
        self._is_warm = self._num_renewed >= self._renew_every
        self.median = state["median"]
        self.sigma = state["sigma"]
        self.reference = state["reference"]
