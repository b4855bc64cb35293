"""The vote's law and the healing ladder: pure, so tested as laws and as stories."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol.flags import FAULTS, NO_FLAGS, STATE_FAULTS, UPDATE_FAULTS, Flag, merge, names
from arc_dist.protocol.healing import Evidence, HealingPolicy, History, Mode, Rung, Verdict, decide, healthy

ballots = st.sets(st.sampled_from(list(Flag))).map(lambda flags: functools.reduce(merge, flags, NO_FLAGS))


@given(ballots, ballots, ballots)
def test_votes_merge_in_any_order_any_number_of_times(a, b, c):
    assert merge(a, b) == merge(b, a)
    assert merge(a, merge(b, c)) == merge(merge(a, b), c)
    assert merge(a, a) == a
    assert merge(a, NO_FLAGS) == a


def test_every_flag_fits_an_int64_and_faults_are_one_of_two_kinds():
    assert all(0 < flag.value < 1 << 62 for flag in Flag)
    assert UPDATE_FAULTS & STATE_FAULTS == NO_FLAGS
    assert names(Flag.PREEMPT | Flag.LOSS_NONFINITE) == ["loss_nonfinite", "preempt"]


POLICY = HealingPolicy()


def fault(step, flags=Flag.LOSS_NONFINITE, *, corrupt=False, certified=(40, 30)):
    return Evidence(step=step, flags=flags, state_corrupt=corrupt, certified=certified)


def test_one_nan_loss_with_a_sound_state_is_skipped():
    history, decision = decide(POLICY, History(), fault(51))
    assert (decision.verdict, decision.rung) == (Verdict.SKIP, Rung.SKIP)
    assert decision.drop_batch
    assert history.mode is Mode.TRAINING
    assert "state is sound" in decision.reason


def test_a_corrupt_state_is_replayed_from_the_newest_certified_snapshot_without_blaming_the_batch():
    history, decision = decide(POLICY, History(), fault(51, corrupt=True))
    assert (decision.rung, decision.restore_step) == (Rung.ROLLBACK, 40)
    assert not decision.drop_batch
    assert decision.lr_scale == 1.0
    assert history.mode is Mode.RECOVERING


def test_corruption_that_comes_back_cuts_the_rate_drops_the_batch_and_distrusts_a_snapshot():
    history, _ = decide(POLICY, History(), fault(51, corrupt=True))
    history, decision = decide(POLICY, history, fault(51, corrupt=True))
    assert decision.restore_step == 30
    assert decision.drop_batch
    assert decision.lr_scale == 0.5


def test_an_explosion_that_goes_on_is_rolled_back_with_a_cut():
    history = History()
    for _ in range(POLICY.max_explosion_skips):
        history, decision = decide(POLICY, history, fault(51, Flag.LOSS_EXPLOSION))
        assert decision.rung is Rung.SKIP
    history, decision = decide(POLICY, history, fault(51, Flag.LOSS_EXPLOSION))
    assert decision.rung is Rung.ROLLBACK
    assert decision.lr_scale == 0.5
    assert decision.drop_batch


def test_no_certified_snapshot_ends_clearly():
    history, decision = decide(POLICY, History(), fault(51, corrupt=True, certified=()))
    assert decision.rung is Rung.STOP
    assert "no certified snapshot" in decision.reason
    assert history.mode is Mode.STOPPED


def test_a_vanishing_gradient_never_escalates():
    history = History()
    for step in range(100):
        history, decision = decide(POLICY, history, fault(step, Flag.GRAD_VANISHING))
        assert decision.rung is Rung.SKIP
    assert history.rollbacks == 0


def test_requests_are_not_faults():
    _, decision = decide(POLICY, History(), fault(51, Flag.PREEMPT))
    assert decision.rung is Rung.APPLY


def test_progress_beyond_the_furthest_fault_gives_the_budget_back():
    history, _ = decide(POLICY, History(), fault(51, corrupt=True))
    for step in range(41, 51 + POLICY.progress_steps):
        history, _ = healthy(POLICY, history, step)
        assert history.mode is Mode.RECOVERING, step
    history, _ = healthy(POLICY, history, 51 + POLICY.progress_steps)
    assert history.mode is Mode.TRAINING
    assert history.rollbacks == 0


def test_a_cut_is_given_back_after_a_healthy_stretch():
    history = History(lr_scale=0.25)
    for step in range(1, 2 * POLICY.lr_restore_after + 1):
        history, decision = healthy(POLICY, history, step)
        expected = {0: 0.25, 1: 0.5, 2: 1.0}[step // POLICY.lr_restore_after]
        assert decision.lr_scale == expected, step


faulty_steps = st.lists(
    st.tuples(
        st.sampled_from([Flag.LOSS_NONFINITE, Flag.LOSS_EXPLOSION, Flag.GRAD_NONFINITE, Flag.WEIGHT_NORM]),
        st.booleans(),
    ),
    min_size=1,
    max_size=60,
)


@given(faulty_steps)
def test_faults_without_progress_always_end(faults):
    """Liveness: the same step failing for ever takes a bounded number of decisions, whatever the mixture of faults."""
    history, rollbacks, skips = History(), 0, 0
    bound = POLICY.max_rollbacks * (POLICY.max_consecutive_skips + 1) + POLICY.max_consecutive_skips + 1
    for i in range(bound + 1):
        flag, corrupt = faults[i % len(faults)]
        history, decision = decide(POLICY, history, fault(51, flag, corrupt=corrupt))
        rollbacks += decision.rung is Rung.ROLLBACK
        skips += decision.rung is Rung.SKIP
        if decision.rung is Rung.STOP:
            break
    assert history.mode is Mode.STOPPED
    assert rollbacks <= POLICY.max_rollbacks


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([NO_FLAGS, *[f for f in Flag if f & FAULTS]])), max_size=80))
def test_decisions_are_a_function_of_the_evidence_alone(steps):
    """Two ranks fed the same evidence never differ, and nothing is done without a flag (S1, S2)."""
    mine = theirs = History()
    for step, (corrupt, flags) in enumerate(steps):
        evidence = fault(step, flags, corrupt=corrupt)
        mine, decision = decide(POLICY, mine, evidence)
        theirs, other = decide(POLICY, dataclasses.replace(theirs), dataclasses.replace(evidence))
        assert decision == other
        assert mine == theirs
        assert (decision.rung is Rung.APPLY) == (flags & FAULTS == NO_FLAGS)
        assert History.from_dict(mine.as_dict()) == mine


@pytest.mark.parametrize("wrong", [{"lr_cut": 0.0}, {"lr_cut": 1.5}, {"max_rollbacks": -1}, {"progress_steps": 0}])
def test_a_policy_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HealingPolicy(**wrong)
