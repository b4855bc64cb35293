"""What is done about a rank that ran out of memory, as pure functions.

A step that did not fit is done again by all ranks, each batch divided into twice as many micro-batches::

    1 --out of memory--> 2 --out of memory--> 4 ...     RETRY, until the failing rank had one sample at a time: STOP
    4 --`widen_after` healthy steps--> 2                a trial: the division is halved
    2 --out of memory within a trial--> 4               the next trial waits twice as long; `max_trials` in a row

The optimizer holds no activations, so dividing does not help it, and its update may be half done: the newest trusted
snapshot is restored and replayed, once; the second time within `widen_after` healthy steps is the end.

Every rank calls `failed` and `healthy` with the same facts at the same steps, and so all divide alike. Why this ends:
`parts` doubles up to the samples of a batch, or `MAX_PARTS`; a trial needs healthy steps before it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

MAX_PARTS = 1 << 16


class Where(enum.Enum):
    """What ran out of memory. Values are part of what ranks tell each other."""

    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Remedy(enum.Enum):
    """What all ranks do about it."""

    RETRY = "retry"  # the same batches, divided
    ROLLBACK = "rollback"  # to the newest certified snapshot
    STOP = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivisionPolicy:
    """How patient to be.

    Attributes:
        widen_after: healthy steps in a row before half the division is tried, and after which a trial has held.
        max_trials: trials in a row that may fail before no other is made.
    """

    widen_after: int = 200
    max_trials: int = 4

    def __post_init__(self) -> None:
        if self.widen_after < 1:
            raise ValueError(f"DivisionPolicy.widen_after must be 1 or more, got {self.widen_after}")
        if self.max_trials < 0:
            raise ValueError(f"DivisionPolicy.max_trials must be 0 or more, got {self.max_trials}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """One rank's account of running out of memory.

    Attributes:
        rank: which.
        where: in which part of the step.
        samples: in the micro-batch that did not fit; None where that is not known.
        obstacle: why it cannot be divided, or why the step cannot be done again; "" when it can.
    """

    rank: int
    where: Where
    samples: int | None
    obstacle: str = ""

    @staticmethod
    def from_dict(rank: int, fields: Mapping[str, Any]) -> Failure:
        """What a rank told the others."""
        return Failure(rank=rank, where=Where(fields["where"]), samples=fields["samples"], obstacle=fields["obstacle"])

    def __str__(self) -> str:
        of = "" if self.samples is None or self.where is Where.OPTIMIZER else f" of {self.samples} samples"
        return f"rank {self.rank} ran out of memory in the {self.where.value}{of}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """How batches are divided at present, and what was learned about it. Part of snapshots and checkpoints.

    Attributes:
        parts: micro-batches that each batch of the loader is divided into; 1 divides nothing.
        healthy: steps in a row since the last change.
        is_trial: half the division that last held is being tried.
        failed_trials: in a row.
        optimizer_failures: in a row.
    """

    parts: int = 1
    healthy: int = 0
    is_trial: bool = False
    failed_trials: int = 0
    optimizer_failures: int = 0

    def __post_init__(self) -> None:
        if self.parts < 1 or self.parts & (self.parts - 1):
            raise ValueError(f"Division.parts must be a power of two, got {self.parts}")

    @property
    def is_settled(self) -> bool:
        """Whether healthy steps change nothing: the state of a run that never ran out of memory."""
        return self.parts == 1 and not self.is_trial and not self.optimizer_failures

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Division:
        """The inverse of `as_dict`; of nothing (older checkpoints), the state of a run that begins."""
        return Division(**fields)


def failed(division: Division, failures: Sequence[Failure]) -> tuple[Division, Remedy, str]:
    """What all ranks do, and why: (division, failures) -> (division', remedy, reason).

    Args:
        division: present, equal on all ranks.
        failures: of all ranks that failed in this step, in rank order; at least one.
    """
    told = "; ".join(map(str, failures))
    if any(failure.where is Where.OPTIMIZER for failure in failures):
        if division.optimizer_failures:
            reason = f"{told}, again: restoring a snapshot and freeing all caches did not help. {_REMEDY}"
            return division, Remedy.STOP, reason
        after = dataclasses.replace(division, healthy=0, optimizer_failures=division.optimizer_failures + 1)
        return after, Remedy.ROLLBACK, f"{told}: caches freed, replayed from a snapshot"
    obstacle = next((failure.obstacle for failure in failures if failure.obstacle), "")
    if obstacle:
        return division, Remedy.STOP, f"{told}, and the step cannot be divided: {obstacle}"
    smallest = min((failure.samples for failure in failures if failure.samples is not None), default=None)
    if division.parts >= MAX_PARTS or (smallest is not None and smallest <= 1):
        tried = ", ".join(str(1 << power) for power in range(division.parts.bit_length()))
        reason = f"{told}, and no smaller micro-batch is left (tried {tried} per batch). {_REMEDY}"
        return division, Remedy.STOP, reason
    parts = 2 * division.parts
    after = dataclasses.replace(
        division,
        parts=parts,
        healthy=0,
        is_trial=False,
        failed_trials=division.failed_trials + division.is_trial,
    )
    return after, Remedy.RETRY, f"{told}: all ranks do the step again, each batch in {parts} micro-batches"


_REMEDY = "Give the ranks more memory, a smaller model, activation checkpointing or a sharded optimizer"


def restarted(division: Division, requested: int) -> Division:
    """After a restart that a rank asked for because its step could not be done again in place: at least `requested`."""
    if requested <= division.parts:
        return division
    trials = division.failed_trials + division.is_trial
    return dataclasses.replace(division, parts=requested, healthy=0, is_trial=False, failed_trials=trials)


def healthy(policy: DivisionPolicy, division: Division) -> Division:
    """After a committed step. What `is_settled` says needs no call."""
    division = dataclasses.replace(division, healthy=division.healthy + 1)
    if division.healthy < policy.widen_after:
        return division
    division = dataclasses.replace(division, optimizer_failures=0)
    if division.is_trial:
        division = dataclasses.replace(division, is_trial=False, failed_trials=0)
    patience = policy.widen_after << division.failed_trials
    if division.parts == 1 or division.healthy < patience or division.failed_trials >= policy.max_trials:
        return division
    return dataclasses.replace(division, parts=division.parts // 2, healthy=0, is_trial=True)


def share(samples: int, parts: int) -> list[int]:
    """How `samples` are divided into `parts`: sizes that differ by one at most, the larger ones first."""
    smaller, larger = divmod(samples, parts)
    return [smaller + 1] * larger + [smaller] * (parts - larger)
