"""Monitors: what they see, what they leave alone, and that one bad value cannot blind them."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.monitors import GradientMonitor, LearningRateMonitor, LossMonitor, StateProbe
from arc_dist.monitors.state import Probed
from arc_dist.monitors.window import RobustWindow
from arc_dist.protocol.flags import NO_FLAGS, Flag


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_the_window_has_the_median_of_the_last_values(values):
    window = RobustWindow(16, renew_every=1)
    for value in values:
        assert window.add(value)
    recent = sorted(values[-16:])
    assert window.median == recent[len(recent) // 2]
    other = RobustWindow(16, renew_every=1)
    other.load_state_dict(window.state_dict())
    for w in (window, other):
        w.add(3.25)
    assert other.state_dict() == window.state_dict()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_at_the_very_first_step(bad):
    assert LossMonitor().judge(bad) is Flag.LOSS_NONFINITE
    assert GradientMonitor().judge(bad) is Flag.GRAD_NONFINITE


def falling_losses(num, noise=0.05, seed=0):
    rng = random.Random(seed)
    return [(0.5 + 4.0 * math.exp(-i / 50)) * (1 + noise * rng.gauss(0, 1)) for i in range(num)]


def test_an_exploding_loss_is_seen_and_not_learned_from():
    monitor = LossMonitor()
    for loss in falling_losses(100):
        assert monitor.judge(loss) == NO_FLAGS
        monitor.accept(loss)
    for _ in range(50):
        assert monitor.judge(1000.0) is Flag.LOSS_EXPLOSION
        assert monitor.judge(math.nan) is Flag.LOSS_NONFINITE
    assert monitor.judge(0.6) == NO_FLAGS


@pytest.mark.parametrize("seed", range(5))
def test_a_memorising_model_with_hard_samples_raises_nothing(seed):
    rng = random.Random(seed)
    monitor = LossMonitor()
    for i in range(2000):
        loss = 4.0 * math.exp(-i / 60) + 1e-4 * rng.random() + (0.3 * rng.random() if rng.random() < 0.02 else 0.0)
        assert monitor.judge(loss) == NO_FLAGS, (i, loss)
        monitor.accept(loss)


@pytest.mark.parametrize("seed", range(5))
def test_noisy_losses_raise_nothing(seed):
    monitor = LossMonitor()
    for loss in falling_losses(3000, noise=0.3, seed=seed):
        assert monitor.judge(loss) == NO_FLAGS
        monitor.accept(loss)


def test_gradient_explosion_and_vanishing_are_relative_to_the_runs_own_scale():
    for scale in (1e-3, 1.0, 1e4):
        monitor = GradientMonitor()
        for i in range(50):
            norm = scale * (1 + 0.3 * math.sin(i))
            assert monitor.judge(norm) == NO_FLAGS
            monitor.accept(norm)
        assert monitor.judge(1e6 * scale) is Flag.GRAD_EXPLOSION
        assert monitor.judge(10 * scale) == NO_FLAGS
        assert monitor.judge(0.0) is Flag.GRAD_VANISHING
    fresh = GradientMonitor()
    for _ in range(50):
        fresh.accept(0.0)
    assert fresh.judge(0.0) == NO_FLAGS, "a run whose gradients were always zero has nothing to vanish"


def sgd(rate):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


@pytest.mark.parametrize("rate", [1e6, math.nan, math.inf, -0.1])
def test_a_rate_that_no_schedule_gives_is_seen(rate):
    optimizer = sgd(0.1)
    monitor = LearningRateMonitor([optimizer])
    assert monitor.judge() == NO_FLAGS
    optimizer.param_groups[0]["lr"] = rate
    assert monitor.judge() is Flag.LEARNING_RATE
    assert monitor.offender[0] == 0


def test_schedules_of_all_kinds_are_left_alone():
    make = torch.optim.lr_scheduler
    for build in (
        lambda o: make.OneCycleLR(o, 1.0, total_steps=400),
        lambda o: make.CosineAnnealingWarmRestarts(o, 50),
        lambda o: make.LambdaLR(o, lambda i: min(1.0, i / 100)),
        lambda o: make.CyclicLR(o, 1e-6, 1.0, step_size_up=3),
    ):
        optimizer = sgd(0.1)
        monitor = LearningRateMonitor([optimizer])
        scheduler = build(optimizer)
        for _ in range(300):
            optimizer.step()
            scheduler.step()
            monitor.accept()
            assert monitor.judge() == NO_FLAGS


def probed(model, optimizer=None):
    found = [Probed(name, p.detach(), True) for name, p in model.named_parameters()]
    if optimizer is not None:
        for i, state in enumerate(optimizer.state.values()):
            found += [Probed(f"optimizer.{i}.{k}", v, False) for k, v in state.items() if v.numel() > 1]
    return found


def trained_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.randn(16, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize(
    ("hurt", "flag"),
    [
        (lambda m, o: m[0].weight.data[3, 5].fill_(math.inf), Flag.WEIGHT_NONFINITE),
        (lambda m, o: m[2].bias.data[0].fill_(math.nan), Flag.WEIGHT_NONFINITE),
        (lambda m, o: m[0].weight.data.mul_(1000), Flag.WEIGHT_NORM),
        (lambda m, o: m[0].weight.data.zero_(), Flag.WEIGHT_NORM),
        (lambda m, o: o.state[m[0].weight]["exp_avg_sq"][1, 1].fill_(math.nan), Flag.OPTIMIZER_NONFINITE),
        (lambda m, o: o.state[m[0].weight]["exp_avg"].zero_(), Flag.OPTIMIZER_RESET),
        (lambda m, o: o.state[m[2].weight]["exp_avg"].mul_(1e9), Flag.OPTIMIZER_NORM),
    ],
)
def test_any_hurt_is_found_within_one_round(hurt, flag):
    model, optimizer = trained_model()
    probe = StateProbe()
    tensors = probed(model, optimizer)
    assert probe.watch(tensors, tensors) == NO_FLAGS
    for step in range(128):
        assert probe.judge(step) == NO_FLAGS
    hurt(model, optimizer)
    found = NO_FLAGS
    for step in range(128, 192):
        found |= probe.judge(step)
    assert found == flag
    in_scan = probe.scan()
    assert (in_scan == flag) == (flag in (Flag.WEIGHT_NONFINITE, Flag.OPTIMIZER_NONFINITE))


def test_optimizer_state_that_vanishes_is_a_reset():
    model, optimizer = trained_model()
    probe = StateProbe()
    tensors = probed(model, optimizer)
    probe.watch(tensors, tensors)
    optimizer.state.clear()
    fewer = probed(model, optimizer)
    assert probe.watch(fewer, fewer) is Flag.OPTIMIZER_RESET
    probe.forget()
    assert probe.watch(tensors, tensors) == NO_FLAGS


def test_values_that_were_not_finite_from_the_start_are_this_models_way():
    model = torch.nn.Linear(4, 4)
    model.weight.data[0, 0] = -math.inf
    probe = StateProbe()
    tensors = probed(model)
    probe.watch(tensors, tensors)
    probe.exempt_present()
    assert probe.scan() == NO_FLAGS
    assert all(probe.judge(step) == NO_FLAGS for step in range(128))


def test_probing_looks_at_every_byte_once_per_round_in_about_equal_parts():
    big = torch.zeros(4_000_003)
    tensors = [Probed("big", big, True), Probed("small", torch.zeros(100), True)]
    probe = StateProbe(rounds=16)
    probe.watch(tensors, tensors)
    sizes = [sum(part.view.numel() for part in group) for group in probe._groups]
    assert len(sizes) == 16
    assert sum(sizes) == 4_000_103
    assert max(sizes) <= 1.1 * statistics.mean(sizes)
