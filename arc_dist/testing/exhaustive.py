"""Visits every state that a very small job can come to, on the pure rules, and checks the invariants in each.

Breadth first, so that a violation comes with a shortest way to it. What makes the space finite, and small:

- Messages are never taken off the network: what was said once may be heard at any later time, any number of times, in
  any order, or never. That is loss, delay, duplication and reordering at once.
- The ranks step together; a step is trained, snapshotted, and certified by the next one or by the end.
- Faults have budgets: kills of a rank, crashes of the coordinator, which loses what is not in its journal. One that was
  replaced may live on as a zombie: it hears what it wants, and writes what manifest it likes.
- Time stands still, so nothing times out.

Afterwards it is checked that from every state the end of the job can still be reached.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

from arc_dist.protocol import commit as commits
from arc_dist.protocol import generations, job
from arc_dist.protocol.budgets import BudgetPolicy, Cause, CauseKind, Death
from arc_dist.protocol.commit import Saves, Shard
from arc_dist.protocol.events import (
    Committing,
    Died,
    Event,
    Finished,
    GenerationEnds,
    GenerationOver,
    GenerationRuns,
    JobOver,
    Ready,
    Settled,
    StateMatters,
)
from arc_dist.protocol.generations import Order
from arc_dist.protocol.job import Job, JobConfig, Phase
from arc_dist.protocol.pick import Committed, Plan, Tier
from arc_dist.protocol.sources import Holding, Inventory
from arc_dist.testing.world import Violation

History = tuple[int, ...]  # the generation that trained each step
_URL = "store"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """How small the job is.

    Attributes:
        num_ranks: ranks.
        num_steps: the job is done with this step; each one but the last is snapshotted and checkpointed, and the last
            at the end.
        kills: how many times a rank's process may die.
        crashes: how many times the coordinator may.
        zombies: how many of the crashed ones live on.
        max_states: bound on the search; None visits all.
    """

    num_ranks: int = 3
    num_steps: int = 2
    kills: int = 1
    crashes: int = 1
    zombies: int = 1
    max_states: int | None = None


@dataclasses.dataclass(frozen=True)
class Rank:
    """A supervisor and its trainer. `mode`: idle, waiting, running, dead, finished or over."""

    mode: str = "idle"
    generation: int = 0
    history: History = ()
    ring: tuple[tuple[Holding, History], ...] = ()


@dataclasses.dataclass(frozen=True)
class Desk:
    """A coordinator: its job, its saves, and the save whose manifest it is writing."""

    job: Job
    saves: Saves
    writing: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class State:
    """Everything. `journal` is text, `heard` what was ever said."""

    desk: Desk
    zombie: Desk | None
    journal: str | None
    ranks: tuple[Rank, ...]
    said: frozenset[Any]
    manifests: frozenset[tuple[int, int, History]]
    plans: tuple[tuple[int, str], ...]
    lost: frozenset[History]
    kills: int
    crashes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explored:
    """What was found.

    Attributes:
        num_states: that were visited.
        num_transitions: between them.
        num_done: states in which the job is over everywhere.
        is_complete: nothing was left out because of `Scope.max_states`.
        met: how often each kind of transition was taken.
    """

    num_states: int
    num_transitions: int
    num_done: int
    is_complete: bool
    met: collections.Counter[str]


def explore(scope: Scope) -> Explored:
    """Visits all states.

    Raises:
        Violation: an invariant breaks; the text has a shortest way there.
    """
    return _Search(scope).run()


class _Search:
    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.config = JobConfig(world_size=scope.num_ranks, budget=BudgetPolicy(max_restarts=1000, max_fruitless=1000))
        self.met: collections.Counter[str] = collections.Counter()

    def run(self) -> Explored:
        scope = self.scope
        saves = commits.open_for(Saves(world_size=scope.num_ranks), 0)
        ranks = (Rank(),) * scope.num_ranks
        nothing: frozenset[Any] = frozenset()
        start = State(Desk(Job(), saves), None, None, ranks, nothing, nothing, (), nothing, scope.kills, scope.crashes)
        seen: dict[Any, int] = {_key(start): 0}
        origin: list[tuple[int, str]] = [(-1, "start")]
        before: list[list[int]] = [[]]
        ends: list[int] = []
        queue: collections.deque[tuple[int, State]] = collections.deque([(0, start)])
        num_transitions, is_complete = 0, True
        while queue:
            number, state = queue.popleft()
            if all(rank.mode == "over" for rank in state.ranks):
                ends.append(number)
            try:
                for name, after in self._next(state):
                    num_transitions += 1
                    self.met[name.partition(" ")[0]] += 1
                    key = _key(after)
                    known = seen.get(key)
                    if known is None:
                        if scope.max_states is not None and len(seen) >= scope.max_states:
                            is_complete = False
                            continue
                        known = seen[key] = len(origin)
                        origin.append((number, name))
                        before.append([])
                        queue.append((known, after))
                    before[known].append(number)
            except Violation as violation:
                raise Violation(f"{violation}; the way there: {', '.join(_way(origin, number))}") from violation
        if is_complete:
            self._check_all_end(before, ends, origin)
        return Explored(
            num_states=len(seen),
            num_transitions=num_transitions,
            num_done=len(ends),
            is_complete=is_complete,
            met=self.met,
        )

    def _check_all_end(self, before: list[list[int]], ends: list[int], origin: list[tuple[int, str]]) -> None:
        reached = set(ends)
        queue = collections.deque(ends)
        while queue:
            for number in before[queue.popleft()]:
                if number not in reached:
                    reached.add(number)
                    queue.append(number)
        stuck = next((number for number in range(len(before)) if number not in reached), None)
        if stuck is not None:
            way = ", ".join(_way(origin, stuck))
            raise Violation(f"liveness: from here the job cannot end any more; the way there: {way}")

    # ---- what can happen next

    def _next(self, state: State) -> Iterator[tuple[str, State]]:
        for message in state.said:
            after = self._hear(state, message)
            if after is not state:
                yield f"hear {_text(message)}", after
        if state.desk.writing is not None:
            yield from self._write(state)
        for number, rank in enumerate(state.ranks):
            yield from self._rank_acts(state, number, rank)
        yield from self._train(state)
        if state.crashes:
            yield from self._crash(state)
        if state.zombie is not None:
            yield from self._zombie_acts(state)

    def _hear(self, state: State, message: Any) -> State:
        if isinstance(message, Shard):
            desk = self._offered(state.desk, message)
            if desk is state.desk:
                return state
            state = dataclasses.replace(state, desk=desk)
            return self._apply(state, Committing(step=message.step)) if desk.writing else state
        return self._apply(state, message)

    def _offered(self, desk: Desk, shard: Shard) -> Desk:
        if desk.writing is not None:
            return desk  # one at a time is enough here
        offered = commits.offer(desk.saves, shard)
        if offered.commit is None:
            same = offered.saves is desk.saves or offered.saves.saves == desk.saves.saves
            return desk if same else dataclasses.replace(desk, saves=offered.saves)
        if set(offered.commit.parts) != set(range(self.scope.num_ranks)):
            raise Violation(f"S5: step {shard.step} is committed with the shards of {sorted(offered.commit.parts)}")
        return dataclasses.replace(desk, saves=offered.saves, writing=(shard.step, shard.generation))

    def _apply(self, state: State, event: Event) -> State:
        outcome = generations.apply(self.config, state.desk.job, event, 0.0)
        if outcome.job is state.desk.job and not outcome.actions:
            return state
        if isinstance(event, (Ready, Died, Finished)) and event.generation < state.desk.job.generation:
            raise Violation(f"S7: {_text(event)} changed {state.desk.job.phase.value} {state.desk.job.generation}")
        desk = dataclasses.replace(state.desk, job=outcome.job)
        journal, saves = state.journal, desk.saves
        kinds = (GenerationEnds, GenerationRuns, JobOver, StateMatters)
        if any(isinstance(action, kinds) for action in outcome.actions):
            journal = json.dumps(job.durable(outcome.job), sort_keys=True)
        for action in outcome.actions:
            if isinstance(action, GenerationOver):
                self._check_nobody_runs(state, action.generation + 1)
                saves = commits.open_for(saves, outcome.job.generation)
            elif isinstance(action, JobOver):
                saves = commits.open_for(saves, None)
        state = dataclasses.replace(state, desk=dataclasses.replace(desk, saves=saves), journal=journal)
        for action in outcome.actions:
            if isinstance(action, GenerationRuns):
                state = self._planned(state, action.plan)
            elif isinstance(action, JobOver) and action.stop is None:
                left = [number for number, rank in enumerate(state.ranks) if rank.mode not in ("finished", "over")]
                if left:
                    raise Violation(f"S1: the job is done, and ranks {left} have not finished")
        return state

    def _planned(self, state: State, plan: Plan) -> State:
        text = json.dumps(plan.as_dict(), sort_keys=True)
        known = dict(state.plans)
        if known.setdefault(plan.generation, text) != text:
            raise Violation(f"S1: generation {plan.generation} has two plans")
        self._check_nobody_runs(state, plan.generation)
        ready = {said.rank for said in state.said if isinstance(said, Ready) and said.generation == plan.generation}
        if len(ready) < self.scope.num_ranks:
            raise Violation(f"S13: generation {plan.generation} runs, and only ranks {sorted(ready)} have said ready")
        history = self._history_of(state, plan)
        self._check_newest(state, history)
        histories = {held for rank in state.ranks for _, held in rank.ring} | {rank.history for rank in state.ranks}
        histories |= {held for _, _, held in state.manifests}
        lost = state.lost | {held for held in histories if held != history[: len(held)]}
        return dataclasses.replace(state, plans=tuple(sorted(known.items())), lost=lost)

    def _history_of(self, state: State, plan: Plan) -> History:
        if plan.tier is Tier.NONE:
            return max((held for _, _, held in state.manifests if held not in state.lost), key=len, default=())
        if plan.tier is Tier.CHECKPOINT:
            found = [h for step, by, h in state.manifests if step == plan.step and plan.saved_by in (None, by)]
            if not found:
                raise Violation(f"S3: there is no manifest of step {plan.step} by generation {plan.saved_by}")
            (history,) = found
        else:
            states = {
                held
                for rank, source in plan.sources.items()
                for holding, held in state.ranks[source.rank].ring
                if holding.slot == source.slot and source.rank == rank
            }
            if len(states) != 1 or len(plan.sources) != self.scope.num_ranks:
                raise Violation(f"S3: step {plan.step} is not one state on all ranks")
            (history,) = states
        if len(history) != plan.step:
            raise Violation(f"S3: step {plan.step} restores {len(history)} updates")
        if history in state.lost:
            raise Violation(f"S8: an abandoned history returns with step {plan.step}")
        return history

    def _check_newest(self, state: State, history: History) -> None:
        held = [
            {past for holding, past in rank.ring if holding.trusted and past not in state.lost} for rank in state.ranks
        ]
        newest = max((len(past) for past in set.intersection(*held)), default=0)
        if newest > len(history):
            raise Violation(f"S4: step {newest} is whole in memory, and {len(history)} is planned")

    def _check_nobody_runs(self, state: State, generation: int) -> None:
        for number, rank in enumerate(state.ranks):
            if rank.mode == "running" and rank.generation < generation:
                raise Violation(f"S13: generation {generation} runs, and rank {number} runs {rank.generation}")

    def _write(self, state: State) -> Iterator[tuple[str, State]]:
        assert state.desk.writing is not None
        step, generation = state.desk.writing
        written = self._manifest(state, state.desk)
        for error, manifests in ((None, written), ("full", state.manifests)):
            if manifests is None:
                continue
            saves = commits.settle(state.desk.saves, step, generation, error)
            desk = dataclasses.replace(state.desk, saves=saves, writing=None)
            committed = None if error else Committed(step=step, url=_URL, generation=generation)
            after = dataclasses.replace(state, desk=desk, manifests=manifests)
            yield (
                f"{'refuse' if error else 'commit'} {step}",
                self._apply(after, Settled(step=step, committed=committed)),
            )
            if error is None and state.crashes:
                # The manifest is there, and who wrote it dies before it can say so.
                for name, crashed in self._crash(dataclasses.replace(state, manifests=manifests)):
                    yield f"{name} after manifest {step}", crashed

    def _manifest(self, state: State, desk: Desk) -> frozenset[Any] | None:
        """The store after a commit; None when it refuses: another is there, or a newer generation has committed."""
        assert desk.writing is not None
        step, generation = desk.writing
        save = desk.saves.saves[desk.writing]
        histories = {part["history"] for part in save.parts.values()}
        if len(histories) != 1:
            raise Violation(f"S5: step {step} is put together from {sorted(histories)}")
        (history,) = histories
        if len(history) != step:
            raise Violation(f"S5: the manifest of step {step} holds {len(history)} updates")
        if any(by > generation or (at, by) == (step, generation) for at, by, _ in state.manifests):
            same = (step, generation, history) in state.manifests
            return state.manifests if same else None
        return state.manifests | {(step, generation, history)}

    # ---- ranks

    def _rank_acts(self, state: State, number: int, rank: Rank) -> Iterator[tuple[str, State]]:
        if rank.mode == "over":
            return
        if rank.mode == "idle":
            inventory = Inventory(host=f"h{number}", shm_dir="", holdings=tuple(holding for holding, _ in rank.ring))
            ready = Ready(rank=number, generation=rank.generation, inventory=inventory)
            waiting = dataclasses.replace(rank, mode="waiting")
            yield f"ready {number}", self._with(state, number, waiting, ready)
            return
        if rank.mode == "running" and len(rank.history) >= self.scope.num_steps:
            yield f"finish {number}", self._finished(state, number, rank)
        if rank.mode == "running" and state.kills:
            cause = Cause(kind=CauseKind.SIGNAL, signal=9)
            died = Died(generation=rank.generation, death=Death(rank=number, cause=cause, step=len(rank.history)))
            dead = dataclasses.replace(rank, mode="dead")
            yield f"kill {number}", dataclasses.replace(self._with(state, number, dead, died), kills=state.kills - 1)
        if generations.is_behind(state.desk.job, rank.generation):
            raise Violation(f"S7: the coordinator forgot generation {rank.generation}")
        told = generations.directive(state.desk.job, number, rank.generation)
        if told.order is Order.RUN and rank.mode == "waiting":
            yield f"run {number}", self._started(state, number, rank, told.generation)
        elif told.order is Order.END:
            ring = rank.ring
            if rank.mode == "running":
                ring = _hold(rank, rank.generation, parting=True)
            ended = Rank(mode="idle", generation=told.generation + 1, ring=ring)
            yield f"end {number}", self._with(state, number, ended)
        elif told.order in (Order.STOP, Order.DONE):
            yield f"over {number}", self._with(state, number, dataclasses.replace(rank, mode="over"))

    def _started(self, state: State, number: int, rank: Rank, generation: int) -> State:
        plan = state.desk.job.plan
        assert plan is not None
        if dict(state.plans)[generation] != json.dumps(plan.as_dict(), sort_keys=True):
            raise Violation(f"S1: rank {number} acts on another plan")
        self._check_nobody_runs(state, generation)
        peers = [other for other in state.ranks if other.generation == generation and other.mode == "running"]
        history = peers[0].history if peers else self._history_of(state, plan)
        ring = tuple(entry for entry in rank.ring if entry[1] == history[: len(entry[1])])
        started = Rank(mode="running", generation=generation, history=history, ring=ring)
        return self._with(state, number, started)

    def _train(self, state: State) -> Iterator[tuple[str, State]]:
        first = state.ranks[0]
        if any((rank.mode, rank.generation) != ("running", first.generation) for rank in state.ranks):
            return
        if len(first.history) >= self.scope.num_steps:
            return
        said = set(state.said)
        ranks: list[Rank] = []
        for number, rank in enumerate(state.ranks):
            ring, shards = _certified(number, rank)
            said |= shards
            trained = dataclasses.replace(rank, history=(*rank.history, rank.generation), ring=ring)
            ranks.append(dataclasses.replace(trained, ring=_hold(trained, rank.generation, parting=False)))
        yield "step", dataclasses.replace(state, ranks=tuple(ranks), said=frozenset(said))

    def _finished(self, state: State, number: int, rank: Rank) -> State:
        """The script of one rank ends, after its last step was certified."""
        ring, shards = _certified(number, rank)
        after = self._with(state, number, dataclasses.replace(rank, mode="finished", ring=ring))
        return dataclasses.replace(
            after, said=after.said | shards | {Finished(rank=number, generation=rank.generation)}
        )

    def _with(self, state: State, number: int, rank: Rank, message: Any = None) -> State:
        ranks = (*state.ranks[:number], rank, *state.ranks[number + 1 :])
        said = state.said if message is None else state.said | {message}
        return dataclasses.replace(state, ranks=ranks, said=said)

    # ---- the coordinator's end

    def _crash(self, state: State) -> Iterator[tuple[str, State]]:
        if state.desk.job.phase in (Phase.DONE, Phase.STOPPED):
            return  # then its host ends as well
        revived = Job() if state.journal is None else job.revive(self.config, json.loads(state.journal), 0.0)
        saves = Saves(world_size=self.scope.num_ranks, poisoned=revived.known.poison)
        desk = Desk(revived, commits.open_for(saves, revived.generation))
        after = dataclasses.replace(state, desk=desk, crashes=state.crashes - 1)
        yield "crash", after
        if self.scope.zombies and state.zombie is None:
            yield "replace", dataclasses.replace(after, zombie=state.desk)

    def _zombie_acts(self, state: State) -> Iterator[tuple[str, State]]:
        """It may hear shards and write one manifest; what it answers is refused for its epoch.

        What it has heard and not acted on changes nothing for anybody else, so hearing and writing are one transition.
        """
        zombie = state.zombie
        assert zombie is not None
        shards = [message for message in state.said if isinstance(message, Shard)]
        for step, generation in sorted({(shard.step, shard.generation) for shard in shards}):
            desk = dataclasses.replace(zombie, writing=None)
            for shard in shards:
                if (shard.step, shard.generation) == (step, generation):
                    desk = self._offered(desk, shard)
            if desk.writing is not None:
                yield from self._zombie_commits(state, desk)
        if zombie.writing is not None:
            yield from self._zombie_commits(state, zombie)

    def _zombie_commits(self, state: State, desk: Desk) -> Iterator[tuple[str, State]]:
        manifests = self._manifest(state, desk)
        if manifests is not None:
            yield "zombie commits", dataclasses.replace(state, zombie=None, manifests=manifests)


class _Frozen(dict[str, Any]):
    """A part of a manifest that can be in a set."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(sorted(self.items())))


def _certified(number: int, rank: Rank) -> tuple[tuple[tuple[Holding, History], ...], frozenset[Shard]]:
    """The rank's memory when all that it holds is certified, and the shards that it then writes."""
    ring = tuple((dataclasses.replace(holding, certified=True), held) for holding, held in rank.ring)
    shards = {
        Shard(rank=number, generation=rank.generation, step=held.step, url=_URL, part=_Frozen({"history": past}))
        for held, past in ring
        if held.generation == rank.generation
    }
    return ring, frozenset(shards)


def _hold(rank: Rank, generation: int, *, parting: bool) -> tuple[tuple[Holding, History], ...]:
    if any(held == rank.history and holding.trusted for holding, held in rank.ring) or not rank.history:
        return rank.ring
    used = {holding.slot for holding, held in rank.ring if held != rank.history}
    slot = next(number for number in range(len(rank.ring) + 1) if number not in used)
    holding = Holding(step=len(rank.history), slot=slot, generation=generation, parting=parting)
    kept = tuple(entry for entry in rank.ring if entry[1] != rank.history)
    return (*kept, (holding, rank.history))


def _key(state: State) -> Any:
    zombie = None if state.zombie is None else _desk_key(state.zombie)
    return (
        _desk_key(state.desk),
        zombie,
        state.journal,
        state.ranks,
        state.said,
        state.manifests,
        state.plans,
        state.lost,
        state.kills,
        state.crashes,
    )


def _desk_key(desk: Desk) -> Any:
    state, saves = desk.job, desk.saves
    return (
        state.phase,
        state.generation,
        frozenset(state.ready.items()),
        state.known,
        state.ledger,
        state.plan.step if state.plan else None,
        state.deaths,
        state.finished,
        state.reached,
        state.committing,
        saves.open_generation,
        frozenset((key, save.status, frozenset(save.parts.items())) for key, save in saves.saves.items()),
        desk.writing,
    )


def _way(origin: list[tuple[int, str]], number: int) -> list[str]:
    names: list[str] = []
    while number >= 0:
        number, name = origin[number]
        names.append(name)
    return names[::-1]


@functools.cache
def _text(message: Any) -> str:
    generation = message.generation
    step = f" step {message.step}" if isinstance(message, Shard) else ""
    return f"{type(message).__name__.lower()} {message.rank} of {generation}{step}"
