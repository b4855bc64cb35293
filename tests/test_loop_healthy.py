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


def guarded_run(rank, world_size, toy):
    job = guarded(toy)
    results = list(job.steps)
    assert [result.number for result in results] == list(range(1, toy.steps + 1))
    assert {result.action for result in results} == {"apply"}
    return job.digest(), [result.loss for result in results]


def plain_run(rank, world_size, toy):
    return plain(toy)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_process(name):
    assert guarded_run(0, 1, VARIANTS[name]) == plain(VARIANTS[name])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_ddp(name, world_size):
    toy = dataclasses.replace(VARIANTS[name], kind="ddp")
    assert run_ranks(world_size, guarded_run, toy) == run_ranks(world_size, plain_run, toy)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "batch norm"])
def test_fsdp2(name, world_size):
    toy = dataclasses.replace(VARIANTS[name], kind="fsdp")
    assert run_ranks(world_size, guarded_run, toy) == run_ranks(world_size, plain_run, toy)
