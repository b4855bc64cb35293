"""A whole job in one process: the real rules, model supervisors and trainers, and a network that does as it likes.

Messages are delivered in any order, late and twice; trainers are killed one or several at a time; supervisors are
replaced; the coordinator is restarted from its journal. The random generator decides all of it, so a seed is a story.

What makes the checks strong: every update has a token that nobody else has, and a state is the tuple of the tokens that
led to it. Two states are the same if and only if their histories are.
"""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

from arc_dist.protocol import commit as commits
from arc_dist.protocol import generations, job
from arc_dist.protocol.budgets import BudgetPolicy, Cause, CauseKind, Death
from arc_dist.protocol.commit import CommitStatus, Saves, Shard
from arc_dist.protocol.events import (
    Committing,
    Died,
    Finished,
    GenerationEnds,
    GenerationOver,
    GenerationRuns,
    JobOver,
    Joined,
    Poisoned,
    Progressed,
    Ready,
    Settled,
    StateMatters,
    Tick,
    WentBack,
)
from arc_dist.protocol.generations import Order
from arc_dist.protocol.job import Job, JobConfig, Member, Phase
from arc_dist.protocol.pick import Committed, Plan, Poison, Tier
from arc_dist.protocol.sources import Holding, Inventory

History = tuple[int, ...]
SNAPSHOT_EVERY = 2
RING_SLOTS = 4


class Violation(AssertionError):
    """An invariant of the design does not hold. The text begins with its name."""


@dataclasses.dataclass
class Trainer:
    generation: int
    history: History
    finished: bool = False


@dataclasses.dataclass
class Supervisor:
    rank: int
    pid: int
    asked: int = 0
    trainer: Trainer | None = None
    ring: dict[int, tuple[Holding, History]] = dataclasses.field(default_factory=dict)
    following: str = ""
    answer: tuple[generations.Directive, Plan | None] | None = None  # on its way back from the coordinator
    is_ready: bool = False
    over: bool = False

    @property
    def alive(self) -> bool:
        return self.trainer is not None and not self.trainer.finished


@dataclasses.dataclass(frozen=True)
class Options:
    world_size: int = 3
    replicated: bool = False
    target_step: int = 12
    kills: int = 4
    replacements: int = 1
    coordinator_restarts: int = 1
    poisonings: int = 1
    duplicate: float = 0.2
    max_fruitless: int = 1000
    max_turns: int = 20_000


class Model:
    """One run. `run` plays it to its end and raises `Violation` when an invariant breaks."""

    def __init__(self, seed: int, options: Options) -> None:
        self.random = random.Random(seed)
        self.options = options
        self.config = JobConfig(
            world_size=options.world_size, budget=BudgetPolicy(max_restarts=10_000, max_fruitless=options.max_fruitless)
        )
        self.now_s = 0.0
        self.job = Job()
        self.saves = commits.open_for(Saves(world_size=options.world_size), 0)
        self.durable: dict[str, Any] | None = None
        self.network: list[tuple[str, Any]] = []
        self.supervisors = [Supervisor(rank=rank, pid=rank) for rank in range(options.world_size)]
        self.next_pid = options.world_size
        self.next_token = 0
        self.faults = {
            "kill": options.kills,
            "replace": options.replacements,
            "restart": options.coordinator_restarts,
            "poison": options.poisonings,
        }
        self.counts: dict[str, int] = {}
        # What is true, whatever anybody believes.
        self.plans: dict[int, Plan] = {}
        self.restored: dict[int, History] = {}
        self.lost_tokens: set[int] = set()
        self.poisoned_tokens: set[int] = set()
        self.manifests: dict[tuple[int, int], History] = {}
        self.certified: set[History] = set()
        self.judged_generations = 0
        for supervisor in self.supervisors:
            self._join(supervisor)

    # ---- the play

    def run(self) -> Job:
        for _ in range(self.options.max_turns):
            self.now_s += 0.01
            if all(supervisor.over for supervisor in self.supervisors):
                return self.job
            self._turn()
        raise Violation(f"liveness: still {self.job.phase} {self.job.generation} after {self.options.max_turns} turns")

    def _turn(self) -> None:
        choice = self.random.random()
        if choice < 0.30 and self.network:
            self._deliver()
        elif choice < 0.62:
            self._supervise(self.random.choice(self.supervisors))
        elif choice < 0.96:
            self._train(self.random.choice(self.supervisors))
        else:
            self._fault()

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _send(self, kind: str, message: Any) -> None:
        self.network.append((kind, message))

    def _deliver(self) -> None:
        index = self.random.randrange(len(self.network))
        kind, message = self.network[index]
        if self.random.random() < self.options.duplicate:
            self._count("duplicate")
        else:
            del self.network[index]
        if kind == "event":
            self._apply(message)
        elif kind == "ready":
            pid, ready = message
            member = self.job.members.get(ready.rank)
            if member is None or member.pid == pid:  # else the service refuses the sender
                self._apply(ready)
        else:
            self._take_shard(message)

    # ---- the coordinator

    def _apply(self, event: Any) -> None:
        before = self.job
        outcome = generations.apply(self.config, self.job, event, self.now_s)
        again = generations.apply(self.config, before, event, self.now_s)
        if again != outcome:
            raise Violation("determinism: the same state and event gave another answer")
        self.job = outcome.job
        for action in outcome.actions:
            if isinstance(action, (GenerationEnds, GenerationRuns, JobOver, StateMatters)):
                self.durable = json.loads(json.dumps(job.durable(self.job)))
            if isinstance(action, GenerationRuns):
                self._check_plan(action.plan)
            elif isinstance(action, GenerationOver):
                self.judged_generations += 1
                self.saves = commits.open_for(self.saves, self.job.generation)
                self._check_nobody_runs(action.generation + 1, "S13: a generation is over")
            elif isinstance(action, JobOver):
                self.saves = commits.open_for(self.saves, None)
                running = [s.rank for s in self.supervisors if s.trainer is None or not s.trainer.finished]
                if action.stop is None and running:
                    raise Violation(f"S1: the job is done, and ranks {running} have not finished")
        if event.__class__ in (Ready, Died, Finished) and event.generation < before.generation and self.job != before:
            raise Violation(f"S7: {event} changed {before.phase} {before.generation}")

    def _take_shard(self, shard: Shard) -> None:
        running = {s.trainer.generation for s in self.supervisors if s.trainer is not None}
        offered = commits.offer(self.saves, shard)
        self.saves = offered.saves
        if offered.commit is None:
            return
        key = (shard.step, shard.generation)
        if any(generation > shard.generation for generation in running):
            raise Violation(f"S7: generation {shard.generation} commits step {shard.step} while {running} runs")
        if set(offered.commit.parts) != set(range(self.options.world_size)):
            raise Violation(f"S5: step {shard.step} is committed with the shards {sorted(offered.commit.parts)}")
        if key in self.manifests and not self.counts.get("restart"):
            raise Violation(f"S5: a second manifest for step {shard.step} of generation {shard.generation}")
        # After a restart of the coordinator the store, whose manifests are exclusive, is what remembers.
        written = {part["history"] for part in offered.commit.parts.values()}
        if len(written) != 1:
            raise Violation(f"S5: step {shard.step} is put together from different states: {written}")
        (history,) = written
        if self.manifests.setdefault(key, history) != history:
            raise Violation(f"S5: another manifest for step {shard.step} of generation {shard.generation}")
        self._apply(Committing(step=shard.step))
        self.saves = commits.settle(self.saves, shard.step, shard.generation, None)
        self._apply(
            Settled(step=shard.step, committed=Committed(step=shard.step, url="store", generation=shard.generation))
        )
        self._count("commit")

    # ---- the checks

    def _check_plan(self, plan: Plan) -> None:
        if plan.generation in self.plans and self.plans[plan.generation] != plan:
            raise Violation(f"S1: generation {plan.generation} has two plans")
        self.plans[plan.generation] = plan
        self._check_nobody_runs(plan.generation, "S13: a generation starts")
        history = self._restored(plan)
        if history:
            if plan.step not in (None, len(history)):
                raise Violation(f"S3: step {plan.step} restores {len(history)} steps")
            if history not in self.certified:
                raise Violation(f"S9: step {plan.step} was never trusted")
        if self.lost_tokens & set(history):
            raise Violation(f"S8: an abandoned history returned with step {plan.step}")
        if self.poisoned_tokens & set(history):
            raise Violation(f"S8: a poisoned step returned with step {plan.step}")
        self._check_newest(plan, history)
        self.restored[plan.generation] = history
        everything = set(range(self.next_token))
        self.lost_tokens |= everything - set(history)

    def _restored(self, plan: Plan) -> History:
        """The state that all ranks will have; one and the same, or there is a violation."""
        if plan.tier is Tier.NONE:
            return self._found_in_store(plan)
        if plan.tier is Tier.CHECKPOINT:
            if (plan.step, plan.saved_by) not in self.manifests:
                raise Violation(f"S3: there is no manifest of step {plan.step} by generation {plan.saved_by}")
            return self.manifests[plan.step, plan.saved_by]
        states: set[History] = set()
        for rank, source in plan.sources.items():
            holder = self.supervisors[source.rank]
            if source.rank != rank and not self.options.replicated:
                raise Violation(f"S3: rank {rank} would restore rank {source.rank}'s shard")
            if source.slot not in holder.ring:
                raise Violation(f"S3: rank {source.rank} has nothing in slot {source.slot}")
            states.add(holder.ring[source.slot][1])
        if len(states) != 1 or len(plan.sources) != self.options.world_size:
            raise Violation(f"S3: step {plan.step} is not one state on all ranks: {states}")
        return states.pop()

    def _found_in_store(self, plan: Plan) -> History:
        """What trainers find without a step in their plan: the newest in the store that is not poisoned, or nothing."""
        usable = [key for key in self.manifests if not any(poison.covers(*key) for poison in plan.poisoned)]
        return self.manifests[max(usable)] if usable else ()

    def _check_newest(self, plan: Plan, history: History) -> None:
        """S4 by brute force: no newer state is trusted, in order, and held by all.

        Poison speaks of step numbers and a generation, and so also covers what that generation trained anew; that much
        is given up on purpose. A start from nothing forgets step 0, which is no loss.
        """
        bad = self.lost_tokens | self.poisoned_tokens
        covered = [entry.covers for entry in self.job.known.poison]
        per_rank = [
            {
                history
                for holding, history in s.ring.values()
                if (holding.certified or holding.parting) and history and not set(history) & bad
                if not any(covers(holding.step, holding.generation) for covers in covered)
            }
            for s in self.supervisors
        ]
        if self.options.replicated:
            # Of a rank that holds nothing nobody knows whose replica it is.
            anywhere = set[History]().union(*per_rank)
            per_rank = [anywhere if s.ring else own for s, own in zip(self.supervisors, per_rank, strict=True)]
        whole = set.intersection(*per_rank)
        newest = max((len(history) for history in whole), default=0)
        if newest > len(history):
            raise Violation(f"S4: step {newest} is whole, with plan {plan.tier.value} the ranks take {len(history)}")

    def _check_nobody_runs(self, generation: int, when: str) -> None:
        for supervisor in self.supervisors:
            if supervisor.alive and supervisor.trainer is not None and supervisor.trainer.generation < generation:
                raise Violation(f"{when}, and rank {supervisor.rank} runs {supervisor.trainer.generation}")

    # ---- a supervisor

    def _join(self, supervisor: Supervisor) -> None:
        member = Member(host="h", pid=supervisor.pid, shm_dir=f"/shm/{supervisor.pid}")
        self._apply(Joined(rank=supervisor.rank, member=member))  # a call: its answer says what to be ready for
        supervisor.asked = self.job.awaited

    def _say_ready(self, supervisor: Supervisor) -> None:
        supervisor.is_ready = True
        inventory = Inventory(
            host="h", shm_dir=f"/shm/{supervisor.pid}", holdings=tuple(h for h, _ in supervisor.ring.values())
        )
        supervisor.following = ""
        ready = Ready(rank=supervisor.rank, generation=supervisor.asked, inventory=inventory)
        self._apply(ready)
        if self.random.random() < self.options.duplicate:
            self._send("ready", (supervisor.pid, ready))

    def _supervise(self, supervisor: Supervisor) -> None:
        if supervisor.over:
            return
        if not supervisor.is_ready:
            self._say_ready(supervisor)
            return
        if supervisor.answer is None:
            if generations.is_behind(self.job, supervisor.asked):
                raise Violation(f"S7: the coordinator forgot generation {supervisor.asked}")
            told = generations.directive(self.job, supervisor.rank, supervisor.asked)
            if told.order.value != supervisor.following and told.order is not Order.WAIT:
                supervisor.answer = (told, self.job.plan)
            elif self.random.random() < 0.02:
                self._apply(Tick())
            return
        (told, plan), supervisor.answer = supervisor.answer, None
        supervisor.following = told.order.value
        if told.order is Order.RUN:
            assert plan is not None
            self._start(supervisor, told.generation, plan)
        elif told.order is Order.END:
            self._part(supervisor)
            supervisor.trainer = None
            supervisor.asked = told.generation + 1
            supervisor.is_ready = False
        else:
            supervisor.trainer = None if told.order is Order.STOP else supervisor.trainer
            supervisor.over = True

    def _start(self, supervisor: Supervisor, generation: int, plan: Plan) -> None:
        if supervisor.trainer is not None:
            raise Violation(f"S13: rank {supervisor.rank} starts {generation} while it runs {supervisor.trainer}")
        if plan != self.plans[generation]:
            raise Violation(f"S1: rank {supervisor.rank} acts on another plan")
        self._check_nobody_runs(generation, f"S13: rank {supervisor.rank} starts {generation}")
        if plan.tier is Tier.MEMORY:
            source = plan.sources[supervisor.rank]
            holding, history = self.supervisors[source.rank].ring.get(source.slot, (None, ()))
            if holding is None or holding.step != plan.step:
                # The generation is ending already: the memory that it was to start from is gone or written again.
                cause = Cause(kind=CauseKind.EXCEPTION, exception_type="StoreGone")
                death = Death(rank=supervisor.rank, cause=cause, step=plan.step)
                self._send("event", Died(generation=generation, death=death))
                return
        else:
            history = self.restored[generation]
        if self.random.random() < 0.5:  # else it does not come to clearing its memory of what was abandoned
            supervisor.ring = {k: v for k, v in supervisor.ring.items() if len(v[1]) <= len(history)}
        supervisor.trainer = Trainer(generation=generation, history=history)
        if plan.tier is Tier.NONE and history:
            self._send("event", WentBack(rank=supervisor.rank, generation=generation, step=len(history)))

    def _part(self, supervisor: Supervisor) -> None:
        """A survivor saves its last step before it goes."""
        if supervisor.alive and self.random.random() < 0.8:
            assert supervisor.trainer is not None
            self._hold(supervisor, supervisor.trainer, parting=True)

    # ---- a trainer: the ranks step together, at most one step apart

    def _train(self, supervisor: Supervisor) -> None:
        trainer = supervisor.trainer
        if trainer is None or trainer.finished:
            return
        peers = [s.trainer for s in self.supervisors if s.trainer and s.trainer.generation == trainer.generation]
        if len(peers) < self.options.world_size:
            return  # blocked in a collective: a peer has not started or is gone
        step = len(trainer.history)
        if min(len(peer.history) for peer in peers) < step:
            return
        if step >= self.options.target_step:
            trainer.finished = True
            self._send("event", Finished(rank=supervisor.rank, generation=trainer.generation))
            return
        ahead = next((peer.history for peer in peers if len(peer.history) > step), None)
        if ahead is None:
            ahead = (*trainer.history, self.next_token)
            self.next_token += 1
        trainer.history = ahead
        self._send("event", Progressed(rank=supervisor.rank, generation=trainer.generation, step=len(ahead)))
        self._certify(supervisor)
        if len(ahead) % SNAPSHOT_EVERY == 0:
            self._hold(supervisor, trainer, parting=False)

    def _certify(self, supervisor: Supervisor) -> None:
        """All ranks have done the step before, so the vote on older snapshots is in."""
        trainer = supervisor.trainer
        assert trainer is not None
        for slot, (holding, history) in list(supervisor.ring.items()):
            if (
                not holding.certified
                and holding.step < len(trainer.history)
                and holding.generation == trainer.generation
            ):
                supervisor.ring[slot] = (dataclasses.replace(holding, certified=True), history)
                self.certified.add(history)
                shard = Shard(
                    rank=supervisor.rank,
                    generation=trainer.generation,
                    step=holding.step,
                    url="store",
                    part={"history": history},
                )
                self._send("shard", shard)

    def _hold(self, supervisor: Supervisor, trainer: Trainer, *, parting: bool) -> None:
        free = [slot for slot in range(RING_SLOTS) if slot not in supervisor.ring]
        oldest = min(supervisor.ring, key=lambda slot: supervisor.ring[slot][0].step, default=0)
        slot = self.random.choice(free) if free else oldest
        holding = Holding(
            step=len(trainer.history),
            slot=slot,
            generation=trainer.generation,
            parting=parting,
            replica_key=int(self.options.replicated),
        )
        if parting:
            self.certified.add(trainer.history)
        supervisor.ring[slot] = (holding, trainer.history)

    # ---- what goes wrong

    def _fault(self) -> None:
        kind = self.random.choice(sorted(self.faults))
        if self.faults[kind] == 0 or self.random.random() < 0.5:
            return
        if getattr(self, f"_fault_{kind}")():
            self.faults[kind] -= 1
            self._count(kind)

    def _fault_kill(self) -> bool:
        victims = [s for s in self.supervisors if s.alive]
        self.random.shuffle(victims)
        for supervisor in victims[: self.random.choice((1, 1, 2, len(victims)))]:
            trainer, supervisor.trainer = supervisor.trainer, None
            assert trainer is not None
            cause = Cause(kind=CauseKind.SIGNAL, signal=9)
            death = Death(rank=supervisor.rank, cause=cause, step=len(trainer.history))
            self._send("event", Died(generation=trainer.generation, death=death))
        return bool(victims)

    def _fault_replace(self) -> bool:
        """A supervisor dies with its process and its memory; its launcher starts another."""
        if self.job.phase.is_over:
            return False
        rank = self.random.randrange(self.options.world_size)
        self.supervisors[rank] = Supervisor(rank=rank, pid=self.next_pid)
        self.next_pid += 1
        self._join(self.supervisors[rank])
        return True

    def _fault_restart(self) -> bool:
        """The coordinator loses what is not in its journal."""
        if self.job.phase.is_over:
            return False
        if self.durable is None:
            self.job = Job(since_s=self.now_s)
            for supervisor in self.supervisors:
                member = Member(host="h", pid=supervisor.pid, shm_dir=f"/shm/{supervisor.pid}")
                self._apply(Joined(rank=supervisor.rank, member=member))
        else:
            self.job = job.revive(self.config, self.durable, self.now_s)
        saves = Saves(world_size=self.options.world_size, poisoned=self.job.known.poison)
        self.saves = commits.open_for(saves, self.job.generation)
        return True

    def _fault_poison(self) -> bool:
        """A fault is traced back: all ranks go back in memory, and say what is bad."""
        trainers = [s.trainer for s in self.supervisors]
        steps = {len(t.history) for t in trainers if t is not None and not t.finished}
        numbers = {t.generation for t in trainers if t is not None}
        if None in trainers or len(steps) != 1 or len(numbers) != 1 or any(t and t.finished for t in trainers):
            return False
        (now,), (generation,) = steps, numbers
        held = [{h for holding, h in s.ring.values() if holding.certified} for s in self.supervisors]
        common = [
            h for h in set.intersection(*held) if len(h) < now and trainers[0] and trainers[0].history[: len(h)] == h
        ]
        if not common or self.job.phase is not Phase.RUNNING or self.job.generation != generation:
            return False
        target = self.random.choice(sorted(common))
        bad = {token for t in trainers if t is not None for token in t.history[len(target) :]}
        self.poisoned_tokens |= bad
        for supervisor in self.supervisors:
            assert supervisor.trainer is not None
            supervisor.trainer.history = target
            supervisor.ring = {k: v for k, v in supervisor.ring.items() if not set(v[1]) & bad}
        poison = Poison(from_step=len(target) + 1, to_step=now, generation=generation)
        self._apply(Poisoned(poison=poison))
        self.saves = commits.poison(self.saves, self.job.known.poison)
        return True


def done_everywhere(model: Model) -> bool:
    """Every rank's process ended at the last step of one history."""
    histories = {s.trainer.history for s in model.supervisors if s.trainer is not None}
    return len(histories) == 1 and all(len(h) == model.options.target_step for h in histories)


__all__ = ["CommitStatus", "Model", "Options", "Violation", "done_everywhere"]
