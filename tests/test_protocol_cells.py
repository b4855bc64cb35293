"""Cells: whatever worlds a run goes through, every micro-batch of the origin is computed exactly once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol.cells import Cell, Origin

origins = st.builds(Origin, st.integers(1, 8), st.integers(1, 6))
lengths = st.integers(1, 12)


def everything(origin: Origin, *, epochs: int, batches: int) -> Counter[tuple[int, Cell]]:
    """What the origin itself computes, written down without the rule."""
    cells: Counter[tuple[int, Cell]] = Counter()
    for replica in range(origin.ranks):
        for number in range(epochs * batches):
            epoch, index = divmod(number, batches)
            cells[epoch, Cell(number // origin.accumulate, replica, index)] += 1
    return cells


@given(origin=origins, batches=lengths, epochs=st.integers(1, 4), data=st.data())
def test_every_cell_comes_once_whatever_the_worlds_in_between(
    origin: Origin, batches: int, epochs: int, data: st.DataObject
) -> None:
    num_turns = -(-epochs * batches // origin.accumulate)
    changes = sorted(data.draw(st.lists(st.integers(0, num_turns), max_size=4)))
    worlds = [data.draw(st.sampled_from(origin.fitting_worlds())) for _ in range(len(changes) + 1)]
    seen: Counter[tuple[int, Cell]] = Counter()
    for ranks, since, until in zip(worlds, [0, *changes], [*changes, num_turns], strict=True):
        for rank in range(ranks):
            for epoch in range(epochs):
                cells = origin.cells(ranks, rank, epoch=epoch, batches=batches, since=since)
                seen.update((epoch, cell) for cell in cells if cell.turn < until)
    assert seen == everything(origin, epochs=epochs, batches=batches)


@given(origin=origins, batches=lengths, data=st.data())
def test_all_ranks_have_equally_much_of_every_turn(origin: Origin, batches: int, data: st.DataObject) -> None:
    ranks = data.draw(st.sampled_from(origin.fitting_worlds()))
    epochs = origin.accumulate  # so that the data does not end within a turn
    counts = [
        Counter(
            cell.turn for epoch in range(epochs) for cell in origin.cells(ranks, rank, epoch=epoch, batches=batches)
        )
        for rank in range(ranks)
    ]
    expected = dict.fromkeys(range(epochs * batches // origin.accumulate), origin.accumulate_in(ranks))
    assert all(count == expected for count in counts)


@given(origin=origins, batches=lengths, epochs=st.integers(1, 4), data=st.data())
def test_a_last_turn_that_is_short_is_shared_evenly_when_it_is_said_so(
    origin: Origin, batches: int, epochs: int, data: st.DataObject
) -> None:
    ranks = data.draw(st.sampled_from(origin.fitting_worlds()))
    sizes = {
        sum(1 for epoch in range(epochs) for _ in origin.cells(ranks, rank, epoch=epoch, batches=batches))
        for rank in range(ranks)
    }
    assert (len(sizes) == 1) == origin.shares_the_last_turn(ranks, total_batches=epochs * batches)


@given(origin=origins, batches=lengths, rank=st.integers(0, 7))
def test_in_the_origins_own_world_nothing_moves(origin: Origin, batches: int, rank: int) -> None:
    rank %= origin.ranks
    cells = list(origin.cells(origin.ranks, rank, epoch=1, batches=batches))
    assert [(cell.replica, cell.batch) for cell in cells] == [(rank, index) for index in range(batches)]


@given(origin=origins, ranks=st.integers(1, 60))
def test_the_worlds_that_fit_are_the_divisors(origin: Origin, ranks: int) -> None:
    accumulate = origin.accumulate_in(ranks)
    assert (accumulate is None) == (ranks not in origin.fitting_worlds())
    if accumulate is not None:
        assert ranks * accumulate == origin.num_cells
