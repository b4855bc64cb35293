"""The rules of hangs: limits that never cry wolf within the factor, verdicts that name who the others wait for."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol.hangs import (
    COMPILE_LIMIT_S,
    INQUIRY_LIMIT_S,
    LEARNED,
    Conduct,
    HangPolicy,
    Inquiry,
    Kind,
    Longest,
    Patience,
    Section,
    Sighting,
    judge,
    merge_limits,
)

LIMITS = st.dictionaries(st.sampled_from(["forward", "vote", "evaluate"]), st.floats(0, 1e6))
STAYS = st.lists(st.integers(1, 10**12), min_size=1)


def seen(rank: int, section: Section = Section.BACKWARD, **fields) -> Sighting:
    """A rank that waits in a collective and is overdue, unless the fields say otherwise."""
    usual = {"step": 120, "name": section.name, "elapsed_s": 90.0, "limit_s": 60.0, "collective": True, "stack": "wait"}
    return Sighting(rank=rank, section=section, **{**usual, **fields})


def working(rank: int, section: Section = Section.DATA, **fields) -> Sighting:
    return seen(rank, section, **{"collective": False, "stack": "own code", **fields})


# ---- limits


@given(STAYS, st.floats(1.01, 100), st.floats(0.001, 1000), st.floats(0, 1))
def test_no_alarm_within_the_factor_of_the_longest_stay_and_always_one_beyond(stays, factor, min_s, share):
    policy = HangPolicy(factor=factor, min_s=min_s)
    longest = Longest()
    for stay in stays:
        longest.add(stay)
    limit_s = policy.limit_s(Section.FORWARD, longest.value / 1e9, warming_up=False)
    allowed_s = max(min_s, factor * max(stays) / 1e9)
    assert not working(0, Section.FORWARD, elapsed_s=share * allowed_s, limit_s=limit_s).is_overdue
    beyond = working(0, Section.FORWARD, elapsed_s=allowed_s * (1 + 1e-9) + 1e-9, limit_s=limit_s)
    assert beyond.is_overdue
    assert judge([beyond]).kind is Kind.HANG


@given(STAYS, STAYS, STAYS)
def test_an_outlier_is_forgotten_after_two_blocks_and_not_before_one(first, second, third):
    longest = Longest()
    for block in (first, second):
        for stay in block:
            longest.add(stay)
        if block is first:
            longest.next_block()
    assert longest.value == max(first + second)
    longest.next_block()
    for stay in third:
        longest.add(stay)
    assert longest.value == max(second + third)


def test_a_block_without_a_stay_leaves_what_is_known():
    longest = Longest(present=7)
    for _ in range(5):
        longest.next_block()
    assert longest.value == 7


@given(LIMITS, LIMITS, LIMITS)
def test_the_merge_of_limits_is_commutative_associative_and_idempotent(a, b, c):
    assert merge_limits(a, b) == merge_limits(b, a)
    assert merge_limits(merge_limits(a, b), c) == merge_limits(a, merge_limits(b, c))
    assert merge_limits(a, a) == a
    assert all(merge_limits(a, b)[name] >= limit for name, limit in a.items())


@pytest.mark.parametrize("section", Section)
def test_what_was_not_learned_is_given_the_generous_limit(section):
    policy = HangPolicy(min_s=1.0, unseen_s=1800.0)
    never = section in (Section.NONE, Section.DONE)
    assert policy.limit_s(section, None, warming_up=False) == (0.0 if never else 1800.0)
    assert policy.limit_s(section, None, warming_up=True) == (0.0 if never else 1800.0)
    learned = policy.limit_s(section, 0.001, warming_up=False)
    assert learned == (0.0 if never else 1.0 if section in LEARNED else 1800.0)


def test_a_limit_set_by_hand_wins_except_at_the_start_and_nothing_is_watched_at_0():
    policy = HangPolicy(deadline_s=7.0, unseen_s=100.0)
    assert policy.limit_s(Section.FORWARD, 50.0, warming_up=False) == 7.0
    assert policy.limit_s(Section.SCRIPT, None, warming_up=False) == 7.0
    assert policy.limit_s(Section.FORWARD, None, warming_up=True) == 100.0
    assert policy.limit_s(Section.FORWARD, 50.0, warming_up=True) == 500.0  # as long as the last process took, and more
    assert policy.limit_s(Section.FORWARD, 0.1, warming_up=True) == 60.0
    assert policy.limit_s(Section.START, None, warming_up=False) == 100.0
    assert policy.named_s(50.0, None) == 7.0
    assert policy.named_s(50.0, 3.0) == 3.0
    off = HangPolicy(deadline_s=0)
    assert {off.limit_s(section, 1.0, warming_up=False) for section in Section} == {0.0}
    assert off.named_s(1.0, 3.0) == 0.0
    assert HangPolicy(factor=0).limit_s(Section.FORWARD, 1.0, warming_up=False) == HangPolicy().unseen_s


def test_a_named_section_has_a_limit_of_its_own():
    policy = HangPolicy(factor=10, min_s=60, unseen_s=1800)
    assert policy.named_s(None, None) == 1800
    assert policy.named_s(30.0, None) == 300
    assert policy.named_s(1.0, None) == 60
    assert policy.named_s(30.0, 0.0) == 0  # for ever


# ---- verdicts


def test_three_wait_in_the_backward_of_a_step_and_one_for_its_data():
    verdict = judge([seen(0), seen(1), working(2), seen(3)])
    assert (verdict.kind, verdict.culprits, verdict.condemned) == (Kind.HANG, (2,), (2,))
    assert "rank 2" in verdict.reason


def test_a_rank_in_an_earlier_step_is_blamed_whatever_its_section():
    late = working(1, Section.SCRIPT, step=119)
    assert judge([seen(0, Section.DATA), late]).culprits == (1,)


def test_waiting_for_a_rank_within_its_limit_is_no_hang():
    evaluating = working(0, Section.SCRIPT, name="evaluate", step=119, limit_s=1800.0)
    verdict = judge([evaluating, seen(1), seen(2)])
    assert verdict.kind is Kind.WAITING
    assert verdict.condemned == ()
    assert verdict.pause_s > 0
    forever = dataclasses.replace(evaluating, limit_s=0.0)
    assert judge([forever, seen(1)]).kind is Kind.WAITING


def test_nobody_overdue_is_no_hang():
    assert judge([seen(0, elapsed_s=1.0), working(1, elapsed_s=1.0)]).kind is Kind.MOVING


def test_a_stopped_rank_is_blamed_even_within_its_limit():
    stopped = seen(1, Section.BACKWARD, conduct=Conduct.STOPPED, elapsed_s=1.0, collective=False)
    assert judge([seen(0), stopped, working(2, elapsed_s=1.0)]).culprits == (1,)


def test_a_rank_under_a_debugger_is_left_alone():
    assert judge([seen(0), working(1, conduct=Conduct.TRACED)]).kind is Kind.WAITING


def test_a_rank_that_ended_is_not_a_hang():
    assert judge([seen(0), working(1, conduct=Conduct.GONE)]).kind is Kind.WAITING


def test_a_compiler_is_given_time():
    compiling = working(1, Section.FORWARD, compiling=True)
    assert judge([seen(0), compiling]).kind is Kind.WAITING
    assert judge([seen(0), dataclasses.replace(compiling, elapsed_s=COMPILE_LIMIT_S + 1)]).culprits == (1,)


def test_the_minority_is_blamed_when_collectives_are_out_of_order():
    ahead = seen(2, Section.BACKWARD)
    behind = [seen(0, Section.FORWARD), seen(1, Section.FORWARD)]
    assert judge([*behind, ahead]).culprits == (2,)
    assert judge([seen(0, Section.FORWARD), seen(1), ahead]).culprits == (0,)
    by_stack = judge([seen(0), seen(1), seen(2, stack="elsewhere")])
    assert by_stack.culprits == (2,)


def test_what_cannot_be_told_is_not_told_but_ended():
    two = judge([seen(0, Section.FORWARD), seen(1, Section.BACKWARD)])
    assert (two.kind, two.culprits) == (Kind.HANG, ())
    assert len(two.condemned) == 1
    same = judge([seen(0), seen(1), seen(2)])
    assert (same.kind, same.culprits, len(same.condemned)) == (Kind.HANG, (), 1)
    assert "cannot be told" in same.reason


def test_a_rank_that_works_ahead_of_those_who_wait_for_it_is_blamed_when_overdue():
    """In a loop that is not ours the vote comes after, and before, the script's own code."""
    stuck = working(0, Section.SCRIPT, limit_s=1800.0, elapsed_s=2000.0)
    assert judge([stuck, seen(1, Section.VOTE)]).culprits == (0,)
    assert judge([dataclasses.replace(stuck, elapsed_s=100.0), seen(1, Section.VOTE)]).kind is Kind.WAITING


def test_the_same_step_gets_more_patience_each_time_and_the_next_one_none():
    patience, factors = Patience(), []
    for _ in range(5):
        patience = patience.after_hang(12)
        factors.append(patience.at(12))
    assert factors == sorted(factors) and factors[0] > 1 and factors[-1] == factors[-2]
    assert patience.at(7) == factors[-1]  # the way to that step is done again
    assert patience.at(13) == 1
    assert patience.after_hang(20).at(20) == factors[0]


def test_a_collective_that_somebody_entered_late_is_waited_for():
    assert judge([seen(0), seen(1, elapsed_s=1.0)]).kind is Kind.WAITING


def test_a_silent_rank_is_blamed_only_when_no_other_can_be():
    verdict = judge([seen(0), seen(1)], silent=[2])
    assert verdict.culprits == (2,)
    assert verdict.condemned == (0,)  # the silent one cannot be reached
    assert judge([seen(0), working(1)], silent=[2]).culprits == (1,)


SIGHTINGS = st.lists(
    st.builds(
        Sighting,
        rank=st.just(0),
        step=st.integers(1, 3),
        section=st.sampled_from(Section),
        name=st.just("name"),
        elapsed_s=st.floats(0, 1e4),
        limit_s=st.sampled_from([0.0, 60.0, 1800.0]),
        conduct=st.sampled_from(Conduct),
        busy=st.floats(0, 2),
        collective=st.booleans(),
        compiling=st.booleans(),
        stack=st.sampled_from(["a", "b", "c"]),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: [dataclasses.replace(one, rank=rank) for rank, one in enumerate(found)])


@given(SIGHTINGS, st.randoms(use_true_random=False))
def test_a_verdict_is_fair_and_does_not_depend_on_who_answered_first(found, random):
    verdict = judge(found)
    shuffled = random.sample(found, len(found))
    again = judge(shuffled)
    assert again.kind is verdict.kind
    if verdict.kind is Kind.HANG:
        assert again.culprits == verdict.culprits
        assert any(one.is_overdue for one in found)
        assert verdict.condemned
        assert set(verdict.condemned) <= {one.rank for one in found}
        for rank in verdict.culprits:
            one = found[rank]
            assert one.is_overdue or one.conduct is Conduct.STOPPED or one.collective
    else:
        assert verdict.condemned == () and verdict.culprits == ()
        assert verdict.pause_s > 0


# ---- the inquiry


def test_an_inquiry_hears_each_rank_once_and_is_bounded():
    inquiry = Inquiry(number=3, opened_s=100.0, awaited=frozenset({0, 1}), told={})
    assert inquiry.take(2, seen(0)) is inquiry  # the answer to an older question
    assert inquiry.take(3, seen(7)) is inquiry
    one = inquiry.take(3, seen(0))
    assert one.take(3, working(0)) is one
    assert one.silent == {1}
    assert not one.is_over(100.0 + INQUIRY_LIMIT_S)
    assert one.is_over(100.1 + INQUIRY_LIMIT_S)
    assert one.take(3, seen(1)).is_over(100.0)
