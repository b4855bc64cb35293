"""A job's life: it works, makes copies of its state, is struck by faults, and goes on from a copy that is left.

Work is measured in seconds of undisturbed training. Between two faults everything is periodic, so the model does not
step through the job: it computes in closed form how far the job came by the moment of a fault and which copies were
complete by then. A life costs time in proportion to its faults, whatever the number of ranks or steps.

What is modelled of a copy: every `interval_s` of work training stops for `stall_s`; `write_s` later, while training
goes on, the copy counts. A fault before that leaves the older one. What is modelled of a fault: the copies that
outlive it; the time until it is seen, until processes run again, and until the newest copy left is read. A fault that
strikes while the job recovers from another starts the recovery again.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """A place where the job's state is copied to, again and again.

    Attributes:
        name: of the place.
        interval_s: work between two copies, in seconds.
        stall_s: for how long training stops at each.
        write_s: how long after that, in wall time, until the copy can be restored.
        restore_s: how long reading it back takes.
        at_multiples: copies are made at multiples of `interval_s` of the whole job's work, as checkpoints are; else
            counted from where the job last went on, as snapshots are.
        is_fixed: the interval follows from how the job works; it is not a choice.
    """

    name: str
    interval_s: float
    stall_s: float
    write_s: float
    restore_s: float
    at_multiples: bool = True
    is_fixed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A kind of fault, as it meets one way of running the job.

    Attributes:
        name: of the kind; the trace of faults uses it.
        survivors: names of the copies that are still there afterwards.
        detect_s: from the fault until something is done about it; nothing useful happens meanwhile.
        restart_s: until processes run again.
        while_idle: it also strikes while the job is not training, as broken hardware does.
        takes_node: a node has to be replaced by a spare one.
        save_s: None, or how long the job takes to write its state to the last copy before it ends: it was warned.
    """

    name: str
    survivors: frozenset[str]
    detect_s: float
    restart_s: float
    while_idle: bool = False
    takes_node: bool = False
    save_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One way of running a job.

    Attributes:
        name: of the plan.
        copies: fastest to restore first.
        faults: how each kind of fault is met.
        spares: nodes that wait to take another's place; None for no limit.
        repair_s: until a node that was replaced is a spare one.
    """

    name: str
    copies: tuple[Copy, ...]
    faults: tuple[Fault, ...]
    spares: int | None = None
    repair_s: float = 0.0

    def with_intervals(self, interval_s: Mapping[str, float]) -> Plan:
        """The same with other intervals for the copies named."""
        copies = (dataclasses.replace(c, interval_s=interval_s.get(c.name, c.interval_s)) for c in self.copies)
        return dataclasses.replace(self, copies=tuple(copies))

    def source(self, fault: Fault) -> Copy | None:
        """The first of the copies that outlives the fault: where it usually goes on from."""
        return next((copy for copy in self.copies if copy.name in fault.survivors), None)


@dataclasses.dataclass
class FaultCost:
    """What the faults of one kind cost over a life, in seconds."""

    number: int = 0
    lost_work_s: float = 0.0
    down_s: float = 0.0


@dataclasses.dataclass
class Account:
    """Where the wall time of a life went; the parts add up to `wall_s`."""

    wall_s: float = 0.0
    useful_s: float = 0.0
    redone_s: float = 0.0
    detect_s: float = 0.0
    wait_s: float = 0.0
    restart_s: float = 0.0
    restore_s: float = 0.0
    stall_s: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    faults: dict[str, FaultCost] = dataclasses.field(default_factory=dict[str, FaultCost])

    @property
    def goodput(self) -> float:
        return self.useful_s / self.wall_s

    @property
    def num_faults(self) -> int:
        return sum(cost.number for cost in self.faults.values())

    def parts(self) -> dict[str, float]:
        """Shares of the wall time by what they were spent on."""
        seconds = {"useful work": self.useful_s, "work done again": self.redone_s}
        seconds |= {f"stall: {name}": spent for name, spent in self.stall_s.items()}
        seconds |= {"until noticed": self.detect_s, "waiting for a node": self.wait_s}
        seconds |= {"restarting": self.restart_s, "restoring": self.restore_s}
        return {name: spent / self.wall_s for name, spent in seconds.items()}


class Stretch:
    """Training between two faults: what has been done and copied by a moment, in closed form.

    Args:
        copies: the copies that are made.
        work_s: the job's work when the stretch begins.
        held: whether each copy already holds just that work.
    """

    def __init__(self, copies: Sequence[Copy], work_s: float, held: Sequence[bool]) -> None:
        self._copies = copies
        self._first_s = [_first_due(copy, work_s, is_held) for copy, is_held in zip(copies, held)]
        self._stalling = [k for k, copy in enumerate(copies) if copy.stall_s > 0]
        self._sum_stalls_s = sum(copy.stall_s for copy in copies)
        self._slowness = 1.0 + sum(copy.stall_s / copy.interval_s for copy in copies)

    def at(self, elapsed_s: float) -> tuple[float, list[int], float, int | None]:
        """Work done, finished copies, and time into the stall of a copy (its index), after `elapsed_s` of wall time.

        All copies due at a moment of work stop training one after the other.
        """
        copies, first_s = self._copies, self._first_s
        counts = [0] * len(copies)
        # A lower bound of the work done: up to it, every copy that was due is finished. The rest is a few steps.
        sure_s = (elapsed_s - self._sum_stalls_s) / self._slowness
        stalled_s = 0.0
        due: list[tuple[float, int]] = []
        for k in self._stalling:
            copy = copies[k]
            count = int((sure_s - first_s[k]) / copy.interval_s) if sure_s > first_s[k] else 0
            counts[k] = count
            stalled_s += count * copy.stall_s
            due.append((first_s[k] + count * copy.interval_s, k))
        work_s, into_s, during = elapsed_s - stalled_s, 0.0, None
        while due:
            next_s, k = min(due)
            if next_s + stalled_s >= elapsed_s:
                work_s = elapsed_s - stalled_s
                break
            if next_s + stalled_s + copies[k].stall_s > elapsed_s:
                work_s, into_s, during = next_s, elapsed_s - next_s - stalled_s, k
                break
            counts[k] += 1
            stalled_s += copies[k].stall_s
            due[self._stalling.index(k)] = (first_s[k] + counts[k] * copies[k].interval_s, k)
        for k, copy in enumerate(copies):
            if copy.stall_s == 0 and work_s >= first_s[k]:
                counts[k] = int((work_s - first_s[k]) / copy.interval_s) + 1
        return work_s, counts, into_s, during

    def newest(self, elapsed_s: float) -> list[float | None]:
        """For each copy the work that the newest one complete by then holds; None where this stretch brought none."""
        held: list[float | None] = []
        for k, copy in enumerate(self._copies):
            by_s = elapsed_s - copy.write_s
            count = self.at(by_s)[1][k] if by_s > self._first_s[k] else 0
            held.append(self._first_s[k] + (count - 1) * copy.interval_s if count else None)
        return held


def _first_due(copy: Copy, work_s: float, is_held: bool) -> float:
    if copy.at_multiples:
        return (math.floor(work_s / copy.interval_s + 1e-9) + 1) * copy.interval_s - work_s
    return copy.interval_s if is_held else 0.0


def live(plan: Plan, trace: Sequence[tuple[float, str]], duration_s: float) -> Account:
    """Plays one life of a job against a trace of faults.

    Args:
        plan: how the job is run.
        trace: (time in seconds, name of the kind of fault), ordered by time.
        duration_s: the wall time that is played.
    """
    return _Life(plan, duration_s).run(trace)


class _Life:
    def __init__(self, plan: Plan, duration_s: float) -> None:
        self._plan = plan
        self._end_s = duration_s
        self._faults = {fault.name: fault for fault in plan.faults}
        self._work_s = 0.0
        # Copies that start at work 0 cost nothing: the initial state comes from the script.
        self._held: list[float | None] = [0.0] * len(plan.copies)
        self._away: list[float] = []  # when nodes that were taken come back
        self._whole_at_s = 0.0
        self._account = Account(wall_s=duration_s, stall_s={copy.name: 0.0 for copy in plan.copies if copy.stall_s > 0})
        for fault in plan.faults:
            self._account.faults[fault.name] = FaultCost()

    def run(self, trace: Sequence[tuple[float, str]]) -> Account:
        begin_s, index = 0.0, 0
        while True:
            stretch = Stretch(self._plan.copies, self._work_s, [held == self._work_s for held in self._held])
            while index < len(trace) and trace[index][0] < begin_s:
                index += 1
            if index >= len(trace) or trace[index][0] >= self._end_s:
                self._work_s += self._train(stretch, self._end_s - begin_s)
                break
            at_s, name = trace[index]
            index += 1
            done_s = self._work_s + self._train(stretch, at_s - begin_s)
            self._keep(stretch, at_s - begin_s)
            begin_s, index = self._recover(trace, index, at_s, self._faults[name], done_s)
            if begin_s >= self._end_s:
                break
        self._account.useful_s = self._work_s
        return self._account

    def _train(self, stretch: Stretch, elapsed_s: float) -> float:
        work_s, counts, into_s, during = stretch.at(elapsed_s)
        for copy, count in zip(self._plan.copies, counts):
            if copy.stall_s > 0:
                self._account.stall_s[copy.name] += count * copy.stall_s
        if during is not None:
            self._account.stall_s[self._plan.copies[during].name] += into_s
        return work_s

    def _keep(self, stretch: Stretch, elapsed_s: float) -> None:
        for k, newest_s in enumerate(stretch.newest(elapsed_s)):
            if newest_s is not None:
                self._held[k] = self._work_s + newest_s

    def _recover(
        self, trace: Sequence[tuple[float, str]], index: int, at_s: float, fault: Fault, done_s: float
    ) -> tuple[float, int]:
        """From a fault to the next stretch; faults meanwhile begin it again. Returns its beginning and next fault."""
        while True:
            phases = [("detect_s", fault.detect_s)]
            if fault.save_s is not None:  # in the time of grace, to the place that all outlive
                self._held[-1] = done_s
                phases.append(("stall_s", fault.save_s))
            phases += [("wait_s", self._wait(fault, at_s)), ("restart_s", fault.restart_s)]
            restored_s, restore_s = self._restore(fault)
            phases.append(("restore_s", restore_s))
            cost = self._account.faults[fault.name]
            cost.number += 1
            cost.lost_work_s += done_s - restored_s
            self._account.redone_s += done_s - restored_s
            done_s = self._work_s = restored_s
            ready_s = at_s + sum(seconds for _, seconds in phases)
            while index < len(trace) and trace[index][0] < ready_s and not self._faults[trace[index][1]].while_idle:
                index += 1
            next_s = trace[index][0] if index < len(trace) else math.inf
            until_s = min(next_s, ready_s, self._end_s)
            cost.down_s += until_s - at_s
            self._spend(phases, until_s - at_s)
            if until_s == ready_s or until_s == self._end_s:
                return until_s, index
            at_s, fault = next_s, self._faults[trace[index][1]]
            index += 1

    def _wait(self, fault: Fault, at_s: float) -> float:
        """How long after the fault was seen until as many nodes are there as the job has."""
        if fault.takes_node and self._plan.spares is not None:
            while self._away and self._away[0] <= at_s:
                heapq.heappop(self._away)
            heapq.heappush(self._away, at_s + self._plan.repair_s)
            missing = len(self._away) - self._plan.spares
            if missing > 0:
                self._whole_at_s = heapq.nsmallest(missing, self._away)[-1]
        return max(0.0, self._whole_at_s - at_s - fault.detect_s)

    def _restore(self, fault: Fault) -> tuple[float, float]:
        """The newest work that is left, the fastest place that has it; what did not outlive the fault is forgotten."""
        best: tuple[float, float] | None = None
        for k, copy in enumerate(self._plan.copies):
            if copy.name not in fault.survivors:
                self._held[k] = None
            held_s = self._held[k]
            if held_s is not None and (best is None or (held_s, -copy.restore_s) > (best[0], -best[1])):
                best = (held_s, copy.restore_s)
        return best or (0.0, 0.0)

    def _spend(self, phases: Sequence[tuple[str, float]], seconds: float) -> None:
        account = self._account
        for name, phase_s in phases:
            spent_s = min(phase_s, seconds)
            seconds -= spent_s
            if name == "stall_s":
                account.stall_s["last save"] = account.stall_s.get("last save", 0.0) + spent_s
            else:
                setattr(account, name, getattr(account, name) + spent_s)
