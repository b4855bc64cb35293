"""Metrics of the script's own: in the manifests, best so far across rollbacks and restarts, kept by retention."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from arc_dist import Store
from arc_dist.errors import ConfigError
from arc_dist.observed import Observed
from ranks import run_ranks
from toy import Toy, guarded


def val_loss(number):
    return abs(number - 12) + 0.5  # the best is at step 12


def train(toy, store, **more):
    job = guarded(toy, store=str(store), checkpoint_every=4, **more)
    for step in job.steps:
        job.arc.observe("val_loss", val_loss(step.number))
        job.arc._engine._checkpointer.wait()
    return job


def test_the_manifest_says_where_the_step_lies_and_how_good_it_was(tmp_path):
    train(Toy(steps=20), tmp_path)
    meta = Store(tmp_path).open(16).meta
    assert meta["step"] == 16
    assert meta["data"] == {"epoch": 0, "batch": 16, "samples": 16 * 8}
    assert meta["metrics"]["val_loss"] == val_loss(16)  # the snapshot is taken after the loop's body has seen the step
    assert math.isfinite(meta["metrics"]["loss"])
    assert meta["best"]["val_loss"]["smallest"] == [0.5, 12]


def test_the_best_so_far_survives_a_restart(tmp_path):
    train(Toy(steps=20), tmp_path)
    job = guarded(Toy(steps=24), store=str(tmp_path))
    next(job.steps)
    assert job.arc.best("val_loss") == (0.5, 12)
    assert job.arc.best("val_loss", largest=True) == (val_loss(1), 1)
    assert job.arc.best("nothing") is None
    job.steps.close()


def test_a_rollback_takes_back_what_was_observed_after_the_step_it_goes_to(tmp_path):
    job = guarded(Toy(steps=20))
    fired = 0
    for step in job.steps:
        job.arc.observe("score", 100.0 if step.number == 9 and not step.repeated and not fired else -step.number)
        if step.number == 9 and not fired:
            fired += 1
            with torch.no_grad():
                next(iter(job.model.parameters())).view(-1)[0] = math.inf
        if step.action == "rollback":
            assert job.arc.best("score", largest=True)[0] < 100.0
    assert fired == 1


def test_retention_keeps_the_best_in_a_run(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    train(Toy(steps=40), f"{store}?keep=last=2;best=val_loss:1")
    kept = [info.step for info in Store(store).steps()]
    assert kept == [12, 36, 40]


def body(rank, world_size, toy, store):
    job = guarded(toy, store=store, checkpoint_every=4)
    for step in job.steps:
        job.arc.observe("val_loss", val_loss(step.number) + rank)
        job.arc._engine._checkpointer.wait()
    return job.arc.best("val_loss")


def test_rank_0s_values_are_those_in_the_manifest(tmp_path):
    assert run_ranks(2, body, Toy(kind="ddp", steps=8), str(tmp_path)) == [(4.5, 8), (5.5, 8)]
    meta = Store(tmp_path).open(8).meta
    assert meta["metrics"]["val_loss"] == val_loss(8)  # the last checkpoint is taken at the end
    assert meta["data"]["samples"] == 2 * 8 * 8


def test_values_that_are_not_finite_are_never_the_best_and_not_in_manifests():
    observed = Observed()
    for step, value in enumerate([3.0, math.nan, 2.0, -math.inf]):
        observed.add("x", value, step)
    assert observed.best("x") == (2.0, 2)
    assert observed.best("x", largest=True) == (3.0, 0)
    assert observed.about(4, None, math.inf, 1)["metrics"] == {}


@pytest.mark.parametrize("name", ["", 3, "x" * 200])
def test_bad_names_are_refused(name):
    with pytest.raises(ConfigError, match="name"):
        Observed().add(name, 1.0, 0)


@pytest.mark.parametrize("value", ["high", None, torch.zeros(2)])
def test_bad_values_are_refused(value):
    with pytest.raises(ConfigError, match="one number"):
        Observed().add("x", value, 0)


def test_observing_before_training_is_refused():
    job = guarded(dataclasses.replace(Toy(), steps=2))
    with pytest.raises(ConfigError, match="before training"):
        job.arc.observe("x", 1.0)
