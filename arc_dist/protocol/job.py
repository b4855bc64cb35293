"""What is known about a job, and which part of it must outlive the coordinator.

The rules that change it are in `generations`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from arc_dist.protocol.budgets import BudgetPolicy, Cause, Death, Ledger
from arc_dist.protocol.hosts import Blamed
from arc_dist.protocol.pick import Committed, Inventory, Known, Plan, Poison, Restored, newest_committed
from arc_dist.protocol.pulse import Survivors


class Phase(enum.Enum):
    """Where a job is; the arrows between these are in `generations`."""

    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    DONE = "done"
    STOPPED = "stopped"

    @property
    def is_over(self) -> bool:
        return self in (Phase.DONE, Phase.STOPPED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What does not change in a job's life.

    Attributes:
        world_size: number of ranks; all of them make a generation.
        budget: how often to try again.
        starting_timeout_s: until every rank must be ready to start.
        ending_timeout_s: until every rank must have ended its process of an ending generation.
        commit_wait_s: how long a start waits for a checkpoint whose manifest is being written.
    """

    world_size: int
    budget: BudgetPolicy = dataclasses.field(default_factory=BudgetPolicy)
    starting_timeout_s: float = 600.0
    ending_timeout_s: float = 60.0
    commit_wait_s: float = 10.0

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"JobConfig.world_size must be 1 or more, got {self.world_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A rank's supervisor. Another one of these for the same rank means that the old one and its process are gone."""

    host: str
    pid: int
    shm_dir: str

    def as_dict(self) -> dict[str, Any]:
        return {"host": self.host, "pid": self.pid, "shm_dir": self.shm_dir}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """Why the job ended without being done.

    Attributes:
        exit_code: the job's.
        reason: for people.
        blame_rank: the rank that failed first, where one did.
        traceback: of the exception that it failed with, where it was one.
        lost: ranks whose supervisors are lost, when that is why.
        survivors: (rank, node) of those that go on as a smaller world without them.
        is_eviction: the lost ones are alive, and are left out on purpose.
    """

    exit_code: int
    reason: str
    blame_rank: int | None = None
    traceback: str = ""
    lost: tuple[int, ...] = ()
    survivors: Survivors = ()
    is_eviction: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The state. The fields from `deaths` on speak of the present generation, or, in ENDING, of the one that ends.

    Attributes:
        first: the first generation of this job.
        members: the supervisors that have joined.
        known: committed checkpoints, poison, and what was restored.
        ledger: what the budgets have spent.
        plan: what the present generation restored; None before the first.
        ready: what each rank that is ready for the next start holds in memory.
        deaths: in the order of their reports, at most one per rank.
        finished: ranks whose script ended well.
        reached: the furthest committed step that was heard of.
        preempted: a preemption notice came in.
        flushing: the present generation trains no more: it writes what memory holds to the store, and ends.
        blamed: recent deaths that hosts may have caused; kept across generations.
        committing: steps whose manifest is being written.
        since_s: when the phase began.
        stop: set in STOPPED.
    """

    phase: Phase = Phase.STARTING
    generation: int = 0
    first: int = 0
    members: Mapping[int, Member] = dataclasses.field(default_factory=dict[int, Member])
    known: Known = dataclasses.field(default_factory=Known)
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    plan: Plan | None = None
    ready: Mapping[int, Inventory] = dataclasses.field(default_factory=dict[int, Inventory])
    deaths: tuple[Death, ...] = ()
    finished: frozenset[int] = frozenset()
    reached: int = 0
    preempted: bool = False
    flushing: bool = False
    blamed: tuple[Blamed, ...] = ()
    committing: frozenset[int] = frozenset()
    since_s: float = 0.0
    stop: Stop | None = None

    @property
    def awaited(self) -> int:
        """The generation that a rank which has nothing running should be ready for."""
        return self.generation + 1 if self.phase is Phase.ENDING else self.generation


def durable(job: Job) -> dict[str, Any]:
    """The part of the state that a restarted coordinator needs, as JSON.

    Readiness is left out: it is a statement about processes at a moment, and ranks of which none is known are asked for
    it again. So is progress between decisions, and the list of committed checkpoints: the stores hold the truth, and a
    store that was emptied in between must not be believed full. Of the newest it is remembered that there was one, so
    that memory which is older is not taken for the newest state.

    The number of ranks is the caller's to add, as `world_size`.
    """
    newest = newest_committed(job.known) or job.known.remembered
    return {
        "phase": job.phase.value,
        "generation": job.generation,
        "first": job.first,
        "remembered": dataclasses.asdict(newest) if newest else None,
        "members": {str(rank): member.as_dict() for rank, member in job.members.items()},
        "poison": [dataclasses.asdict(poison) for poison in job.known.poison],
        "restored": [dataclasses.asdict(restored) for restored in job.known.restored],
        "ledger": job.ledger.as_dict(),
        "plan": job.plan.as_dict() if job.plan else None,
        "deaths": [{"rank": death.rank, "cause": death.cause.as_dict(), "step": death.step} for death in job.deaths],
        "finished": sorted(job.finished),
        "reached": job.reached,
        "preempted": job.preempted,
        "flushing": job.flushing,
        "blamed": [dataclasses.asdict(entry) for entry in job.blamed],
        "stop": dataclasses.asdict(job.stop) if job.stop else None,
    }


def revive(config: JobConfig, record: Mapping[str, Any], now_s: float) -> Job:
    """The state of a job whose coordinator was restarted.

    A job that was over begins anew, with fresh budgets, since somebody started it again. So does one that goes on with
    another number of ranks: who was a member, finished or died says nothing about the ranks of now, and what they held
    in memory is not theirs. Generations are counted on, so that poison and abandonment still mean what they meant.

    Raises:
        KeyError, ValueError, TypeError: the record was not made by `durable`.
    """
    known = Known(
        poison=tuple(Poison(**poison) for poison in record["poison"]),
        restored=tuple(Restored(**restored) for restored in record["restored"]),
        remembered=Committed(**record["remembered"]) if record.get("remembered") else None,
    )
    phase, generation = Phase(record["phase"]), int(record["generation"])
    if phase.is_over or record.get("world_size", config.world_size) != config.world_size:
        return Job(generation=generation + 1, first=generation + 1, known=known, since_s=now_s)
    return Job(
        phase=phase,
        generation=generation,
        first=int(record["first"]),
        members={int(rank): Member(**member) for rank, member in record["members"].items()},
        known=known,
        ledger=Ledger.from_dict(record["ledger"]),
        plan=Plan.from_dict(record["plan"]) if record["plan"] else None,
        deaths=tuple(
            Death(rank=int(death["rank"]), cause=Cause.from_dict(death["cause"]), step=death["step"])
            for death in record["deaths"]
        ),
        finished=frozenset(record["finished"]),
        reached=int(record["reached"]),
        preempted=bool(record["preempted"]),
        flushing=bool(record.get("flushing", False)),
        blamed=tuple(Blamed(**entry) for entry in record.get("blamed", ())),
        since_s=now_s,
    )
