"""Who is blamed, and when a job is not tried again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arc_dist.errors import ExitCode
from arc_dist.protocol.batches import MAX_SAMPLES, BatchPlace
from arc_dist.protocol.budgets import (
    BudgetPolicy,
    Cause,
    CauseKind,
    Death,
    Ended,
    Failure,
    Ledger,
    judge,
    root_of,
)

KILLED = Cause(kind=CauseKind.SIGNAL, signal=9)
BUG = Cause(kind=CauseKind.EXCEPTION, exit_code=1, exception_type="ValueError", message="shapes differ")
ECHO = Cause(kind=CauseKind.EXCEPTION, exit_code=1, exception_type="RuntimeError", message="Connection closed by peer")
POLICY = BudgetPolicy(max_restarts=5, max_fruitless=3)


def ended(*deaths: Death, reached: int = 10, first: bool = False, preempted: bool = False) -> Ended:
    return Ended(first=first, deaths=deaths, reached=reached, preempted=preempted)


def death(cause: Cause, rank: int = 0, step: int | None = 10) -> Death:
    return Death(rank=rank, cause=cause, step=step)


def test_an_echo_is_never_the_root_whatever_came_first():
    assert root_of([death(ECHO, 0), death(KILLED, 1)]).rank == 1
    assert root_of([death(KILLED, 1), death(ECHO, 0)]).rank == 1
    assert root_of([death(ECHO, 2), death(ECHO, 0)]).rank == 2
    assert root_of([death(BUG, 2), death(KILLED, 0)]).rank == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("torch.distributed.DistBackendError", "NCCL error: remote process exited"),
        ("PeerLost", "rank 1 did not answer"),
        ("RuntimeError", "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
        ("BrokenPipeError", "[Errno 32]"),
    ],
)
def test_what_torch_says_of_a_lost_peer_is_an_echo(kind: str, message: str):
    assert Cause(kind=CauseKind.EXCEPTION, exception_type=kind, message=message).is_echo
    assert not Cause(kind=CauseKind.EXIT, exit_code=1, message=message).is_echo
    assert not BUG.is_echo


def test_failures_beside_the_root_are_told_and_echoes_are_not():
    oom = Cause(kind=CauseKind.OOM, signal=9)
    together = [death(ECHO, 0), death(BUG, 1, 7), death(oom, 2, 7), death(Cause(kind=CauseKind.LOST), 3)]
    _, judgement = judge(POLICY, Ledger(), ended(*together))
    assert judgement.root == together[1]
    assert judgement.reason.startswith("rank 1 ValueError: shapes differ at step 7")
    assert "rank 2 killed by the kernel for lack of memory at step 7" in judgement.reason
    assert "rank 0" not in judgement.reason
    assert "rank 3" not in judgement.reason
    assert judge(POLICY, Ledger(), ended(death(oom, 2, 7), death(ECHO, 0)))[1].reason == str(death(oom, 2, 7))


@pytest.mark.parametrize("code", [ExitCode.PREEMPTED, ExitCode.NO_PROGRESS, ExitCode.CONFIGURATION])
def test_what_a_process_asks_for_is_done(code: ExitCode):
    asked = replace(BUG, kind=CauseKind.EXIT, exit_code=int(code))
    _, judgement = judge(POLICY, Ledger(), ended(death(ECHO, 1), death(asked)))
    assert judgement.stop_code == code
    assert judgement.root.rank == 0


def test_a_bug_before_the_first_step_of_the_job_is_not_tried_again():
    _, judgement = judge(POLICY, Ledger(), ended(death(BUG, step=0), reached=0, first=True))
    assert judgement.stop_code == 1
    exited = Cause(kind=CauseKind.EXIT, exit_code=3)
    _, judgement = judge(POLICY, Ledger(), ended(death(exited, step=None), reached=0, first=True))
    assert judgement.stop_code == 3
    # Not before the first step of a later generation, and not when a peer was killed.
    assert judge(POLICY, Ledger(), ended(death(BUG, step=0), reached=0))[1].stop_code is None
    assert judge(POLICY, Ledger(), ended(death(ECHO), death(KILLED, 1), reached=0, first=True))[1].stop_code is None


def test_the_same_bug_at_the_same_step_is_not_tried_a_third_time():
    ledger, first = judge(POLICY, Ledger(), ended(death(BUG, step=7), reached=7))
    assert first.stop_code is None
    _, again = judge(POLICY, ledger, ended(death(BUG, rank=1, step=7), reached=7))
    assert again.stop_code == 1
    _, elsewhere = judge(POLICY, ledger, ended(death(BUG, step=8), reached=8))
    assert elsewhere.stop_code is None
    _, other = judge(POLICY, ledger, ended(death(replace(BUG, message="other"), step=7), reached=9))
    assert other.stop_code is None


def test_addresses_of_objects_do_not_make_another_bug():
    one = replace(BUG, message="<Foo object at 0x7f31aa>")
    assert one.signature == replace(BUG, message="<Foo object at 0x7e0000>").signature
    assert one.signature != BUG.signature


def test_numbers_do_not_make_another_bug_but_another_line_does():
    one = replace(BUG, message="cannot allocate 12.5 GiB, pid 4711", frame="train.py:8 in loss")
    assert one.signature == replace(one, message="cannot allocate 9.75 GiB, pid 12").signature
    assert one.signature != replace(one, frame="train.py:9 in loss").signature
    assert one.signature != replace(one, exception_type="KeyError").signature


def at(ordinal: int) -> Cause:
    return replace(BUG, batch=BatchPlace(ordinal=ordinal, epoch=0, index=ordinal, samples=(4, 9), num_samples=2))


def test_the_same_bug_at_the_same_batch_is_told_with_its_samples():
    ledger, first = judge(POLICY, Ledger(), ended(death(at(7), step=7), reached=7))
    assert first.stop_code is None
    _, again = judge(POLICY, ledger, ended(death(at(7), step=7), reached=7))
    assert again.stop_code == 1
    assert "It fails each time at batch 7 of epoch 0 (samples 4, 9): mend or leave out" in again.reason


def test_the_batch_decides_and_not_the_step_where_both_are_known():
    """Healing leaves batches out, so that the same step has other data, and the same data belongs to another step."""
    ledger, _ = judge(POLICY, Ledger(), ended(death(at(7), step=7), reached=7))
    assert judge(POLICY, ledger, ended(death(at(7), step=6), reached=6))[1].stop_code == 1
    assert judge(POLICY, ledger, ended(death(at(8), step=7), reached=7))[1].stop_code is None
    assert judge(POLICY, ledger, ended(death(BUG, step=7), reached=7))[1].stop_code == 1


def test_a_bug_that_was_passed_in_between_did_not_repeat_itself():
    ledger, _ = judge(POLICY, Ledger(), ended(death(at(7), step=7), reached=7))
    ledger, _ = judge(POLICY, ledger, ended(death(KILLED, step=20), reached=20))
    assert judge(POLICY, ledger, ended(death(at(7), step=7), reached=7))[1].stop_code is None


FAILURES = st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.none() | st.integers(0, 3), st.integers(0, 4))


@given(st.lists(FAILURES, max_size=8))
@example([("a", 1, 1, 0), ("a", 3, None, 3), ("a", 1, 1, 0)])
def test_a_job_stops_at_the_second_failure_at_one_place_and_never_before(
    history: list[tuple[str, int, int | None, int]],
):
    """Against a model that looks at the whole history each time."""
    patient = BudgetPolicy(max_restarts=100, max_fruitless=100)
    ledger = Ledger()
    past: list[tuple[Failure, int]] = []  # each with what the furthest generation after it reached
    for kind, step, ordinal, further in history:
        cause = replace(BUG, exception_type=kind, batch=None if ordinal is None else at(ordinal).batch)
        reached = step + further
        past = [(failure, max(later, reached)) for failure, later in past]
        mine = Failure.of(death(cause, step=step))
        expected = any(
            later <= (failure.step or 0)
            and failure.signature == mine.signature
            and (failure.step == step if None in (ordinal, failure.ordinal) else failure.ordinal == ordinal)
            for failure, later in past
        )
        ledger, judgement = judge(patient, ledger, ended(death(cause, step=step), reached=reached))
        assert (judgement.stop_code is not None) == expected
        assert Ledger.from_dict(ledger.as_dict()) == ledger
        if expected:
            return
        past.append((mine, 0))


@given(
    st.builds(
        BatchPlace,
        ordinal=st.integers(0),
        epoch=st.integers(0),
        index=st.integers(0),
        count=st.integers(1, 9),
        samples=st.lists(st.integers(0), max_size=MAX_SAMPLES).map(tuple),
        num_samples=st.integers(0),
    )
)
def test_a_place_in_the_data_survives_the_wire(place: BatchPlace):
    cause = replace(BUG, batch=place, frame="train.py:8 in loss")
    assert Cause.from_dict(cause.as_dict()) == cause
    assert f"of epoch {place.epoch}" in str(place)


@pytest.mark.parametrize("batch", [{}, {"ordinal": "x"}, {"ordinal": 1, "epoch": None}])
def test_a_place_that_makes_no_sense_is_refused(batch: dict[str, object]):
    with pytest.raises(ValueError, match="not a place in the data"):
        Cause.from_dict({"kind": "exception", "exit_code": 1, "exception": {"type": "ValueError", "batch": batch}})


def test_no_progress_ends_a_job_and_progress_pays_back():
    ledger = Ledger(best_step=10)
    for _ in range(2):
        ledger, judgement = judge(POLICY, ledger, ended(death(KILLED)))
        assert judgement.stop_code is None
    progressed, judgement = judge(POLICY, ledger, ended(death(KILLED, step=11), reached=11))
    assert judgement.stop_code is None
    assert progressed.fruitless == 0
    _, judgement = judge(POLICY, ledger, ended(death(KILLED)))
    assert judgement.stop_code == ExitCode.NO_PROGRESS
    assert "no step beyond 10" in judgement.reason


def test_the_restart_budget_is_a_bound_and_the_code_tells_the_kind():
    spent = Ledger(restarts=5)
    assert judge(POLICY, spent, ended(death(KILLED)))[1].stop_code == ExitCode.INFRASTRUCTURE
    assert judge(POLICY, spent, ended(death(replace(BUG, exit_code=9))))[1].stop_code == 9
    assert judge(POLICY, replace(spent, restarts=4), ended(death(KILLED)))[1].stop_code is None


def test_preemption_and_replacement_are_free():
    spent = Ledger(restarts=5, fruitless=2, best_step=10)
    ledger, judgement = judge(POLICY, spent, ended(death(KILLED), preempted=True))
    assert judgement.stop_code == ExitCode.PREEMPTED
    ledger, judgement = judge(POLICY, spent, ended(death(Cause(kind=CauseKind.REPLACED)), reached=0))
    assert judgement.stop_code is None
    assert (ledger.restarts, ledger.fruitless) == (5, 2)
    # A user's bug stays one although the host is to go.
    assert judge(POLICY, Ledger(), ended(death(BUG), reached=0, first=True, preempted=True))[1].stop_code == 1


def test_wire_forms_come_back():
    for cause in (KILLED, BUG, ECHO, Cause(kind=CauseKind.OOM, signal=9), Cause(kind=CauseKind.EXIT, exit_code=3)):
        assert Cause.from_dict(cause.as_dict()) == cause
        assert str(cause)
    ledger, _ = judge(POLICY, Ledger(), ended(death(BUG)))
    assert Ledger.from_dict(ledger.as_dict()) == ledger


@pytest.mark.parametrize("fields", [{}, {"kind": "aliens"}, {"kind": "exit", "exit_code": "3"}])
def test_a_cause_that_makes_no_sense_is_refused(fields: dict[str, object]):
    with pytest.raises(ValueError, match=r"aliens|None|whole number"):
        Cause.from_dict(fields)


def test_policies_are_validated():
    with pytest.raises(ValueError, match="max_restarts"):
        BudgetPolicy(max_restarts=-1)
    with pytest.raises(ValueError, match="max_fruitless"):
        BudgetPolicy(max_fruitless=0)


HANG = Cause(kind=CauseKind.HANG, signal=9, message="data wait of step 12 for 61.0 s, waiting")


def test_a_hang_is_the_infrastructures_affair_and_the_root():
    assert root_of([death(ECHO, 0), death(HANG, 1)]).rank == 1
    ledger, judgement = judge(POLICY, Ledger(), ended(death(HANG, 1), reached=10, first=True))
    assert judgement.stop_code is None
    assert ledger.restarts == 1
    assert "data wait of step 12" in judgement.reason


def test_the_same_hang_again_and_again_is_no_progress():
    ledger, judgement = judge(POLICY, Ledger(), ended(death(HANG, step=7), reached=7))
    for _ in range(POLICY.max_fruitless):
        assert judgement.stop_code is None
        ledger, judgement = judge(POLICY, ledger, ended(death(HANG, step=7), reached=7))
    assert judgement.stop_code == ExitCode.NO_PROGRESS


def test_where_it_hung_survives_the_journal():
    assert Cause.from_dict(HANG.as_dict()) == HANG
    assert Cause.from_dict(BUG.as_dict()) == BUG


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (Cause(kind=CauseKind.OOM, signal=9), "lack of memory"),
        (Cause(kind=CauseKind.HANG, message="in forward for 9 s"), "hung (in forward for 9 s)"),
        (Cause(kind=CauseKind.EXIT, exit_code=3), "exited with code 3"),
        (Cause(kind=CauseKind.LOST), "lost without a report"),
        (Cause(kind=CauseKind.REPLACED), "replaced by another supervisor"),
        (Cause(kind=CauseKind.OVERDUE), "grace period"),
    ],
    ids=lambda value: value.kind.value if isinstance(value, Cause) else "",
)
def test_each_cause_is_said_in_words(cause: Cause, words: str):
    assert words in str(cause)
    assert cause.signature.startswith(cause.kind.value)


def test_an_exit_that_blames_the_infrastructure_is_not_the_users():
    assert not Cause(kind=CauseKind.EXIT, exit_code=ExitCode.INFRASTRUCTURE).is_users
    assert Cause(kind=CauseKind.EXIT, exit_code=3).is_users
