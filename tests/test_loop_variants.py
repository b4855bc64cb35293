"""Gradient scaling, several models, schedulers per epoch, extras: what a step may consist of."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from arc_dist import Arc
from toy import Net, Noise, digest


def setting():
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), DataLoader(Noise(64), batch_size=8)


def fp16_loss(model, batch):
    with torch.autocast("cpu", torch.float16):
        return nn.functional.mse_loss(model(batch[0]).float(), batch[1])


def test_a_gradient_scaler_searches_its_scale_as_without_us_and_raises_no_alarm():
    steps = 20

    def plain():
        model, optimizer, loader = setting()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        taken = dropped = 0
        for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
            scaler.scale(fp16_loss(model, batch)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            fell = scaler.get_scale() < before
            taken, dropped = taken + (not fell), dropped + fell
            if taken == steps:
                return digest(model, [optimizer]), scaler.get_scale(), dropped
        raise AssertionError("unreachable")

    model, optimizer, loader = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    arc = Arc(model, optimizer, scaler=scaler, max_grad_norm=1.0, snapshot_every=5)
    results = list(arc.train(lambda batch: fp16_loss(model, batch), loader, steps=steps))
    expected, scale, dropped = plain()
    assert dropped > 3, "the scale must have been too large at first"
    assert {result.action for result in results} == {"apply"}
    assert digest(model, [optimizer]) == expected
    assert scaler.get_scale() == scale


def test_two_models_with_an_optimizer_each_are_one_state():
    torch.manual_seed(0)
    models = {"body": nn.Linear(16, 8), "head": nn.Linear(8, 4)}
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-3) for name, model in models.items()}
    arc = Arc(models, optimizers, snapshot_every=4)
    fired = 0
    actions = []

    def loss_fn(batch):
        return nn.functional.mse_loss(models["head"](models["body"](batch[0])), batch[1])

    for step in arc.train(loss_fn, DataLoader(Noise(256), 8), steps=20):
        actions.append(step.action)
        if step.number == 10 and not fired:
            fired += 1
            with torch.no_grad():
                models["head"].weight[0, 0] = float("nan")
    assert fired == 1
    assert actions.count("rollback") == 1
    assert all(bool(torch.isfinite(p).all()) for model in models.values() for p in model.parameters())


@pytest.mark.parametrize("plateau", [False, True])
def test_a_scheduler_per_epoch_steps_once_per_epoch(plateau):
    model, optimizer, loader = setting()
    make = lr_scheduler.ReduceLROnPlateau if plateau else lambda o: lr_scheduler.ExponentialLR(o, 0.5)
    scheduler = make(optimizer)
    arc = Arc(model, optimizer, scheduler=scheduler, scheduler_every="epoch", snapshot_every=5)
    losses = list(arc.train(lambda b: nn.functional.mse_loss(model(b[0]), b[1]), loader, epochs=3))
    assert [result.epoch for result in losses] == [0] * 8 + [1] * 8 + [2] * 8
    assert scheduler.last_epoch == 3


def test_extras_are_restored_with_the_rest():
    class Counter:
        """Counts loss evaluations."""

        value = 0

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    model, optimizer, loader = setting()
    counter = Counter()
    arc = Arc(model, optimizer, extras={"counter": counter}, snapshot_every=4)
    fired = 0

    def loss_fn(batch):
        counter.value += 1
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    for step in arc.train(loss_fn, loader, steps=20):
        if step.number == 10 and not fired:
            fired += 1
            with torch.no_grad():
                model.first.weight[0, 0] = float("inf")
    assert fired == 1
    assert counter.value == 20, "the evaluations that were rolled back do not count"
