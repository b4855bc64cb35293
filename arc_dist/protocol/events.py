"""The vocabulary of a job's life: what can be heard, and what there is to do about it.

An event is one message that arrived or one thing that was noticed. An action is what the caller of the rules does
beyond telling the ranks; its docstring says what must be durable first.
"""

from __future__ import annotations

import dataclasses

from arc_dist.protocol.budgets import Death, Judgement
from arc_dist.protocol.job import Member, Stop
from arc_dist.protocol.pick import Committed, Inventory, Plan, Poison
from arc_dist.protocol.pulse import Survivors

# ---- events: what is heard -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
    """A supervisor is there."""

    rank: int
    member: Member


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """No process of the rank's older generations is left, and it can start `generation`."""

    rank: int
    generation: int
    inventory: Inventory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Died:
    """The rank's process of `generation` is gone."""

    generation: int
    death: Death

    @property
    def rank(self) -> int:
        return self.death.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """The rank's script of `generation` ended with exit code 0."""

    rank: int
    generation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressed:
    """The rank committed `step`."""

    rank: int
    generation: int
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WentBack:
    """The ranks of `generation` restored `step`: older than planned, or what they found where no plan was."""

    rank: int
    generation: int
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preempted:
    """The rank's host was told to go."""

    rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisoned:
    """States in a range of steps are bad."""

    poison: Poison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """A store said which checkpoints it holds; it replaces what was known of that store."""

    url: str
    committed: frozenset[Committed]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Committing:
    """A manifest is about to be written."""

    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settled:
    """The attempt at a manifest is over; `committed` is None when the store refused."""

    step: int
    committed: Committed | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vanished:
    """Supervisors were not heard for too long, or this side must not go on by itself (no ranks).

    Attributes:
        ranks: whose supervisors are lost.
        reason: for people.
        survivors: (rank, node) of those that may go on as a smaller world; empty when nobody may.
        is_replaceable: the launcher may start the lost ones again by itself.
        is_eviction: they are alive, and are left out on purpose.
    """

    ranks: tuple[int, ...]
    reason: str
    survivors: Survivors = ()
    is_replaceable: bool = False
    is_eviction: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = (
    Joined
    | Ready
    | Died
    | Finished
    | Progressed
    | WentBack
    | Preempted
    | Poisoned
    | Listed
    | Committing
    | Settled
    | Vanished
    | Tick
)


# ---- actions: what the caller does beyond telling the ranks ----------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationEnds:
    """`generation` is being ended because of `death`. The state must be durable before the sender is answered."""

    generation: int
    death: Death


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOver:
    """All processes of `generation` are gone: nothing more can come from it. `judgement` says what follows.

    `advice` is for people: a host to take out, or nothing.
    """

    generation: int
    deaths: tuple[Death, ...]
    judgement: Judgement
    reached: int
    advice: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRuns:
    """`plan.generation` starts. The state must be durable before any rank is told."""

    plan: Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobOver:
    """The job is done (`stop` None) or was stopped. The state must be durable before any rank is told."""

    generation: int
    stop: Stop | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateMatters:
    """Something was heard that its sender will not say again. It must be durable before the sender is answered."""


Action = GenerationEnds | GenerationOver | GenerationRuns | JobOver | StateMatters
