"""SeededSampler: every index once per epoch, in an order that does not depend on the number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.data.sampler import SeededSampler
from arc_dist.errors import ConfigError

lengths = st.integers(0, 200)
worlds = st.integers(1, 9)
seeds = st.integers(0, 2**63)


def parts(length: int, world: int, epoch: int = 0, start: int = 0, **options: object) -> list[list[int]]:
    """What each rank gets."""
    result = []
    for rank in range(world):
        sampler = SeededSampler(length, num_replicas=world, rank=rank, **options)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        sampler.start_at(start)
        mine = list(sampler)
        assert len(mine) == len(sampler)
        result.append(mine)
    return result


def interleaved(ranks: list[list[int]]) -> list[int]:
    """All ranks' samples in the order of global positions."""
    return [index for turn in zip(*ranks) for index in turn]


@given(length=lengths, world=worlds, seed=seeds, epoch=st.integers(0, 1000))
def test_over_all_ranks_every_index_comes_once_and_pads_repeat_the_first(
    length: int, world: int, seed: int, epoch: int
) -> None:
    ranks = parts(length, world, epoch, seed=seed)
    assert len({len(mine) for mine in ranks}) == 1
    everything = interleaved(ranks)
    assert sorted(everything[:length]) == list(range(length))
    pads = everything[length:]
    assert len(pads) < world
    assert pads == [everything[i % length] for i in range(len(pads))]


@given(length=lengths, world=worlds, seed=seeds)
def test_dropping_the_last_leaves_out_less_than_one_per_rank(length: int, world: int, seed: int) -> None:
    everything = interleaved(parts(length, world, seed=seed, drop_last=True))
    assert len(everything) == length - length % world
    assert len(set(everything)) == len(everything)


@given(length=lengths, world=worlds, other=worlds, seed=seeds, shuffle=st.booleans())
def test_the_global_order_does_not_depend_on_the_number_of_ranks(
    length: int, world: int, other: int, seed: int, shuffle: bool
) -> None:
    one, two = (interleaved(parts(length, n, seed=seed, shuffle=shuffle))[:length] for n in (world, other))
    assert one == two


@given(length=lengths, world=worlds, other=worlds, seed=seeds, data=st.data())
def test_a_change_of_world_in_mid_epoch_uses_every_sample_once(
    length: int, world: int, other: int, seed: int, data: st.DataObject
) -> None:
    turns = data.draw(st.integers(0, length // world))
    before = interleaved([mine[:turns] for mine in parts(length, world, 4, seed=seed)])
    after = interleaved(parts(length, other, 4, start=len(before), seed=seed))
    assert sorted((before + after)[:length]) == list(range(length))


def test_epochs_and_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    orders = {tuple(parts(50, 1, epoch, seed=seed)[0]) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16
    assert torch.equal(state, torch.get_rng_state())


def test_without_shuffling_positions_are_indices() -> None:
    assert parts(7, 2, shuffle=False) == [[0, 2, 4, 6], [1, 3, 5, 0]]


def test_the_order_is_pinned() -> None:
    """A run must go on in the same order with a later version."""
    assert parts(8, 1, 1, seed=5) == [PINNED]


PINNED = [5, 1, 4, 3, 6, 7, 0, 2]


def test_a_start_lasts_for_its_epoch() -> None:
    sampler = SeededSampler(range(10), num_replicas=1, rank=0, shuffle=False)
    sampler.start_at(6)
    sampler.set_epoch(0)
    assert list(sampler) == [6, 7, 8, 9]
    sampler.set_epoch(1)
    assert len(list(sampler)) == 10


def test_arguments_out_of_range() -> None:
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        SeededSampler(5, num_replicas=2, rank=2)
    with pytest.raises(ConfigError, match="length is -1"):
        SeededSampler(-1)
    with pytest.raises(ConfigError, match="position 6"):
        SeededSampler(5).start_at(6)
