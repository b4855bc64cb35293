"""The life of a job: which processes may run, when they must end, and when the job is over.

A *generation* is one set of live training processes, one per rank. It is numbered; whatever a process or its supervisor
says carries the number, and what an older generation says changes nothing (fencing). The phases of a job::

                    all ranks ready                       a rank died
    STARTING(g) ----------------------> RUNNING(g) ------------------------> ENDING(g)
        ^                                   | all ranks finished                 | all ranks ready for g+1
        |                                   v                                    v
        |                                 DONE                             judge(deaths) ----> STOPPED
        +--------------------------------- g := g+1 ----------------------------+

    from STARTING and ENDING, when some rank stays silent too long ----------------------------> STOPPED

**ready(g)** from a rank means two things: all its processes of older generations are gone, and it can start generation
g. So `RUNNING(g)` begins when no process of an older generation exists anywhere: there is one live process per rank
(S13). **One decision** (S1): the plan of a generation is chosen once, at the moment when it starts to run, is part of
the state, and every rank is told the same one however often it asks.

**Several deaths.** The first death in RUNNING begins the end of the generation; more deaths of it are evidence. The
judgement waits until all ranks are ready for the next one, since only then is the evidence complete: the echo of a
death may be reported before the death itself. A death while STARTING takes back that rank's readiness, no more:
nothing has run. A rank that finished (exit 0) while another died goes back with the others to the restored step, and
so is started again; its result is not lost, because the end of its script comes again.

**Saying it twice.** A duplicate, a reordered or a late message finds a state in which it changes nothing: `ready` is a
set, a second death of a rank in a generation is ignored, older generations are fenced. `ready(g+1)` in RUNNING(g) is a
death whose report was lost or is late: the process is gone either way.

**Preemption.** A notice in RUNNING is told to all ranks (LEAVE), which save and end by themselves. Whatever else ends a
generation after a notice, and a notice that finds none running, lead to one last generation if memory holds a state
newer than every checkpoint: its processes do not train but write that state (*flush*). It has a plan and a number like
any other, so the same rules keep it whole (all ranks write the same step) and fence what came before. Then the job
stops: as preempted when nothing is lost, else as a fault of the infrastructure.

**A new supervisor** for a rank means that a launcher started it again, after it ended the old one with a signal or lost
it. In RUNNING that begins the end of the generation; in ENDING it takes the place of a death that says no more. Either
way a notice of preemption is over: it meant those that are gone.

**Lost hosts.** Supervisors that are not heard any more (`protocol.pulse`) end the job for all, in any phase: those that
are left go on as a smaller world, which is another job, or end so that the launcher brings them together again.

**Bounds.** STARTING and ENDING have deadlines, since a supervisor may be gone with its host; RUNNING has none, because
a job may take as long as it takes. A generation waits at most `commit_wait_s` for a checkpoint that is being committed
and would be newer than what it would restore otherwise.

`apply(config, state, event, now_s)` answers with the new state, what to do beyond telling the ranks, and why. What a
rank is told is a function of the state, `directive`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

from arc_dist.errors import ExitCode
from arc_dist.protocol import budgets, hosts
from arc_dist.protocol.budgets import Cause, CauseKind, Death, Ended
from arc_dist.protocol.events import (
    Action,
    Committing,
    Died,
    Event,
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
    StateMatters,
    Tick,
    Vanished,
    WentBack,
)
from arc_dist.protocol.job import Job, JobConfig, Phase, Stop
from arc_dist.protocol.pick import Restored, Tier, newest_committed, pick

_SIGTERM = 15
_TOLD_TO_GO = (1, 2, 3, _SIGTERM)  # SIGHUP, SIGINT, SIGQUIT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The answer of `apply`. A `job` that is the very object put in means that the event changed nothing."""

    job: Job
    reason: str
    actions: tuple[Action, ...] = ()


# ---- handlers: one event in one kind of phase. They answer (job', reason, actions). ----------------------------------

_Answer = tuple[Job, str, tuple[Action, ...]]


def _join(config: JobConfig, job: Job, event: Joined, now_s: float) -> _Answer:
    before = job.members.get(event.rank)
    if before == event.member:
        return job, "known already", ()
    job = dataclasses.replace(job, members={**job.members, event.rank: event.member})
    if before is None:
        return job, f"rank {event.rank} joined", ()
    # Its memory went with the old supervisor, and so did its readiness.
    ready = {rank: inventory for rank, inventory in job.ready.items() if rank != event.rank}
    deaths = _with_replaced(job.deaths, event.rank) if job.phase is Phase.ENDING else job.deaths
    # What was said of a preemption meant the supervisors that are gone: somebody has started the job again.
    job = dataclasses.replace(job, ready=ready, deaths=deaths, preempted=False)
    return job, f"rank {event.rank} has a new supervisor", (StateMatters(),)


def _with_replaced(deaths: tuple[Death, ...], rank: int) -> tuple[Death, ...]:
    """A launcher ends all ranks when it lost one. Without this the job would be judged by how they were ended."""
    replaced = Death(rank=rank, cause=Cause(kind=CauseKind.REPLACED))
    known = next((death for death in deaths if death.rank == rank), None)
    if known is None:
        return (*deaths, replaced)
    if known.cause.kind is CauseKind.LOST or known.cause.signal in _TOLD_TO_GO or known.cause.is_echo:
        return tuple(replaced if death is known else death for death in deaths)
    return deaths


def _join_running(config: JobConfig, job: Job, event: Joined, now_s: float) -> _Answer:
    before = job.members.get(event.rank)
    job, reason, _ = _join(config, job, event, now_s)
    if before is None or before == event.member:
        return job, reason, ()
    death = Death(rank=event.rank, cause=Cause(kind=CauseKind.REPLACED))
    return _begin_end(job, death, now_s)


def _ready(config: JobConfig, job: Job, event: Ready, now_s: float) -> _Answer:
    if event.generation != job.awaited:
        return job, _fenced(job, event.generation), ()
    if job.ready.get(event.rank) == event.inventory:
        return job, "known already", ()
    job = dataclasses.replace(job, ready={**job.ready, event.rank: event.inventory})
    if job.phase is Phase.ENDING:
        held = [h.step for h in event.inventory.holdings if h.generation == job.generation]
        job = dataclasses.replace(job, reached=max([job.reached, *held]))
    return job, f"rank {event.rank} is ready for generation {event.generation}", ()


def _ready_running(config: JobConfig, job: Job, event: Ready, now_s: float) -> _Answer:
    if event.generation != job.generation + 1:
        return job, _fenced(job, event.generation), ()
    # The process is gone, and nobody said why (yet). Had it finished, only an ending would make the rank say this.
    death = Death(rank=event.rank, cause=Cause(kind=CauseKind.LOST))
    job, reason, actions = _begin_end(job, death, now_s)
    job, _, _ = _ready(config, job, event, now_s)
    return job, reason, actions


def _died_running(config: JobConfig, job: Job, event: Died, now_s: float) -> _Answer:
    if event.generation != job.generation:
        return job, _fenced(job, event.generation), ()
    if event.rank in job.finished:
        return job, f"rank {event.rank} finished before", ()
    return _begin_end(job, event.death, now_s)


def _died_ending(config: JobConfig, job: Job, event: Died, now_s: float) -> _Answer:
    if event.generation != job.generation:
        return job, _fenced(job, event.generation), ()
    known = next((death for death in job.deaths if death.rank == event.rank), None)
    if known is not None and known.cause.kind is not CauseKind.LOST:
        return job, "known already", ()
    if known == event.death:
        return job, "known already", ()
    # A report that comes late explains what was only noticed before, in its place.
    others = tuple(event.death if death is known else death for death in job.deaths)
    deaths = others if known is not None else (*job.deaths, event.death)
    reached = max(job.reached, event.death.step or 0)
    return dataclasses.replace(job, deaths=deaths, reached=reached), f"{event.death}, too", (StateMatters(),)


def _died_starting(config: JobConfig, job: Job, event: Died, now_s: float) -> _Answer:
    if event.generation != job.generation or event.rank not in job.ready:
        return job, _fenced(job, event.generation), ()
    ready = {rank: inventory for rank, inventory in job.ready.items() if rank != event.rank}
    return dataclasses.replace(job, ready=ready), f"{event.death}, before anything ran", ()


def _finished(config: JobConfig, job: Job, event: Finished, now_s: float) -> _Answer:
    if event.generation != job.generation:
        return job, _fenced(job, event.generation), ()
    if event.rank in job.finished:
        return job, "known already", ()
    job = dataclasses.replace(job, finished=job.finished | {event.rank})
    return job, f"rank {event.rank} finished", (StateMatters(),)


def _progress(config: JobConfig, job: Job, event: Progressed, now_s: float) -> _Answer:
    if event.generation != job.generation or event.step <= job.reached:
        return job, "nothing new", ()
    return dataclasses.replace(job, reached=event.step), f"step {event.step}", ()


def _went_back(config: JobConfig, job: Job, event: WentBack, now_s: float) -> _Answer:
    if event.generation != job.generation:
        return job, _fenced(job, event.generation), ()
    so_far = [entry.step for entry in job.known.restored if entry.generation == event.generation]
    if any(step is not None and step <= event.step for step in so_far):
        return job, "known already", ()
    known = job.known.with_restored(Restored(generation=event.generation, step=event.step))
    return dataclasses.replace(job, known=known), f"the ranks went back to step {event.step}", (StateMatters(),)


def _preempted(config: JobConfig, job: Job, event: Preempted, now_s: float) -> _Answer:
    if job.preempted:
        return job, "known already", ()
    return dataclasses.replace(job, preempted=True), f"rank {event.rank} was told to go", (StateMatters(),)


def _poisoned(config: JobConfig, job: Job, event: Poisoned, now_s: float) -> _Answer:
    known = job.known.with_poison(event.poison)
    if known is job.known:
        return job, "known already", ()
    reason = f"steps {event.poison.from_step}-{event.poison.to_step} are poisoned"
    return dataclasses.replace(job, known=known), reason, (StateMatters(),)


def _listed(config: JobConfig, job: Job, event: Listed, now_s: float) -> _Answer:
    committed = frozenset(entry for entry in job.known.committed if entry.url != event.url) | event.committed
    if committed == job.known.committed and job.known.remembered is None:
        return job, "known already", ()
    known = dataclasses.replace(job.known, committed=committed, remembered=None)
    return dataclasses.replace(job, known=known), f"{event.url} holds {len(event.committed)} checkpoints", ()


def _committing(config: JobConfig, job: Job, event: Committing, now_s: float) -> _Answer:
    return dataclasses.replace(job, committing=job.committing | {event.step}), f"step {event.step} is committing", ()


def _settled(config: JobConfig, job: Job, event: Settled, now_s: float) -> _Answer:
    job = dataclasses.replace(job, committing=job.committing - {event.step})
    entry = event.committed
    if entry is None:
        return job, f"step {event.step} was not committed", ()
    if entry in job.known.committed:
        return job, f"step {event.step} is known to be committed", ()
    known = dataclasses.replace(job.known, committed=job.known.committed | {entry})
    reached = max(job.reached, entry.step) if entry.generation == job.generation else job.reached
    return dataclasses.replace(job, known=known, reached=reached), f"step {event.step} is committed", (StateMatters(),)


def _tick(config: JobConfig, job: Job, event: Tick, now_s: float) -> _Answer:
    due_s = deadline_s(config, job)
    if due_s is None or now_s < due_s or len(job.ready) == config.world_size:
        return job, "nothing is due", ()
    silent = [rank for rank in range(config.world_size) if rank not in job.ready]
    what = "did not end its process" if job.phase is Phase.ENDING else "was not ready"
    more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
    reason = f"rank {silent[0]}{more} {what} within {now_s - job.since_s:.0f} s"
    stop = Stop(exit_code=ExitCode.INFRASTRUCTURE, reason=reason, blame_rank=silent[0])
    return _over(job, stop, now_s)


def _vanished(config: JobConfig, job: Job, event: Vanished, now_s: float) -> _Answer:
    if event.is_replaceable:
        if job.phase is not Phase.RUNNING or not event.ranks:
            return job, "waiting for another supervisor", ()
        return _begin_end(job, Death(rank=event.ranks[0], cause=Cause(kind=CauseKind.LOST)), now_s)
    # Nobody comes in their place in this world. What memory holds of a job that was told to go cannot be whole.
    survivors = () if job.preempted else event.survivors
    blamed = event.ranks[0] if event.ranks else None
    stop = Stop(exit_code=ExitCode.INFRASTRUCTURE, reason=event.reason, blame_rank=blamed, lost=event.ranks)
    stop = dataclasses.replace(stop, survivors=survivors, is_eviction=event.is_eviction)
    return _over(job, stop, now_s)


def _ignored(config: JobConfig, job: Job, event: Event, now_s: float) -> _Answer:
    return job, f"nothing to do in {job.phase.value}", ()


# ---- the table -------------------------------------------------------------------------------------------------------

_ALIVE = (Phase.STARTING, Phase.RUNNING, Phase.ENDING)
_OVER = (Phase.DONE, Phase.STOPPED)

# Rows: what is heard. Columns: the phase it is heard in. A job that is over changes no more.
_TABLE: dict[type[Any], dict[Phase, Callable[[JobConfig, Job, Any, float], _Answer]]] = {
    Joined: {Phase.STARTING: _join, Phase.RUNNING: _join_running, Phase.ENDING: _join},
    Ready: {Phase.STARTING: _ready, Phase.RUNNING: _ready_running, Phase.ENDING: _ready},
    Died: {Phase.STARTING: _died_starting, Phase.RUNNING: _died_running, Phase.ENDING: _died_ending},
    Finished: {Phase.STARTING: _ignored, Phase.RUNNING: _finished, Phase.ENDING: _ignored},
    Progressed: {Phase.STARTING: _ignored, Phase.RUNNING: _progress, Phase.ENDING: _progress},
    WentBack: {Phase.STARTING: _ignored, Phase.RUNNING: _went_back, Phase.ENDING: _went_back},
    Preempted: dict.fromkeys(_ALIVE, _preempted),
    Poisoned: dict.fromkeys((*_ALIVE, *_OVER), _poisoned),
    Listed: dict.fromkeys(_ALIVE, _listed),
    Committing: dict.fromkeys((*_ALIVE, *_OVER), _committing),
    Settled: dict.fromkeys((*_ALIVE, *_OVER), _settled),
    Vanished: dict.fromkeys(_ALIVE, _vanished),
    Tick: {Phase.STARTING: _tick, Phase.RUNNING: _ignored, Phase.ENDING: _tick},
}


def apply(config: JobConfig, job: Job, event: Event, now_s: float) -> Outcome:
    """One step of the machine: looks the event up in the table, then takes every transition that is now open."""
    handler = _TABLE[type(event)].get(job.phase, _ignored)
    job, reason, actions = handler(config, job, event, now_s)
    while (open_transition := _open_transition(config, job, now_s)) is not None:
        job, reason, more = open_transition
        actions += more
    return Outcome(job=job, reason=reason, actions=actions)


def _open_transition(config: JobConfig, job: Job, now_s: float) -> _Answer | None:
    """What follows from the state alone: the arrows of the diagram that wait for *all* ranks."""
    if job.phase is Phase.RUNNING and len(job.finished) == config.world_size:
        return _over(job, _flushed(job) if job.flushing else None, now_s)
    if job.phase is Phase.STARTING and job.preempted and job.generation == job.first:
        return _over(job, Stop(exit_code=ExitCode.PREEMPTED, reason="told to go before anything ran"), now_s)
    if job.phase is Phase.ENDING and len(job.ready) == config.world_size:
        return _conclude(config, job, now_s)
    if job.phase is Phase.STARTING and len(job.ready) == config.world_size:
        return _start(config, job, now_s)
    return None


def _begin_end(job: Job, death: Death, now_s: float) -> _Answer:
    """RUNNING -> ENDING."""
    job = dataclasses.replace(
        job,
        phase=Phase.ENDING,
        since_s=now_s,
        ready={},
        deaths=(death,),
        reached=max(job.reached, death.step or 0),
    )
    return job, str(death), (GenerationEnds(generation=job.generation, death=death),)


def _conclude(config: JobConfig, job: Job, now_s: float) -> _Answer:
    """ENDING -> STARTING of the next generation, or STOPPED: all processes are gone and all evidence is in."""
    ended = Ended(first=job.generation == job.first, deaths=job.deaths, reached=job.reached, preempted=job.preempted)
    ledger, judgement = budgets.judge(config.budget, job.ledger, ended)
    root = judgement.root
    blamed, advice = _blame_host(job, root)
    over = GenerationOver(
        generation=job.generation, deaths=job.deaths, judgement=judgement, reached=job.reached, advice=advice
    )
    job = dataclasses.replace(job, ledger=ledger, blamed=blamed)
    is_left_unsaved = judgement.stop_code == ExitCode.PREEMPTED and root.cause.exit_code != ExitCode.PREEMPTED
    stop = None
    if job.flushing:
        step = job.plan.step if job.plan else None
        reason = f"told to go, and step {step} could not be saved from memory: {root}"
        stop = Stop(exit_code=ExitCode.INFRASTRUCTURE, reason=reason, blame_rank=root.rank)
    elif judgement.stop_code is not None and not is_left_unsaved:
        stop = Stop(
            exit_code=judgement.stop_code,
            reason=f"{judgement.reason}; {advice}" if advice else judgement.reason,
            blame_rank=root.rank,
            traceback=root.cause.traceback,
        )
    if stop is not None:
        job, reason, actions = _over(job, stop, now_s)
        return job, reason, (over, *actions)
    job = dataclasses.replace(
        job,
        phase=Phase.STARTING,
        generation=job.generation + 1,
        since_s=now_s,
        deaths=(),
        finished=frozenset(),
        reached=0,
        preempted=is_left_unsaved,
    )
    return job, judgement.reason, (over,)


def _blame_host(job: Job, root: Death) -> tuple[tuple[hosts.Blamed, ...], str]:
    """What is held against hosts once this generation is over, and the advice that follows from it."""
    member = job.members.get(root.rank)
    if member is None or not hosts.tells_of_host(root.cause):
        return job.blamed, ""
    blamed = hosts.with_blamed(job.blamed, hosts.Blamed(generation=job.generation, host=member.host))
    found = hosts.suspect(blamed, {other.host for other in job.members.values()}, job.generation)
    return blamed, hosts.advice(*found) if found is not None else ""


def _start(config: JobConfig, job: Job, now_s: float) -> _Answer | None:
    """STARTING -> RUNNING: the one place where a plan is made."""
    plan = pick(job.generation, job.ready, job.known)
    newest = max(job.committing, default=-1)
    if newest > (-1 if plan.step is None else plan.step) and now_s < job.since_s + config.commit_wait_s:
        return None  # a newer checkpoint is a moment away; `Settled` or a `Tick` comes back here
    if job.preempted:
        committed = newest_committed(job.known)
        if plan.tier is not Tier.MEMORY or plan.step is None or (committed is not None and committed.step >= plan.step):
            stop = Stop(exit_code=ExitCode.PREEMPTED, reason=f"told to go; nothing is left to save: {plan.reason}")
            return _over(job, stop, now_s)
        job = dataclasses.replace(job, flushing=True)
    known = job.known
    has_past = any(inventory.holdings or inventory.copies for inventory in job.ready.values())
    if job.generation > job.first or has_past:
        known = known.with_restored(Restored(generation=job.generation, step=plan.step))
    job = dataclasses.replace(job, phase=Phase.RUNNING, since_s=now_s, plan=plan, known=known, ready={}, reached=0)
    return job, plan.reason, (GenerationRuns(plan=plan),)


def _flushed(job: Job) -> Stop:
    step = job.plan.step if job.plan else None
    return Stop(exit_code=ExitCode.PREEMPTED, reason=f"told to go; step {step} was saved from memory")


def _over(job: Job, stop: Stop | None, now_s: float) -> _Answer:
    phase = Phase.DONE if stop is None else Phase.STOPPED
    job = dataclasses.replace(job, phase=phase, since_s=now_s, stop=stop, ready={})
    reason = "all ranks finished" if stop is None else stop.reason
    return job, reason, (JobOver(generation=job.generation, stop=stop),)


def _fenced(job: Job, generation: int) -> str:
    return f"fenced: this is about generation {generation}, the job is {job.phase.value} {job.generation}"


def deadline_s(config: JobConfig, job: Job) -> float | None:
    """When a `Tick` may change something, on the clock of `now_s`; None: only other events can."""
    if job.phase is Phase.ENDING:
        return job.since_s + config.ending_timeout_s
    if job.phase is Phase.STARTING:
        waits_for_commit = len(job.ready) == config.world_size
        return job.since_s + (config.commit_wait_s if waits_for_commit else config.starting_timeout_s)
    return None


# ---- what a rank is told ---------------------------------------------------------------------------------------------


class Order(enum.Enum):
    """Values are part of the wire format."""

    WAIT = "wait"
    RUN = "run"
    LEAVE = "leave"
    END = "end"
    STOP = "stop"
    DONE = "done"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directive:
    """An order about `generation`, with its reason.

    Attributes:
        leaving: with `END`: number of the signal by which the job was told to go, 0 if it was not. A process that has
            not got it yet is to get it, and the time to save what it wants.
    """

    order: Order
    generation: int
    reason: str = ""
    leaving: int = 0


def directive(job: Job, rank: int, generation: int, *, following: str = "") -> Directive:
    """What `rank` is told when it asks about `generation`: the one it runs, or the one it wants to start.

    LEAVE is for a rank that is `following` the order to run already: its process shall save its state and end.

    An order to end generation g is always followed by `ready(g+1)`. So it is also the answer to a rank that waits to
    start and of whose readiness nothing is known, as after a restart of the coordinator: it has nothing to end, and
    says `ready` again.
    """
    present = job.generation
    if job.phase is Phase.STOPPED:
        return Directive(order=Order.STOP, generation=present, reason=job.stop.reason if job.stop else "")
    if job.phase is Phase.DONE:
        return Directive(order=Order.DONE, generation=present, reason="all ranks finished")
    if generation < present:
        reason = f"generation {generation} is over; the job is at {present}"
        return Directive(order=Order.END, generation=generation, reason=reason)
    if job.phase is Phase.RUNNING and generation == present:
        if job.preempted and not job.flushing and following in (Order.RUN.value, Order.LEAVE.value):
            return Directive(order=Order.LEAVE, generation=present, reason="some rank was told to go")
        return Directive(order=Order.RUN, generation=present, reason=job.plan.reason if job.plan else "")
    if job.phase is Phase.ENDING and (generation == present or rank not in job.ready):
        root = budgets.root_of(job.deaths)
        return Directive(order=Order.END, generation=present, reason=str(root), leaving=_leaving(job, root))
    if job.phase is Phase.RUNNING:
        return Directive(order=Order.END, generation=present, reason=f"generation {present} runs; say ready again")
    if job.phase is Phase.STARTING and generation == present and rank not in job.ready:
        return Directive(order=Order.END, generation=present - 1, reason="say ready again")
    return Directive(order=Order.WAIT, generation=generation)


def _leaving(job: Job, root: Death) -> int:
    """The signal that the launcher or a person ends this job with, as far as one rank's end tells."""
    if root.cause.signal in _TOLD_TO_GO:
        return root.cause.signal
    return _SIGTERM if job.preempted or root.cause.exit_code == ExitCode.PREEMPTED else 0


def is_behind(job: Job, generation: int) -> bool:
    """True when a rank knows of a generation that this state cannot have led to: the coordinator is an old one."""
    return generation > job.generation + (job.phase is not Phase.STARTING)
