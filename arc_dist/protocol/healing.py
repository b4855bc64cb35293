"""What is done about a fault: the ladder, as a pure function.

Every rank calls `decide` with the same evidence and the same history and so gets the same decision; no rank is asked
twice and none decides alone. The verdicts are those of the ARC paper (section 3.1.2): HEALTHY applies the update,
SKIP drops it, FAILURE restores an older state. The modes are its state machine (section 3.1.4)::

    TRAINING   --fault, state sound, skips left-->  TRAINING    (SKIP: nothing was poisoned, drop the update)
    TRAINING   --fault otherwise---------------->  RECOVERING  (ROLLBACK to the newest certified snapshot)
    RECOVERING --fault before progress---------->  RECOVERING  (ROLLBACK, one snapshot older each time)
    RECOVERING --no snapshot or budget left----->  STOPPED     (a clear end with a report)
    RECOVERING --`progress_steps` healthy steps beyond the furthest fault--> TRAINING

Why this ends: a rollback raises `rollbacks`; only progress beyond the furthest fault sets it back to zero; the number
of rollbacks without progress is bounded. So a run either gets further or stops.

When is the batch or the learning rate to blame? A value that is not finite inside the *state* while every accepted
update was finite (updates that are not are never applied) is corruption: a flipped bit, a stray write, a bad host.
Replaying the same batches at the same rate is then right, and gives bit for bit the run that would have been. Anything
else, and corruption that comes back, cuts the rate and drops the batch that was being trained on.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from arc_dist.protocol.flags import FAULTS, NO_FLAGS, STATE_FAULTS, Flag, names


class Verdict(enum.Enum):
    """The paper's phi(S): what a step is judged to be, the same on every rank."""

    HEALTHY = "healthy"
    SKIP = "skip"
    FAILURE = "failure"


class Mode(enum.Enum):
    """Where the ladder stands; the arrows are drawn above."""

    TRAINING = "training"
    RECOVERING = "recovering"
    STOPPED = "stopped"


class Rung(enum.Enum):
    """What a decision asks the ranks to do."""

    APPLY = "apply"
    SKIP = "skip"
    RETRY = "retry"  # the same batches again, divided; see `protocol.oom`
    ROLLBACK = "rollback"
    STOP = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealingPolicy:
    """The budgets of the ladder.

    Attributes:
        max_consecutive_skips: updates dropped in a row while the state is sound, before a rollback is tried.
        max_explosion_skips: the same for a finite but exploding loss or gradient, where the state itself may have
            gone astray.
        max_rollbacks: rollbacks without progress before the run is stopped.
        progress_steps: healthy steps beyond the furthest fault that count as progress.
        lr_cut: factor on the learning rate at a rollback that is not plain corruption; 1.0 never cuts.
        lr_floor: the product of all cuts never falls below this.
        lr_restore_after: healthy steps in a row after which one cut is given back.
    """

    max_consecutive_skips: int = 10
    max_explosion_skips: int = 2
    max_rollbacks: int = 4
    progress_steps: int = 10
    lr_cut: float = 0.5
    lr_floor: float = 1.0 / 64
    lr_restore_after: int = 200

    def __post_init__(self) -> None:
        for name in ("max_consecutive_skips", "max_explosion_skips", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"HealingPolicy.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("progress_steps", "lr_restore_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"HealingPolicy.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("lr_cut", "lr_floor"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"HealingPolicy.{name} must be in (0, 1], got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """What the ladder remembers. It is never rolled back: a loop would be forgotten with it."""

    mode: Mode = Mode.TRAINING
    skips_in_a_row: int = 0
    rollbacks: int = 0  # without progress
    healthy_in_a_row: int = 0
    furthest_fault: int = -1  # the highest step that ever failed
    lr_scale: float = 1.0

    def as_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "mode": self.mode.value}

    @staticmethod
    def from_dict(fields: Mapping[str, object]) -> History:
        values = dict(fields)
        values["mode"] = Mode(values["mode"])
        return History(**values)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What all ranks know about a step once its vote is in; equal on every rank.

    Attributes:
        step: number of the step that was judged (the update that would be applied).
        flags: the OR of all ballots and of the implicit vote.
        state_corrupt: the slow path found a value that is not finite in some rank's state, or replicas that differ.
        certified: steps of the snapshots that are certified on every rank, newest first.
    """

    step: int
    flags: Flag
    state_corrupt: bool = False
    certified: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """The agreed answer, with its reason."""

    verdict: Verdict
    rung: Rung
    reason: str
    restore_step: int | None = None
    drop_batch: bool = False
    lr_scale: float = 1.0


_APPLY = Decision(verdict=Verdict.HEALTHY, rung=Rung.APPLY, reason="")


def healthy(policy: HealingPolicy, history: History, step: int) -> tuple[History, Decision]:
    """The verdict of a step without faults: applies the update and pays budgets back."""
    in_a_row = history.healthy_in_a_row + 1
    progressed = history.mode is Mode.RECOVERING and step >= history.furthest_fault + policy.progress_steps
    lr_scale = history.lr_scale
    if lr_scale < 1.0 and in_a_row % policy.lr_restore_after == 0:
        lr_scale = min(1.0, lr_scale / policy.lr_cut)
    after = dataclasses.replace(
        history,
        mode=Mode.TRAINING if progressed else history.mode,
        rollbacks=0 if progressed else history.rollbacks,
        skips_in_a_row=0,
        healthy_in_a_row=in_a_row,
        lr_scale=lr_scale,
    )
    return after, dataclasses.replace(_APPLY, lr_scale=lr_scale)


def decide(policy: HealingPolicy, history: History, evidence: Evidence) -> tuple[History, Decision]:
    """The ladder: (policy, history, evidence) -> (history', decision)."""
    faults = evidence.flags & FAULTS
    if faults == NO_FLAGS:
        return healthy(policy, history, evidence.step)
    what = ", ".join(names(faults))
    if history.mode is Mode.STOPPED:
        return history, _stop(history, f"{what} after the run was stopped")
    after = dataclasses.replace(history, healthy_in_a_row=0, furthest_fault=max(history.furthest_fault, evidence.step))
    state_fault = evidence.state_corrupt or bool(faults & STATE_FAULTS)
    if not state_fault:
        if faults == Flag.GRAD_VANISHING:
            # A zero gradient may be the truth (a perfect fit): it is dropped and told, and never escalates.
            return after, _skip(after, f"{what}: the update was dropped")
        finite = not faults & (Flag.LOSS_NONFINITE | Flag.GRAD_NONFINITE)
        allowed = policy.max_explosion_skips if finite else policy.max_consecutive_skips
        if history.skips_in_a_row < allowed:
            after = dataclasses.replace(after, skips_in_a_row=history.skips_in_a_row + 1)
            return after, _skip(after, f"{what}: the state is sound, the update was dropped")
    return _rollback(policy, after, evidence, what, state_fault)


def _rollback(
    policy: HealingPolicy, history: History, evidence: Evidence, what: str, state_fault: bool
) -> tuple[History, Decision]:
    if history.rollbacks >= policy.max_rollbacks:
        reason = f"{what}: {history.rollbacks} rollbacks brought no progress beyond step {history.furthest_fault}"
        return dataclasses.replace(history, mode=Mode.STOPPED), _stop(history, reason)
    if not evidence.certified:
        reason = f"{what}: no certified snapshot is held by every rank"
        return dataclasses.replace(history, mode=Mode.STOPPED), _stop(history, reason)
    # The first rollback takes the newest; each one that brought no progress distrusts one more.
    target = evidence.certified[min(history.rollbacks, len(evidence.certified) - 1)]
    corruption = state_fault and not evidence.flags & Flag.REDUCED_LOSS_EXPLOSION
    blame_training = history.rollbacks > 0 or not corruption
    lr_scale = max(policy.lr_floor, history.lr_scale * policy.lr_cut) if blame_training else history.lr_scale
    after = dataclasses.replace(
        history, mode=Mode.RECOVERING, rollbacks=history.rollbacks + 1, skips_in_a_row=0, lr_scale=lr_scale
    )
    how = f"learning rate x {lr_scale:g}, batch dropped" if blame_training else "replayed as it was"
    return after, Decision(
        verdict=Verdict.FAILURE,
        rung=Rung.ROLLBACK,
        reason=f"{what}: restored step {target}, {how}",
        restore_step=target,
        drop_batch=blame_training,
        lr_scale=lr_scale,
    )


def _skip(history: History, reason: str) -> Decision:
    return Decision(verdict=Verdict.SKIP, rung=Rung.SKIP, reason=reason, drop_batch=True, lr_scale=history.lr_scale)


def _stop(history: History, reason: str) -> Decision:
    return Decision(verdict=Verdict.FAILURE, rung=Rung.STOP, reason=reason, lr_scale=history.lr_scale)
