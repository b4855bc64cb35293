"""One rank runs out of memory: all ranks do the step again in smaller micro-batches, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch

from arc_dist import TrainingStopped
from oom_jobs import PLACES, Shortage, divide_by_hand, short_of_memory, weights
from ranks import run_ranks
from toy import Toy

KINDS = {"single": 1, "ddp": 2, "fsdp": 2}
STEPS = 14
NEVER = Shortage(times=0)


def launch(toy, body, *args):
    """Runs `body` in the world of the toy; a list with one entry per rank."""
    return run_ranks(KINDS[toy.kind], body, toy, *args, init=toy.kind != "single")


def last_rank(toy):
    return KINDS[toy.kind] - 1


def retried_body(rank, world_size, toy, shortages):
    """Several trainings, one after the other; what became of each."""
    told = []
    for shortage in shortages:
        job, memory = short_of_memory(toy, shortage, rank)
        actions = [step.action for step in job.steps]
        guard = job.arc._engine.guard
        told.append((memory.refused, actions, guard.division.parts, job.digest(), job.replica(), guard.healer.details))
    return told


def by_hand_body(rank, world_size, toy, at, parts):
    job, memory = short_of_memory(toy, NEVER, rank)
    actions = [step.action for step in divide_by_hand(job, at, parts)]
    return memory.refused, actions, job.digest(), job.replica()


def variant(*, soak=False, **fields):
    toy = Toy(steps=STEPS, **fields)
    name = f"{toy.kind}-{toy.accumulate}{'-norm' * toy.batch_norm}{'-unclipped' * (toy.clip is None)}"
    return pytest.param(toy, id=name, marks=[pytest.mark.soak] if soak else [])


@pytest.mark.parametrize(
    "toy",
    [
        variant(kind="single", batch_norm=True, clip=None),
        variant(kind="ddp"),
        variant(kind="ddp", accumulate=2),
        variant(kind="fsdp"),
        variant(kind="fsdp", accumulate=2, soak=True),
        variant(kind="ddp", batch_norm=True, soak=True),
        variant(kind="fsdp", clip=None, soak=True),
    ],
)
def test_wherever_one_rank_fails_the_run_is_bitwise_that_with_the_step_divided_from_the_start(toy):
    at = 7
    shortages = [Shortage(rank=last_rank(toy), at=at, place=place) for place in PLACES]
    expected = launch(toy, by_hand_body, at, 2)
    outcomes = launch(toy, retried_body, shortages)
    for index, place in enumerate(PLACES):
        replicas = set()
        for rank, told in enumerate(outcomes):
            refused, actions, parts, digest, replica, details = told[index]
            assert refused == ([8] if rank == last_rank(toy) else []), f"{place}: the fault must have fired, once"
            assert actions == ["apply"] * (at - 1) + ["retry"] + ["apply"] * (STEPS - at), place
            assert parts == 2
            assert digest == expected[rank][2], place
            where = "backward" if place.startswith("backward") else "forward"
            assert details[last_rank(toy)]["memory"]["where"] == where
            replicas.add(replica)
        if toy.kind == "ddp" and not toy.batch_norm:  # DDP evens out running statistics in the next forward only
            assert len(replicas) == 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "place", ["before the model", pytest.param("last layer", marks=pytest.mark.soak), "backward, late"]
)
def test_the_very_first_steps_and_several_divisions(kind, place):
    """The first step, where DDP has not arranged its buckets, and the second, where it does; down to 2 samples."""
    toy = Toy(kind=kind, steps=6)
    for at in (1, 2):
        shortage = Shortage(rank=last_rank(toy), at=at, place=place, fits=2)
        outcomes = launch(toy, retried_body, [shortage])
        assert outcomes[-1][0][0] == [8, 4], "the fault must have fired twice"
        for (_, actions, parts, _, replica, _), *_ in outcomes:
            assert parts == 4
            assert actions == ["retry" if number == at else "apply" for number in range(1, 7)]
            if kind == "ddp":
                assert replica == outcomes[0][0][4]


def undivided_body(rank, world_size, toy, shortage):
    job, memory = short_of_memory(toy, shortage, rank, train=False)
    losses = [step.loss for step in job.steps]
    return memory.refused, losses, weights(job.model)


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_the_result_is_that_of_the_undivided_batch_up_to_rounding(kind):
    toy = Toy(kind=kind, steps=STEPS)
    outcomes = launch(toy, undivided_body, Shortage(rank=last_rank(toy), fits=1))
    undivided = launch(toy, undivided_body, NEVER)
    assert set(outcomes[-1][0]) == {8, 4, 2}, "also when a tiny batch takes the place of a part"
    for (_, losses, ours), (_, theirs_losses, theirs) in zip(outcomes, undivided):
        assert losses == pytest.approx(theirs_losses, rel=1e-5)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def hopeless_body(rank, world_size, toy, place):
    job, memory = short_of_memory(toy, Shortage(rank=world_size - 1, at=3, place=place, fits=0), rank)
    with pytest.raises(TrainingStopped, match=r"no smaller micro-batch is left.*tried 1, 2, 4, 8 per batch") as caught:
        list(job.steps)
    return memory.refused, caught.value.exit_code, job.replica()


@pytest.mark.parametrize("kind", KINDS)
def test_where_one_sample_does_not_fit_all_ranks_stop_and_say_what_was_tried(kind):
    outcomes = launch(Toy(kind=kind, steps=STEPS), hopeless_body, "backward, early")
    assert set(outcomes[-1][0]) == {8, 4, 2, 1}
    assert {code for _, code, _ in outcomes} == {77}
    if kind == "ddp":
        assert len({replica for *_, replica in outcomes}) == 1


class Starved:
    """An optimizer that runs out of memory in the middle of its update, as its state is made, `times` times."""

    def __init__(self, optimizer, at, times):
        self.step, self.at, self.times, self.fired = optimizer.step, at, times, 0
        self.parameters = optimizer.param_groups[0]["params"]
        self.calls = 0
        optimizer.step = self

    def __call__(self):
        self.calls += 1
        if self.calls >= self.at and self.fired < self.times:
            self.fired += 1
            with torch.no_grad():
                self.parameters[0].add_(1.0)  # half done
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.step()


def optimizer_body(rank, world_size, toy, times):
    job, _ = short_of_memory(toy, NEVER, rank)
    starved = Starved(job.optimizers[0], 8, times if rank == world_size - 1 else 0)
    error, actions = "", []
    try:
        actions = [step.action for step in job.steps if step.action != "apply"]
    except TrainingStopped as stopped:
        error = str(stopped)
    return starved.fired, actions, job.digest(), error


@pytest.mark.parametrize("kind", KINDS)
def test_a_half_done_update_is_undone_on_all_ranks_and_the_run_is_bitwise_the_undisturbed_one(kind):
    toy = Toy(kind=kind, steps=STEPS)
    outcomes = launch(toy, optimizer_body, 1)
    undisturbed = launch(toy, optimizer_body, 0)
    assert [fired for fired, *_ in outcomes] == [0] * last_rank(toy) + [1]
    for (_, actions, digest, error), (_, none, expected, _) in zip(outcomes, undisturbed):
        assert (actions, none, error) == (["rollback"], [], "")
        assert digest == expected


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_that_never_fits_stops_all_ranks(kind):
    outcomes = launch(Toy(kind=kind, steps=STEPS), optimizer_body, 100)
    assert outcomes[-1][0] == 2, "the fault must have fired twice"
    for *_, error in outcomes:
        assert "ran out of memory in the optimizer, again" in error


def widened_body(rank, world_size, toy, widen_after):
    job, memory = short_of_memory(toy, Shortage(rank=1, at=3, times=1), rank, widen_after=widen_after)
    seen = []
    for step in job.steps:
        division = job.arc._engine.guard.division
        seen.append((step.number, step.action, division.parts, division.is_trial))
    return memory.refused, seen


def test_what_fitted_for_a_while_is_tried_in_larger_parts_again():
    outcomes = run_ranks(2, widened_body, Toy(kind="ddp", steps=STEPS), 4)
    assert outcomes[0][1] == outcomes[1][1]
    assert outcomes[1][0] == [8]
    parts = [parts for _, _, parts, _ in outcomes[0][1]]
    assert parts == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert [trial for *_, trial in outcomes[0][1]][5:10] == [True, True, True, True, False]


def incidents_body(rank, world_size, toy):
    job, memory = short_of_memory(toy, Shortage(rank=1), rank)
    list(job.steps)
    return memory.refused


def test_the_incident_names_the_rank_the_place_and_the_samples(tmp_path):
    env = {"ARC_RUN_DIR": str(tmp_path)}
    assert run_ranks(2, incidents_body, Toy(kind="ddp", steps=STEPS), env=env) == [[], [8]]
    lines = [json.loads(line) for path in tmp_path.rglob("incidents.jsonl") for line in path.read_text().splitlines()]
    (told,) = [line for line in lines if line["kind"] == "out_of_memory"]
    assert (told["step"], told["ranks"], told["action"]) == (7, [1], "retry")
    assert "rank 1 ran out of memory in the forward of 8 samples" in told["reason"]
    assert told["details"][1]["memory"]["error"].startswith("OutOfMemoryError: CUDA out of memory")
