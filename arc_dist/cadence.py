"""How often snapshots are taken, and how often ranks vote that need not at every step."""

from __future__ import annotations

import math
from typing import Any

from arc_dist.healing.vote import Voter
from arc_dist.settings import Settings
from arc_dist.telemetry.log import logger

_MEASURED_CAPTURES = 3
_MEASURING_EVERY = 8
_MAX_EVERY = 500
_VOTE_AFTER = 24  # step times measured before the vote's cadence is agreed on
_VOTE_WITHIN_S = 0.05
_MAX_VOTE_EVERY = 32


class SnapshotCadence:
    """How often snapshots are taken: as set, or so that their cost stays under a share of the step time.

    While measuring, snapshots are taken every 8 updates. The third one finds all memory in place; its cost, and the
    median step time, give the interval, which is the largest that any rank needs.
    """

    def __init__(self, settings: Settings) -> None:
        self._share = settings.snapshot_cost
        self.every = settings.snapshot_every
        self._is_fixed = self.every is not None
        self._shortest = max(1, -(-settings.certify_after // (settings.snapshots - 1)))
        self.last = -1
        self._num_captured = 0
        self._cost_s = 0.0
        self._scan_s = 0.0
        self._step_times: list[float] = []
        self.spent_s = 0.0  # on captures and scans so far

    def next_due(self) -> int:
        """The step at whose boundary the next snapshot is due."""
        return 0 if self.last < 0 else self.last + (self.every or _MEASURING_EVERY)

    def due(self, step: int) -> bool:
        """Whether a snapshot is due at this boundary."""
        return step >= self.next_due()

    def observe(self, step_s: float) -> None:
        """A step took this long, without snapshots and without what the script did between steps."""
        if self.every is None:
            self._step_times.append(step_s)

    def captured(self, step: int, cost_s: float | None) -> None:
        """A snapshot of `step` was due, and taken at this cost; None where it existed or could not be taken.

        It counts on every rank alike, whatever became of it there, because the ranks settle at the same count.
        """
        self.last = step
        self._num_captured += 1
        if cost_s is not None:
            self._cost_s = cost_s
            self.spent_s += cost_s

    def certified(self, scan_s: float) -> None:
        """Looking through a snapshot before trusting it took this long."""
        self._scan_s = scan_s
        self.spent_s += scan_s

    def settle(self, step: int, voter: Voter) -> None:
        """Agrees on the interval once enough was measured. Every rank gets here at the same step."""
        if self.every is not None or self._num_captured <= _MEASURED_CAPTURES or self.last != step:
            return
        times = sorted(self._step_times)
        step_s = times[len(times) // 2] if times else math.inf
        cost_s = self._cost_s + self._scan_s
        need = math.ceil(cost_s / (self._share * step_s)) if step_s > 0 else _MAX_EVERY
        self.every = int(voter.maximum(min(max(need, self._shortest), _MAX_EVERY), step))
        logger.info(
            "a snapshot every %d steps: one takes %.2f ms, a step %.2f ms, so %.2f %% of the time",
            self.every,
            cost_s * 1e3,
            step_s * 1e3,
            100.0 * cost_s / (self.every * step_s),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"every": self.every, "num_captured": self._num_captured}

    def load_state_dict(self, state: dict[str, Any], *, step: int) -> None:
        if self.every is None:
            self.every = state["every"]
        self._num_captured = max(self._num_captured, state["num_captured"]) if self.every is None else 0
        self.last = step

    def adopt(self, state: dict[str, Any]) -> None:
        """Takes over another rank's state, unless the settings fix the interval."""
        if not self._is_fixed:
            self.every, self._num_captured = state["every"], state["num_captured"]


class VoteCadence:
    """At how many of its steps a job votes whose gradients already carry every fault to all ranks.

    What is left to vote on there are requests (an orderly end, a checkpoint still being written), which may take
    `_VOTE_WITHIN_S` to be heard. So steps of that length or more each have a vote, hidden behind their backward; where
    steps are as short as the vote itself, it goes with every few of them.

    Args:
        is_fixed: vote at every step, measuring nothing.
    """

    def __init__(self, *, is_fixed: bool) -> None:
        self.every = 1
        self._is_fixed = is_fixed
        self._step_times: list[float] | None = None if is_fixed else []

    @property
    def is_settled(self) -> bool:
        return self._step_times is None

    def observe(self, step_s: float, step: int, voter: Voter) -> None:
        """A step took this long. Every rank calls it after the same steps; it blocks once, to agree."""
        if self._step_times is None:
            return
        self._step_times.append(step_s)
        if len(self._step_times) < _VOTE_AFTER:
            return
        slowest = voter.maximum(sorted(self._step_times)[_VOTE_AFTER // 2], step)
        self.every = max(1, min(int(_VOTE_WITHIN_S / max(slowest, 1e-9)), _MAX_VOTE_EVERY))
        self._step_times = None
        if self.every > 1:
            logger.info("a step takes %.2f ms: requests are voted on every %d steps", slowest * 1e3, self.every)

    def state_dict(self) -> dict[str, Any]:
        return {"every": self.every, "is_settled": self.is_settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.is_settled and state["is_settled"]:
            self.every = state["every"]
            self._step_times = None

    def adopt(self, state: dict[str, Any]) -> None:
        """Takes over another rank's state, unless every step is voted on."""
        if not self._is_fixed:
            self.every = state["every"]
            self._step_times = None if state["is_settled"] else []
