"""Monitors of what belongs to the optimizer: its second moments and its settings.

That its state is finite, and not suddenly zero, is the `StateProbe`'s; its learning rate the `LearningRateMonitor`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from arc_dist.monitors.base import Cost, Finding, Monitor, Part, Policy, Sees, register, require
from arc_dist.protocol.flags import Flag

# Sums of squares under the names of torch's optimizers, with the setting that makes them decay.
_SECOND_MOMENTS = {
    "exp_avg_sq": "betas",
    "max_exp_avg_sq": None,
    "square_avg": "alpha",
    "sum": None,
}
_SMALLEST = 1e-25  # below this a moment may underflow by itself


@register
class SecondMoment(Monitor):
    """A mean of squares that is negative, or that fell faster than its decay allows.

    ``v' = beta v + (1 - beta) g^2 >= beta v``, so after n updates no sum of them is below ``beta^n`` of what it was;
    what is neither Adagrad's ``sum`` nor ``max_exp_avg_sq`` may fall at all. There is no innocent reading of either, so
    all ranks roll back. For the decay it takes the number of updates that the optimizer counts itself; where it counts
    none, only the sign is judged.

    Args:
        slack: share of the bound that rounding may take.
    """

    name = "second_moment"
    sees = Sees.OPTIMIZER
    cost = Cost.PASS
    policy = Policy.ROLLBACK

    def __init__(self, *, slack: float = 0.5) -> None:
        self._slack = require("slack", slack, 0.0, 1.0)
        self._past: dict[str, tuple[float, float, float]] = {}  # by tensor: sum, updates, decay

    def look(self, subject: Part) -> Iterable[Finding]:
        if subject.field not in _SECOND_MOMENTS:
            return []
        name = subject.name
        # Slices of one tensor are the caller's business; a whole tensor is one pass.
        lowest, total = torch.stack((subject.tensor.min().float(), subject.tensor.sum(dtype=torch.float32))).tolist()
        if lowest < 0.0:
            return [self.found(f"{name} is negative", lowest, 0.0, self.certain(Flag.OPTIMIZER_INVALID))]
        if not math.isfinite(total):
            return []  # the state probe's
        past = self._past.pop(name, None)
        decay, updates = _decay(subject), subject.updates
        if decay is None or updates is None:
            return []
        found = []
        if past is not None and past[2] == decay and updates > past[1]:
            least = past[0] * decay ** (updates - past[1])
            if least > _SMALLEST * subject.tensor.numel() and total < self._slack * least:
                flag = self.certain(Flag.OPTIMIZER_INVALID)
                found = [self.found(f"{name} shrank faster than it decays", total, least, flag)]
        self._past[name] = (total, updates, decay)
        return found

    def forget(self) -> None:
        self._past.clear()


def _decay(part: Part) -> float | None:
    """What a second moment keeps of itself in one update; None where it is not known."""
    setting = _SECOND_MOMENTS[part.field]
    if setting is None:
        return 1.0
    value = part.group.get(setting)
    if isinstance(value, (tuple, list)):
        value = value[1] if len(value) > 1 else None
    try:
        decay = float(value) if value is not None else None
    except (TypeError, ValueError):
        return None
    return decay if decay is not None and 0.0 < decay <= 1.0 else None


# What is not a hyperparameter: the tensors, and what schedulers and the learning-rate monitor look after.
_NOT_JUDGED = {"params", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "param_names"}


@register
class Hyperparameters(Monitor):
    """An optimizer's setting (betas, momentum, weight decay, eps) that changed although it used to stay.

    A setting that moves in the first looks is a schedule's (OneCycleLR turns momentum and betas), and is let be. One
    that is not finite has no innocent reading: all ranks roll back. Everything else is told, once per change.

    Args:
        settled: looks without a change after which a setting counts as one that stays.
    """

    name = "hyperparameters"
    sees = Sees.GROUPS
    cost = Cost.CONSTANT
    policy = Policy.ALERT

    def __init__(self, *, settled: int = 8) -> None:
        self._settled = require("settled", settled, 1, 1 << 30)
        self._values: dict[str, float] = {}
        self._stays: dict[str, int] = {}  # looks without a change; -1: it moves

    def look(self, subject: Sequence[Mapping[str, Any]]) -> Iterable[Finding]:
        found = []
        for index, group in enumerate(subject):
            for key, setting in group.items():
                if key in _NOT_JUDGED:
                    continue
                values = setting if isinstance(setting, (tuple, list)) else (setting,)
                for place, value in enumerate(values):
                    if isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1):
                        what = f"group {index} {key}" + (f"[{place}]" if len(values) > 1 else "")
                        found += self._judge(what, float(value))
        return found

    def _judge(self, what: str, value: float) -> list[Finding]:
        before = self._values.get(what)
        if not math.isfinite(value):
            return [self.found(what, value, before, Flag.HYPERPARAMETER)]
        self._values[what] = value
        stays = self._stays.get(what, 0)
        if before is None or stays < 0:
            return []
        if value == before:
            self._stays[what] = stays + 1
            return []
        self._stays[what] = 0 if stays >= self._settled else -1
        return [self.found(what, value, before)] if stays >= self._settled else []

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self._values), "stays": dict(self._stays)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._values, self._stays = dict(state["values"]), dict(state["stays"])
