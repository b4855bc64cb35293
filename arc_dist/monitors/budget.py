"""The share of the time that monitors may take, kept by measuring and by looking less often."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """Says when the next look may be taken.

    A look that took c seconds is paid for with c / share seconds of waiting, so that over any long time looks take at
    most `share` of it. Waiting that was not needed is saved up for `burst_s` at most, so that after a long step
    several looks may follow each other.

    Args:
        share: of the time, in (0, 1].
        clock: seconds that never go back.
        burst_s: how much time may be saved up, in seconds.
    """

    def __init__(self, share: float, clock: Callable[[], float], *, burst_s: float = 10.0) -> None:
        self.share = share
        self.clock = clock
        self.next_at = clock()  # a look before this time would be too early
        self.spent_s = 0.0
        self._burst_s = burst_s

    def is_due(self) -> bool:
        return self.clock() >= self.next_at

    def charge(self, began: float) -> float:
        """A look that began at `began` is over. Returns how long it took, in seconds."""
        now = self.clock()
        cost_s = max(0.0, now - began)
        self.spent_s += cost_s
        self.next_at = max(self.next_at, now - self._burst_s) + cost_s / self.share
        return cost_s
