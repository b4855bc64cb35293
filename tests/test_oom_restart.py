"""Where a rank cannot take its place in the collectives of a step that did not fit, all processes start again, divided.

And memory that is really short: an address space with a limit, in which the allocator fails.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from arc_dist import Arc
from oom_jobs import Shortage, divide_by_hand, short_of_memory, weights_hash
from ranks import rank_outcomes, run_ranks, run_supervised
from toy import Toy, build_loader, build_model, build_optimizers

SCRIPT = str(Path(__file__).parent / "scripts" / "oom_toy.py")
STEPS = 14


def by_hand_body(rank, world_size, toy, at, parts, settings):
    job, _ = short_of_memory(toy, Shortage(times=0), rank, **settings)
    list(divide_by_hand(job, at, parts))
    return job.digest()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_restart_goes_on_divided_and_ends_bitwise_as_if_divided_from_there(tmp_path, kind):
    toy = Toy(kind=kind, steps=STEPS)
    settings = {"out_of_memory": "restart", "snapshot_every": 1, "certify_after": 1}
    config = {
        "toy": dataclasses.asdict(toy),
        "shortage": dataclasses.asdict(Shortage(place="backward, late")),
        "out": str(tmp_path),
        "settings": settings,
    }
    env = {"OMP_NUM_THREADS": "1", "ARC_RUN_DIR": str(tmp_path / "run")}
    done = run_supervised(2, SCRIPT, json.dumps(config), env=env, timeout_s=100)
    output = done.stdout + done.stderr
    assert done.exit_code == 0, output
    assert "rank 1 ran out of memory in the backward of step 7" in output
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert [result["parts"] for result in results] == [4, 4]
    first = results[0]["numbers"][0]  # of the generation that ended the run
    assert 5 <= first <= 7
    assert [result["digest"] for result in results] == run_ranks(2, by_hand_body, toy, first, 4, settings)


def unsupervised_body(rank, world_size, toy):
    job, _ = short_of_memory(toy, Shortage(at=3), rank, out_of_memory="restart")
    list(job.steps)


def test_without_a_supervisor_the_rank_says_what_to_do_and_nobody_hangs():
    outcomes = rank_outcomes(2, unsupervised_body, Toy(kind="ddp", steps=STEPS))
    assert not any(outcome.ok for outcome in outcomes)
    assert re.search(
        r"rank 1 ran out of memory in the forward of step 3.*start\s+the job with arcrun", outcomes[1].error
    )
    assert "Connection closed by peer" in outcomes[0].error or "gloo" in outcomes[0].error


def raised_body(rank, world_size, toy):
    job, memory = short_of_memory(toy, Shortage(rank=0, at=3), rank, out_of_memory="raise")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 8 GiB"):
        list(job.steps)
    return memory.refused


def test_the_error_itself_for_those_who_want_it():
    assert run_ranks(1, raised_body, Toy(steps=STEPS), init=False) == [[8]]


# ---------------------------------------------------------------------- memory that is really short


def address_space():
    words = Path("/proc/self/statm").read_text().split()
    return int(words[0]) * resource.getpagesize()


# Copies of each output: a tensor of 8 samples takes 8 x 4 x 4 x 2^18 bytes = 32 MiB, and a step needs more than four.
WIDTH = 1 << 18
HEADROOM = 110 << 20


def limited_body(rank, world_size, toy, limited):
    """Activations of many MiB; from step 4 on the last rank's address space may grow by less than they need."""
    model = build_model(toy).eval()
    optimizers = build_optimizers(toy, model)
    arc = Arc(model, optimizers, max_grad_norm=1.0, snapshot_every=5)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    is_limited = not limited

    def loss_fn(batch):
        nonlocal is_limited
        x, y = batch
        output = model(x)
        if not is_limited and rank == world_size - 1 and arc.steps_done == 3:
            is_limited = True
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + HEADROOM, hard))
        difference = output.repeat_interleave(WIDTH, 1) - y.repeat_interleave(WIDTH, 1)
        return nn.functional.gelu(difference).pow(2).mean()

    try:
        actions = [step.action for step in arc.train(loss_fn, build_loader(toy), steps=5)]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    guard = arc._engine.guard
    told = [theirs["memory"]["error"] for theirs in guard.healer.details if theirs["memory"]]
    return actions, guard.division.parts, told, [p.detach().flatten() for p in _local(model)], weights_hash(model)


def _local(model):
    return [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]


@pytest.mark.parametrize(
    "kind",
    [pytest.param("single", marks=pytest.mark.soak), "ddp", pytest.param("fsdp", marks=pytest.mark.soak)],
)
def test_the_allocators_own_error_under_a_limit_of_the_address_space(kind):
    toy, world_size = Toy(kind=kind), 1 if kind == "single" else 2
    outcomes = run_ranks(world_size, limited_body, toy, True, init=kind != "single")
    free = run_ranks(world_size, limited_body, toy, False, init=kind != "single")
    for (actions, parts, told, ours, digest), (others, one, nothing, theirs, _) in zip(outcomes, free):
        assert parts > 1, "memory must have been short"
        assert actions[:4] == ["apply", "apply", "apply", "retry"]
        assert set(actions) == {"apply", "retry"}
        assert told and "DefaultCPUAllocator" in told[0]
        assert (set(others), one, nothing) == ({"apply"}, 1, [])
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
        if kind == "ddp":
            assert digest == outcomes[0][4]
