"""Each monitor by itself: what it finds, what it leaves alone, and that it remembers across `state_dict`."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_dist.monitors import (
    DeadNeurons,
    EffectiveRank,
    GradientConsistency,
    GradientEntropy,
    GradientLayers,
    Hyperparameters,
    LabelRange,
    LossDivergence,
    LossPlateau,
    LossSpike,
    MetricCollapse,
    MetricNonfinite,
    NonfiniteBatch,
    Part,
    Point,
    RepeatedBatches,
    SecondMoment,
    WeightHealth,
    WeightNorm,
    WeightSparsity,
    output_diversity,
    output_entropy,
)
from arc_dist.monitors.base import Histories
from arc_dist.monitors.batches import SeenBatch
from arc_dist.monitors.replicas import ReplicaDigest
from arc_dist.monitors.stray import StrayWrites
from arc_dist.monitors.weights import effective_rank
from arc_dist.protocol.flags import NO_FLAGS, Flag


def learning(num, noise=0.05, seed=0, floor=0.5):
    rng = random.Random(seed)
    return [(floor + 4.0 * math.exp(-i / 100)) * (1 + noise * rng.gauss(0, 1)) for i in range(num)]


def feed(monitor, values, name="loss", start=0):
    return [(i, f) for i, value in enumerate(values, start) for f in monitor.look(Point(name, i, value))]


# ---------------------------------------------------------------------- losses and metrics


@pytest.mark.parametrize("make", [LossSpike, LossDivergence, LossPlateau])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_falls_with_noise_raises_nothing(make, noise, seed):
    assert feed(make(), learning(5000, noise, seed)) == []


@pytest.mark.parametrize("make", [LossSpike, LossDivergence])
def test_warm_restarts_and_hard_samples_raise_nothing(make):
    rng = random.Random(1)
    losses = []
    for i in range(5000):
        restart = 0.2 * math.exp(-(i % 500) / 50)
        rare = 0.5 * rng.random() if rng.random() < 0.02 else 0.0
        losses.append(0.1 + 4.0 * math.exp(-i / 100) + restart + rare + 0.01 * rng.random())
    assert feed(make(), losses) == []


def test_a_spike_that_stays_is_told_once_and_one_that_does_not_is_left():
    monitor = LossSpike()
    assert feed(monitor, learning(500)) == []
    assert feed(monitor, [3.0, 0.5, 3.0, 0.5]) == []
    found = feed(monitor, [3.0] * 200)
    assert [(i, finding.value) for i, finding in found] == [(3, 3.0)]
    assert found[0][1].name == "loss_spike: loss"
    assert found[0][1].flag == NO_FLAGS


def test_a_slow_divergence_is_found_long_before_the_start_is_reached():
    monitor = LossDivergence()
    assert feed(monitor, learning(2000)) == []
    found = feed(monitor, [0.5 * 1.002**i for i in range(1000)])
    assert found and found[0][1].value < 4.5
    assert found[0][1].before == pytest.approx(0.5, rel=0.05)


def test_a_plateau_at_a_high_level_is_told_once():
    rng = random.Random(0)
    found = feed(LossPlateau(patience=500), [2.3 * (1 + 0.02 * rng.gauss(0, 1)) for _ in range(5000)])
    assert [i for i, _ in found] == [499]


@settings(deadline=None, max_examples=25)
@given(st.floats(-6, 6), st.lists(st.floats(0.1, 50.0), min_size=40, max_size=200))
def test_multiplying_a_loss_by_a_constant_changes_nothing(power, losses):
    factor = 2.0 ** round(power * 3)  # exact in floating point
    for make in (LossSpike, lambda: LossDivergence(chunk=8, rises=2), lambda: LossPlateau(patience=30, chunk=8)):
        plain = [i for i, _ in feed(make(), losses)]
        assert [i for i, _ in feed(make(), [factor * loss for loss in losses])] == plain


def test_each_series_is_judged_by_itself():
    monitor = LossSpike()
    for i, loss in enumerate(learning(300)):
        for name, scale in (("loss/generator", 1.0), ("loss/critic", 100.0), ("accuracy", 1.0)):
            assert list(monitor.look(Point(name, i, scale * loss))) == []
    assert feed(monitor, [3.0] * 10, "loss/critic") == []
    assert [f.name for _, f in feed(monitor, [3.0] * 10, "loss/generator")] == ["loss_spike: loss/generator"]
    assert feed(monitor, [300.0] * 10, "accuracy") == []


@pytest.mark.parametrize("make", [LossSpike, LossDivergence, LossPlateau])
def test_a_loss_monitor_goes_on_where_it_was(make):
    losses = [*learning(700), *[0.5 * 1.003**i for i in range(900)]]
    through, first, second = make(), make(), make()
    expected = feed(through, losses)
    found = feed(first, losses[:333])
    second.load_state_dict(first.state_dict())
    assert found + feed(second, losses[333:], start=333) == expected
    assert second.state_dict() == through.state_dict()


def test_a_metric_that_is_not_finite_is_told_when_it_begins():
    found = feed(MetricNonfinite(), [1.0, math.nan, math.nan, 2.0, math.inf], "reward")
    assert [i for i, _ in found] == [1, 4]


def test_an_accuracy_that_collapses_is_found_and_noise_is_not():
    rng = random.Random(0)
    monitor = MetricCollapse()
    rising = [0.1 + 0.8 * (1 - math.exp(-i / 20)) + 0.05 * rng.gauss(0, 1) for i in range(200)]
    assert feed(monitor, rising, "val/accuracy") == []
    assert feed(monitor, [0.1, 0.1, 0.9], "val/accuracy") == []
    copy = MetricCollapse()
    copy.load_state_dict(monitor.state_dict())
    for one in (monitor, copy):
        assert [i for i, _ in feed(one, [0.1] * 10, "val/accuracy")] == [2]
        assert feed(one, [9.0] * 20 + [0.1] * 10, "perplexity") == []


def test_output_measures_tell_a_collapse():
    torch.manual_seed(0)
    varied, same = torch.randn(256, 10) * 3, torch.randn(1, 10).expand(256, 10) * 30
    assert output_entropy(varied) > 0.95 and output_entropy(same) < 0.5
    images = torch.randn(64, 3, 8, 8)
    assert output_diversity(images) > 0.9 and output_diversity(images[:1].expand(64, 3, 8, 8)) < 1e-6
    with pytest.raises(ValueError, match="classes"):
        output_entropy(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="batch"):
        output_diversity(torch.zeros(1, 4))


# ---------------------------------------------------------------------- gradients


def gradients(num, shape=(32, 64), seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for i in range(num):
        yield Part("w", scale * math.exp(-i / 100) * torch.randn(shape, generator=generator), i)


def shown(monitor, parts):
    return [finding for part in parts for finding in monitor.look(part)]


@pytest.mark.parametrize("make", [GradientLayers, GradientEntropy, GradientConsistency, DeadNeurons])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_gradients_that_fade_with_noise_raise_nothing(make, scale):
    assert shown(make(), gradients(400, scale=scale)) == []


def later(tensors, start=1000):
    return [Part("w", tensor, start + i) for i, tensor in enumerate(tensors)]


def test_a_layer_that_explodes_vanishes_or_loses_its_shape_is_told_once():
    torch.manual_seed(0)
    cases = {
        "explodes": [1e4 * torch.randn(32, 64) for _ in range(6)],
        "vanishes": [torch.zeros(32, 64) for _ in range(6)],
    }
    for word, hurt in cases.items():
        monitor = GradientLayers()
        assert shown(monitor, gradients(50)) == []
        found = shown(monitor, later(hurt))
        assert [word in finding.name for finding in found] == [True]
    monitor = GradientLayers()
    assert shown(monitor, [Part("w", 1.0 + 0.1 * torch.randn(512), i) for i in range(20)]) == []
    centred = torch.randn(512)
    found = shown(monitor, later([centred - centred.mean()] * 6))
    assert ["coefficient" in finding.name for finding in found] == [True]


def test_a_gradient_that_falls_into_few_values_is_found():
    monitor = GradientEntropy()
    assert shown(monitor, gradients(50)) == []
    spike = torch.zeros(32, 64)
    spike[0, 0] = 1.0
    assert len(shown(monitor, later([spike] * 10))) == 1


def test_jumping_to_and_fro_and_repeated_gradients_are_found():
    monitor = GradientConsistency()
    direction = torch.randn(64)
    found = shown(monitor, later([(-1.0) ** i * direction + 0.01 * torch.randn(64) for i in range(30)]))
    assert ["turns round" in finding.name for finding in found] == [True]
    found = shown(GradientConsistency(), later([direction] * 8))
    assert ["same again" in finding.name for finding in found] == [True]
    apart = [Part("w", direction, 10 * i) for i in range(20)]
    assert shown(GradientConsistency(), apart) == [], "only steps that follow each other are compared"


def test_units_that_die_are_found_and_dropout_is_not():
    generator = torch.Generator().manual_seed(0)
    monitor = DeadNeurons()
    healthy = [torch.randn(32, 16, generator=generator) for _ in range(40)]
    for gradient in healthy:
        gradient[torch.rand(32, generator=generator) < 0.4] = 0.0
    assert shown(monitor, later(healthy)) == []
    for gradient in healthy:
        gradient[:24] = 0.0
    copy = DeadNeurons()
    copy.load_state_dict(monitor.state_dict())
    for one in (monitor, copy):
        (found,) = shown(one, later(healthy))
        assert found.value >= 0.75
    embedding = [Part("e", gradient, i, is_embedding=True) for i, gradient in enumerate(healthy)]
    assert shown(DeadNeurons(), embedding) == []


# ---------------------------------------------------------------------- weights


def drifting(num, shape=(64, 64)):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    for i in range(num):
        weight = 0.999 * weight + 0.05 * torch.randn(shape, generator=generator)
        yield Part("w", weight, i)


@pytest.mark.parametrize("make", [WeightNorm, WeightSparsity, EffectiveRank, WeightHealth])
def test_weights_that_drift_raise_nothing_and_every_hurt_is_told_once(make):
    monitor = make()
    assert shown(monitor, drifting(100)) == []
    weight = list(drifting(100))[-1].tensor
    hurt = {
        WeightNorm: [1e4 * weight, 1e-5 * weight],
        WeightSparsity: [weight * (torch.rand(64, 64) < 0.7)],
        EffectiveRank: [weight[:, :1] @ weight[:1, :]],
        WeightHealth: [1e-3 * weight[:, :1] @ weight[:1, :]],
    }[make]
    copy = make()
    copy.load_state_dict(monitor.state_dict())
    for one in (monitor, copy):
        for tensor in hurt:
            assert len(shown(one, later([tensor] * 4))) == 1
            assert shown(one, later([weight] * 2)) == []


def test_runaway_growth_is_told():
    found = shown(WeightNorm(), later([2.5 ** max(0, i - 20) * torch.ones(16, 16) for i in range(24)]))
    assert ["grows" in finding.name for finding in found] == [True]


def test_layers_that_begin_at_zero_are_no_collapse_and_no_explosion():
    grown = [torch.zeros(16, 16), torch.zeros(16, 16), *[0.01 * i * torch.randn(16, 16) for i in range(1, 60)]]
    for make in (WeightNorm, WeightSparsity, WeightHealth, EffectiveRank):
        assert shown(make(), later(grown)) == []


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_effective_rank_is_the_rank_of_equal_directions_whatever_the_scale(rank, scale, seed):
    torch.manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    matrix = scale * basis[:, :rank] @ basis[:rank, :]
    assert effective_rank(scale * basis[:, :rank]) == pytest.approx(rank, rel=1e-4)
    assert effective_rank(matrix) <= rank + 1e-3
    assert effective_rank(torch.zeros(4, 4)) == 0.0
    assert effective_rank(torch.full((4, 4), math.nan)) == 0.0


# ---------------------------------------------------------------------- optimizers


def moments(optimizer, parameter, step):
    state = optimizer.state[parameter]
    return [
        Part(f"w.{field}", value, step, field=field, group=optimizer.param_groups[0], updates=float(state["step"]))
        for field, value in state.items()
        if value.dim()
    ]


@pytest.mark.parametrize("kind", ["adam", "amsgrad", "adagrad"])
def test_second_moments_of_real_optimizers_raise_nothing_and_hurt_ones_do(kind):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = {
        "adam": lambda: torch.optim.AdamW([parameter], betas=(0.9, 0.95)),
        "amsgrad": lambda: torch.optim.Adam([parameter], amsgrad=True),
        "adagrad": lambda: torch.optim.Adagrad([parameter]),
    }[kind]()
    monitor = SecondMoment()
    for step in range(300):
        parameter.grad = torch.randn(8, 8) * 10.0 ** -(step / 50)
        optimizer.step()
        if step % 7 == 0:
            assert shown(monitor, moments(optimizer, parameter, step)) == []
    state = optimizer.state[parameter]
    field = "sum" if kind == "adagrad" else "exp_avg_sq"
    before = state[field].clone()
    state[field].mul_(1e-3)
    (found,) = shown(monitor, moments(optimizer, parameter, 301))
    assert found.flag is Flag.OPTIMIZER_INVALID and "shrank" in found.name
    state[field].copy_(before)[2, 2] = -1.0
    (found,) = shown(monitor, moments(optimizer, parameter, 302))
    assert found.flag is Flag.OPTIMIZER_INVALID and "negative" in found.name
    state[field].copy_(before).mul_(1e-6)
    monitor.forget()
    assert shown(monitor, moments(optimizer, parameter, 303)) == [], "a restored state is not compared with the old one"


def test_settings_that_a_schedule_turns_are_left_alone_and_others_are_told():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=100)  # turns betas[0]
    monitor = Hyperparameters()
    for _ in range(50):
        optimizer.step()
        schedule.step()
        assert list(monitor.look(optimizer.param_groups)) == []
    copy = Hyperparameters()
    copy.load_state_dict(monitor.state_dict())
    optimizer.param_groups[0]["weight_decay"] = 5.0
    for one in (monitor, copy):
        (found,) = one.look(optimizer.param_groups)
        assert (found.name, found.value, found.before) == ("hyperparameters: group 0 weight_decay", 5.0, 0.01)
        assert found.flag == NO_FLAGS
        assert list(one.look(optimizer.param_groups)) == []
    optimizer.param_groups[0]["eps"] = math.nan
    (found,) = monitor.look(optimizer.param_groups)
    assert found.flag is Flag.HYPERPARAMETER


# ---------------------------------------------------------------------- data


def batch(ordinal, x, y=None, epoch=0):
    return SeenBatch((x, torch.zeros(4, dtype=torch.long) if y is None else y), ordinal, epoch, ordinal)


def test_repeated_batches_are_found_but_not_the_same_one_again_or_in_the_next_epoch():
    torch.manual_seed(0)
    data = [torch.randn(4, 8) for _ in range(20)]
    monitor = RepeatedBatches()
    for i, x in enumerate(data):
        assert list(monitor.look(batch(i, x))) == []
    assert list(monitor.look(batch(19, data[19]))) == []
    assert list(monitor.look(batch(20, data[3].flip(0)))) == [], "another order is another batch"
    assert list(monitor.look(batch(21, data[5], epoch=1))) == []
    copy = RepeatedBatches()
    copy.load_state_dict(monitor.state_dict())
    for one in (monitor, copy):
        (found,) = one.look(batch(22, data[3].clone()))
        assert found.before == 3
        hurt = torch.full((4, 8), math.nan)
        assert list(one.look(batch(23, hurt))) == []
        assert len(list(one.look(batch(24, hurt.clone())))) == 1


def test_batches_that_are_not_finite_and_labels_out_of_range_are_found():
    x = torch.zeros(4, 8)
    x[1, 2] = math.inf
    (found,) = NonfiniteBatch().look(batch(0, x))
    assert found.name == "nonfinite_batch: batch 0 [0]" and found.value == 1
    assert list(NonfiniteBatch(keys=["[1]"]).look(batch(0, x))) == []
    nested = SeenBatch({"a": [torch.zeros(2), {"b": x}], "c": "text"}, 0, 0, 0)
    assert [f.name for f in NonfiniteBatch().look(nested)] == ["nonfinite_batch: batch 0 [a][1][b]"]
    labels = LabelRange(high=9)
    assert list(labels.look(batch(0, x, torch.tensor([0, 9, -100, 3])))) == []
    (found,) = labels.look(batch(0, x, torch.tensor([0, 10, -100, 3])))
    assert (found.value, found.before) == (10, 9)
    (found,) = labels.look(batch(0, x, torch.tensor([0, -1])))
    assert (found.value, found.before) == (-1, 0)
    assert list(labels.look(batch(0, x, torch.tensor([-100])))) == []


# ---------------------------------------------------------------------- stray writes and replicas


def held(stray):
    while stray.hold():
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bit", [0, 7, 14])
def test_any_flipped_bit_of_what_is_held_is_found(dtype, bit):
    torch.manual_seed(0)
    weights = [("a", torch.randn(300, 300).to(dtype)), ("b", torch.randn(7).to(dtype))]
    stray = StrayWrites()
    stray.watch(weights)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for step in range(20):
        held(stray)
        assert stray.compare(step) == []
        weights[0][1].add_(0.1)  # the update
    held(stray)
    weights[0][1].view(-1).view(words)[71_003] ^= 1 << bit
    (found,) = stray.compare(20)
    assert found.flag is Flag.STRAY_WRITE and found.name == "stray_writes: a"
    held(stray)
    weights[1][1].view(words)[3] ^= 1 << bit
    (found,) = stray.compare(21)
    assert found.name == "stray_writes: b"


def test_a_script_that_writes_to_its_weights_is_left_alone_after_it_did_so_again():
    weight = torch.randn(10)
    stray = StrayWrites()
    stray.watch([("early", weight[:5]), ("late", weight[5:])])
    held(stray)
    weight[:5].clamp_(-0.01, 0.01)
    (found,) = stray.compare(0)
    assert found.flag == NO_FLAGS and "left alone" in found.name
    for step in range(1, 20):
        held(stray)
        assert stray.compare(step) == []
    held(stray)
    weight[5:] += 1
    assert stray.compare(20)[0].flag is Flag.STRAY_WRITE
    stray.load_state_dict(stray.state_dict())  # the rollback
    held(stray)
    weight[5:] += 1
    assert stray.compare(20)[0].flag == NO_FLAGS, "it came back when the steps were done again"
    assert stray.left_alone == {"early", "late"}


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(0, 31), st.data())
def test_the_digest_of_replicas_sees_any_one_bit_and_any_fill(numel, bit, data):
    see_one_bit_and_a_fill(numel, bit, data.draw(st.integers(0, numel - 1)))


@pytest.mark.parametrize("numel", [1, 2, 5])
def test_the_digest_of_replicas_sees_each_bit_of_a_value(numel):
    for bit in range(32):
        see_one_bit_and_a_fill(numel, bit, numel - 1)


def see_one_bit_and_a_fill(numel, bit, place):
    tensor = torch.full((numel,), 0.5)
    other = torch.arange(5.0)
    digest = ReplicaDigest()
    digest.watch([tensor, other.view(1, 5)])
    before = digest.digest()
    assert digest.digest() == before >= 0
    tensor.view(torch.int32)[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert digest.digest() != before
    tensor.fill_(0.25)
    assert digest.digest() != before


def test_histories_keep_the_last_values_and_come_back_exactly():
    past = Histories(4)
    for i, name in itertools.product(range(7), "ab"):
        past.add(name, i * (1.1 if name == "a" else 0.3))
    assert past.count("a") == 7 and past.median("a") == pytest.approx(5 * 1.1)
    other = Histories(4)
    other.load_state_dict(past.state_dict())
    assert [other.last(name) for name in "ab"] == [past.last(name) for name in "ab"]
    assert other.count("b") == 7
