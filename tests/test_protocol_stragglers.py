"""Who is slow: by own work, against the median, persistently, once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol.stragglers import PATIENCE, Slow, Streaks, compare

RANKS = frozenset({0, 1, 2})


def work(data: float = 0.01, forward: float = 0.1) -> dict[str, float]:
    return {"data wait": data, "forward": forward}


def slow(rank: int) -> Slow:
    return Slow(rank=rank, ratio=2.0, part="forward", excess_s=0.1)


def test_a_slow_rank_is_found_with_the_part_that_is_slow():
    (found,) = compare({0: work(), 1: work(data=0.2), 2: work()}, 0.5, 1.5)
    assert (found.rank, found.part) == (1, "data wait")
    assert abs(found.ratio - 0.3 / 0.11) < 1e-9
    assert abs(found.excess_s - 0.19) < 1e-9


def test_of_two_ranks_the_faster_one_is_the_measure():
    assert [one.rank for one in compare({0: work(), 1: work(forward=0.3)}, 0.5, 1.5)] == [1]
    assert [one.rank for one in compare({0: work(forward=0.3), 1: work()}, 0.5, 1.5)] == [0]


def test_below_the_factor_or_too_little_to_matter_is_not_slow():
    assert compare({0: work(), 1: work(forward=0.15)}, 0.5, 1.5) == ()
    assert compare({0: work(), 1: work(data=0.02), 2: work()}, 5.0, 1.01) == ()  # 10 ms of a step of 5 s
    assert compare({0: work(), 1: work(forward=9.0)}, 10.0, 0) == ()
    assert compare({0: work(forward=9.0)}, 10.0, 1.5) == ()


def test_ranks_without_any_work_of_their_own():
    (found,) = compare({0: {"forward": 0.0}, 1: {"forward": 0.5}}, 0.5, 1.5)
    assert found.ratio == float("inf")


@given(st.dictionaries(st.integers(0, 9), st.floats(0, 10), min_size=2), st.floats(1.01, 10))
def test_never_half_of_the_ranks_or_more_unless_two_and_only_above_the_factor(totals, factor):
    found = compare({rank: {"forward": total} for rank, total in totals.items()}, 1.0, factor)
    assert 2 * len(found) <= len(totals)
    for one in found:
        assert all(totals[one.rank] >= totals[rank] for rank in totals if rank not in {f.rank for f in found})


def test_reported_after_some_comparisons_in_a_row_and_once():
    streaks, reports = Streaks(), []
    for _ in range(3 * PATIENCE):
        streaks, reported = streaks.after((slow(1),), RANKS)
        reports.append([one.rank for one in reported])
    assert reports == [[]] * (PATIENCE - 1) + [[1]] + [[]] * (2 * PATIENCE)


def test_an_interrupted_streak_is_forgotten():
    streaks = Streaks()
    for found in [(slow(1),)] * (PATIENCE - 1) + [()] + [(slow(1),)] * (PATIENCE - 1):
        streaks, reported = streaks.after(found, RANKS)
        assert reported == ()


def test_reported_again_after_it_was_fast_for_as_long():
    streaks, count = Streaks(), 0
    rounds = [(slow(1),)] * PATIENCE + [()] + [(slow(1),)] * PATIENCE + [()] * PATIENCE + [(slow(1),)] * PATIENCE
    for found in rounds:
        streaks, reported = streaks.after(found, RANKS)
        count += len(reported)
    assert count == 2


def test_what_is_known_of_a_rank_does_not_pass_to_the_next_that_has_its_number():
    streaks = Streaks()
    for _ in range(PATIENCE):
        streaks, _ = streaks.after((slow(1), slow(2)), RANKS)
    assert streaks.slow == {1, 2}
    assert streaks.without(1).slow == {2}
