"""Drives the rules of `protocol` with what ranks say, and answers them. Thread-safe; knows no transport.

A message is a dict, its answer is a dict; `call` is the only entry. Each message is taken under one lock, handed to the
pure rules, journaled when the rules ask for it, and only then visible to anybody. Long polls wait on one condition.

What comes out of order, twice or from the past is the rules' business; see `protocol.generations`.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arc_dist.coordinator import view
from arc_dist.coordinator.board import Board, Reading
from arc_dist.coordinator.chronicle import Chronicle
from arc_dist.coordinator.eviction import EvictionDesk
from arc_dist.coordinator.hangs import HangDesk
from arc_dist.coordinator.hosts import HostDesk
from arc_dist.coordinator.journal import Journal
from arc_dist.coordinator.peers import PeerDesk
from arc_dist.coordinator.records import (
    INCIDENTS_NAME,
    describe,
    identity_of,
    member_of,
    read_cause,
    read_holding,
    read_listed,
)
from arc_dist.coordinator.saves import CommitPort, SaveDesk, default_commit
from arc_dist.coordinator.spares import SpareDesk
from arc_dist.coordinator.wire import MAX_POLL_S, Fields
from arc_dist.errors import ConfigError, CoordinatorUnavailable, Deposed, Fenced, StoreError
from arc_dist.protocol import commit as commits
from arc_dist.protocol import generations
from arc_dist.protocol.budgets import BudgetPolicy, Death
from arc_dist.protocol.commit import Saves
from arc_dist.protocol.events import (
    Died,
    Event,
    Finished,
    GenerationEnds,
    GenerationOver,
    GenerationRuns,
    JobOver,
    Joined,
    Poisoned,
    Preempted,
    Progressed,
    Ready,
    Settled,
    StateMatters,
    Tick,
    WentBack,
)
from arc_dist.protocol.generations import Order
from arc_dist.protocol.job import Job, JobConfig, Member, Phase, durable, revive
from arc_dist.protocol.pick import Poison
from arc_dist.protocol.pulse import PulseRules
from arc_dist.protocol.sources import Inventory

logger = logging.getLogger("arc_dist.coordinator")

JOURNAL_NAME = "journal.log"
_METHODS = (
    *("join", "ready", "died", "finished", "directive", "preempt", "watched", "pulse", "stand_by"),  # supervisors
    *("shard", "give_up_save", "commit_status", "progress", "restored", "poison", "hello_store", "worlds"),
    *("incident", "report", "status"),  # what people read
)
_LOCKLESS = frozenset({"incident", "report", "status", "pulse"})  # nobody may wait for them
_MAX_HOLDINGS = 64
_MAX_QUIET_S = 1e9
_APPEND_AGAIN_S = 1.0


class Coordinator:
    """The service. Constructing it does no I/O; `Coordinator.open` also opens the journal in a run directory.

    Args:
        world_size: number of ranks.
        job_id: named in answers and logs.
        run_dir: where ``incidents.jsonl`` goes; None keeps none.
        journal: where decisions go, and from where they come back; None forgets them.
        clock: monotonic seconds.
        max_restarts: see `protocol.budgets`.
        max_fruitless: see `protocol.budgets`.
        commit: writes manifests; default: the checkpoint store's.
        starting_timeout_s: see `protocol.job.JobConfig`.
        ending_timeout_s: see `protocol.job.JobConfig`.
        hosts: finds supervisors that are lost; None finds none.
        spare_after_s: how long a rank may be silent while a generation ends before a spare takes its place.
        evicts: whether hosts that are suspected or slow are left out at restarts.
    """

    def __init__(
        self,
        world_size: int,
        *,
        job_id: str = "local",
        run_dir: Path | None = None,
        journal: Journal | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_restarts: int = 100,
        max_fruitless: int = 3,
        commit: CommitPort = default_commit,
        starting_timeout_s: float = 600.0,
        ending_timeout_s: float = 60.0,
        hosts: HostDesk | None = None,
        spare_after_s: float = 15.0,
        evicts: bool = False,
    ) -> None:
        self._config = JobConfig(
            world_size=world_size,
            budget=BudgetPolicy(max_restarts=max_restarts, max_fruitless=max_fruitless),
            starting_timeout_s=starting_timeout_s,
            ending_timeout_s=ending_timeout_s,
        )
        self.job_id = job_id
        self._journal = journal
        self.epoch = journal.epoch if journal is not None else 1  # tells this coordinator from an earlier one
        self._clock = clock
        self._changed = threading.Condition()
        self._deposed_by: int | None = None
        self._closed = False
        self._told: set[int] = set()  # ranks that were told that the job is over
        self._journal_error: str | None = None
        self._append_again_s = 0.0
        self._store: dict[str, Any] | None = None  # rank 0's rendezvous store for the generation that starts or runs
        self._board = Board()
        self._chronicle = Chronicle(job_id, run_dir, self._board)
        # Names the job through all its restarts, as long as its journal is kept: what memory holds is known by it.
        last = journal.last if journal is not None else None
        self._lineage = str((last or {}).get("lineage") or secrets.token_hex(16))
        self._job = self._revived(journal)
        saves = Saves(world_size=world_size, poisoned=self._job.known.poison)
        self._saves = SaveDesk(
            commits.open_for(saves, self._job.generation),
            commit=commit,
            about={"job_id": job_id, "epoch": self.epoch},
            changed=self._changed,
            clock=clock,
        )
        self._hosts = hosts or HostDesk(world_size, PulseRules(), clock)
        self._peers = PeerDesk(world_size)
        self._hangs = HangDesk(world_size, run_dir, clock, self._chronicle.note)
        note = self._chronicle.note
        self._spares = SpareDesk(spare_after_s, clock, changed=self._changed, note=note, seated=self._seated)
        self._evictions = EvictionDesk(evicts, self._hosts, self._spares, self._hangs, note)
        self._methods: dict[str, Callable[[Fields], dict[str, Any]]] = {
            name: getattr(self, f"_{name}") for name in _METHODS
        }

    @staticmethod
    def open(world_size: int, *, run_dir: Path, **settings: Any) -> Coordinator:
        """A coordinator with its journal in `run_dir`. `settings` as for the constructor.

        Raises:
            ConfigError: another coordinator uses `run_dir`, or it cannot be written.
            StoreCorrupt: the journal there was altered.
        """
        coordinator = Coordinator(world_size, run_dir=run_dir, journal=Journal.open(run_dir / JOURNAL_NAME), **settings)
        try:
            coordinator._board.load(run_dir / INCIDENTS_NAME)
        except OSError as error:
            logger.warning("earlier incidents of the job will not be shown: %s", error)
        return coordinator

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._config.world_size

    @property
    def job(self) -> Job:
        """The state of the job, which never changes in place."""
        return self._job

    @property
    def saves(self) -> Saves:
        """The state of the saves, which never changes in place."""
        return self._saves.saves

    @property
    def methods(self) -> frozenset[str]:
        """What `call` understands."""
        return frozenset(self._methods)

    def call(self, method: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Takes one message and answers it. Blocks only in long polls, at most `MAX_POLL_S`.

        Raises:
            ConfigError: no such method, or fields that are missing or wrong.
            Fenced: this coordinator was replaced by a newer one, or the sender's supervisor was.
        """
        if method not in self.methods:
            raise ConfigError(f"there is no method {method!r}; known: {', '.join(sorted(self.methods))}")
        fields = Fields(method, body)
        self._check_epoch(fields)
        if method in _LOCKLESS:
            answer = self._methods[method](fields)
        else:
            with self._changed:
                self._check_sender(fields)
                answer = self._methods[method](fields)
        if method == "watched":
            self._hangs.publish()  # not under the lock: it writes files
        return {**answer, "epoch": self.epoch}

    def close(self) -> None:
        """Closes the journal; calls that wait are answered with an error."""
        with self._changed:
            self._closed = True
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            self._changed.notify_all()

    def wait_told(self, timeout_s: float) -> bool:
        """Waits until the job is over and every rank that joined has asked and been told so. True when that is so."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closed or (self._job.phase.is_over and self._told.issuperset(self._job.members)),
                timeout_s,
            )

    # ---- membership and generations

    def _join(self, fields: Fields) -> dict[str, Any]:
        rank = self._rank(fields)
        world_size = fields.integer("world_size", minimum=1)
        if world_size != self._config.world_size:
            raise ConfigError(
                f"rank {rank} says that the world has {world_size} ranks, the coordinator of job {self.job_id} says "
                f"{self._config.world_size}. Start all ranks of a job alike.",
                rank=rank,
            )
        member = Member(host=fields.text("host"), pid=fields.integer("pid"), shm_dir=fields.text("shm_dir"))
        self._apply(Joined(rank=rank, member=member))
        return {"generation": self._job.awaited, "sender": identity_of(member), "lineage": self._lineage}

    def _ready(self, fields: Fields) -> dict[str, Any]:
        rank, generation = self._rank(fields), fields.integer("generation")
        holdings = tuple(read_holding(entry) for entry in fields.mappings("inventory", max_items=_MAX_HOLDINGS))
        inventory = Inventory(host=fields.text("host"), shm_dir=fields.text("shm_dir"), holdings=holdings)
        inventory = self._peers.take(rank, fields.mapping_or_none("peer"), inventory)
        # A restarted coordinator may have forgotten a first join, which is not journaled. Were the member not known
        # when the generation runs, its successor would be taken for the first one, and nobody would end what it left.
        member = member_of(fields.text("sender", default=""), inventory.host, inventory.shm_dir)
        if member is not None and rank not in self._job.members:
            self._apply(Joined(rank=rank, member=member))
        self._evictions.consider(rank, generation, self._job, self._config, self._apply)
        self._check_sender(fields)
        store = fields.mapping_or_none("store")
        if store is not None and generation == self._job.generation + (self._job.phase is not Phase.STARTING):
            self._store = dict(store)
        self._apply(Ready(rank=rank, generation=generation, inventory=inventory))
        return self._where()

    def _died(self, fields: Fields) -> dict[str, Any]:
        cause = read_cause(fields.mapping("cause"))
        death = Death(rank=self._rank(fields), cause=cause, step=fields.integer_or_none("step"))
        self._apply(Died(generation=fields.integer("generation"), death=death))
        return self._where()

    def _finished(self, fields: Fields) -> dict[str, Any]:
        self._apply(Finished(rank=self._rank(fields), generation=fields.integer("generation")))
        return self._where()

    def _progress(self, fields: Fields) -> dict[str, Any]:
        generation, step = fields.integer("generation"), fields.integer("step")
        self._apply(Progressed(rank=self._rank(fields), generation=generation, step=step))
        return self._where()

    def _restored(self, fields: Fields) -> dict[str, Any]:
        generation, step = fields.integer("generation"), fields.integer("step")
        self._apply(WentBack(rank=self._rank(fields), generation=generation, step=step))
        return self._where()

    def _preempt(self, fields: Fields) -> dict[str, Any]:
        self._apply(Preempted(rank=self._rank(fields)))
        return self._where()

    def _watched(self, fields: Fields) -> dict[str, Any]:
        return self._hangs.take(self._rank(fields), fields, self._job)

    def _pulse(self, fields: Fields) -> dict[str, Any]:
        self._check_sender(fields)
        is_leaving = fields.boolean("leaving", default=False)
        vanished = self._hosts.hear(self._rank(fields), fields.integer("node"), is_leaving=is_leaving)
        if vanished is not None:
            with self._changed:
                self._apply(self._spares.consider(vanished))
        return self._where()

    def _stand_by(self, fields: Fields) -> dict[str, Any]:
        return self._spares.wait(fields, lambda: self._job, self._apply, self._check_alive)

    def _directive(self, fields: Fields) -> dict[str, Any]:
        """Long poll. `after` is the kind of order that the asker already follows; another one is an answer."""
        rank, generation = self._rank(fields), fields.integer("generation")
        after = fields.text("after", default="")
        deadline_s = self._clock() + fields.number("timeout_s", default=0.0, maximum=MAX_POLL_S)
        while True:
            self._check_sender(fields)  # whose place may have been taken while it waited
            self._apply(Tick())
            self._check_alive()
            if generations.is_behind(self._job, generation):
                raise Fenced(
                    f"rank {rank} asks about generation {generation}, but this coordinator's memory ends with "
                    f"{self._job.generation}: its journal was lost. Restart the job.",
                    rank=rank,
                )
            told = generations.directive(self._job, rank, generation, following=after)
            remaining_s = deadline_s - self._clock()
            if told.order is not Order.WAIT and told.order.value != after:
                return self._directive_answer(rank, told)
            if remaining_s <= 0:
                return {"kind": Order.WAIT.value}
            due_s = generations.deadline_s(self._config, self._job)
            if due_s is not None:
                remaining_s = min(remaining_s, max(0.01, due_s - self._clock()))
            self._changed.wait(remaining_s)

    def _directive_answer(self, rank: int, told: generations.Directive) -> dict[str, Any]:
        if told.order in (Order.STOP, Order.DONE):
            self._told.add(rank)
            self._changed.notify_all()
        answer: dict[str, Any] = {"kind": told.order.value, "generation": told.generation, "reason": told.reason}
        if told.order is Order.END:
            answer["leaving"] = told.leaving
        if told.order is Order.RUN and self._job.plan is not None:
            answer |= {"plan": {**self._job.plan.as_dict(), "flush": self._job.flushing}, "store": self._store}
            answer["peers"] = self._peers.directions(rank, self._job.plan)
        if told.order is Order.STOP and self._job.stop is not None:
            stop = self._job.stop
            answer |= {"exit_code": stop.exit_code, "blame_rank": stop.blame_rank, "traceback": stop.traceback}
            answer["survivors"] = [list(survivor) for survivor in stop.survivors]
        return answer

    # ---- checkpoints

    def _shard(self, fields: Fields) -> dict[str, Any]:
        return self._saves.take_shard(self._rank(fields), fields, self._apply)

    def _give_up_save(self, fields: Fields) -> dict[str, Any]:
        return self._saves.give_up(self._rank(fields), fields)

    def _commit_status(self, fields: Fields) -> dict[str, Any]:
        return self._saves.outcome(fields, self._check_alive)

    def _hello_store(self, fields: Fields) -> dict[str, Any]:
        self._apply(read_listed(fields))
        return self._where()

    def _worlds(self, fields: Fields) -> dict[str, Any]:
        self._evictions.take_worlds(fields)
        return self._where()

    def _poison(self, fields: Fields) -> dict[str, Any]:
        poison = Poison(
            from_step=fields.integer("from_step"),
            to_step=fields.integer("to_step"),
            generation=fields.integer("generation"),
        )
        if poison.to_step < poison.from_step:
            raise ConfigError(f"poison: from_step {poison.from_step} is after to_step {poison.to_step}")
        self._apply(Poisoned(poison=poison))
        self._saves.poison(self._job.known.poison)
        return self._where()

    # ---- what people read

    def facts(self) -> tuple[view.Facts, Reading]:
        """What descriptions are made of. The rules' state never changes but is replaced, so nothing waits for this.

        Raises:
            Fenced, CoordinatorUnavailable: as `call`.
        """
        self._check_alive()
        facts = view.Facts(
            job_id=self.job_id,
            epoch=self.epoch,
            world_size=self.world_size,
            job=self._job,
            saves=self._saves.describe(),
            journal_error=self._journal_error,
            now_s=self._clock(),
            wall_s=time.time(),
        )
        return facts, self._board.read()

    def view(self) -> dict[str, Any]:
        """The state of the job for people, of bounded size; see `view.status`."""
        return view.status(*self.facts())

    def history(self) -> dict[str, Any]:
        """Samples of progress, and what happened; see `view.history`."""
        return view.history(*self.facts())

    def incidents(self, after: int, limit: int) -> dict[str, Any]:
        """Incidents with an id above `after`, oldest first; `next` is the `after` to ask with for those that follow."""
        self._check_alive()
        incidents, count = self._board.incidents_after(after, limit)
        newest = incidents[-1]["id"] if incidents else min(after, count)
        return {"incidents": incidents, "next": newest, "count": count, "epoch": self.epoch}

    def _incident(self, fields: Fields) -> dict[str, Any]:
        return {"recorded": self._chronicle.record(fields.others())}

    def _report(self, fields: Fields) -> dict[str, Any]:
        rank, generation, step = self._rank(fields), fields.integer("generation"), fields.integer("step")
        held = [Fields("report", entry).integer("step") for entry in fields.mappings("held", max_items=_MAX_HOLDINGS)]
        quiet_s = fields.number_or_none("quiet_s", maximum=_MAX_QUIET_S)
        if generation <= self._job.generation:
            self._board.note_where(rank, generation, step, quiet_s, held)
        return self._where()

    def _status(self, fields: Fields) -> dict[str, Any]:
        return {
            "job_id": self.job_id,
            "world_size": self._config.world_size,
            **describe(self._job),
            "saves": self._saves.describe(),
            "journal_error": self._journal_error,
        }

    # ---- inside

    def _apply(self, event: Event) -> None:
        """Lets the rules answer, makes durable what must be, and only then shows it to others."""
        outcome = generations.apply(self._config, self._job, event, self._clock())
        if outcome.job is self._job and not outcome.actions:
            self._append_late()
            return
        if any(
            isinstance(action, (GenerationEnds, GenerationRuns, JobOver, StateMatters)) for action in outcome.actions
        ):
            self._append(outcome.job)
        self._job = outcome.job
        if isinstance(event, Settled) and event.committed is not None:
            self._board.note_commit(event.committed.step, event.committed.url)
        for action in outcome.actions:
            if isinstance(action, GenerationEnds):
                logger.info("generation %d ends: %s", action.generation, action.death)
            elif isinstance(action, GenerationOver):
                self._saves.open_for(outcome.job.generation)
                logger.info("generation %d is over: %s", action.generation, action.judgement.reason)
                self._chronicle.generation_over(action)
            elif isinstance(action, GenerationRuns):
                plan = action.plan
                logger.info("generation %d runs: %s", plan.generation, plan.reason)
                self._board.note_generation(plan.generation, plan.step, plan.tier.value, plan.reason)
            elif isinstance(action, JobOver):
                self._saves.open_for(None)
                self._chronicle.job_over(action)
        self._changed.notify_all()

    def _append(self, job: Job) -> None:
        """A journal that cannot be written is lost protection, not a reason to stop a job: said once, and shown."""
        if self._journal is None:
            return
        try:
            record = {"world_size": self._config.world_size, "store": self._store, "lineage": self._lineage}
            self._journal.append({**durable(job), **record})
            self._journal_error = None
        except StoreError as error:
            if self._journal_error is None:
                logger.warning("%s; a restarted coordinator would not know it", error)
            self._journal_error = str(error)
        except Deposed:
            self._deposed_by = self.epoch + 1  # at least
            raise

    def _append_late(self) -> None:
        """Tries again to make durable what the journal did not take, now and then, while nothing else happens."""
        if self._journal_error is not None and self._clock() >= self._append_again_s:
            self._append_again_s = self._clock() + _APPEND_AGAIN_S
            self._append(self._job)

    def _revived(self, journal: Journal | None) -> Job:
        if journal is None or journal.last is None:
            return Job(since_s=self._clock())
        self._store = journal.last["store"]
        return revive(self._config, journal.last, self._clock())

    def _seated(self, rank: int) -> None:
        """Another host has the rank now: it was not heard yet, and nothing is known of its speed."""
        self._hosts.expect(rank)
        self._hangs.forget(rank)

    def _rank(self, fields: Fields) -> int:
        rank = fields.integer("rank")
        if rank >= self._config.world_size:
            raise ConfigError(f"there is no rank {rank} in a world of {self._config.world_size}", rank=rank)
        return rank

    def _where(self) -> dict[str, Any]:
        return {"phase": self._job.phase.value, "generation": self._job.generation}

    def _check_epoch(self, fields: Fields) -> None:
        epoch = fields.integer("epoch", default=0)
        if epoch > self.epoch:
            self._deposed_by = epoch
        self._check_alive()

    def _check_alive(self) -> None:
        if self._closed:
            raise CoordinatorUnavailable(f"the coordinator of job {self.job_id} was closed; nothing can be asked of it")
        if self._deposed_by is not None:
            raise Deposed(
                f"this coordinator (epoch {self.epoch}) was replaced by a newer one (epoch {self._deposed_by})",
                epoch=self._deposed_by,
            )

    def _check_sender(self, fields: Fields) -> None:
        """A supervisor that was replaced is told so: it must not start a second process for its rank.

        A job that is over takes no new members and starts nothing; whoever asks is told the end.
        """
        sender = fields.text("sender", default="")
        self._evictions.check(sender)
        if not sender or self._job.phase.is_over:
            return
        rank = self._rank(fields)
        member = self._job.members.get(rank)
        if member is not None and identity_of(member) != sender:
            raise Fenced(f"another supervisor has taken the place of this one for rank {rank}; end", rank=rank)
