"""Which process may stay when its generation ends: only one that has said that it left that very generation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol import reentry
from arc_dist.protocol.reentry import MAX_BARREN, Choice, Standing, Stay

INSIDE = Stay(standing=Standing.INSIDE, generation=3, within_s=5.0)


def test_the_ordinary_way_through_two_generations():
    stay = reentry.began(Stay(), 3, 5.0)
    assert reentry.choose(stay, 0.0)[0] is Choice.ASK
    stay = reentry.asked(stay, 10.0)
    assert reentry.choose(stay, 14.9)[0] is Choice.WAIT
    stay = reentry.left(stay, 3, progressed=True)
    assert reentry.choose(stay, 1e9)[0] is Choice.KEEP
    stay = reentry.entering(stay, 4, 20.0)
    assert reentry.choose(stay, 24.9)[0] is Choice.WAIT
    stay = reentry.began(stay, 4, 5.0)
    assert stay.standing is Standing.INSIDE
    assert stay.generation == 4


@pytest.mark.parametrize(
    "stay", [reentry.asked(INSIDE, 10.0), reentry.entering(reentry.left(INSIDE, 3, progressed=True), 4, 10.0)]
)
def test_who_is_late_is_ended(stay):
    assert reentry.choose(stay, 14.9)[0] is Choice.WAIT
    choice, reason = reentry.choose(stay, 15.0)
    assert choice is Choice.END
    assert "within 5 s" in reason


def test_a_word_of_another_generation_changes_nothing():
    entering = reentry.entering(reentry.left(INSIDE, 3, progressed=True), 5, 0.0)
    inside = reentry.began(entering, 5, 5.0)
    for stay in (entering, inside):
        assert reentry.left(stay, 3, progressed=True) is stay
        assert reentry.stuck(stay, 3, "late") is stay
    assert reentry.began(entering, 4, 5.0) is entering


def test_who_has_left_by_itself_is_kept():
    assert reentry.choose(reentry.left(INSIDE, 3, progressed=False), 0.0)[0] is Choice.KEEP


def test_who_cannot_get_rid_of_the_old_generation_is_ended():
    choice, reason = reentry.choose(reentry.stuck(INSIDE, 3, "a thread goes on"), 0.0)
    assert (choice, reason) == (Choice.END, "a thread goes on")


def come_back(stay, *, progressed):
    generation = stay.generation + 1
    return reentry.left(
        reentry.began(reentry.entering(stay, generation, 0.0), generation, 5.0), generation, progressed=progressed
    )


def test_who_comes_back_in_vain_again_and_again_is_ended():
    stay = reentry.left(INSIDE, 3, progressed=False)  # not a re-entry: nothing is held against it
    for _ in range(MAX_BARREN):
        assert reentry.choose(stay, 0.0)[0] is Choice.KEEP
        stay = come_back(stay, progressed=False)
    assert reentry.choose(stay, 0.0)[0] is Choice.END


def test_a_step_makes_good_for_what_was_in_vain():
    stay = reentry.left(INSIDE, 3, progressed=False)
    for _ in range(3 * MAX_BARREN):
        stay = come_back(come_back(stay, progressed=False), progressed=True)
        assert reentry.choose(stay, 0.0)[0] is Choice.KEEP


def test_a_new_function_has_no_past():
    stay = reentry.left(
        reentry.began(reentry.ended(come_back(reentry.left(INSIDE, 3, progressed=True), progressed=False)), 9, 1.0),
        9,
        progressed=False,
    )
    assert stay.barren == 0


WORDS = st.tuples(st.sampled_from(["began", "left", "stuck", "ended", "end", "run"]), st.integers(0, 4), st.booleans())


@given(st.lists(WORDS, max_size=40))
def test_nobody_is_kept_with_an_old_generation_in_it(words):
    """Any words, late or doubled, with the supervisor's own acts between them: kept is who left what it was in last."""
    stay, present, now_s = Stay(), 0, 0.0
    is_in: int | None = None  # the generation that the function is in, by its own words about the present one
    for word, number, flag in words:
        now_s += 1.0
        generation = present if flag else number
        if word == "began":
            after = reentry.began(stay, generation, 5.0)
            is_in = generation if after is not stay else is_in
            stay = after
        elif word == "left":
            after = reentry.left(stay, generation, progressed=flag)
            if after is not stay:
                assert generation == is_in
                is_in = None
            stay = after
        elif word == "stuck":
            stay = reentry.stuck(stay, generation, "reason")
        elif word == "ended":
            stay, is_in = reentry.ended(stay), None
        elif word == "end":
            choice, _ = reentry.choose(stay, now_s)
            if choice is Choice.ASK:
                stay = reentry.asked(stay, now_s)
        elif reentry.choose(stay, now_s)[0] is Choice.KEEP:
            assert is_in is None
            present = max(present, stay.generation) + 1
            stay = reentry.entering(stay, present, now_s)
        choice, reason = reentry.choose(stay, now_s)
        assert (choice is Choice.KEEP) <= (stay.standing is Standing.LEFT and is_in is None)
        assert bool(reason) == (choice in (Choice.END, Choice.ASK))
        assert stay.barren <= MAX_BARREN
