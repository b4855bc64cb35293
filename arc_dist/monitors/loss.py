"""The loss monitor: not finite, and explosion.

An explosion is a loss that is far outside the noise of the recent accepted steps *and* above anything the run has
come from: ``loss > median + 20 sigma`` and ``loss > 2 x reference``, where sigma is 1.4826 x MAD (at least 5 % of the
median) and the reference is the largest median the run ever had. The second condition is what keeps a model that
memorises (loss 1e-4 with rare hard samples at 0.1) from raising alarms: such a sample is far outside the noise and yet
nothing compared with where training began. What is not finite is flagged from the very first step; explosion needs
`min_count` accepted steps.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from arc_dist.monitors.window import RobustWindow
from arc_dist.protocol.flags import NO_FLAGS, Flag


class LossMonitor:
    """Judges one rank's own loss (or, as a second instance, the mean over ranks).

    Args:
        explosion_sigmas: distance from the median in robust standard deviations.
        explosion_factor: multiple of the run's largest median that the loss must exceed as well.
        min_count: accepted values needed before explosion is judged.
    """

    def __init__(
        self,
        *,
        explosion_sigmas: float = 20.0,
        explosion_factor: float = 2.0,
        min_count: int = 8,
        explosion_flag: Flag = Flag.LOSS_EXPLOSION,
    ) -> None:
        self._sigmas = explosion_sigmas
        self._factor = explosion_factor
        self._min_count = min_count
        self._explosion_flag = explosion_flag
        self._window = RobustWindow()
        self.threshold = sys.float_info.max  # above this a finite loss counts as an explosion

    def judge(self, loss: float) -> Flag:
        """The flags that `loss` raises; changes nothing."""
        if -math.inf < loss <= self.threshold:  # false for NaN
            return NO_FLAGS
        return self._explosion_flag if math.isfinite(loss) else Flag.LOSS_NONFINITE

    def accept(self, loss: float) -> None:
        """Learns from a step whose update was applied."""
        if self._window.add(loss):
            self._renew()

    def _renew(self) -> None:
        window = self._window
        if window.count < self._min_count:
            self.threshold = sys.float_info.max
            return
        noise = max(window.sigma, 0.05 * abs(window.median))
        self.threshold = max(window.median + self._sigmas * noise, self._factor * window.reference)

    def state_dict(self) -> dict[str, Any]:
        return self._window.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window.load_state_dict(state)
        self._renew()
