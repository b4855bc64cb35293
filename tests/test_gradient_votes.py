"""Under DDP a gradient carries its rank's ballot to all others; only requests are voted on, every few steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arc_dist.parallel import Clipper
from arc_dist.protocol.flags import Flag
from ranks import run_ranks
from toy import Toy, guarded, plain

LONG = Toy(kind="ddp", steps=120)
SETTLED = 40  # steps after which the cadence of the vote is agreed on


def is_silent(guard):
    """Whether the next step has no vote of its own."""
    return guard.vote_cadence.every > 1 and not guard._is_vote_due(guard.step + 1)


def constant_inf(loss, job):
    return loss + math.inf  # its gradient is finite: no other rank would see anything by itself


def nan_loss(loss, job):
    return loss * math.nan


def exploding(loss, job):
    return loss + 1e6  # the same gradient


def large_rate(loss, job):
    job.optimizers[0].param_groups[0]["lr"] *= 1e4
    return loss


def reset_optimizer(loss, job):
    for state in job.optimizers[0].state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    return loss


FAULTS = {
    constant_inf: ("skip", "loss_nonfinite"),
    nan_loss: ("skip", "loss_nonfinite"),
    exploding: ("skip", "loss_explosion"),
    large_rate: ("rollback", "learning_rate"),
    reset_optimizer: ("rollback", "optimizer_reset"),
}


def fault_body(rank, world_size, toy, hurt):
    """One rank alone meets a fault at a step that has no vote."""
    box, fired = [], []

    def wrap(loss, arc):
        job = box[0]
        guard = arc._engine.guard
        if rank == 1 and not fired and guard.step > SETTLED and is_silent(guard):
            fired.append(guard.step + 1)
            return hurt(loss, job)
        return loss

    job = guarded(toy, wrap_loss=wrap)
    box.append(job)
    told, replicas = [], []
    for step in job.steps:
        replicas.append(job.replica())
        if step.action != "apply":
            details = job.arc._engine.guard.healer.details
            told.append((step.action, [theirs["flags"] for theirs in details]))
    return fired, told, replicas, job.digest(), job.arc._engine.guard.vote_cadence.every


@pytest.mark.parametrize("hurt", FAULTS)
def test_a_fault_that_one_rank_sees_between_votes_is_answered_by_all(hurt):
    outcomes = run_ranks(2, fault_body, LONG, hurt)
    assert [len(fired) for fired, *_ in outcomes] == [0, 1], "the fault must have fired, on one rank"
    action, flag = FAULTS[hurt]
    assert outcomes[0][4] == outcomes[1][4] > 1
    for _, told, replicas, *_ in outcomes:
        assert told == [(action, [[], [flag]])]
        assert replicas == outcomes[0][2], "replicas are equal after every step"


def quiet_body(rank, world_size, toy):
    job = guarded(toy, monitors=("standard", "-replicas"))  # which adds a vote after each snapshot
    first = next(job.steps)
    assert first.number == 1
    guard = job.arc._engine.guard
    voted = []  # the steps with a vote
    begin = guard.voter.begin

    def noted(ballot, digest=None):
        voted.append(guard.step + 1)
        begin(ballot, digest)

    guard.voter.begin = noted
    list(job.steps)
    return job.digest(), sum(step > SETTLED for step in voted), guard.vote_cadence.every


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


def test_short_steps_vote_every_few_and_end_bitwise_as_unguarded():
    outcomes = run_ranks(2, quiet_body, LONG)
    assert [digest for digest, *_ in outcomes] == run_ranks(2, plain_body, LONG)
    for _, votes, every in outcomes:
        assert every > 1
        assert votes <= (LONG.steps - SETTLED) // every + 2  # the end has a vote of its own


def request_body(rank, world_size, toy):
    job = guarded(toy)
    asked = heard = None
    for step in job.steps:
        guard = job.arc._engine.guard
        if rank == 1 and asked is None and step.number > SETTLED and is_silent(guard):
            asked = step.number
            guard.request(Flag.CHECKPOINT_BUSY)
        if heard is None and guard.agreed & Flag.CHECKPOINT_BUSY:
            heard = step.number
    return asked, heard, guard.vote_cadence.every


def test_a_request_is_heard_by_all_at_the_next_vote():
    (_, heard, every), (asked, heard_too, _) = run_ranks(2, request_body, LONG)
    assert heard == heard_too
    assert asked < heard <= asked + every


def hooked_body(rank, world_size, toy):
    job = guarded(dataclasses.replace(toy, steps=SETTLED + 10))
    job.model.register_comm_hook(None, lambda state, bucket: _averaged(bucket))
    list(job.steps)
    return job.arc._engine.guard.vote_cadence.every, job.arc._engine.guard.carries_votes


def _averaged(bucket):
    buffer = bucket.buffer().div_(torch.distributed.get_world_size())
    return torch.distributed.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])


def test_with_a_communication_hook_every_step_votes():
    assert run_ranks(2, hooked_body, LONG) == [(1, False)] * 2


# ---------------------------------------------------------------------- clipping without asking twice


def bits(gradients):
    return [g.contiguous().view(-1).view(torch.uint8).tolist() for g in gradients]


@settings(deadline=None, max_examples=200)
@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 30.0, 1e30, math.nan, math.inf]),
    near=st.sampled_from([None, 0.99, 0.9995, 1.0, 1.0000001, 1.0005, 1.012, 1.5]),
    seed=st.integers(0, 99),
)
def test_clipping_gives_the_bits_that_torch_gives(shapes, dtype, scale, near, seed):
    torch.manual_seed(seed)
    mine = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    theirs = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for a, b in zip(mine, theirs):
        a.grad = (torch.randn(a.shape) * scale).to(dtype)
        b.grad = a.grad.clone()
    norm = torch.nn.utils.get_total_norm([p.grad for p in theirs])
    limit = 1.0 if near is None or not 0.0 < norm.item() < math.inf else near * norm.item()
    measured = Clipper(mine, limit, sharded=False)()
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit).item()
    assert measured == expected or (math.isnan(measured) and math.isnan(expected))
    assert bits([p.grad for p in mine]) == bits([p.grad for p in theirs])


def test_parameters_without_gradients_are_passed_over():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    assert Clipper(parameters, 1.0, sharded=False)() == 0.0
    parameters[1].grad = torch.full((2,), 3.0)
    assert Clipper(parameters, None, sharded=False)() == pytest.approx(math.sqrt(18))
    assert parameters[1].grad.tolist() == [3.0, 3.0]
