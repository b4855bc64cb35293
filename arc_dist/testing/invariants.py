"""What must hold after every event of a simulated job: one checker per invariant of the design, by its name there.

`Truth` is what is so, whatever any process of the job believes. What makes the checks strong: every update of the
weights has a token that no other update has, and a state is the tuple of the tokens that led to it. Two states are the
same if and only if their histories are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from arc_dist.protocol.job import Phase
from arc_dist.protocol.pick import Committed, Known, Plan, Tier
from arc_dist.protocol.sources import Holding
from arc_dist.testing.world import Violation

History = tuple[int, ...]


class Running(Protocol):
    """A training process."""

    rank: int
    generation: int

    @property
    def is_running(self) -> bool: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifested:
    """A manifest that was written, and the states that its shards held at that moment."""

    disk: str
    directory: str
    step: int
    generation: int
    certified: bool
    histories: tuple[History, ...]


Ring = dict[int, tuple[Holding, History]]


@dataclasses.dataclass(eq=False)
class Truth:
    """What is so.

    Attributes:
        world_size: number of ranks.
        keys: of each rank: equal ones are of replicas, 0 is nobody's.
        hosts: where each rank is.
        plans: what each generation was decided to restore.
        flushing: generations that train no more, but save what memory holds.
        lost: tokens of updates that a later decision gave up.
        poisoned: tokens of updates that were found to be bad, and whose poison the coordinator has acknowledged.
        certified: states that were trusted.
        manifests: by disk and directory.
        rings: the memory of each rank at this moment.
        processes: the training process of each rank that was started last.
        generations_of: in which generations each rank had a process.
        oldest: no process of an older generation than this lives.
        num_losses: processes that were lost, ever; a generation may end only for one of them.
        excused: the coordinator forgot what it had announced that it might forget (its journal was not writable).
    """

    world_size: int
    keys: Mapping[int, int]
    hosts: Mapping[int, str]
    plans: dict[int, Plan] = dataclasses.field(default_factory=dict)
    flushing: set[int] = dataclasses.field(default_factory=set)
    lost: set[int] = dataclasses.field(default_factory=set)
    poisoned: set[int] = dataclasses.field(default_factory=set)
    certified: set[History] = dataclasses.field(default_factory=set)
    manifests: dict[tuple[str, str], Manifested] = dataclasses.field(default_factory=dict)
    rings: dict[int, Ring] = dataclasses.field(default_factory=dict)
    processes: dict[int, Running] = dataclasses.field(default_factory=dict)
    generations_of: dict[int, set[int]] = dataclasses.field(default_factory=dict)
    oldest: int = 0
    next_token: int = 0
    num_losses: int = 0
    losses_before: dict[int, int] = dataclasses.field(default_factory=dict)
    excused: bool = False

    def __post_init__(self) -> None:
        self.on_host: dict[str, list[int]] = {}
        for rank, host in self.hosts.items():
            self.on_host.setdefault(host, []).append(rank)

    def running(self) -> list[Running]:
        """The training processes that live."""
        return [process for process in self.processes.values() if process.is_running]

    def new_token(self) -> int:
        self.next_token += 1
        return self.next_token - 1


def s1_one_decision(truth: Truth, plan: Plan) -> None:
    """In a generation all ranks act on one decision: its plan never changes."""
    known = truth.plans.setdefault(plan.generation, plan)
    if known != plan and not truth.excused:
        raise Violation(f"S1: generation {plan.generation} has two plans: {known.reason}; {plan.reason}")
    truth.plans[plan.generation] = plan


def s1_acts_on_it(truth: Truth, rank: int, generation: int, plan: Mapping[str, Any]) -> None:
    """Every rank starts with the plan that was decided."""
    decided = truth.plans.get(generation)
    is_flushing = generation in truth.flushing
    if decided is None or {**decided.as_dict(), "flush": is_flushing} != dict(plan):
        raise Violation(f"S1: rank {rank} starts generation {generation} with a plan that was not decided")


def s1_done_is_done(finished: int, world_size: int, phase: Phase) -> None:
    """A job is done when every rank has finished, and not before."""
    if phase is Phase.DONE and finished < world_size:
        raise Violation(f"S1: the job is done, and {world_size - finished} ranks have not finished")


def s2_no_end_without_a_loss(truth: Truth, generation: int) -> None:
    """No generation is ended unless a process was lost that was not told to end, since the one before was ended."""
    if truth.num_losses <= truth.losses_before.get(generation, 0):
        raise Violation(f"S2: generation {generation} is ended, and nothing was lost")


def s3_whole(truth: Truth, plan: Plan) -> History | None:
    """The planned step is one state, held for every rank; returns it, or None when it is for the ranks to find."""
    if plan.tier is Tier.NONE:
        return None
    if plan.tier is Tier.CHECKPOINT:
        return _committed_state(truth, plan)
    states: set[History] = set()
    for rank, source in plan.sources.items():
        if source.rank != rank and not (truth.keys[rank] and truth.keys[rank] == truth.keys[source.rank]):
            raise Violation(f"S3: rank {rank} would restore rank {source.rank}'s shard")
        if truth.hosts[source.rank] != truth.hosts[rank]:
            raise Violation(f"S3: rank {rank} would restore from the memory of another host")
        holding, history = truth.rings[source.rank].get(source.slot, (None, ()))
        if holding is None:
            return None  # that memory is lost since it was told of; its supervisor's end is on its way
        states.add(history)
    if len(states) != 1 or len(plan.sources) != truth.world_size:
        raise Violation(f"S3: step {plan.step} is not one state on all ranks: {sorted(states)}")
    (history,) = states
    if len(history) != plan.step:
        raise Violation(f"S3: step {plan.step} restores {len(history)} updates")
    return history


def _committed_state(truth: Truth, plan: Plan) -> History:
    found = [
        entry
        for entry in truth.manifests.values()
        if entry.step == plan.step and f"sim://{entry.disk}" == plan.url and plan.saved_by in (None, entry.generation)
    ]
    if not found:
        raise Violation(f"S3: there is no manifest of step {plan.step} by generation {plan.saved_by} in {plan.url}")
    return found[-1].histories[0]


def s4_newest(truth: Truth, known: Known, plan: Plan, history: History) -> None:
    """No newer state is trusted, not refused, and held for all ranks; by brute force.

    Poison speaks of step numbers and a generation, and so also covers what that generation trained anew; that much is
    given up on purpose.
    """
    bad = truth.lost | truth.poisoned
    best = len(history)
    for entry in truth.manifests.values():
        told = Committed(step=entry.step, url=f"sim://{entry.disk}", generation=entry.generation)
        covered = any(poison.covers(entry.step, entry.generation) for poison in known.poison)
        if told in known.committed and not covered and not bad & set(entry.histories[0]) and entry.step > best:
            raise Violation(f"S4: step {entry.step} is committed, and {plan.tier.value} {best} is planned")
    newest = _newest_in_memory(truth, known)
    if newest > best:
        raise Violation(f"S4: step {newest} is whole in memory, and {plan.tier.value} {best} is planned")


def _newest_in_memory(truth: Truth, known: Known) -> int:
    """Step of the newest state that is trusted, not refused, and held for all ranks; 0: there is none."""
    bad = truth.lost | truth.poisoned
    reachable: dict[int, set[History]] = {rank: set() for rank in range(truth.world_size)}
    for giver in range(truth.world_size):
        for holding, held in truth.rings[giver].values():
            covered = any(poison.covers(holding.step, holding.generation) for poison in known.poison)
            if not holding.trusted or covered or bad & set(held):
                continue
            for rank in truth.on_host[truth.hosts[giver]]:
                # Of a rank that has nothing left nobody knows whose replica it is.
                is_replica = truth.keys[rank] and truth.keys[rank] == truth.keys[giver] and truth.rings[rank]
                if rank == giver or is_replica:
                    reachable[rank].add(held)
    return max((len(held) for held in set.intersection(*reachable.values())), default=0)


def s5_manifest_implies_shards(entry: Manifested, world_size: int, missing: Iterable[str]) -> None:
    """When a manifest is written all its shards are there, and all are of one state and of the step it names."""
    for name in missing:
        raise Violation(f"S5: the manifest of step {entry.step} names {name}, which is not there")
    if len(entry.histories) != world_size:
        raise Violation(f"S5: step {entry.step} is committed with {len(entry.histories)} of {world_size} shards")
    if len(set(entry.histories)) != 1 or len(entry.histories[0]) != entry.step:
        raise Violation(f"S5: step {entry.step} is put together from {sorted(set(entry.histories))}")


def s6_kept(truth: Truth, entry: Manifested, present: bool) -> None:
    """A commit that was acknowledged stays."""
    if not present:
        raise Violation(f"S6: the commit of step {entry.step} was acknowledged, and is not in {entry.disk}")


def s6_saved_before_the_end(truth: Truth, known: Known) -> None:
    """A job that ends as preempted leaves nothing in memory that is newer than all checkpoints."""
    committed = max((entry.step for entry in truth.manifests.values()), default=0)
    newest = _newest_in_memory(truth, known)
    if newest > committed:
        raise Violation(f"S6: the job ends as preempted, and step {newest} was in memory; {committed} is committed")


def s7_fenced(truth: Truth, entry: Manifested) -> None:
    """No generation commits after a newer one has, in the same store."""
    for other in truth.manifests.values():
        if other.disk == entry.disk and other.generation > entry.generation:
            raise Violation(f"S7: generation {entry.generation} commits step {entry.step} after {other.generation} did")


def s7_only_the_open_generation_commits(truth: Truth, generation: int, open_generation: int | None, step: int) -> None:
    """What lets a manifest be written belongs to the generation that runs or ends."""
    if generation != open_generation:
        raise Violation(f"S7: generation {generation} begins to commit step {step}, and {open_generation} is open")


def s8_never_returns(truth: Truth, history: History, where: str) -> None:
    """Updates that were given up or found to be bad are in no state that is restored."""
    if truth.excused:
        return
    if truth.lost & set(history):
        raise Violation(f"S8: an abandoned history returns with {where}")
    if truth.poisoned & set(history):
        raise Violation(f"S8: a poisoned state returns with {where}")


def s9_trusted(truth: Truth, history: History, where: str) -> None:
    """What is restored was certified."""
    if history and history not in truth.certified:
        raise Violation(f"S9: {where} was never trusted")


def s13_one_process(truth: Truth, rank: int, generation: int) -> None:
    """When a rank's process starts, it has no other, and no rank has one of an older generation."""
    mine = truth.processes.get(rank)
    if mine is not None and mine.is_running:
        raise Violation(f"S13: rank {rank} starts generation {generation} and still runs {mine.generation}")
    if truth.oldest >= generation:
        return
    for process in truth.running():
        if process.generation < generation:
            raise Violation(f"S13: generation {generation} starts, and rank {process.rank} runs {process.generation}")
    truth.oldest = generation


def s13_one_for_ever(truth: Truth, rank: int, generation: int) -> None:
    """A rank has one process in a generation and never a second: its peers may have met the first already."""
    if generation in truth.generations_of.setdefault(rank, set()):
        raise Violation(f"S13: rank {rank} starts a second process in generation {generation}")
    truth.generations_of[rank].add(generation)


def s13_nobody_runs(truth: Truth, generation: int) -> None:
    """When a generation is decided to run, no process of an older one lives."""
    older = [process for process in truth.running() if process.generation < generation]
    if older:
        raise Violation(f"S13: generation {generation} may run, and rank {older[0].rank} runs {older[0].generation}")


def s14_found_before_use(expected: History, restored: History, where: str) -> None:
    """What a restore hands out is what was written, whatever happened to the disk."""
    if expected != restored:
        raise Violation(f"S14: {where} was restored as {restored}, {expected} was written")


def s15_announced(is_behind: bool, journal_error: str | None) -> None:
    """A decision that is not in the journal is shown as such for as long as that is so."""
    if is_behind and journal_error is None:
        raise Violation("S15: the journal lacks a decision, and nothing says so")
