"""Dividing batches after running out of memory: pure, so tested as laws and as stories."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol.oom import (
    MAX_PARTS,
    Division,
    DivisionPolicy,
    Failure,
    Remedy,
    Where,
    failed,
    healthy,
    restarted,
    share,
)

POLICY = DivisionPolicy(widen_after=10, max_trials=2)


def out_of_memory(samples=64, *, rank=1, where=Where.FORWARD, obstacle=""):
    return Failure(rank=rank, where=where, samples=samples, obstacle=obstacle)


def after_healthy(division, steps):
    for _ in range(steps):
        division = healthy(POLICY, division)
    return division


@pytest.mark.parametrize("where", [Where.FORWARD, Where.BACKWARD])
def test_each_failure_doubles_the_division_until_single_samples_fail(where):
    division, samples, seen = Division(), 8, []
    while True:
        division, remedy, reason = failed(division, [out_of_memory(samples, where=where)])
        if remedy is Remedy.STOP:
            break
        assert remedy is Remedy.RETRY
        seen.append(division.parts)
        samples = 8 // division.parts
    assert seen == [2, 4, 8]
    assert "tried 1, 2, 4, 8 per batch" in reason
    assert f"rank 1 ran out of memory in the {where.value}" in reason


def test_a_batch_that_cannot_be_divided_stops_and_says_why():
    division, remedy, reason = failed(Division(), [out_of_memory(obstacle="it holds no tensor")])
    assert (division, remedy) == (Division(), Remedy.STOP)
    assert "it holds no tensor" in reason


def test_what_a_rank_tells_is_understood():
    told = {"where": "backward", "samples": 8, "obstacle": "", "parts": 2, "error": "out of memory"}
    assert Failure.from_dict(3, told) == Failure(rank=3, where=Where.BACKWARD, samples=8)
    assert str(Failure.from_dict(3, told)) == "rank 3 ran out of memory in the backward of 8 samples"
    assert str(out_of_memory(None, where=Where.OPTIMIZER)) == "rank 1 ran out of memory in the optimizer"
    assert Division().is_settled
    assert not any(division.is_settled for division in (Division(parts=2), Division(is_trial=True)))


def test_where_samples_cannot_be_counted_the_division_has_a_bound_of_its_own():
    division, remedy, _ = failed(Division(parts=MAX_PARTS // 2), [out_of_memory(None)])
    assert (remedy, division.parts) == (Remedy.RETRY, MAX_PARTS)
    assert failed(division, [out_of_memory(None)])[1] is Remedy.STOP


def test_an_optimizer_is_given_one_more_try_from_a_snapshot():
    failure = [out_of_memory(where=Where.OPTIMIZER)]
    division, remedy, _ = failed(Division(), failure)
    assert (remedy, division.parts) == (Remedy.ROLLBACK, 1)
    again, remedy, reason = failed(after_healthy(division, POLICY.widen_after - 1), failure)
    assert remedy is Remedy.STOP
    assert "again" in reason
    assert again.optimizer_failures == 1
    forgiven = after_healthy(division, POLICY.widen_after)
    assert forgiven.is_settled
    assert failed(forgiven, failure)[1] is Remedy.ROLLBACK


def test_a_division_is_narrowed_again_step_by_step_when_it_holds():
    division = after_healthy(Division(parts=4), POLICY.widen_after - 1)
    assert division.parts == 4
    division = healthy(POLICY, division)
    assert (division.parts, division.is_trial) == (2, True)
    division = after_healthy(division, POLICY.widen_after)
    assert (division.parts, division.is_trial) == (1, True)
    division = after_healthy(division, POLICY.widen_after)
    assert division.is_settled
    assert division.failed_trials == 0


def test_a_trial_that_fails_makes_the_next_wait_twice_as_long_and_the_last_one_is_the_last():
    division = after_healthy(Division(parts=2), 10)
    division, remedy, _ = failed(division, [out_of_memory()])
    assert (remedy, division.parts, division.failed_trials) == (Remedy.RETRY, 2, 1)
    assert after_healthy(division, 19).parts == 2
    division = after_healthy(division, 20)
    assert (division.parts, division.is_trial) == (1, True)
    division, _, _ = failed(division, [out_of_memory()])
    assert (division.parts, division.failed_trials) == (2, POLICY.max_trials)
    assert after_healthy(division, 1000).parts == 2


def test_what_a_restart_asked_for_is_a_lower_bound():
    assert restarted(Division(), 4).parts == 4
    assert restarted(Division(parts=8), 4) == Division(parts=8)
    trial = Division(parts=2, is_trial=True, healthy=3)
    assert restarted(trial, 4) == Division(parts=4, failed_trials=1)


@given(st.lists(st.sampled_from(["healthy", "forward", "backward", "optimizer"]), max_size=300), st.integers(1, 40))
def test_any_story_ends_or_gets_on(events, samples):
    """Between two healthy steps only so many retries fit, and the state survives a checkpoint."""
    division, in_a_row = Division(), 0
    for event in events:
        division = Division.from_dict(json.loads(json.dumps(division.as_dict())))
        if event == "healthy":
            in_a_row = 0
            if not division.is_settled:
                division = healthy(POLICY, division)
            continue
        largest = max(share(samples, division.parts))
        before = division
        division, remedy, reason = failed(division, [out_of_memory(largest, where=Where(event))])
        assert reason
        if remedy is Remedy.STOP:
            assert largest <= 1 or before.optimizer_failures
            return
        in_a_row += 1
        assert in_a_row <= samples.bit_length() + 1
        assert division.parts == before.parts * (2 if remedy is Remedy.RETRY else 1)
        assert division.failed_trials <= POLICY.max_trials


@given(st.integers(0, 200), st.integers(1, 64))
def test_shares_are_even_and_complete(samples, parts):
    sizes = share(samples, parts)
    assert sum(sizes) == samples
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("change", [{"widen_after": 0}, {"max_trials": -1}])
def test_nonsense_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(POLICY, **change)
    with pytest.raises(ValueError, match="power of two"):
        Division(parts=3)
