"""The learning-rate monitor: a rate that is not finite, negative, or jumped without a scheduler.

A rate may change for many good reasons (a scheduler, a warm-up written by hand). What no schedule does is exceed the
largest rate ever seen by a factor of ten from one step to the next, outside any scheduler's own step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from arc_dist.protocol.flags import NO_FLAGS, Flag

_JUMP_FACTOR = 10.0


class LearningRateMonitor:
    """Watches the rates of all parameter groups of the given optimizers."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._largest = 0.0
        self.offender: tuple[int, float] | None = None  # (group, rate) behind the last flag
        self.accept()

    def rates(self) -> list[float]:
        """The current rates, one per parameter group."""
        return [float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups]

    def accept(self) -> None:
        """The present rates are right: at the start, after a scheduler's step, after an accepted update."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if group["lr"] > self._largest and math.isfinite(group["lr"]):
                    self._largest = float(group["lr"])

    def judge(self) -> Flag:
        """The flags that the present rates raise."""
        # A run that starts at rate zero has no scale yet: its first rate is taken as it is.
        limit = _JUMP_FACTOR * self._largest if self._largest > 0.0 else math.inf
        index = 0
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                rate = group["lr"]
                if not 0.0 <= rate <= limit or rate == math.inf:  # the first is also true for NaN
                    self.offender = (index, float(rate))
                    return Flag.LEARNING_RATE
                index += 1
        return NO_FLAGS

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._largest = state["largest"]
