"""The agreed answer to a step: its verdict, what to do, and with which settings."""

from __future__ import annotations

import dataclasses
import enum


class Verdict(enum.Enum):
    """The paper's phi(S): what a step is judged to be, the same on every rank."""

    HEALTHY = "healthy"
    SKIP = "skip"
    FAILURE = "failure"


class Rung(enum.Enum):
    """What a decision asks the ranks to do."""

    APPLY = "apply"
    SKIP = "skip"
    RETRY = "retry"  # the same batches again, divided; see `protocol.oom`
    ROLLBACK = "rollback"
    CHECKPOINT = "checkpoint"
    ESCAPE = "escape"
    OWN = "own"
    STOP = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """The agreed answer, with its reason.

    Attributes:
        verdict: what the step is judged to be.
        rung: what to do.
        reason: why, for people.
        name: of the rung in the ladder; empty where none was used.
        restore_step: the state to restore.
        before_step: restore the newest committed checkpoint of an earlier step.
        drop_batch: leave the failed step's batches out, and those of `window` - 1 steps before it.
        skip_ahead: and those of so many steps after it.
        lr_scale, clip_scale: factors on the learning rate and on the limit of the gradient's norm from now on.
        reset_moments: the optimizers begin anew.
        perturbation: standard deviation of the noise on the weights / their typical magnitude.
        noise_seed: of that noise.
    """

    verdict: Verdict
    rung: Rung
    reason: str
    name: str = ""
    restore_step: int | None = None
    before_step: int | None = None
    drop_batch: bool = False
    window: int = 1
    skip_ahead: int = 0
    lr_scale: float = 1.0
    clip_scale: float = 1.0
    reset_moments: bool = False
    perturbation: float = 0.0
    noise_seed: str = ""

    @property
    def action(self) -> str:
        """What to call it: the rung's kind, or the name of a rung of the user's own."""
        return self.name if self.rung is Rung.OWN else self.rung.value
