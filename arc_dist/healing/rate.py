"""A learning-rate cut that is right under every scheduler.

Schedulers come in two kinds: those that compute the rate from the step, and those that multiply the rate they find
(exponential, chained, ReduceLROnPlateau). Writing a cut into the parameter groups is undone by the first kind and
compounded by the second. So the groups always hold the schedule's own rate, and the factor is applied only while the
optimizer takes its step: the effective rate is ``factor x schedule`` at every step, for any scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RateScale:
    """Scales the rates of all parameter groups during an optimizer step.

    A factor of exactly 1.0 touches nothing, so an unhealed run stays bitwise the unguarded one.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._saved: list[tuple[dict[str, object], object]] = []

    def apply(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Multiplies the rates; call right before the step. Rates held in tensors are changed in place."""
        if self.factor == 1.0:
            return
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                rate = group["lr"]
                if isinstance(rate, torch.Tensor):
                    self._saved.append((group, rate.clone()))
                    rate.mul_(self.factor)
                else:
                    self._saved.append((group, rate))
                    group["lr"] = rate * self.factor

    def undo(self) -> None:
        """Gives the groups the schedule's own rates back; call right after the step, also when it raised."""
        for group, rate in self._saved:
            if isinstance(rate, torch.Tensor):
                held = group["lr"]
                assert isinstance(held, torch.Tensor)
                held.copy_(rate)
            else:
                group["lr"] = rate
        self._saved.clear()
