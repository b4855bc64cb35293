"""After a cut by f the effective rate is f x the schedule at every later step, under every scheduler."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.optim import lr_scheduler as make

from arc_dist import Arc, HealingPolicy
from arc_dist.healing.rate import RateScale
from ranks import run_ranks

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


HEALED = {
    "cosine": lambda o: make.CosineAnnealingLR(o, 120),
    "one-cycle": lambda o: make.OneCycleLR(o, 0.01, total_steps=121, cycle_momentum=False),
    "exponential": lambda o: make.ExponentialLR(o, 0.97),
    "plateau": lambda o: make.ReduceLROnPlateau(o, patience=9, factor=0.5),
    "warm-up": lambda o: make.SequentialLR(
        o, [make.LinearLR(o, 0.1, total_iters=10), make.CosineAnnealingLR(o, 110)], milestones=[10]
    ),
    "chained": lambda o: make.ChainedScheduler([make.ExponentialLR(o, 0.99), make.StepLR(o, 17, 0.5)]),
}


def healed_run(rank, world_size, kind, name, fails):
    """(faults left, the rate that each committed step really used, by its number)."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp":
        fully_shard(model)
    optimizer = Recording(model.parameters(), lr=0.01)
    left = [fails]

    def loss_fn(batch):
        out = model(batch).mean()
        if arc.steps_done + 1 == 33 and left[0] and rank == world_size - 1:
            left[0] -= 1
            return out * float("nan")
        return 1.0 + out - out.detach()  # constant, so that a plateau is one, with a gradient

    policy = HealingPolicy(lr_restore_after=20, ramp_steps=8, ladder=("rollback", "rollback", "escape"))
    arc = Arc(model, optimizer, scheduler=HEALED[name](optimizer), snapshot_every=5, policy=policy)
    data = [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(400)]
    numbers = [step.number for step in arc.train(loss_fn, data, steps=110)]
    return left[0], list(zip(numbers, optimizer.used, strict=True))


def healed_body(rank, world_size, kind, fails):
    return {name: [healed_run(rank, world_size, kind, name, n) for n in (0, fails)] for name in HEALED}


def factors(numbers, cuts):
    """What the policy above says of each committed step: halved at each rollback, back by a ramp after 20 healthy ones.

    A rollback shows as a number that comes again.
    """
    factor, in_a_row, before, found = 1.0, 0, 0, []
    for number in numbers:
        if number != before + 1:
            factor, in_a_row = factor * 0.5, 0
            cuts -= 1
        in_a_row += 1
        if in_a_row > 20 and factor < 1.0:
            factor = min(1.0, factor + 0.5 / 8)
        before = number
        found.append(factor)
    assert cuts == 0, "every rollback must show"
    return found


SOME = [("single", 1), ("single", 3), ("ddp", 3), ("fsdp", 3)]
REST = [pytest.param(kind, fails, marks=pytest.mark.soak) for kind in ("ddp", "fsdp") for fails in (1, 2)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "fails"), [*SOME, *REST])
def test_after_healing_the_rate_is_what_policy_and_scheduler_say_at_every_later_step(kind, fails):
    if kind == "single":
        outcomes = [healed_body(0, 1, kind, fails)]
    else:
        outcomes = run_ranks(2, healed_body, kind, fails, timeout_s=200.0)
    assert all(left == 0 for _, (left, _) in outcomes[-1].values()), "the faults must have fired"
    for found in outcomes:
        for name, ((_, healthy), (_, used)) in found.items():
            schedule = dict(healthy)
            assert len(schedule) == 110
            numbers = [number for number, _ in used]
            assert numbers[:32] == list(range(1, 33)) and numbers[-1] == 110 and len(numbers) == 110 + 2 * fails
            expected = factors(numbers, fails)
            assert expected[-1] == 1.0 and min(expected) == 0.5**fails
            for (number, rate), factor in zip(used, expected):
                assert rate == pytest.approx(schedule[number] * factor, rel=1e-12), (name, number)
