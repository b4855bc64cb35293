"""The vote's law and the healing ladder: pure, so tested as laws and as stories."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol.decision import Rung, Verdict
from arc_dist.protocol.flags import FAULTS, NO_FLAGS, STATE_FAULTS, UPDATE_FAULTS, Flag, merge, names
from arc_dist.protocol.healing import TRANSITIONS, Event, History, Mode, decide, healthy
from arc_dist.protocol.ladder import RUNGS, Evidence, HealingPolicy

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
ROOT = Path(__file__).resolve().parent.parent


def fault(step, flags=Flag.LOSS_NONFINITE, *, corrupt=False, certified=(40, 30), has_store=False, must_restore=False):
    return Evidence(
        step=step,
        flags=flags,
        state_corrupt=corrupt,
        certified=certified,
        has_store=has_store,
        must_restore=must_restore,
    )


def climb(policy, evidence, history=None, ladder=None):
    """The same fault for ever: the decisions until the run stops, and the last history."""
    history = history or History()
    decisions = []
    for _ in range(1000):
        history, decision = decide(policy, history, evidence, ladder)
        decisions.append(decision)
        if decision.rung is Rung.STOP:
            return decisions, history
    raise AssertionError("a fault without progress must end")


def test_one_nan_loss_with_a_sound_state_is_skipped():
    history, decision = decide(POLICY, History(), fault(51))
    assert (decision.verdict, decision.rung) == (Verdict.SKIP, Rung.SKIP)
    assert decision.drop_batch
    assert history.mode is Mode.TRAINING
    assert "state is sound" in decision.reason


def test_a_corrupt_state_is_replayed_from_the_newest_certified_snapshot_without_blaming_the_batch():
    history, decision = decide(POLICY, History(), fault(51, corrupt=True))
    assert (decision.rung, decision.name, decision.restore_step) == (Rung.ROLLBACK, "replay", 40)
    assert not decision.drop_batch
    assert (decision.lr_scale, decision.clip_scale) == (1.0, 1.0)
    assert history.mode is Mode.RECOVERING


def test_corruption_that_comes_back_cuts_the_rate_and_the_clip_and_drops_the_batch():
    history, _ = decide(POLICY, History(), fault(51, corrupt=True))
    history, decision = decide(POLICY, history, fault(51, corrupt=True))
    assert (decision.name, decision.restore_step) == ("rollback", 40)
    assert decision.drop_batch
    assert (decision.lr_scale, decision.clip_scale) == (0.5, 0.5)


def test_the_whole_ladder_in_its_order():
    decisions, history = climb(POLICY, fault(51, corrupt=True, certified=(40, 30, 20), has_store=True))
    assert [(d.name, d.restore_step, d.before_step) for d in decisions[:-1]] == [
        ("replay", 40, None),
        ("rollback", 40, None),
        ("rollback", 40, None),
        ("older", 30, None),
        ("older", 20, None),
        ("checkpoint", None, 20),
        ("escape", 40, None),
        ("escape", 40, None),
    ]
    assert [d.lr_scale for d in decisions[:-1]] == [1.0, *(0.5**n for n in range(1, 7)), POLICY.lr_floor]
    assert min(d.clip_scale for d in decisions) == POLICY.clip_floor
    assert len({d.noise_seed for d in decisions if d.rung is Rung.ESCAPE}) == 2, "each escape has noise of its own"
    assert history.mode is Mode.STOPPED
    assert "8 rollbacks brought no progress beyond step 51 (replay, rollback" in decisions[-1].reason


def test_rungs_that_do_not_apply_are_left_out():
    decisions, _ = climb(POLICY, fault(51, corrupt=True, certified=(40,)))
    assert [d.name for d in decisions] == ["replay", "rollback", "rollback", "escape", "escape", ""]
    decisions, _ = climb(POLICY, fault(51, Flag.REDUCED_LOSS_EXPLOSION, certified=(40,)))
    assert [d.name for d in decisions] == ["rollback", "rollback", "escape", "escape", ""], "no corruption: no replay"
    decisions, _ = climb(POLICY, fault(51, corrupt=True, certified=(), has_store=True))
    assert [(d.name, d.before_step) for d in decisions] == [("checkpoint", 51), ("", None)]


def test_what_an_escape_does_is_the_policys():
    policy = HealingPolicy(ladder=("escape",), perturbation_scale=0.25, skip_ahead_steps=7, batch_window=3)
    _, decision = decide(policy, History(), fault(51))
    assert (decision.rung, decision.restore_step, decision.reset_moments) == (Rung.ESCAPE, 40, True)
    assert (decision.perturbation, decision.skip_ahead, decision.window) == (0.25, 7, 3)


def test_a_rung_of_ones_own_restores_the_newest_snapshot_and_goes_by_its_name():
    history, decision = decide(HealingPolicy(ladder=("freeze",)), History(), fault(51))
    assert (decision.rung, decision.action, decision.restore_step) == (Rung.OWN, "freeze", 40)
    assert history.mode is Mode.RECOVERING


def test_a_rung_that_failed_half_way_is_followed_by_one_that_restores():
    history, _ = decide(HealingPolicy(ladder=("skip", "freeze", "escape")), History(), fault(51, corrupt=True))
    again = fault(51, must_restore=True)
    _, decision = decide(HealingPolicy(ladder=("skip", "freeze", "escape")), history, again)
    assert decision.rung is Rung.ESCAPE


def test_the_ladder_may_be_chosen_by_the_fault():
    _, decision = decide(POLICY, History(), fault(51), ("escape",))
    assert decision.rung is Rung.ESCAPE


def test_the_policys_own_choice_is_its_ladder():
    assert POLICY.ladder_for(fault(51)) == POLICY.ladder


def test_a_ladder_without_a_rung_for_the_fault_stops():
    history, decision = decide(HealingPolicy(ladder=("replay",)), History(), fault(51))
    assert (decision.rung, decision.action, history.mode) == (Rung.STOP, "stop", Mode.STOPPED)
    assert "the ladder has no rung for it" in decision.reason


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


def test_a_vanishing_gradient_never_escalates_and_is_believed_in_the_end():
    history, decisions = History(), []
    for step in range(100):
        history, decision = decide(POLICY, history, fault(step, Flag.GRAD_VANISHING))
        decisions.append(decision)
    skips = POLICY.max_consecutive_skips
    assert [d.rung for d in decisions] == [Rung.SKIP] * skips + [Rung.APPLY] * (100 - skips)
    assert [bool(d.reason) for d in decisions] == [True] * (skips + 1) + [False] * (99 - skips), "told once"
    assert not history.tried
    history, _ = healthy(POLICY, history, 101)
    assert decide(POLICY, history, fault(102))[1].rung is Rung.SKIP, "a healthy step gives the skips back"


def test_requests_are_not_faults():
    _, decision = decide(POLICY, History(), fault(51, Flag.PREEMPT))
    assert decision.rung is Rung.APPLY


@pytest.mark.parametrize("policy", [POLICY, HealingPolicy(ladder=("escape",))])
def test_progress_beyond_the_furthest_fault_gives_the_budget_back(policy):
    history, _ = decide(policy, History(), fault(51, corrupt=True))
    climbing = history.mode
    assert climbing is (Mode.RECOVERING if policy is POLICY else Mode.ESCAPING)
    for step in range(41, 51 + policy.progress_steps):
        history, _ = healthy(policy, history, step)
        assert history.mode is climbing, step
    history, _ = healthy(policy, history, 51 + policy.progress_steps)
    assert history.mode is Mode.TRAINING
    assert (history.tried, history.restored_step) == ((), None)


def test_a_cut_is_given_back_by_a_ramp_after_a_healthy_stretch():
    history = History(lr_scale=0.25, clip_scale=0.5)
    wait, ramp = POLICY.lr_restore_after, POLICY.ramp_steps
    for step in range(1, wait + 2 * ramp + 1):
        history, decision = healthy(POLICY, history, step)
        risen = 0.5 * max(0, step - wait) / ramp
        assert decision.lr_scale == pytest.approx(min(1.0, 0.25 + risen)), step
        assert decision.clip_scale == pytest.approx(min(1.0, 0.5 + risen)), step
    assert (history.lr_scale, history.clip_scale) == (1.0, 1.0), "exactly, so that the run is bitwise again"


def test_nothing_is_given_back_before_progress():
    history, _ = decide(POLICY, History(), fault(5000, Flag.REDUCED_LOSS_EXPLOSION))
    for step in range(41, 41 + 3 * POLICY.lr_restore_after):
        history, decision = healthy(POLICY, history, step)
        assert (decision.lr_scale, decision.clip_scale) == (0.5, 0.5)


def test_a_fault_interrupts_the_ramp():
    history = History(lr_scale=0.5, healthy_in_a_row=POLICY.lr_restore_after + 10)
    history, _ = decide(POLICY, history, fault(51))
    for step in range(52, 52 + POLICY.lr_restore_after):
        history, decision = healthy(POLICY, history, step)
        assert decision.lr_scale == 0.5


# ---------------------------------------------------------------------- the table


def test_the_table_is_whole_and_ends_where_it_should():
    assert TRANSITIONS.keys() == set(Mode)
    for mode, row in TRANSITIONS.items():
        assert row.keys() == set(Event), mode
        assert row[Event.GAVE_UP] is Mode.STOPPED
        assert mode is Mode.STOPPED or row[Event.PROGRESS] is Mode.TRAINING
    assert set(TRANSITIONS[Mode.STOPPED].values()) == {Mode.STOPPED}


EVENT_OF = {
    Rung.APPLY: Event.HEALTHY,
    Rung.SKIP: Event.SKIPPED,
    Rung.ROLLBACK: Event.RESTORED,
    Rung.CHECKPOINT: Event.RESTORED,
    Rung.OWN: Event.RESTORED,
    Rung.ESCAPE: Event.ESCAPED,
    Rung.STOP: Event.GAVE_UP,
}
OWN = HealingPolicy(ladder=("skip", "replay", "freeze", "rollback", "checkpoint", "escape", "melt"))
SINGLE_FLAGS = [NO_FLAGS, *[flag for flag in Flag if flag & FAULTS]]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("policy", [POLICY, OWN])
def test_every_mode_with_every_evidence(policy, mode):
    """Exhaustive over modes, flags, what is held, what was tried, skips so far, and all that decides a rung."""
    kinds = [Flag.LOSS_NONFINITE, Flag.GRAD_VANISHING, Flag.WEIGHT_NORM, Flag.REDUCED_LOSS_EXPLOSION]
    pairs = [*SINGLE_FLAGS, *[a | b for a, b in itertools.combinations(kinds, 2)]]
    held = [(), (40,), (40, 30)]
    tried = [policy.ladder[1 : n + 1] for n in range(len(policy.ladder))]
    for flags, certified, done, skips, corrupt, store, must in itertools.product(
        pairs, held, tried, (0, 2, 10), *[(False, True)] * 3
    ):
        history = History(
            mode=mode, tried=done, skips_in_a_row=skips, restored_step=30 if done else None, furthest_fault=51
        )
        evidence = fault(51, flags, corrupt=corrupt, certified=certified, has_store=store, must_restore=must)
        after, decision = decide(policy, history, evidence)
        assert after.mode is TRANSITIONS[mode][EVENT_OF[decision.rung]]
        if not flags:
            assert decision.rung is Rung.APPLY, "nothing is done without a flag"
            continue
        if decision.rung is Rung.APPLY:
            assert flags == Flag.GRAD_VANISHING and not (corrupt or must), "no update with a fault is applied"
        if decision.rung is Rung.SKIP:
            assert not (corrupt or must or flags & STATE_FAULTS), "a state that is not sound is never gone on with"
        if decision.restore_step is not None:
            assert decision.restore_step in certified
            assert after.tried == (*done, decision.name) and len(after.tried) <= policy.max_rollbacks
        if decision.rung is Rung.CHECKPOINT:
            assert store and decision.before_step is not None
        if mode is Mode.STOPPED:
            assert decision.rung is Rung.STOP
        assert 0 < decision.lr_scale <= history.lr_scale and 0 < decision.clip_scale <= history.clip_scale
        assert decision.verdict is {Rung.APPLY: Verdict.HEALTHY, Rung.SKIP: Verdict.SKIP}.get(
            decision.rung, Verdict.FAILURE
        )


def diagram():
    """The table as docs/healing.md shows it."""
    lines = ["stateDiagram-v2", "    [*] --> TRAINING"]
    for mode, row in TRANSITIONS.items():
        for other in Mode:
            events = [event for event, to in row.items() if to is other]
            if events and mode is not other:
                lines.append(f"    {mode.name} --> {other.name}: {', '.join(event.name for event in events)}")
    return "\n".join(lines)


def test_the_documents_show_the_table_and_the_rungs():
    text = (ROOT / "docs/healing.md").read_text()
    (shown,) = re.findall(r"```mermaid\n(.*?)\n```", text, re.DOTALL)
    assert shown == diagram()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
    assert {name: rows.get(name) for name in RUNGS} == RUNGS
    assert {event.name: event.value for event in Event} == {
        name: what for name, what in rows.items() if name in Event.__members__
    }


# ---------------------------------------------------------------------- laws

faulty_steps = st.lists(
    st.tuples(
        st.sampled_from([Flag.LOSS_NONFINITE, Flag.LOSS_EXPLOSION, Flag.GRAD_NONFINITE, Flag.WEIGHT_NORM]),
        st.booleans(),
    ),
    min_size=1,
    max_size=60,
)
policies = st.builds(
    HealingPolicy,
    ladder=st.lists(st.sampled_from([*RUNGS, "freeze", "melt"]), min_size=1, max_size=12).map(
        lambda names: tuple((["skip"] if "skip" in names else []) + ([n for n in names if n != "skip"] or ["rollback"]))
    ),
    max_consecutive_skips=st.integers(0, 12),
    max_explosion_skips=st.integers(0, 4),
    max_rollbacks=st.integers(1, 12),
    progress_steps=st.integers(1, 20),
)


@given(policies, faulty_steps, st.booleans())
def test_faults_without_progress_always_end(policy, faults, has_store):
    """Liveness: the same step failing for ever takes a bounded number of decisions, whatever policy and faults."""
    history, restores, skips = History(), 0, 0
    bound = (policy.max_rollbacks + 1) * (max(policy.max_consecutive_skips, policy.max_explosion_skips) + 1)
    for i in range(bound + 1):
        flag, corrupt = faults[i % len(faults)]
        history, decision = decide(policy, history, fault(51, flag, corrupt=corrupt, has_store=has_store))
        restores += decision.restore_step is not None or decision.before_step is not None
        skips += decision.rung is Rung.SKIP
        if decision.rung is Rung.STOP:
            break
    assert history.mode is Mode.STOPPED
    assert restores <= min(policy.max_rollbacks, len(policy.ladder))


@given(policies, st.lists(st.booleans(), min_size=1, max_size=300), st.integers(1, 6))
def test_a_run_gets_further_or_stops(policy, fails, kept):
    """A run with faults at any steps: between two states further than ever before there are bounded many decisions."""
    history, step, furthest, since = History(), 0, 0, 0
    states = policy.max_rollbacks + 1
    skips = max(policy.max_consecutive_skips, policy.max_explosion_skips) + 1
    # Each restored state is at most `kept` steps back, and so many steps may be healthy again before the next fault.
    bound = states * (kept + policy.progress_steps + 2) * skips
    for fails_now in fails * 20:
        if step > furthest:
            furthest, since = step, 0
        since += 1
        assert since <= bound, "no loop without progress"
        if not fails_now:
            history, _ = healthy(policy, history, step + 1)
            step += 1
            continue
        held = tuple(sorted({max(0, step - kept), max(0, step - 2 * kept)}, reverse=True))
        history, decision = decide(policy, history, fault(step + 1, certified=held))
        if decision.rung is Rung.STOP:
            return
        if decision.restore_step is not None:
            step = decision.restore_step


@given(policies, st.lists(st.tuples(st.booleans(), st.sampled_from(SINGLE_FLAGS)), max_size=80))
def test_decisions_are_a_function_of_the_evidence_alone(policy, steps):
    """Two ranks fed the same evidence never differ, and nothing is done without a flag (S1, S2)."""
    mine = theirs = History()
    for step, (corrupt, flags) in enumerate(steps):
        evidence = fault(step, flags, corrupt=corrupt)
        mine, decision = decide(policy, mine, evidence)
        theirs, other = decide(policy, dataclasses.replace(theirs), dataclasses.replace(evidence))
        assert decision == other
        assert mine == theirs
        if not flags & FAULTS:
            assert decision.rung is Rung.APPLY
        elif flags != Flag.GRAD_VANISHING:
            assert decision.rung is not Rung.APPLY
        assert History.from_dict(mine.as_dict()) == mine


def test_a_history_of_an_earlier_version_can_be_read():
    old = {"mode": "recovering", "skips_in_a_row": 1, "rollbacks": 2, "healthy_in_a_row": 0, "furthest_fault": 9}
    assert History.from_dict({**old, "lr_scale": 0.5}).mode is Mode.RECOVERING


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr_cut": 0.0},
        {"lr_cut": 1.5},
        {"lr_cut": float("nan")},
        {"lr_cut": "half"},
        {"lr_floor": 0.75},
        {"clip_cut": -1.0},
        {"clip_floor": 0.9},
        {"max_rollbacks": -1},
        {"max_rollbacks": 1.5},
        {"progress_steps": 0},
        {"ramp_steps": 0},
        {"batch_window": 0},
        {"skip_ahead_steps": -1},
        {"perturbation_scale": 1.5},
        {"perturbation_scale": float("inf")},
        {"reset_moments": 1},
        {"ladder": "skip"},
        {"ladder": ["skip", "rollback"]},
        {"ladder": ("rollback", "skip")},
        {"ladder": ("skip", "skip", "rollback")},
        {"ladder": ("roll back",)},
    ],
)
def test_a_policy_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HealingPolicy(**wrong)


@pytest.mark.parametrize(
    "contradictory",
    [
        {"ladder": ()},
        {"ladder": ("skip",), "max_consecutive_skips": 0, "max_explosion_skips": 0},
        {"ladder": ("rollback",), "max_rollbacks": 0},
        {"max_rollbacks": 0, "max_consecutive_skips": 0, "max_explosion_skips": 0},
    ],
)
def test_a_policy_without_a_rung_left_is_refused(contradictory):
    with pytest.raises(ValueError, match="no rung left"):
        HealingPolicy(**contradictory)


def test_an_escape_that_would_change_nothing_is_refused():
    with pytest.raises(ValueError, match="without 'escape'"):
        HealingPolicy(reset_moments=False, perturbation_scale=0, skip_ahead_steps=0)
    HealingPolicy(ladder=("rollback",), reset_moments=False, perturbation_scale=0, skip_ahead_steps=0)
