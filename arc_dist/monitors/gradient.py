"""The gradient monitor: the global L2 norm (ARC paper, section 3.2.1), judged before clipping.

It reads the norm that clipping computes anyway, so a guarded step with clipping costs no extra pass. The paper's fixed
thresholds (1e3 to 1e5) depend on the model's scale; here an explosion is ``norm > factor x reference``, the largest
median that the run itself ever had. Under DDP the reduced gradient, and so its norm, is the same number on every
rank: every rank raises the same flag without a message (the *implicit vote*).
"""

from __future__ import annotations

import math
import sys
from typing import Any

from arc_dist.monitors.window import RobustWindow
from arc_dist.protocol.flags import NO_FLAGS, Flag

# The paper's epsilon_grad. A norm below it is called vanishing only if the run's norms used to be far above it.
_VANISHING_NORM = 1e-10
_ONCE_HEALTHY_NORM = 1e-6


class GradientMonitor:
    """Judges the global gradient norm of one optimizer step.

    Args:
        explosion_factor: multiple of the run's usual norm that counts as an explosion.
        min_count: accepted values needed before explosion and vanishing are judged.
    """

    def __init__(self, *, explosion_factor: float = 50.0, min_count: int = 8) -> None:
        self._factor = explosion_factor
        self._min_count = min_count
        self._window = RobustWindow()
        self.threshold = sys.float_info.max  # above this a finite norm counts as an explosion
        self.lowest = 0.0  # below this a norm counts as vanishing

    def judge(self, norm: float) -> Flag:
        """The flags that `norm` raises; changes nothing."""
        if self.lowest <= norm <= self.threshold:  # false for NaN
            return NO_FLAGS
        if not math.isfinite(norm):
            return Flag.GRAD_NONFINITE
        return Flag.GRAD_EXPLOSION if norm > self.threshold else Flag.GRAD_VANISHING

    def accept(self, norm: float) -> None:
        """Learns from a step whose update was applied."""
        if self._window.add(norm):
            self._renew()

    def _renew(self) -> None:
        window = self._window
        judging = window.count >= self._min_count
        self.threshold = self._factor * window.reference if judging and window.reference > 0.0 else sys.float_info.max
        self.lowest = _VANISHING_NORM if judging and window.median > _ONCE_HEALTHY_NORM else 0.0

    def state_dict(self) -> dict[str, Any]:
        return self._window.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window.load_state_dict(state)
        self._renew()
