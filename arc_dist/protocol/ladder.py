"""The healing ladder as a policy: its rungs in order, their budgets, and what each may change.

A ladder is a tuple of names. A fault is answered by the first rung that applies to it and was not used up since the
run last made progress; a name that stands twice may be used twice. When nothing is left the run stops with a report.
What each built-in rung does is in `RUNGS`; any other name is a rung of the user's own, see docs/healing.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

from arc_dist.protocol.flags import Flag

SKIP = "skip"
RUNGS = {
    SKIP: "the update is dropped: the state is sound, and the batch is left out",
    "replay": "plain corruption only: the newest certified snapshot, and the same batches at the same rate again",
    "rollback": "the newest certified snapshot, softened",
    "older": "the next older certified snapshot, softened",
    "checkpoint": "the newest committed checkpoint that is older still, restored in place from the store, softened",
    "escape": "the newest certified snapshot, softened; moments reset, weights perturbed, batches ahead left out",
}
"""What each rung does. Softened: learning rate and gradient clip are cut, the offending batches left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What all ranks know about a step once its vote is in; equal on every rank.

    Attributes:
        step: number of the step that was judged (the update that would be applied).
        flags: the OR of all ballots and of the implicit vote.
        state_corrupt: the slow path found a value that is not finite in some rank's state, or replicas that differ.
        certified: steps of the snapshots that are certified on every rank, newest first.
        has_store: committed checkpoints can be restored.
        must_restore: a rung failed half-way, so the state at hand cannot be gone on with.
    """

    step: int
    flags: Flag
    state_corrupt: bool = False
    certified: tuple[int, ...] = ()
    has_store: bool = False
    must_restore: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealingPolicy:
    """The ladder and its budgets. Subclass it and override `ladder_for` to choose by the kind of fault.

    Attributes:
        ladder: the rungs in order; "skip", if wanted, once and first.
        max_consecutive_skips: updates dropped in a row while the state is sound, before the next rung is tried.
        max_explosion_skips: the same for a finite but exploding loss or gradient, where the state itself may have
            gone astray.
        max_rollbacks: restored states of any kind without progress before the run is stopped.
        progress_steps: healthy steps beyond the furthest fault that count as progress.
        lr_cut: factor on the learning rate at a softened rung; 1.0 never cuts.
        lr_floor: the product of all cuts never falls below this.
        lr_restore_after: healthy steps in a row, progress included, after which cuts begin to be given back.
        ramp_steps: healthy steps over which one cut is given back, in equal parts.
        clip_cut: factor on `max_grad_norm` at a softened rung; 1.0 never cuts.
        clip_floor: the product of all cuts of the clip never falls below this.
        batch_window: steps whose batches a softened rung leaves out: the failed one and those before it.
        perturbation_scale: standard deviation of the noise that "escape" adds to each weight, in parts of the typical
            magnitude of its tensor; 0 adds none.
        reset_moments: "escape" makes the optimizers begin anew.
        skip_ahead_steps: "escape" leaves out the batches of so many steps beyond the failed one.
    """

    ladder: tuple[str, ...] = (
        *(SKIP, "replay", "rollback", "rollback", "older", "older"),
        *("checkpoint", "escape", "escape"),
    )
    max_consecutive_skips: int = 10
    max_explosion_skips: int = 2
    max_rollbacks: int = 8
    progress_steps: int = 10
    lr_cut: float = 0.5
    lr_floor: float = 1.0 / 64
    lr_restore_after: int = 200
    ramp_steps: int = 100
    clip_cut: float = 0.5
    clip_floor: float = 1.0 / 16
    batch_window: int = 1
    perturbation_scale: float = 0.01
    reset_moments: bool = True
    skip_ahead_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("max_consecutive_skips", "max_explosion_skips", "max_rollbacks", "skip_ahead_steps"):
            self._require(name, _is_whole(getattr(self, name), 0), "a whole number, 0 or more")
        for name in ("progress_steps", "lr_restore_after", "ramp_steps", "batch_window"):
            self._require(name, _is_whole(getattr(self, name), 1), "a whole number, 1 or more")
        for name in ("lr_cut", "lr_floor", "clip_cut", "clip_floor"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and 0.0 < value <= 1.0, "in (0, 1]")
        scale = self.perturbation_scale
        self._require("perturbation_scale", _is_number(scale) and 0.0 <= scale <= 1.0, "in [0, 1]")
        self._require("reset_moments", type(self.reset_moments) is bool, "True or False")
        self._require_ladder()
        for cut, floor in (("lr_cut", "lr_floor"), ("clip_cut", "clip_floor")):
            holds = getattr(self, cut) == 1.0 or getattr(self, floor) <= getattr(self, cut)
            self._require(floor, holds, f"at most {cut} ({getattr(self, cut)}), or no cut could be made")

    def _require_ladder(self) -> None:
        given = cast("object", self.ladder)  # users may give anything
        parts = cast("tuple[object, ...]", given) if isinstance(given, tuple) else (None,)
        named = all(isinstance(name, str) and name.isidentifier() for name in parts)
        self._require("ladder", named, "a tuple of names of rungs")
        self._require("ladder", SKIP not in self.ladder[1:], "a ladder that has 'skip' once and first, or not at all")
        skips = SKIP in self.ladder and max(self.max_consecutive_skips, self.max_explosion_skips) > 0
        restores = self.max_rollbacks > 0 and any(name != SKIP for name in self.ladder)
        self._require("ladder", skips or restores, "a ladder with a rung that has a budget: there is no rung left")
        if "escape" in self.ladder:
            changes = self.reset_moments or self.perturbation_scale > 0 or self.skip_ahead_steps > 0
            self._require("ladder", changes, "without 'escape' where reset_moments, noise and skipping ahead are off")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"HealingPolicy.{name} must be {rule}, got {getattr(self, name)!r}")

    def ladder_for(self, evidence: Evidence) -> Sequence[str]:
        """The rungs for this fault, in order. Pure: every rank asks it with the same evidence.

        What it gives differently on one rank, or raises, is told, and `ladder` is used.
        """
        return self.ladder


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
