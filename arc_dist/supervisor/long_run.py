"""Progress of scripts that keep their own checkpoints, as far as it can be seen from outside."""

from __future__ import annotations

import time
from typing import Any

from arc_dist.snapshot import layout
from arc_dist.supervisor.trainers import Trainer, Trainers

_LONG_RUN_S = 60.0


class LongRuns:
    """Lets a long run of such a script count as progress.

    Its steps are counted from its start in every generation, so they say nothing about how far the job is. A short run
    counts only when it got further than any before.
    """

    def __init__(self, rank: int, trainers: Trainers) -> None:
        self._rank = rank
        self._trainers = trainers
        self._furthest = 0

    def report(self, trainer: Trainer, step: int | None) -> dict[str, Any] | None:
        """What to tell the coordinator of a trainer that has ended, or left its generation; None for nothing."""
        if step is None or trainer.forked_at is None or self._trainers.phase() != layout.Phase.NONE:
            return None
        ran_s = (trainer.exited_at or time.monotonic()) - trainer.forked_at
        self._furthest = self._furthest + step if ran_s >= _LONG_RUN_S else max(self._furthest, step)
        return {"rank": self._rank, "generation": trainer.generation, "step": self._furthest}
