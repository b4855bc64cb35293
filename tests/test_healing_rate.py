"""After a cut by f the effective rate is f x the schedule at every later step, under every scheduler."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler as make

from arc_dist.healing.rate import RateScale

SCHEDULERS = {
    "constant": lambda o: make.LambdaLR(o, lambda i: 1.0),
    "cosine": lambda o: make.CosineAnnealingLR(o, 40),
    "one-cycle": lambda o: make.OneCycleLR(o, 0.5, total_steps=41, cycle_momentum=False),
    "exponential": lambda o: make.ExponentialLR(o, 0.9),
    "plateau": lambda o: make.ReduceLROnPlateau(o, patience=2, factor=0.3),
    "lambda": lambda o: make.LambdaLR(o, lambda i: 1.0 / (1 + i)),
    "chained": lambda o: make.ChainedScheduler([make.ExponentialLR(o, 0.95), make.StepLR(o, 7, 0.5)]),
}


class Recording(torch.optim.SGD):
    """Notes the rate that its step really used."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.used = []

    def step(self, closure=None):
        self.used.append(float(self.param_groups[0]["lr"]))
        return super().step(closure)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_effective_rate_is_the_factor_times_the_schedule(name, as_tensor):
    def run(cut_at, restore_at, factor):
        weight = torch.nn.Parameter(torch.ones(1))
        rate = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
        optimizer = Recording([weight], lr=rate)
        scheduler = SCHEDULERS[name](optimizer)
        scale = RateScale()
        for step in range(40):
            if step == cut_at:
                scale.factor = factor
            if step == restore_at:
                scale.factor = 1.0
            scale.apply([optimizer])
            try:
                optimizer.step()
            finally:
                scale.undo()
            if name == "plateau":
                scheduler.step(1.0)  # never improves
            else:
                scheduler.step()
        return optimizer.used

    schedule = run(None, None, 1.0)
    assert len(set(schedule)) > 1 or name == "constant"
    healed = run(10, 25, 0.25)
    for step, (used, scheduled) in enumerate(zip(healed, schedule)):
        assert used == scheduled * (0.25 if 10 <= step < 25 else 1.0), step
