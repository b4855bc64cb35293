"""Escaping: the same noise however a tensor is cut, and optimizers that begin anew."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from arc_dist.healing import escape
from arc_dist.healing.vote import Voter
from arc_dist.snapshot.state import TrainingState
from ranks import run_ranks
from toy import Net, Toy, build_model


def alone(item):
    return [item]


def state_of(model, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainingState({"": model}, {"": optimizer})


def whole_digests(model):
    """SHA-256 of each whole parameter, by its bare name. Collective where there are shards."""
    found = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        data = whole.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        found[name.removeprefix("module.")] = hashlib.sha256(data).hexdigest()
    return found


def columns(parameter):
    return Shard(1) if parameter.dim() == 2 else Shard(0)


def build(kind):
    if kind != "columns":
        return build_model(Toy(kind=kind))
    torch.manual_seed(3)
    model = Net(width=32)
    for layer in (model.first, model.second):
        fully_shard(layer, shard_placement_fn=columns, mesh=init_device_mesh("cpu", (2,)))
    return model


def perturbed_body(rank, world_size, kind):
    model = build(kind)
    state = state_of(model)
    voter = Voter() if world_size > 1 else None
    before = whole_digests(model)
    gather = alone if voter is None else lambda item: voter.gather(item, 0)
    escape.perturb(state, gather, scale=0.05, seed="here")
    return before, whole_digests(model)


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4), ("columns", 2)])
def test_every_sharding_ends_with_the_bits_of_a_single_process(kind, ranks):
    if kind == "columns":
        torch.manual_seed(3)
        model = Net(width=32)
        before = whole_digests(model)
        escape.perturb(state_of(model), alone, scale=0.05, seed="here")
        expected = (before, whole_digests(model))
    else:
        expected = perturbed_body(0, 1, "single")
    assert all(expected[0][name] != expected[1][name] for name in ("first.weight", "second.weight", "last.weight"))
    for outcome in run_ranks(ranks, perturbed_body, kind):
        assert outcome == expected


def test_the_noise_is_of_the_size_that_was_asked_for():
    torch.manual_seed(0)
    model = torch.nn.Linear(400, 300, bias=False)
    with torch.no_grad():
        model.weight.normal_(std=0.02)
    before = model.weight.detach().clone()
    escape.perturb(state_of(model), alone, scale=0.1, seed="a")
    noise = model.weight.detach() - before
    median = before.abs().median().item()
    magnitude = 2.0 ** math.floor(math.log2(median))
    assert noise.std().item() == pytest.approx(0.1 * magnitude, rel=0.02)
    assert abs(noise.mean().item()) < 0.01 * noise.std().item() * 3
    assert noise.abs().max().item() < 3.5 * 0.1 * magnitude


def test_seeds_and_names_give_different_noise():
    first, again, other = (escape._noise(key, 0, 1000, 1000) for key in ("a/w", "a/w", "b/w"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_any_part_of_the_noise_is_the_part_of_the_whole():
    total = 3 * escape._BLOCK_NUMEL + 17
    whole = escape._noise("k", 0, total, total)
    for first, numel in [(0, 1), (5, 70_000), (escape._BLOCK_NUMEL - 1, 2), (total - 3, 3), (1, total - 1)]:
        assert torch.equal(escape._noise("k", first, numel, total), whole[first : first + numel])


def test_only_trained_floating_parameters_are_changed():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bf16 = torch.nn.Parameter(torch.full((64, 8), 1.0, dtype=torch.bfloat16))
            self.f64 = torch.nn.Parameter(torch.ones(8, dtype=torch.float64))
            self.c64 = torch.nn.Parameter(torch.ones(8, dtype=torch.complex64))
            self.scalar = torch.nn.Parameter(torch.tensor(2.0))
            self.zeros = torch.nn.Parameter(torch.zeros(8))
            self.empty = torch.nn.Parameter(torch.zeros(0, 4))
            self.frozen = torch.nn.Parameter(torch.ones(8), requires_grad=False)
            self.register_buffer("buffer", torch.ones(8))

    model = Mixed()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    escape.perturb(state_of(model), alone, scale=0.1, seed="x")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"bf16", "f64", "c64", "scalar"}
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_values_that_are_not_finite_do_not_decide_the_size():
    model = torch.nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.weight[0, 0], model.weight[0, 1] = math.inf, math.nan
    escape.perturb(state_of(model), alone, scale=0.1, seed="x")
    assert torch.isfinite(model.weight[1:]).all()
    assert (model.weight[1:] != 1.0).any()


def test_noise_draws_nothing_from_the_scripts_generators():
    model = torch.nn.Linear(8, 8)
    before = torch.get_rng_state()
    escape.perturb(state_of(model), alone, scale=0.1, seed="x")
    assert torch.equal(torch.get_rng_state(), before)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.25),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_was_reset_steps_as_a_new_one(name):
    def step(parameter, optimizer, seed):
        parameter.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    parameter = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = OPTIMIZERS[name]([parameter])
    is_lazy = escape.begins_empty(optimizer)
    for seed in range(5):
        step(parameter, optimizer, seed)
    fresh_parameter = torch.nn.Parameter(parameter.detach().clone())
    fresh = OPTIMIZERS[name]([fresh_parameter])
    escape.reset_moments(optimizer, is_lazy=is_lazy)
    for seed in range(5, 10):
        step(parameter, optimizer, seed)
        step(fresh_parameter, fresh, seed)
        assert torch.equal(parameter, fresh_parameter), seed
    assert is_lazy is (name != "adagrad")
