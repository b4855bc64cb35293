"""The learning-rate monitor: a rate that is not finite, negative, or jumped without a scheduler.

A rate may change for many good reasons (a scheduler, a warm-up written by hand). What no schedule does is exceed the
largest rate ever seen by a factor of ten from one step to the next, outside any scheduler's own step.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from arc_dist.protocol.flags import NO_FLAGS, Flag

_JUMP_FACTOR = 10.0
_RATE = operator.itemgetter("lr")


class LearningRateMonitor:
    """Watches the rates of all parameter groups of the given optimizers."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._largest = 0.0
        self._accepted: list[Any] = []  # what `judge` found in order last; the usual answer is "the same again"
        self.offender: tuple[int, float] | None = None  # (group, rate) behind the last flag
        self.has_risen = False  # `judge` saw a rate that is larger than any accepted so far
        self.accept()

    def rates(self) -> list[float]:
        """The current rates, one per parameter group."""
        return [float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups]

    def accept(self) -> None:
        """The present rates are right: at the start, after a scheduler's step, after an accepted update."""
        self.has_risen = False
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if group["lr"] > self._largest and math.isfinite(group["lr"]):
                    self._largest = float(group["lr"])

    def judge(self) -> Flag:
        """The flags that the present rates raise."""
        # A run that starts at rate zero has no scale yet: its first rate is taken as it is.
        rates = []
        for optimizer in self._optimizers:
            rates += map(_RATE, optimizer.param_groups)
        if rates == self._accepted:
            return NO_FLAGS
        self._accepted = []
        largest = self._largest
        limit = _JUMP_FACTOR * largest if largest > 0.0 else math.inf
        for index, rate in enumerate(rates):
            if not 0.0 <= rate <= limit or rate == math.inf:  # the first is also true for NaN
                self.offender = (index, float(rate))
                return Flag.LEARNING_RATE
            if rate > largest:
                self.has_risen = True
        if not self.has_risen and not any(map(torch.is_tensor, rates)):  # a tensor changes in place
            self._accepted = rates
        return NO_FLAGS

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._largest = state["largest"]
        self._accepted = []
