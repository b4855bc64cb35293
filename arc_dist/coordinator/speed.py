"""The ranks' own work per step, from the running sums that their progress pages keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

from arc_dist.coordinator.wire import Fields
from arc_dist.errors import ConfigError
from arc_dist.protocol.hangs import LABELS, WARM_UP_STEPS, Section
from arc_dist.protocol.stragglers import Work

_LEAST_STEPS = 8  # of each rank in one comparison
_LEAST_MEASURED = 4
# Parts of a step in which a rank waits for no other one, and what they are called in reports.
_ALONE = {
    LABELS[Section.EPOCH]: "data wait",
    LABELS[Section.DATA]: "data wait",
    LABELS[Section.UPDATE]: "optimizer",
    LABELS[Section.CHECKPOINT]: "checkpoint",
    LABELS[Section.SCRIPT]: "the script's own code",
}
_FORWARD, _BACKWARD = LABELS[Section.FORWARD], LABELS[Section.BACKWARD]
_BUILT_IN = frozenset(LABELS.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpentSoFar:
    """A rank's sums; times in seconds, by section.

    `cpu_s` is of `measured` of the steps. `sharded`: the forward pass has collectives, too.
    """

    steps: int
    measured: int
    time_s: Mapping[str, float]
    cpu_s: Mapping[str, float]
    limits_s: Mapping[str, float]
    factor: float
    sharded: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """All ranks' own work over the same stretch of the job. `step`: steps that rank 0's process had begun."""

    work: Mapping[int, Work]
    step_s: float
    step: int
    factor: float


def read_spent(fields: Fields) -> SpentSoFar:
    """What `snapshot.progress.Spent` became on its way."""
    return SpentSoFar(
        steps=fields.integer("steps"),
        measured=fields.integer("measured"),
        time_s=_seconds(fields.mapping("time_ns")),
        cpu_s=_seconds(fields.mapping("cpu_ns")),
        limits_s=_seconds(fields.mapping("limit_ns")),
        factor=fields.number("straggler_factor", default=0.0, maximum=1e6),
        sharded=fields.boolean("sharded", default=False),
    )


def _seconds(times_ns: Mapping[str, object]) -> dict[str, float]:
    if not all(isinstance(value, int) for value in times_ns.values()):
        raise ConfigError("watched: times must be whole nanoseconds")
    return {str(name): cast("int", value) / 1e9 for name, value in times_ns.items()}


class Speed:
    """Makes windows of what the ranks report, each over at least a few steps of every rank."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._first: dict[int, SpentSoFar] = {}
        self._last: dict[int, SpentSoFar] = {}

    def take(self, rank: int, spent: SpentSoFar) -> Window | None:
        """Takes a report; a window when that completes one."""
        if spent.steps < WARM_UP_STEPS:
            return None
        self._last[rank] = spent
        self._first.setdefault(rank, spent)
        if len(self._last) < self._world_size:
            return None
        for r, last in self._last.items():
            first = self._first[r]
            if last.steps - first.steps < _LEAST_STEPS or last.measured - first.measured < _LEAST_MEASURED:
                return None
        work = {r: _work(self._first[r], self._last[r]) for r in self._last}
        first, last = self._first[rank], self._last[rank]
        step_s = (sum(last.time_s.values()) - sum(first.time_s.values())) / (last.steps - first.steps)
        self._first, self._last = dict(self._last), {}
        return Window(work=work, step_s=step_s, step=last.steps, factor=spent.factor)


def _work(first: SpentSoFar, last: SpentSoFar) -> dict[str, float]:
    """Seconds of own work per step, by part.

    Waiting for other ranks happens in the backward pass and the vote (and in the forward pass of sharded models).
    There the training thread's processor time stands for its work.
    """
    num_steps, num_measured = last.steps - first.steps, last.measured - first.measured
    work: dict[str, float] = {}
    for name, total_s in last.time_s.items():
        spent_s = total_s - first.time_s.get(name, 0.0)
        if name == _BACKWARD or (name == _FORWARD and last.sharded):
            cpu_s = last.cpu_s.get(name, 0.0) - first.cpu_s.get(name, 0.0)
            spent_s, part = cpu_s * num_steps / num_measured, name
        elif name == _FORWARD:
            part = name
        elif name in _BUILT_IN:
            if name not in _ALONE:
                continue
            part = _ALONE[name]
        else:
            part = name  # a section that the user named
        work[part] = work.get(part, 0.0) + spent_s / num_steps
    return work
