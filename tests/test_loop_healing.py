"""Faults that the loop heals: replicas stay equal, and rolling back and replaying equals never having failed."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch.distributed.tensor import DTensor

from arc_dist import HealingPolicy, TrainingStopped
from ranks import rank_outcomes, run_ranks
from toy import Toy, guarded, plain

KINDS = {"single": 1, "ddp": 2, "fsdp": 2}


def launch(kind, body, *args):
    """Runs `body` in the world of `kind`; a list with one entry per rank."""
    toy = Toy(kind=kind)
    if kind == "single":
        return [body(0, 1, toy, *args)]
    return run_ranks(KINDS[kind], body, toy, *args)


def hurt_largest(model, value):
    weight = max(model.parameters(), key=lambda p: p.numel())
    with torch.no_grad():
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        local.view(-1)[3] = value


def inf_weight_body(rank, world_size, toy, at):
    """A weight of the last rank turns to infinity after step `at`, once."""
    job = guarded(toy)
    fired, actions = 0, []
    for step in job.steps:
        actions.append(step.action)
        if step.number == at and rank == world_size - 1 and not fired:
            hurt_largest(job.model, math.inf)
            fired += 1
    return fired, [action for action in actions if action != "apply"], job.digest(), job.replica()


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


@functools.cache
def launch_plain(kind):
    return launch(kind, plain_body)


@pytest.mark.parametrize("at", [1, 7, 10, 29])
@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_weight_is_undone_and_the_run_ends_bitwise_as_if_nothing_had_happened(kind, at):
    healed = launch(kind, inf_weight_body, at)
    undisturbed = launch_plain(kind)
    assert [fired for fired, *_ in healed] == [0] * (len(healed) - 1) + [1]
    for (_, actions, digest, _), expected in zip(healed, undisturbed):
        assert actions == ["rollback"]
        assert digest == expected
    if kind == "ddp":
        assert len({replica for *_, replica in healed}) == 1


def nan_loss_body(rank, world_size, toy, at, times):
    """The loss of the last rank alone is NaN at steps `at`..., `times` times."""
    fired = []

    def wrap(loss, arc):
        if rank == world_size - 1 and arc.steps_done + 1 == at and len(fired) < times:
            fired.append(loss.item())
            return loss * math.nan
        return loss

    job = guarded(toy, wrap_loss=wrap)
    results, replicas = [], []
    for step in job.steps:
        results.append((step.number, step.action, step.verdict.value))
        replicas.append(job.replica())
    return len(fired), results, replicas, job.digest()


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_loss_on_one_rank_is_skipped_by_all(kind, times):
    outcomes = launch(kind, nan_loss_body, 12, times)
    assert outcomes[-1][0] == times, "the fault must have fired"
    for _, results, replicas, _ in outcomes:
        assert [number for number, *_ in results] == list(range(1, 31))
        assert results[11] == (12, "skip", "skip")
        assert {action for _, action, _ in results[:11] + results[12:]} == {"apply"}
        if kind == "ddp":
            assert replicas == outcomes[0][2], "replicas are equal after every step"


def persistent_body(rank, world_size, toy):
    def wrap(loss, arc):
        return loss * math.nan if arc.steps_done + 1 >= 12 and rank == 0 else loss

    policy = HealingPolicy(max_consecutive_skips=2, max_rollbacks=2)
    job = guarded(toy, wrap_loss=wrap, policy=policy)
    with pytest.raises(TrainingStopped, match=r"step 12.*rollbacks brought no progress") as caught:
        list(job.steps)
    assert caught.value.exit_code == 77
    return job.replica()


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_for_ever_ends_with_a_clear_stop_on_all_ranks(kind):
    replicas = launch(kind, persistent_body)
    if kind == "ddp":
        assert len(set(replicas)) == 1


def nan_at_first_body(rank, world_size, toy):
    fired = []

    def wrap(loss, arc):
        if not fired and rank == 0:
            fired.append(1)
            return loss * math.nan
        return loss

    job = guarded(toy, wrap_loss=wrap)
    first = next(job.steps)
    rest = list(job.steps)
    assert len(rest) == toy.steps - 1
    return len(fired), first.number, first.action


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_at_the_very_first_step_is_healed(kind):
    outcomes = launch(kind, nan_at_first_body)
    assert outcomes[0] == (1, 1, "skip")
    assert all(outcome[1:] == (1, "skip") for outcome in outcomes)


def exploding_body(rank, world_size, toy):
    """Weights of all ranks are scaled up: the loss explodes and stays there until a rollback."""
    job = guarded(dataclasses.replace(toy, steps=60))
    fired, actions, rates = 0, [], []
    for step in job.steps:
        actions.append(step.action)
        rates.append(job.arc._engine.guard.rate.factor)
        if step.number == 40 and not fired:
            fired += 1
            with torch.no_grad():
                for p in job.model.parameters():
                    (p.to_local() if isinstance(p, DTensor) else p).mul_(6.0)
    return fired, [a for a in actions if a != "apply"], rates[-1], job.replica()


@pytest.mark.parametrize("kind", KINDS)
def test_an_explosion_is_rolled_back_with_a_cut_rate(kind):
    outcomes = launch(kind, exploding_body)
    for fired, actions, rate, replica in outcomes:
        assert fired == 1
        assert actions == ["rollback"]
        assert rate == 0.5
        if kind == "ddp":
            assert replica == outcomes[0][3]


def learning_rate_body(rank, world_size, toy):
    """Somebody sets the rate to 1e6 on one rank."""
    job = guarded(toy)
    fired, actions = 0, []
    for step in job.steps:
        actions.append(step.action)
        if step.number == 13 and rank == world_size - 1 and not fired:
            job.optimizers[0].param_groups[0]["lr"] = 1e6
            fired += 1
    return fired, [a for a in actions if a != "apply"], job.digest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_set_by_accident_is_undone(kind):
    outcomes = launch(kind, learning_rate_body)
    undisturbed = launch_plain(kind)
    assert outcomes[-1][0] == 1
    for (_, actions, digest), expected in zip(outcomes, undisturbed):
        assert actions == ["rollback"]
        assert digest == expected


def moments_body(rank, world_size, toy):
    """The optimizer's moments are zeroed on one rank."""
    job = guarded(toy)
    fired, actions = 0, []
    for step in job.steps:
        actions.append(step.action)
        if step.number == 13 and rank == world_size - 1 and not fired:
            for state in job.optimizers[0].state.values():
                for value in state.values():
                    if value.numel() > 1:
                        (value.to_local() if isinstance(value, DTensor) else value).zero_()
            fired += 1
    return fired, [a for a in actions if a != "apply"], job.replica()


@pytest.mark.parametrize("kind", KINDS)
def test_moments_that_vanish_are_restored(kind):
    outcomes = launch(kind, moments_body)
    assert outcomes[-1][0] == 1
    for _, actions, replica in outcomes:
        assert "rollback" in actions
        if kind == "ddp":
            assert replica == outcomes[0][2]


def raising_body(rank, world_size, toy):
    def wrap(loss, arc):
        if rank == 1 and arc.steps_done + 1 == 9:
            raise ValueError("a bug on one rank")
        return loss

    return [step.number for step in guarded(toy, wrap_loss=wrap).steps]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_error_on_one_rank_ends_the_others_instead_of_hanging_them(kind):
    outcomes = rank_outcomes(2, raising_body, Toy(kind=kind), collective_timeout_s=20.0, timeout_s=50.0)
    assert "a bug on one rank" in (outcomes[1].error or "")
    assert outcomes[0].error is not None, "rank 0 must notice within the collective's timeout"


def early_exit_body(rank, world_size, toy):
    job = guarded(toy)
    for step in job.steps:
        if step.number == 7:
            break
    job.steps.close()
    return job.digest()


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_the_loop_early_is_safe(kind):
    seven = dataclasses.replace(Toy(kind=kind), steps=7)
    expected = [plain(seven)[0]] if kind == "single" else run_ranks(2, plain_seven, seven)
    assert launch(kind, early_exit_body) == expected


def plain_seven(rank, world_size, toy):
    return plain(toy)[0]
