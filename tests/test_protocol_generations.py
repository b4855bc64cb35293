"""The life of a job, event by event."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_dist.errors import ExitCode
from arc_dist.protocol import events, generations
from arc_dist.protocol.budgets import Cause, CauseKind, Death, Failure
from arc_dist.protocol.events import (
    Committing,
    Died,
    Finished,
    GenerationEnds,
    GenerationOver,
    GenerationRuns,
    JobOver,
    Joined,
    Listed,
    Poisoned,
    Preempted,
    Progressed,
    Ready,
    Settled,
    Tick,
    WentBack,
)
from arc_dist.protocol.generations import Order, apply, deadline_s, directive, is_behind
from arc_dist.protocol.job import Job, JobConfig, Member, Phase, durable, revive
from arc_dist.protocol.pick import Committed, Poison, Tier
from arc_dist.protocol.sources import Holding, Inventory

CONFIG = JobConfig(world_size=2)
KILLED = Cause(kind=CauseKind.SIGNAL, signal=9)


def ready(rank: int, generation: int, *holdings: Holding) -> Ready:
    return Ready(rank=rank, generation=generation, inventory=Inventory(host="h", shm_dir=f"/{rank}", holdings=holdings))


def died(rank: int, generation: int, step: int = 5, cause: Cause = KILLED) -> Died:
    return Died(generation=generation, death=Death(rank=rank, cause=cause, step=step))


def join(rank: int, pid: int | None = None) -> Joined:
    return Joined(rank=rank, member=Member(host="h", pid=rank if pid is None else pid, shm_dir=f"/{rank}"))


def finished(rank: int, generation: int) -> Finished:
    return Finished(rank=rank, generation=generation)


def play(*heard: Any, job: Job | None = None, now_s: float = 0.0) -> tuple[Job, list[Any]]:
    state, actions = job or Job(), []
    for event in heard:
        outcome = apply(CONFIG, state, event, now_s)
        state = outcome.job
        actions += outcome.actions
        assert outcome.reason
    return state, actions


RUNNING, _ = play(join(0), join(1), ready(0, 0), ready(1, 0))
ENDING, _ = play(died(1, 0), job=RUNNING)


def test_a_generation_runs_when_all_are_ready():
    job, actions = play(ready(0, 0))
    assert (job.phase, actions) == (Phase.STARTING, [])
    job, (runs,) = play(ready(1, 0), job=job)
    assert (job.phase, job.generation) == (Phase.RUNNING, 0)
    assert isinstance(runs, GenerationRuns)
    assert runs.plan == job.plan
    assert runs.plan.tier is Tier.NONE


def test_a_death_ends_the_generation_and_the_next_starts_when_nothing_of_it_is_left():
    job, (ends,) = play(died(1, 0), job=RUNNING)
    assert isinstance(ends, GenerationEnds)
    assert directive(job, 0, 0).order is Order.END
    job, _ = play(ready(1, 1, Holding(step=4, slot=0, certified=True, replica_key=1)), job=job)
    assert job.phase is Phase.ENDING
    assert directive(job, 1, 1).order is Order.WAIT
    snapshot = Holding(step=5, slot=0, parting=True, replica_key=1)
    job, (over, runs) = play(ready(0, 1, snapshot), job=job)
    assert isinstance(over, GenerationOver)
    assert isinstance(runs, GenerationRuns)
    assert (job.phase, job.generation) == (Phase.RUNNING, 1)
    assert runs.plan.step == 5
    assert directive(job, 0, 1).order is Order.RUN


def test_several_deaths_are_one_end_and_the_root_is_named():
    echo = Cause(kind=CauseKind.EXCEPTION, exception_type="RuntimeError", message="Connection closed by peer")
    job, actions = play(died(0, 0, cause=echo), died(1, 0), job=RUNNING)
    assert [type(action) for action in actions] == [GenerationEnds, events.StateMatters]
    assert "rank 1 killed by signal 9" in directive(job, 0, 0).reason
    _, (over, _) = play(ready(0, 1), ready(1, 1), job=job)
    assert over.judgement.root.rank == 1


@pytest.mark.parametrize(
    ("cause", "leaving"),
    [
        (Cause(kind=CauseKind.SIGNAL, signal=9), 0),
        (Cause(kind=CauseKind.SIGNAL, signal=2), 2),
        (Cause(kind=CauseKind.SIGNAL, signal=15), 15),
        (Cause(kind=CauseKind.EXIT, exit_code=75), 15),
        (Cause(kind=CauseKind.EXIT, exit_code=1), 0),
    ],
)
def test_ranks_that_were_not_told_to_go_are_told_by_the_end_of_one_that_was(cause, leaving):
    job, _ = play(died(1, 0, cause=cause), job=RUNNING)
    assert directive(job, 0, 0).leaving == leaving
    job, _ = play(events.Preempted(rank=1), died(1, 0, cause=cause), job=RUNNING)
    assert directive(job, 0, 0).leaving == (leaving or 15)


def test_a_death_of_an_older_generation_changes_nothing():
    second, _ = play(ready(0, 1), ready(1, 1), job=ENDING)
    for late in (died(0, 0), finished(0, 0), ready(0, 1), ready(0, 0)):
        outcome = apply(CONFIG, second, late, 9.0)
        assert outcome.job is second
        assert not outcome.actions


def test_all_finished_is_done_and_nothing_changes_that():
    job, actions = play(finished(0, 0), finished(1, 0), job=RUNNING)
    assert job.phase is Phase.DONE
    assert actions[-1] == JobOver(generation=0, stop=None)
    assert directive(job, 0, 0).order is Order.DONE
    for late in (died(0, 0), ready(0, 1), Tick(), join(0, 99)):
        assert apply(CONFIG, job, late, 1e6).job is job


def test_a_rank_that_finished_is_started_again_when_another_died():
    job, _ = play(finished(0, 0), died(1, 0), job=RUNNING)
    assert directive(job, 0, 0).order is Order.END
    job, _ = play(ready(0, 1), ready(1, 1), job=job)
    assert (job.phase, job.finished) == (Phase.RUNNING, frozenset())
    job, _ = play(finished(1, 1), job=job)
    assert job.phase is Phase.RUNNING


def test_a_death_after_the_end_of_a_rank_is_no_death():
    job, actions = play(finished(0, 0), died(0, 0), job=RUNNING)
    assert job.phase is Phase.RUNNING
    assert not any(isinstance(action, GenerationEnds) for action in actions)


def test_a_death_while_starting_takes_back_the_readiness():
    job, _ = play(ready(0, 0), died(0, 0))
    assert (job.phase, dict(job.ready)) == (Phase.STARTING, {})
    job, _ = play(ready(1, 0), job=job)
    assert job.phase is Phase.STARTING
    assert directive(job, 0, 0).generation == -1  # nothing is to be ended; say ready again
    job, _ = play(ready(0, 0), job=job)
    assert job.phase is Phase.RUNNING


def test_ready_without_a_death_is_a_death_and_a_late_report_explains_it():
    job, _ = play(ready(1, 1), job=RUNNING)
    assert job.phase is Phase.ENDING
    assert job.deaths[0].cause.kind is CauseKind.LOST
    job, _ = play(died(1, 0), job=job)
    assert [death.cause for death in job.deaths] == [KILLED]
    assert 1 in job.ready


def test_a_replaced_supervisor_ends_what_ran_and_its_memory_is_forgotten():
    job, (ends, _) = play(join(1, pid=77), ready(1, 1), job=RUNNING)[0], (None, None)
    assert job.phase is Phase.ENDING
    assert job.deaths[0].cause.kind is CauseKind.REPLACED
    job, _ = play(join(1, pid=78), job=job)
    assert 1 not in job.ready
    assert apply(CONFIG, job, join(1, pid=78), 0.0).job is job
    assert ends is None


def test_a_bug_before_the_first_step_stops_the_job_for_all():
    bug = Cause(kind=CauseKind.EXCEPTION, exit_code=1, exception_type="NameError", message="x")
    job, actions = play(died(1, 0, step=0, cause=bug), ready(0, 1), ready(1, 1), job=RUNNING)
    assert job.phase is Phase.STOPPED
    assert isinstance(actions[-1], JobOver)
    assert job.stop is not None
    assert (job.stop.exit_code, job.stop.blame_rank) == (1, 1)
    for rank in (0, 1):
        told = directive(job, rank, 1)
        assert told.order is Order.STOP
        assert "NameError" in told.reason


@pytest.mark.parametrize(("state", "limit_s"), [(Job(), 600.0), (ENDING, 60.0)])
def test_silence_has_a_bound(state: Job, limit_s: float):
    assert deadline_s(CONFIG, state) == limit_s
    state, _ = play(ready(0, state.awaited), job=state)
    assert apply(CONFIG, state, Tick(), limit_s - 1).job is state
    job = apply(CONFIG, state, Tick(), limit_s).job
    assert job.stop is not None
    assert (job.stop.exit_code, job.stop.blame_rank) == (ExitCode.INFRASTRUCTURE, 1)
    assert deadline_s(CONFIG, RUNNING) is None
    assert apply(CONFIG, RUNNING, Tick(), 1e9).job is RUNNING


def test_a_start_waits_for_a_checkpoint_that_is_being_committed_but_not_for_ever():
    held = Holding(step=8, slot=0, certified=True)
    waiting, actions = play(Committing(step=10), died(1, 0), ready(0, 1, held), ready(1, 1, held), job=RUNNING)
    assert waiting.phase is Phase.STARTING
    assert not any(isinstance(action, GenerationRuns) for action in actions)
    committed = Committed(step=10, url="u", generation=0)
    job, _ = play(Settled(step=10, committed=committed), job=waiting)
    assert job.plan is not None
    assert (job.phase, job.plan.step, job.plan.tier) == (Phase.RUNNING, 10, Tier.CHECKPOINT)
    refused, _ = play(Settled(step=10, committed=None), job=waiting)
    assert refused.plan is not None
    assert refused.plan.step == 8
    assert deadline_s(CONFIG, waiting) == CONFIG.commit_wait_s
    late, _ = play(Tick(), job=waiting, now_s=CONFIG.commit_wait_s)
    assert late.plan is not None
    assert late.plan.step == 8
    # What came too late is abandoned.
    job, _ = play(Settled(step=10, committed=committed), died(0, 1), ready(0, 2), ready(1, 2), job=late)
    assert job.plan is not None
    assert job.plan.tier is Tier.NONE
    assert "abandoned" in job.plan.refused[0].reason


def test_it_does_not_wait_for_an_older_checkpoint():
    held = Holding(step=12, slot=0, certified=True)
    job, _ = play(Committing(step=10), died(1, 0), ready(0, 1, held), ready(1, 1, held), job=RUNNING)
    assert job.phase is Phase.RUNNING


def test_where_the_ranks_really_went_back_to_counts():
    held = Holding(step=12, slot=0, certified=True)
    job, _ = play(died(1, 0), ready(0, 1, held), ready(1, 1, held), job=RUNNING)
    job, _ = play(WentBack(rank=0, generation=1, step=6), job=job)
    again = apply(CONFIG, job, WentBack(rank=1, generation=1, step=6), 0.0)
    assert again.job is job
    between = Holding(step=8, slot=1, certified=True)
    job, _ = play(died(1, 1), ready(0, 2, between), ready(1, 2, between), job=job)
    assert job.plan is not None
    assert job.plan.tier is Tier.NONE


def test_a_job_that_its_launcher_starts_again_is_not_judged_by_how_the_launcher_ended_it():
    """torchrun lost rank 1's supervisor, ended rank 0 with SIGTERM, and starts both again."""
    told = Cause(kind=CauseKind.SIGNAL, signal=15)
    echo = Cause(kind=CauseKind.EXCEPTION, exit_code=1, exception_type="PeerLost")
    for how in (told, echo):
        job, _ = play(Preempted(rank=0), died(0, 0, cause=how), job=RUNNING)
        revived = revive(CONFIG, json.loads(json.dumps(durable(job))), now_s=1.0)
        job, actions = play(join(0, pid=100), join(1, pid=101), ready(0, 1), ready(1, 1), job=revived)
        (over,) = [action for action in actions if isinstance(action, GenerationOver)]
        assert over.judgement.root.cause.kind is CauseKind.REPLACED
        assert (job.phase, job.generation) == (Phase.RUNNING, 1)
        assert job.ledger.restarts == job.ledger.fruitless == 0


def test_a_new_supervisor_hides_no_bug_that_was_reported_before():
    bug = Cause(kind=CauseKind.EXCEPTION, exit_code=1, exception_type="ValueError", message="no")
    job, _ = play(died(0, 0, cause=bug), join(0, pid=100), join(1, pid=101), job=RUNNING)
    job, _ = play(ready(0, 1), ready(1, 1), job=job)
    assert job.ledger.seen == (Failure(signature=bug.signature, step=5),)


def test_a_notice_of_preemption_ends_with_the_supervisors_that_it_meant():
    for before in (RUNNING, ENDING):
        job, _ = play(Preempted(rank=0), job=before)
        assert job.preempted
        job, _ = play(join(0, pid=100), job=job)
        assert not job.preempted


def test_a_preemption_notice_ends_the_job_as_preempted():
    job, _ = play(Preempted(rank=0), died(0, 0), ready(0, 1), ready(1, 1), job=RUNNING)
    assert job.stop is not None
    assert job.stop.exit_code == ExitCode.PREEMPTED


def test_a_listing_replaces_what_was_known_of_that_store():
    one, two, other = (Committed(step=s, url=u, generation=0) for s, u in ((1, "u"), (2, "u"), (3, "v")))
    job, _ = play(Listed(url="u", committed=frozenset({one})), Listed(url="v", committed=frozenset({other})))
    job, _ = play(Listed(url="u", committed=frozenset({two})), job=job)
    assert job.known.committed == {two, other}


def test_a_rank_from_the_future_unmasks_an_old_coordinator():
    assert not is_behind(RUNNING, 1)
    assert is_behind(RUNNING, 2)
    assert is_behind(Job(), 1)


@pytest.mark.parametrize("state", [Job(), RUNNING, ENDING])
def test_a_restarted_coordinator_goes_on_where_its_journal_ends(state: Job):
    again = revive(CONFIG, json.loads(json.dumps(durable(state))), 3.0)
    assert (again.phase, again.generation, again.plan) == (state.phase, state.generation, state.plan)
    assert (again.deaths, again.finished, again.members) == (state.deaths, state.finished, state.members)
    if state is ENDING:  # who is ready is asked again
        assert directive(again, 1, 1).order is Order.END


@pytest.mark.parametrize("end", [(finished(0, 0), finished(1, 0)), (died(0, 0, 0, Cause(kind=CauseKind.EXIT)),)])
def test_a_job_that_was_over_begins_anew_and_keeps_its_poison(end: tuple[Any, ...]):
    poison = Poison(from_step=1, to_step=3, generation=0)
    state, _ = play(Poisoned(poison=poison), *end, ready(0, 1), ready(1, 1), job=RUNNING)
    assert state.phase.is_over
    again = revive(CONFIG, durable(state), 0.0)
    assert (again.phase, again.ledger.restarts, again.ledger.seen) == (Phase.STARTING, 0, ())
    assert again.generation == again.first == state.generation + 1
    assert again.known.poison == (poison,)


def test_of_the_checkpoints_a_restarted_coordinator_remembers_the_newest_until_a_store_tells():
    entry = Committed(step=20, url="u", generation=0)
    state, _ = play(Listed(url="u", committed=frozenset({entry, Committed(step=10, url="u")})), died(0, 0), job=RUNNING)
    for _ in range(2):  # the second one is restarted before any store has told
        state = revive(CONFIG, json.loads(json.dumps(durable(state))), 1.0)
        assert (state.known.committed, state.known.remembered) == (frozenset(), entry)
    older = Holding(step=18, slot=0, certified=True)
    job, _ = play(ready(0, 1, older), ready(1, 1, older), job=state)
    assert job.plan is not None
    assert (job.plan.tier, job.plan.step) == (Tier.NONE, None)
    told, _ = play(Listed(url="u", committed=frozenset()), job=state)
    assert told.known.remembered is None


def test_memory_of_an_earlier_life_is_gone_on_from_and_what_it_gave_up_stays_so():
    """The first generation of a life that found snapshots in memory: what is newer than its step is abandoned."""
    state, _ = play(*(died(rank, 0, cause=Cause(kind=CauseKind.EXIT)) for rank in (0, 1)), job=RUNNING)
    state = dataclasses.replace(state, phase=Phase.STOPPED)
    begun = revive(CONFIG, durable(state), 1.0)
    both, alone = Holding(step=8, slot=0, certified=True), Holding(step=12, slot=1, certified=True)
    job, _ = play(join(0), join(1), ready(0, 1, both, alone), ready(1, 1, both), job=begun)
    assert job.plan is not None
    assert (job.plan.tier, job.plan.step) == (Tier.MEMORY, 8)
    assert job.known.refusal(12, 0, in_memory=True) is not None
    assert job.known.refusal(8, 0, in_memory=True) is None


@pytest.mark.parametrize("state", [Job(), RUNNING, ENDING, dataclasses.replace(RUNNING, finished=frozenset({1}))])
def test_a_journal_of_another_world_begins_anew(state: Job):
    again = revive(JobConfig(world_size=1), {**durable(state), "world_size": CONFIG.world_size}, 3.0)
    assert (again.phase, again.members, again.finished, again.plan) == (Phase.STARTING, {}, frozenset(), None)
    assert again.generation == again.first == state.generation + 1


def test_the_table_says_something_about_every_event_while_the_job_lives():
    for kind, phase in itertools.product(generations._TABLE, (Phase.STARTING, Phase.RUNNING, Phase.ENDING)):
        assert phase in generations._TABLE[kind], (kind, phase)


@pytest.mark.parametrize("world_size", [0, -1])
def test_a_world_has_ranks(world_size: int):
    with pytest.raises(ValueError, match="world_size"):
        JobConfig(world_size=world_size)


# ---- laws

numbers = st.integers(0, 3)
some_ranks = st.integers(0, 1)
causes = st.sampled_from([KILLED, Cause(kind=CauseKind.EXIT, exit_code=3), Cause(kind=CauseKind.LOST)])
any_event = st.one_of(
    st.builds(join, some_ranks, st.integers(0, 2)),
    st.builds(lambda r, g, s: ready(r, g, Holding(step=s, slot=0, certified=True)), some_ranks, numbers, numbers),
    st.builds(ready, some_ranks, numbers),
    st.builds(died, some_ranks, numbers, numbers, causes),
    st.builds(finished, some_ranks, numbers),
    st.builds(Progressed, rank=some_ranks, generation=numbers, step=numbers),
    st.builds(WentBack, rank=some_ranks, generation=numbers, step=numbers),
    st.builds(Preempted, rank=some_ranks),
    st.builds(lambda s, g: Poisoned(poison=Poison(from_step=s, to_step=s, generation=g)), numbers, numbers),
    st.builds(Committing, step=numbers),
    st.builds(lambda s: Settled(step=s, committed=Committed(step=s, url="u", generation=0)), numbers),
    st.just(Tick()),
)


@settings(max_examples=300)
@given(st.lists(any_event, max_size=25))
def test_law_a_message_that_comes_twice_counts_once(heard: list[Any]):
    state = Job()
    for event in heard:
        once = apply(CONFIG, state, event, 1.0)
        twice = apply(CONFIG, once.job, event, 1.0)
        assert twice.job == once.job
        state = once.job


@settings(max_examples=300)
@given(st.lists(any_event, max_size=25))
def test_law_generations_only_grow_and_the_end_is_the_end(heard: list[Any]):
    state = Job()
    for event in heard:
        after = apply(CONFIG, state, event, 1.0).job
        assert after.generation >= state.generation
        if state.phase.is_over:
            assert after.phase is state.phase
        if after.phase is Phase.RUNNING:
            assert after.plan is not None
            assert after.plan.generation == after.generation
        if state.phase is Phase.RUNNING and after.generation == state.generation:
            assert after.plan == state.plan
        state = after


@settings(max_examples=200)
@given(st.lists(any_event, max_size=25))
def test_law_the_journal_holds_what_ranks_were_told(heard: list[Any]):
    state = Job()
    for event in heard:
        state = apply(CONFIG, state, event, 1.0).job
    if not state.phase.is_over:
        again = revive(CONFIG, json.loads(json.dumps(durable(state))), 1.0)
        for rank, generation in itertools.product((0, 1), range(5)):
            before, after = (directive(job, rank, generation) for job in (state, again))
            # What it knows of readiness is gone, so it may ask for it again; it orders nothing else.
            assert after.order in (before.order, Order.END)


def says_nothing_new(event: Any, job: Job) -> str:
    outcome = apply(CONFIG, job, event, 0.0)
    assert outcome.job == job
    assert outcome.actions == ()
    return outcome.reason


@pytest.mark.parametrize(
    "event", [died(0, 1), finished(0, 1), ready(0, 3), WentBack(rank=0, generation=1, step=4)], ids=str
)
def test_what_belongs_to_another_generation_changes_nothing(event: Any):
    assert "generation" in says_nothing_new(event, RUNNING)
    if not isinstance(event, WentBack):
        assert "generation" in says_nothing_new(event, ENDING) or isinstance(event, Finished)


def test_what_is_known_changes_nothing():
    once, _ = play(finished(0, 0), Preempted(rank=1), Progressed(rank=0, generation=0, step=7), job=RUNNING)
    assert says_nothing_new(finished(0, 0), once) == "known already"
    assert says_nothing_new(Preempted(rank=0), once) == "known already"
    assert says_nothing_new(Progressed(rank=0, generation=0, step=7), once) == "nothing new"
    assert says_nothing_new(Progressed(rank=0, generation=1, step=9), once) == "nothing new"
    assert once.reached == 7
    assert apply(CONFIG, once, join(0), 0.0).actions == ()  # the same supervisor, which did not hear the answer
    listed = Listed(url="u", committed=frozenset({Committed(step=1, url="u", generation=0)}))
    assert says_nothing_new(listed, play(listed, job=once)[0]) == "known already"
    assert says_nothing_new(died(1, 0), ENDING) == "known already"


def test_a_loss_that_is_noticed_twice_is_known():
    noticed, _ = play(ready(1, 1), job=RUNNING)
    (lost,) = noticed.deaths
    assert lost.cause.kind is CauseKind.LOST
    assert says_nothing_new(Died(generation=0, death=lost), noticed) == "known already"


def test_told_to_go_with_nothing_in_memory_ends_as_preempted():
    job, actions = play(Preempted(rank=0), died(0, 0), ready(0, 1), ready(1, 1), job=RUNNING)
    assert job.phase is Phase.STOPPED
    assert job.stop is not None and job.stop.exit_code == ExitCode.PREEMPTED
    assert "nothing is left to save" in job.stop.reason
    assert isinstance(actions[-1], JobOver)


def told_to_go_with_memory() -> Job:
    held = Holding(step=4, slot=0, certified=True)
    job, _ = play(Preempted(rank=0), died(0, 0), ready(0, 1, held), ready(1, 1, held), job=RUNNING)
    assert job.phase is Phase.RUNNING
    assert job.flushing
    return job


def test_told_to_go_with_a_snapshot_in_memory_has_it_saved_and_ends_as_preempted():
    job, _ = play(finished(0, 1), finished(1, 1), job=told_to_go_with_memory())
    assert job.stop is not None and job.stop.exit_code == ExitCode.PREEMPTED
    assert "step 4 was saved from memory" in job.stop.reason


def test_a_snapshot_that_could_not_be_saved_from_memory_is_said():
    job, _ = play(died(1, 1), ready(0, 2), ready(1, 2), job=told_to_go_with_memory())
    assert job.stop is not None and job.stop.exit_code == ExitCode.INFRASTRUCTURE
    assert job.stop.blame_rank == 1
    assert "step 4 could not be saved from memory" in job.stop.reason


def test_who_comes_late_to_the_end_is_told_of_it():
    stopped, _ = play(Preempted(rank=0), died(0, 0), ready(0, 1), ready(1, 1), job=RUNNING)
    assert directive(stopped, 0, 1).order is Order.STOP
    done, _ = play(finished(0, 0), finished(1, 0), job=RUNNING)
    assert directive(done, 0, 0).order is Order.DONE
    later, _ = play(ready(0, 1), ready(1, 1), job=ENDING)
    assert directive(later, 0, 0).order is Order.END
    assert "say ready again" in directive(later, 0, 2).reason
