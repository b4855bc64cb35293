"""Retention: laws of the decision, the text form, and what `Store.prune` does to real directories."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.checkpoint_store.retention import (
    Best,
    Retention,
    StepFacts,
    decide,
    format_age,
    keep,
    parse_age,
    parse_retention,
)
from arc_dist.errors import ConfigError

NOW = 1_000_000.0
METRICS = st.dictionaries(st.sampled_from(["loss", "accuracy"]), st.floats(width=16), max_size=2)
BESTS = st.builds(Best, metric=st.sampled_from(["loss", "accuracy"]), largest=st.booleans(), count=st.integers(1, 3))
POLICIES = st.builds(
    Retention,
    last=st.integers(2, 5),
    every=st.none() | st.integers(1, 40),
    best=st.lists(BESTS, max_size=2).map(tuple),
    age_s=st.none() | st.floats(0, 2000),
)
FACTS = st.builds(
    StepFacts,
    step=st.integers(0, 100),
    certified=st.booleans(),
    committed_at=st.floats(NOW - 3000, NOW + 1000),
    metrics=METRICS,
    pinned=st.none() | st.sampled_from(["", "paper"]),
    quarantined=st.none() | st.just("diverged"),
)
RUNS = st.lists(FACTS, max_size=25, unique_by=lambda fact: fact.step)


def fact(step: int, **fields: object) -> StepFacts:
    return dataclasses.replace(StepFacts(step=step, certified=True, committed_at=NOW - 100 + step), **fields)  # type: ignore[arg-type]


def union(a: Retention, b: Retention) -> Retention:
    """The policy that has the rules of both, where one policy can say it."""
    return Retention(
        last=max(a.last, b.last),
        every=a.every if b.every is None else b.every,
        best=(*a.best, *b.best),
        age_s=max((age for age in (a.age_s, b.age_s) if age is not None), default=None),
    )


@given(RUNS, POLICIES)
def test_the_newest_certified_step_is_always_kept(run: list[StepFacts], policy: Retention) -> None:
    kept = keep(run, policy, NOW)
    trusted = sorted(f.step for f in run if f.certified and f.quarantined is None)
    assert set(trusted[-policy.last :]) <= kept.keys()
    assert all(f.step in kept for f in run if trusted[-policy.last :] and f.step >= trusted[-policy.last :][0])


@given(RUNS, POLICIES)
def test_pins_are_always_kept(run: list[StepFacts], policy: Retention) -> None:
    kept = keep(run, policy, NOW)
    assert all(f.step in kept for f in run if f.pinned is not None)


@given(RUNS, POLICIES, POLICIES)
def test_adding_a_rule_never_removes_more(run: list[StepFacts], a: Retention, b: Retention) -> None:
    b = dataclasses.replace(b, every=None) if a.every is not None else b
    both = keep(run, union(a, b), NOW).keys()
    assert keep(run, a, NOW).keys() | keep(run, b, NOW).keys() <= both


@given(RUNS, POLICIES)
def test_what_was_kept_is_kept_again(run: list[StepFacts], policy: Retention) -> None:
    kept = keep(run, policy, NOW)
    assert keep([f for f in run if f.step in kept], policy, NOW).keys() == kept.keys()


@given(RUNS, POLICIES, st.randoms())
def test_order_does_not_matter_and_every_step_has_a_reason(run: list[StepFacts], policy: Retention, random) -> None:  # type: ignore[no-untyped-def]
    decisions = decide(run, policy, NOW)
    shuffled = list(run)
    random.shuffle(shuffled)
    assert decide(shuffled, policy, NOW) == decisions
    assert decisions.keys() == {f.step for f in run}
    assert all(decision.why for decision in decisions.values())


@given(RUNS, POLICIES, st.integers(101, 200))
def test_a_new_certified_step_is_never_removed_at_once(run: list[StepFacts], policy: Retention, step: int) -> None:
    kept = keep([*run, fact(step)], policy, NOW)
    assert step in kept


@given(RUNS, POLICIES)
def test_untrusted_steps_never_push_out_trusted_ones(run: list[StepFacts], policy: Retention) -> None:
    trusted = [f for f in run if f.trusted]
    if not trusted:
        return
    with_all = keep(run, policy, NOW).keys()
    assert keep(trusted, policy, NOW).keys() <= with_all


def test_each_rule_and_its_reason() -> None:
    run = [fact(step, metrics={"loss": 9 - step / 100, "accuracy": 0.1}) for step in range(0, 800, 100)]
    run[1] = fact(100, metrics={"loss": 0.5, "accuracy": 0.9})
    run[2] = fact(200, pinned="figure 3")
    run[3] = fact(300, quarantined="loss diverged at 310", metrics={"loss": 0.01})
    run[4] = fact(400, certified=False, metrics={"loss": 0.01})
    policy = parse_retention("last=2,every=500,best=loss,best=accuracy:1:max")
    decisions = decide(run, policy, NOW)
    assert {step: d.why for step, d in decisions.items() if d.kept} == {
        0: "the first certified step from 0 on (every 500)",
        100: "loss 0.5, number 1 of the smallest; accuracy 0.9, number 1 of the largest",
        200: "pinned: figure 3",
        500: "the first certified step from 500 on (every 500)",
        600: "one of the newest 2 certified steps",
        700: "the newest certified step",
    }
    assert decisions[300].why == "quarantined (loss diverged at 310) and older than the newest 2 certified steps"
    assert decisions[400].why == "uncertified and older than the newest 2 certified steps"
    assert keep(run, parse_retention("age=1h"), NOW).keys() == {0, 100, 200, 500, 600, 700}
    assert keep(run, Retention(age_s=0), NOW + 10_000).keys() == {200, 600, 700}


def test_what_is_newer_than_the_window_stays_whatever_it_is() -> None:
    run = [fact(1), fact(2), fact(3, certified=False), fact(4), fact(5, quarantined="x"), fact(6, certified=False)]
    kept = keep(run, Retention(last=2), NOW)
    assert kept.keys() == {2, 3, 4, 5, 6}
    assert "newer than step 2" in kept[3]
    assert keep([fact(1, certified=False), fact(2, certified=False)], Retention(), NOW).keys() == {1, 2}


def test_a_run_that_never_saves_at_a_multiple_still_keeps_one_of_each_stretch() -> None:
    run = [fact(step) for step in (7, 1007, 1507, 2007, 3007, 3507)]
    assert keep(run, Retention(last=2, every=1000), NOW).keys() == {7, 1007, 2007, 3007, 3507}


def test_values_that_are_no_numbers_are_never_best() -> None:
    run = [fact(s, metrics={"loss": v}) for s, v in enumerate([math.nan, -math.inf, 3.0, 2.0, 2.0, 9.0, 9.0])]
    assert keep(run, Retention(last=2, best=(Best(metric="loss"),)), NOW).keys() == {4, 5, 6}


def test_one_is_refused_with_the_reason() -> None:
    for last in (1, 0, -3):
        with pytest.raises(ConfigError, match="would leave nothing to restore"):
            Retention(last=last)
    with pytest.raises(ConfigError, match="appears twice"):
        keep([fact(1), fact(1)], Retention(), NOW)


@given(POLICIES)
def test_the_text_form_is_read_back(policy: Retention) -> None:
    policy = dataclasses.replace(policy, age_s=None if policy.age_s is None else float(round(policy.age_s)))
    assert parse_retention(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not NAME=VALUE"),
        ("3", "is not NAME=VALUE"),
        ("last=", "is not NAME=VALUE"),
        ("last=two", "not a whole number"),
        ("last=1", "nothing to restore"),
        ("last=3,last=4", "appears twice"),
        ("newest=3", "there is no rule 'newest'"),
        ("every=0", "at least 1"),
        ("every=-5", "not a whole number"),
        ("best=:2", "name a metric"),
        ("best=loss:0", "name a metric"),
        ("best=loss:2:3", "METRIC"),
        ("best=loss:up", "not a whole number"),
        ("age=7", "such as 90m or 7d"),
        ("age=-7d", "such as 90m or 7d"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_retention(text)


def test_ages() -> None:
    assert [parse_age(text) for text in ("90s", "1.5h", "7d", "2w")] == [90, 5400, 604800, 1209600]
    assert [format_age(seconds) for seconds in (0, 90, 5400, 86400, 1209600, 0.5)] == [
        "0s", "90s", "90m", "1d", "2w", "0.5s",
    ]  # fmt: skip
