"""Three lines around `Arc.step`, in one process, under DDP and FSDP2, with one rank alone in trouble."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.distributed.tensor import DTensor

from arc_dist import Arc
from ranks import run_ranks
from toy import Toy, build_loader, build_model, build_optimizers, build_schedulers, digest, make_loss, plain

KINDS = {"single": 1, "ddp": 2, "fsdp": 2}
BASE = {
    "clipping": Toy(),
    "no clipping": Toy(clip=None),
    "two optimizers": Toy(two_optimizers=True),
    "accumulation": Toy(accumulate=2, steps=12),
    "bf16": Toy(bf16=True),
}


def train(toy, hurt=None, **settings):
    """A user's loop. `hurt(i, loss, model, when)` is called before and after backward and may hurt something."""
    model = build_model(toy)
    optimizers = build_optimizers(toy, model)
    schedulers = build_schedulers(toy, optimizers)
    loss_fn, batches = make_loss(toy, model), iter(build_loader(toy))
    controller = Arc(model, optimizers, scheduler=schedulers, snapshot_every=5, **settings)
    hurt = hurt or (lambda i, loss, model, when: loss)
    actions, weights = [], []
    for i in range(toy.steps):
        for micro in range(toy.accumulate):
            last = micro == toy.accumulate - 1
            if toy.kind == "fsdp":
                model.set_requires_gradient_sync(last)
                model.set_is_last_backward(last)
            elif toy.kind == "ddp":
                model.require_backward_grad_sync = last
            loss = hurt(i, loss_fn(next(batches)), model, "loss")
            action = controller.step(loss)
            actions.append(action.kind)
            if action.rolled_back:
                break
            (loss / toy.accumulate).backward()
        if not action.rolled_back:
            hurt(i, loss, model, "gradient")
            if toy.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), toy.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
        weights.append(digest(model, [], rng=False))
    steps_done = controller.steps_done
    controller.close()
    finite = all(bool(torch.isfinite(p.to_local() if isinstance(p, DTensor) else p).all()) for p in model.parameters())
    return {
        "actions": actions,
        "weights": weights,
        "digest": digest(model, optimizers),
        "finite": finite,
        "steps": steps_done,
    }


def launch(toy, body, *args):
    return [body(0, 1, toy, *args)] if toy.kind == "single" else run_ranks(KINDS[toy.kind], body, toy, *args)


def healthy_body(rank, world_size, toy):
    variants = [dataclasses.replace(variant, kind=toy.kind) for variant in BASE.values()]
    return [(train(variant), plain(variant)[0]) for variant in variants]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_fault_it_is_bitwise_the_unguarded_loop(kind):
    for pairs in launch(Toy(kind=kind), healthy_body):
        for (name, variant), (mine, theirs) in zip(BASE.items(), pairs):
            assert mine["digest"] == theirs, name
            assert set(mine["actions"]) == {"apply"}
            assert mine["steps"] == variant.steps


def nan_body(rank, world_size, toy):
    fired = []

    def hurt(i, loss, model, when):
        if when == "loss" and i == 12 and rank == world_size - 1:
            fired.append(i)
            return loss * math.nan
        return loss

    return {**train(toy, hurt), "fired": len(fired)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_loss_on_one_rank_gives_every_rank_the_same_action(kind):
    outcomes = launch(Toy(kind=kind), nan_body)
    assert outcomes[-1]["fired"] == 1
    for outcome in outcomes:
        assert outcome["actions"] == ["apply"] * 12 + ["skip"] + ["apply"] * 17
        assert outcome["finite"]
        assert outcome["steps"] == 29
        if kind == "ddp":
            assert outcome["weights"] == outcomes[0]["weights"]


def gradient_body(rank, world_size, toy):
    fired = []

    def hurt(i, loss, model, when):
        if when == "gradient" and i == 12:
            fired.append(i)
            for p in model.parameters():
                if p.grad is not None:
                    (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad).mul_(math.nan)
        return loss

    return {**train(toy, hurt), "fired": len(fired)}


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_gradient_makes_the_optimizer_step_do_nothing(kind, clip):
    outcomes = launch(Toy(kind=kind, clip=clip), gradient_body)
    for outcome in outcomes:
        assert outcome["fired"] == 1
        assert outcome["weights"][12] == outcome["weights"][11]
        assert outcome["weights"][13] != outcome["weights"][12]
        assert outcome["finite"]
        assert outcome["steps"] == 29


def weight_body(rank, world_size, toy):
    fired = []

    def hurt(i, loss, model, when):
        if when == "gradient" and i == 12 and rank == world_size - 1 and not fired:
            fired.append(i)
            weight = max(model.parameters(), key=lambda p: p.numel())
            with torch.no_grad():
                (weight.to_local() if isinstance(weight, DTensor) else weight).view(-1)[0] = math.inf
        return loss

    return {**train(toy, hurt), "fired": len(fired)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_weight_on_one_rank_is_rolled_back_on_all(kind):
    outcomes = launch(Toy(kind=kind), weight_body)
    assert outcomes[-1]["fired"] == 1
    for outcome in outcomes:
        assert outcome["actions"].count("rollback") == 1
        assert outcome["finite"]
        if kind == "ddp":
            assert outcome["weights"][-1] == outcomes[0]["weights"][-1]


def test_it_resumes_from_its_store(tmp_path):
    toy = Toy(steps=10)
    first = train(toy, store=str(tmp_path))
    second = train(dataclasses.replace(toy, steps=3), store=str(tmp_path))
    assert first["steps"] == 10
    assert second["actions"] == ["resume", "apply", "apply"]
    assert second["weights"][0] == first["weights"][-1]
    assert second["steps"] == 12
