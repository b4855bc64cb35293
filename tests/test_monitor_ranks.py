"""Monitors on several ranks: findings of one rank are acted on, or told, by all alike, under DDP and FSDP2."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from arc_dist.monitors import Monitor, Sees, register
from ranks import run_ranks
from toy import Toy, guarded, plain


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


def replica_body(rank, world_size, toy, settings):
    """The last bit of one weight flips on the last rank."""
    job = guarded(toy, **settings)
    told, actions, fired = [], [], 0
    for step in job.steps:
        job.arc._engine.guard._record = lambda **fields: told.append(fields)
        actions.append(step.action)
        if step.number == 23 and rank == world_size - 1 and not fired:
            fired += 1
            next(job.model.parameters()).data.view(-1).view(torch.int32)[5] ^= 1
    incidents = [(fields["reason"], fields["ranks"]) for fields in told if fields["kind"] == "numeric"]
    return fired, [action for action in actions if action != "apply"], job.digest(), incidents


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "blamed"), [(2, [0, 1]), (3, [2])])
def test_a_bit_that_flips_in_one_replica_is_found_and_undone_exactly(world_size, blamed):
    toy = Toy(kind="ddp", steps=40)
    settings = {"compare_replicas_every": 4, "monitors": ("replicas",)}
    outcomes = run_ranks(world_size, replica_body, toy, settings)
    expected = run_ranks(world_size, plain_body, toy)
    assert [fired for fired, *_ in outcomes] == [0] * (world_size - 1) + [1]
    assert [actions for _, actions, *_ in outcomes] == [["rollback"]] * world_size
    assert [digest for _, _, digest, _ in outcomes] == expected
    ((reason, ranks),) = outcomes[0][3]
    assert "replicas_differ" in reason and ranks == blamed


@register
class OneRank(Monitor):
    """Finds something at one step, on the ranks it is told."""

    name = "test_one_rank"
    sees = Sees.WEIGHT
    mine = False

    def __init__(self):
        self.done = False

    def look(self, subject):
        assert not isinstance(subject.tensor, DTensor) and subject.tensor.numel()
        if not type(self).mine or type(self).mine == "done" or subject.step < 20:
            return []
        type(self).mine = "done"
        return [self.found(subject.name, 1.0)]


def one_rank_body(rank, world_size, toy, policy):
    OneRank.mine = rank == 1
    options = {"test_one_rank": {"policy": policy}}
    job = guarded(toy, monitors=("full", "test_one_rank"), monitor_options=options, monitor_budget=1.0)
    told, actions = [], []
    for step in job.steps:
        job.arc._engine.guard._record = lambda **fields: told.append(fields)
        actions.append(step.action)
    told = [(fields["cause"].split(":")[0], fields["ranks"]) for fields in told if fields["kind"] == "alert"]
    return OneRank.mine, [action for action in actions if action != "apply"], told, job.digest()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("policy", ["alert", "rollback"])
def test_what_one_rank_finds_is_told_by_rank_0_or_acted_on_by_all(kind, policy):
    toy = Toy(kind=kind, steps=40)
    outcomes = run_ranks(2, one_rank_body, toy, policy)
    assert [mine for mine, *_ in outcomes] == [False, "done"]
    acted = ["rollback"] if policy == "rollback" else []
    assert [actions for _, actions, *_ in outcomes] == [acted, acted]
    assert outcomes[0][2] == ([] if acted else [("test_one_rank", [1])])
    assert [digest for *_, digest in outcomes] == run_ranks(2, plain_body, toy), "an exact replay, or nothing at all"


def origin_body(rank, world_size, toy):
    """One rank's gradient of one layer becomes NaN in its own backward."""
    fired, armed = [], []
    job = guarded(toy, monitors=("gradient_origin",))

    def poison(module, inputs, output):
        if armed and output.requires_grad:
            armed.clear()
            output.register_hook(lambda gradient: gradient * float("nan"))

    told, actions = [], []
    for step in job.steps:
        if step.number == 1:
            job.arc._engine.guard._record = lambda **fields: told.append(fields)
        if step.number == 11 and rank == 1 and not fired:
            armed.append(True)
            fired.append(True)
            job.model.get_submodule("module.second" if toy.kind == "ddp" else "second").register_forward_hook(poison)
        actions.append(step.action)
    details = [fields["details"] for fields in told if fields["kind"] == "numeric"]
    names = [[finding["name"] for finding in theirs["tensors"]] for theirs in details[0]] if details else None
    return len(fired), [action for action in actions if action != "apply"], names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_rank_whose_own_gradient_went_bad_is_named(kind):
    outcomes = run_ranks(2, origin_body, Toy(kind=kind, steps=20))
    assert [fired for fired, *_ in outcomes] == [0, 1]
    assert [actions for _, actions, _ in outcomes] == [["skip"], ["skip"]]
    innocent, guilty = outcomes[0][2]
    assert not any("gradient_origin" in name for name in innocent)
    assert any(name.startswith("gradient_origin: ") for name in guilty)
