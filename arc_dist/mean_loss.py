"""The loss averaged over ranks, judged every so many steps.

When the mean is due is counted, and a collective follows from the count; so the count must be equal on all ranks
whatever happened. A step that was begun and never committed therefore leaves no trace here: ranks that fail in it, some
before the mean of that step was begun and some after, leave the same count for those who go on in their place.
"""

from __future__ import annotations

from arc_dist.healing.vote import Voter
from arc_dist.monitors.loss import LossMonitor
from arc_dist.protocol.flags import Flag


class MeanLoss:
    """One rank's part of it.

    Args:
        voter: carries the sums.
        monitor: judges the mean.
        every: committed steps between two judgements.
    """

    def __init__(self, voter: Voter, monitor: LossMonitor, *, every: int) -> None:
        self.monitor = monitor
        self._voter = voter
        self._every = every
        self._sum, self._count = 0.0, 0
        self._is_begun = False  # in the step at hand
        self._is_taken = False  # the same, and its result is here
        self._accepted: float | None = None

    def begin(self) -> None:
        """Sends this rank's sum when it is due. Does not block; every rank must call it with its ballot."""
        if self._count >= self._every:
            self._voter.begin_mean(self._sum, self._count)
            self._is_begun = True

    def judge(self, step: int) -> int:
        """The flag that the mean raises, 0 for none. Blocks where a mean was begun."""
        if not self._is_begun:
            return 0
        self._is_begun, self._is_taken = False, True
        mean = self._voter.mean(step)
        if mean is None:
            return 0
        if self.monitor.judge(mean):
            return Flag.REDUCED_LOSS_EXPLOSION.value
        self._accepted = mean
        return 0

    def committed(self, loss: float) -> None:
        """The step was committed with this loss."""
        if self._is_taken:
            self.settled()
        self._sum += loss
        self._count += 1

    def settled(self) -> None:
        """The step at hand is over on all ranks, committed or not; a mean that it judged is not judged again."""
        if not self._is_taken:
            return
        if self._accepted is not None:
            self.monitor.accept(self._accepted)
        self._accepted, self._is_taken = None, False
        self._sum, self._count = 0.0, 0

    def state_dict(self) -> tuple[float, int]:
        return self._sum, self._count

    def load_state_dict(self, state: tuple[float, int]) -> None:
        self._sum, self._count = state
        self._is_begun = self._is_taken = False
        self._accepted = None
