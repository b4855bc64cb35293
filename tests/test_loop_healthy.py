"""Without a fault a guarded run is bitwise the unguarded one (S16), in every kind of parallelism."""

from __future__ import annotations

import dataclasses

import pytest

from ranks import run_ranks
from toy import Toy, guarded, plain

VARIANTS = {
    "default": Toy(),
    "no clipping": Toy(clip=None),
    "accumulation": Toy(accumulate=3, steps=12),
    "bf16": Toy(bf16=True),
    "two optimizers": Toy(two_optimizers=True),
    "constant rate": Toy(schedule=False),
    "batch norm": Toy(batch_norm=True),
}


def pair(toy):
    """What the guarded and the plain run of a variant end with."""
    job = guarded(toy)
    results = list(job.steps)
    assert [result.number for result in results] == list(range(1, toy.steps + 1))
    assert {result.action for result in results} == {"apply"}
    return (job.digest(), [result.loss for result in results]), plain(toy)


def pairs_body(rank, world_size, toys):
    return [pair(toy) for toy in toys]


@pytest.mark.parametrize("name", VARIANTS)
def test_one_process(name):
    mine, theirs = pair(VARIANTS[name])
    assert mine == theirs


@pytest.mark.parametrize(
    ("kind", "world_size"), [("ddp", 4), ("fsdp", 2), pytest.param("fsdp", 4, marks=pytest.mark.soak)]
)
def test_ranks(kind, world_size):
    """All variants in the same processes, which takes a tenth of the time."""
    names = [name for name in VARIANTS if kind == "ddp" or name != "batch norm"]
    toys = [dataclasses.replace(VARIANTS[name], kind=kind) for name in names]
    for rank, pairs in enumerate(run_ranks(world_size, pairs_body, toys, timeout_s=100)):
        for name, (mine, theirs) in zip(names, pairs):
            assert mine == theirs, f"{name} on rank {rank}"
