"""What is done about a fault: climbing the ladder, as a pure function.

Every rank calls `decide` with the same evidence and the same history and so gets the same decision; no rank is asked
twice and none decides alone. The verdicts are those of the ARC paper (section 3.1.2): HEALTHY applies the update,
SKIP drops it, FAILURE restores an older state. The modes are its state machine (section 3.1.4), `TRANSITIONS`::

    TRAINING --RESTORED--> RECOVERING --ESCAPED--> ESCAPING --GAVE_UP--> STOPPED
        ^                      |                       |
        +------- PROGRESS -----+-----------------------+

A fault in RECOVERING or ESCAPING climbs on from the rung that was used last (ladder.py); one in TRAINING begins below.
Progress is `progress_steps` healthy steps beyond the furthest fault.

Why this ends: each restored state uses up a rung, a ladder is finite, and so are `max_rollbacks` and the skips in a row
between two of them. Only progress gives rungs back, and then the run is further than it ever was. A vanishing gradient
restores nothing and is dropped no more than `max_consecutive_skips` times in a row: then it is taken as the truth.

When is the batch or the learning rate to blame? A value that is not finite inside the *state* while every accepted
update was finite (updates that are not are never applied) is corruption: a flipped bit, a stray write, a bad host.
Replaying the same batches at the same rate is then right, and gives bit for bit the run that would have been. Anything
else, and corruption that comes back, softens what comes: lower rate, tighter clip, offending batches left out.

Rates are cut and given back by products and sums of floats alone, which IEEE 754 rounds alike on every host.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping, Sequence

from arc_dist.protocol.decision import Decision, Rung, Verdict
from arc_dist.protocol.flags import FAULTS, NO_FLAGS, STATE_FAULTS, Flag, names
from arc_dist.protocol.ladder import RUNGS, SKIP, Evidence, HealingPolicy


class Mode(enum.Enum):
    """Where a run stands."""

    TRAINING = "training"
    RECOVERING = "recovering"
    ESCAPING = "escaping"
    STOPPED = "stopped"


class Event(enum.Enum):
    """What a decision means for the mode."""

    HEALTHY = "a healthy step"
    PROGRESS = "progress beyond the furthest fault"
    SKIPPED = "an update was dropped"
    RESTORED = "an older state was restored"
    ESCAPED = "an older state was restored and perturbed"
    GAVE_UP = "no rung is left"


TRANSITIONS: Mapping[Mode, Mapping[Event, Mode]] = {
    Mode.TRAINING: {
        Event.HEALTHY: Mode.TRAINING,
        Event.PROGRESS: Mode.TRAINING,
        Event.SKIPPED: Mode.TRAINING,
        Event.RESTORED: Mode.RECOVERING,
        Event.ESCAPED: Mode.ESCAPING,
        Event.GAVE_UP: Mode.STOPPED,
    },
    Mode.RECOVERING: {
        Event.HEALTHY: Mode.RECOVERING,
        Event.PROGRESS: Mode.TRAINING,
        Event.SKIPPED: Mode.RECOVERING,
        Event.RESTORED: Mode.RECOVERING,
        Event.ESCAPED: Mode.ESCAPING,
        Event.GAVE_UP: Mode.STOPPED,
    },
    Mode.ESCAPING: {
        Event.HEALTHY: Mode.ESCAPING,
        Event.PROGRESS: Mode.TRAINING,
        Event.SKIPPED: Mode.ESCAPING,
        Event.RESTORED: Mode.RECOVERING,
        Event.ESCAPED: Mode.ESCAPING,
        Event.GAVE_UP: Mode.STOPPED,
    },
    Mode.STOPPED: dict.fromkeys(Event, Mode.STOPPED),
}


_KINDS = {
    "replay": Rung.ROLLBACK,
    "rollback": Rung.ROLLBACK,
    "older": Rung.ROLLBACK,
    "checkpoint": Rung.CHECKPOINT,
    "escape": Rung.ESCAPE,
}
assert RUNGS.keys() == {SKIP, *_KINDS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """What the ladder remembers. It is never rolled back: a loop would be forgotten with it."""

    mode: Mode = Mode.TRAINING
    skips_in_a_row: int = 0
    tried: tuple[str, ...] = ()  # rungs that restored a state without progress since
    restored_step: int | None = None  # the oldest state that they restored
    healthy_in_a_row: int = 0
    furthest_fault: int = -1  # the highest step that ever failed
    lr_scale: float = 1.0
    clip_scale: float = 1.0
    escapes: int = 0  # in the whole run
    decisions: int = 0  # in the whole run: of two histories of a run the one with more is the later

    def as_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "mode": self.mode.value, "tried": list(self.tried)}

    @staticmethod
    def from_dict(fields: Mapping[str, object]) -> History:
        values = dict(fields)
        values.pop("rollbacks", None)  # of earlier versions
        values["mode"] = Mode(values["mode"])
        values["tried"] = tuple(values.get("tried", ()))  # type: ignore[arg-type]
        return History(**values)  # type: ignore[arg-type]


def healthy(policy: HealingPolicy, history: History, step: int) -> tuple[History, Decision]:
    """The verdict of a step without faults: applies the update and pays budgets back."""
    in_a_row = history.healthy_in_a_row + 1
    is_climbing = history.mode in (Mode.RECOVERING, Mode.ESCAPING)
    progressed = is_climbing and step >= history.furthest_fault + policy.progress_steps
    mode = TRANSITIONS[history.mode][Event.PROGRESS if progressed else Event.HEALTHY]
    lr_scale, clip_scale = history.lr_scale, history.clip_scale
    if mode is Mode.TRAINING and in_a_row > policy.lr_restore_after:
        lr_scale = _given_back(lr_scale, policy.lr_cut, policy.ramp_steps)
        clip_scale = _given_back(clip_scale, policy.clip_cut, policy.ramp_steps)
    after = dataclasses.replace(
        history,
        mode=mode,
        tried=() if progressed else history.tried,
        restored_step=None if progressed else history.restored_step,
        skips_in_a_row=0,
        healthy_in_a_row=in_a_row,
        lr_scale=lr_scale,
        clip_scale=clip_scale,
        decisions=history.decisions + progressed,
    )
    return after, _apply(after)


def _given_back(scale: float, cut: float, ramp_steps: int) -> float:
    raised = scale + (1.0 - cut) / ramp_steps
    return raised if raised < 1.0 - 1e-9 else 1.0


def decide(
    policy: HealingPolicy, history: History, evidence: Evidence, ladder: Sequence[str] | None = None
) -> tuple[History, Decision]:
    """The ladder: (policy, history, evidence) -> (history', decision).

    Args:
        policy: the budgets.
        history: what was done so far.
        evidence: what all ranks know.
        ladder: the rungs for this fault; the policy's if None.
    """
    faults = evidence.flags & FAULTS
    if faults == NO_FLAGS:
        return healthy(policy, history, evidence.step)
    what = ", ".join(names(faults))
    if history.mode is Mode.STOPPED:
        return history, _stop(history, f"{what} after the run was stopped")
    after = dataclasses.replace(
        history,
        healthy_in_a_row=0,
        furthest_fault=max(history.furthest_fault, evidence.step),
        decisions=history.decisions + 1,
    )
    rungs = policy.ladder if ladder is None else ladder
    is_sound = not (evidence.state_corrupt or evidence.must_restore or faults & STATE_FAULTS)
    if is_sound and faults == Flag.GRAD_VANISHING:
        return _vanishing(policy, after, what, may_skip=SKIP in rungs)
    used: Counter[str] = Counter()
    for name in rungs:
        used[name] += 1
        if name == SKIP:
            if is_sound and after.skips_in_a_row < _allowed_skips(policy, faults):
                return _skip(after, f"{what}: the state is sound, the update was dropped")
        elif used[name] > after.tried.count(name) and len(after.tried) < policy.max_rollbacks:
            decision = _restoring(name, policy, after, evidence, what)
            if decision is not None:
                return _climbed(after, decision), decision
    return _give_up(after, evidence, what)


def _allowed_skips(policy: HealingPolicy, faults: Flag) -> int:
    finite = not faults & (Flag.LOSS_NONFINITE | Flag.GRAD_NONFINITE)
    return policy.max_explosion_skips if finite else policy.max_consecutive_skips


def _vanishing(policy: HealingPolicy, history: History, what: str, *, may_skip: bool) -> tuple[History, Decision]:
    """A zero gradient may be the truth (a perfect fit): it is dropped and told, never escalates, and is believed."""
    dropped = history.skips_in_a_row
    limit = policy.max_consecutive_skips if may_skip else 0
    if dropped < limit:
        return _skip(history, f"{what}: the update was dropped")
    reason = f"{what}: taken as the truth after {dropped} dropped updates, and applied from now on"
    reason = reason if dropped == limit else ""  # once is enough
    after = dataclasses.replace(history, skips_in_a_row=limit + 1)
    return after, dataclasses.replace(_apply(after), reason=reason)


def _restoring(name: str, policy: HealingPolicy, history: History, evidence: Evidence, what: str) -> Decision | None:
    """What the rung `name` would do about the fault; None where it does not apply."""
    is_corruption = bool(evidence.state_corrupt or evidence.flags & STATE_FAULTS)
    is_corruption = is_corruption and not evidence.flags & Flag.REDUCED_LOSS_EXPLOSION
    if name == "replay" and (history.tried or not is_corruption):
        return None
    target = before = None
    if name != "checkpoint":
        target = _target(name, evidence.certified, history.restored_step)
    elif evidence.has_store:
        before = evidence.step if history.restored_step is None else history.restored_step
    if target is None and before is None:
        return None
    where = f"step {target}" if before is None else f"a checkpoint before step {before}"
    if name == "replay":
        return Decision(
            verdict=Verdict.FAILURE,
            rung=Rung.ROLLBACK,
            name=name,
            reason=f"{what}: restored {where}, replayed as it was",
            restore_step=target,
            lr_scale=history.lr_scale,
            clip_scale=history.clip_scale,
        )
    lr_scale = _cut(history.lr_scale, policy.lr_cut, policy.lr_floor)
    clip_scale = _cut(history.clip_scale, policy.clip_cut, policy.clip_floor)
    rung = _KINDS.get(name, Rung.OWN)
    escapes = rung is Rung.ESCAPE
    how = "" if name in ("rollback", "older", "checkpoint") else f"{name}, "
    return Decision(
        verdict=Verdict.FAILURE,
        rung=rung,
        name=name,
        reason=f"{what}: {how}restored {where}, learning rate x {lr_scale:g}, batch dropped",
        restore_step=target,
        before_step=before,
        drop_batch=True,
        window=policy.batch_window,
        skip_ahead=policy.skip_ahead_steps if escapes else 0,
        lr_scale=lr_scale,
        clip_scale=clip_scale,
        reset_moments=escapes and policy.reset_moments,
        perturbation=policy.perturbation_scale if escapes else 0.0,
        noise_seed=f"{history.escapes}.{evidence.step}" if escapes else "",
    )


def _target(name: str, certified: Sequence[int], oldest: int | None) -> int | None:
    """The newest certified step; for "older" one that was not gone back to yet."""
    if name == "older" and certified:
        limit = certified[0] if oldest is None else min(oldest, certified[0])
        certified = [step for step in certified if step < limit]
    return certified[0] if certified else None


def _cut(scale: float, cut: float, floor: float) -> float:
    return scale if cut == 1.0 else min(scale, max(floor, scale * cut))


def _climbed(history: History, decision: Decision) -> History:
    escaped = decision.rung is Rung.ESCAPE
    steps = [step for step in (history.restored_step, decision.restore_step) if step is not None]
    return dataclasses.replace(
        history,
        mode=TRANSITIONS[history.mode][Event.ESCAPED if escaped else Event.RESTORED],
        tried=(*history.tried, decision.name),
        restored_step=min(steps, default=None),
        skips_in_a_row=0,
        lr_scale=decision.lr_scale,
        clip_scale=decision.clip_scale,
        escapes=history.escapes + escaped,
    )


def _give_up(history: History, evidence: Evidence, what: str) -> tuple[History, Decision]:
    if history.tried:
        tried = ", ".join(history.tried)
        reason = (
            f"{what}: {len(history.tried)} rollbacks brought no progress beyond step {history.furthest_fault} ({tried})"
        )
    elif not evidence.certified:
        reason = f"{what}: no certified snapshot is held by every rank"
    else:
        reason = f"{what}: the ladder has no rung for it"
    after = dataclasses.replace(history, mode=TRANSITIONS[history.mode][Event.GAVE_UP])
    return after, _stop(after, reason)


def _skip(history: History, reason: str) -> tuple[History, Decision]:
    after = dataclasses.replace(
        history,
        mode=TRANSITIONS[history.mode][Event.SKIPPED],
        skips_in_a_row=history.skips_in_a_row + 1,
    )
    return after, Decision(
        verdict=Verdict.SKIP,
        rung=Rung.SKIP,
        name=SKIP,
        reason=reason,
        drop_batch=True,
        lr_scale=after.lr_scale,
        clip_scale=after.clip_scale,
    )


def _apply(history: History) -> Decision:
    return Decision(
        verdict=Verdict.HEALTHY,
        rung=Rung.APPLY,
        reason="",
        lr_scale=history.lr_scale,
        clip_scale=history.clip_scale,
    )


def _stop(history: History, reason: str) -> Decision:
    return Decision(
        verdict=Verdict.FAILURE,
        rung=Rung.STOP,
        reason=reason,
        lr_scale=history.lr_scale,
        clip_scale=history.clip_scale,
    )
