"""A world that changes size: whatever the ranks in between, each step is made of the samples it always was."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from arc_dist import Arc, Store
from elastic_job import Plan, build_loader, live, skipped_turns, timeline
from ranks import run_ranks

UNTIL = 24


def results(out: Path, life: int, ranks: int) -> list[dict]:
    return [json.loads((out / f"result-{life}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("plan", "worlds"),
    [
        (Plan(kind="ddp"), [4, 2, 3, 1, 4]),
        (Plan(kind="fsdp"), [4, 3, 1, 2, 4]),
        (Plan(kind="ddp", ranks=1, accumulate=4, workers=2), [1, 4, 2]),
        (Plan(kind="fsdp", ranks=2, accumulate=1, batch_size=4, sampler="distributed"), [2, 1, 2]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else f"{value.kind}-{value.sampler}",
)
def test_orderly_changes_of_world_keep_the_samples_of_every_step(tmp_path, plan, worlds):
    ends = [4 * (life + 1) + life % 2 for life in range(len(worlds))]
    for life, (ranks, until) in enumerate(zip(worlds, ends, strict=True)):
        done = live(plan, tmp_path, life=life, ranks=ranks, until=until, supervised=False)
        assert done.exit_code == 0, done
        begin = ends[life - 1] if life else 0
        assert results(tmp_path, life, ranks)[0]["steps"] == [[n, "apply"] for n in range(begin + 1, until + 1)], done
    seen = timeline(tmp_path, until=ends[-1])
    assert skipped_turns(plan, seen, until=ends[-1]) == []
    assert {seen.worlds[end] for end in ends} == set(worlds)


def random_plan(rng: random.Random, kind: str) -> Plan:
    ranks, accumulate = rng.choice([(4, 3), (2, 6), (3, 4), (1, 12)])
    return Plan(
        kind=kind, ranks=ranks, accumulate=accumulate, batch_size=rng.choice([1, 2]), workers=rng.choice([0, 0, 1]),
        samples=rng.choice([61, 100, 128]), sampler=rng.choice(["seeded", "distributed"]),
    )  # fmt: skip


def run_sequence(out: Path, seed: int) -> None:
    """Lives of a job in random worlds, each with a fault or an orderly end, until `UNTIL` steps are committed."""
    rng = random.Random(seed)
    plan = random_plan(rng, ("ddp", "fsdp")[seed % 2])
    worlds, num_nans, begin, life = set(), 0, 0, 0
    while begin < UNTIL:
        # Without a checkpoint yet, a start in another world would be a run of its own.
        ranks = rng.choice([1, 2, 3, 4]) if begin else plan.ranks
        fault = rng.choice(["kills", "nans", "kills supervised", "none"])
        rank, at = rng.randrange(ranks), begin + rng.randrange(1, 8)
        what = fault.split()[0]
        faults = {} if fault == "none" else {what: {str(rank): at}}
        supervised = fault == "kills supervised"
        done = live(plan, out, life=life, ranks=ranks, until=at + 2, supervised=supervised, **faults)
        assert (done.exit_code != 0) == (fault == "kills"), (fault, done)
        assert fault == "none" or (out / f"{what}-{life}-{rank}-{at}").exists(), (fault, done)
        num_nans += fault == "nans"
        worlds.add(ranks)
        begin = (
            max((info.step for info in Store(str(out / "store")).steps()), default=0) if any(out.glob("store/*")) else 0
        )
        life += 1
        assert life < 40, "the job does not get on"
    seen = timeline(out, until=begin)
    skipped = skipped_turns(plan, seen, until=begin)
    incidents = [json.loads(line) for line in (out / "run" / "incidents.jsonl").read_text().splitlines()]
    logged = sum(1 for incident in incidents if incident.get("action") == "skip")
    assert logged >= num_nans
    # A skip is done again by a life that goes on from before it.
    assert len(skipped) <= logged, (skipped, incidents)
    assert len(worlds) > 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_random_worlds_and_faults_use_every_sample_once(tmp_path, seed):
    run_sequence(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2, 35))
def test_more_random_worlds_and_faults(tmp_path, seed):
    run_sequence(tmp_path, seed)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_restart_within_the_new_world_changes_no_bit(tmp_path, kind):
    plan = Plan(kind=kind, ranks=4, accumulate=1, workers=1)
    digests = []
    for name, ends in (("through", [6, 14]), ("restarted", [6, 10, 14])):
        out = tmp_path / name
        out.mkdir()
        for life, until in enumerate(ends):
            done = live(plan, out, life=life, ranks=4 if life == 0 else 2, until=until, supervised=False)
            assert done.exit_code == 0, done
        digests.append([result["digest"] for result in results(out, len(ends) - 1, 2)])
    assert digests[0] == digests[1]


def trained_body(rank, world_size, kind, store, until):
    """A model without dropout, whose gradient is a function of the samples alone; all of it, on every rank."""
    torch.manual_seed(3)
    model: Any = nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 4))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step / 7))
    arc = Arc(model, optimizer, scheduler=scheduler, accumulate=3, store=store, max_grad_norm=0.5)
    norms = [
        step.grad_norm
        for step in arc.train(
            lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]), build_loader(Plan()), steps=until
        )
    ]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return norms, [p.detach().tolist() for p in whole], optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_and_rates_are_those_of_the_world_that_was(tmp_path, kind):
    norms, weights, rate = run_ranks(2, trained_body, kind, str(tmp_path / "same"), 12, timeout_s=300)[0]
    seen: list[float] = []
    for ranks, until in ((2, 4), (3, 8), (1, 12)):
        changed = run_ranks(ranks, trained_body, kind, str(tmp_path / "other"), until, timeout_s=300)
        seen += changed[0][0]
        assert all(theirs[1] == changed[0][1] for theirs in changed)
    assert seen == pytest.approx(norms, rel=1e-4)
    assert seen[:4] == norms[:4]
    assert changed[0][2] == rate
    for mine, theirs in zip(changed[0][1], weights, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-3, atol=1e-5)
