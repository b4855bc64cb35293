"""Hangs: how long a rank may stay in a section, whether a job hangs, and which rank the others wait for.

**Deadlines.** Each rank learns the longest stay of each section over its recent past (`Longest`) and multiplies by a
factor. The first steps of a process (compilation, warming up) are learned apart, for the processes after it. A section
that was never seen has a generous limit. The ranks' limits are merged by taking the largest, so that one slow rank does
not make the others look hung.

**Verdict.** In a synchronous job one stuck rank makes all others wait, and then all are overdue. So being overdue only
starts an inquiry: every rank is looked at (`Sighting`), and `judge` asks who the others wait for:

1. A stopped process (SIGSTOP) is the culprit: nothing it waits for can come.
2. Otherwise the ranks that are *behind* (lower step, earlier section) and do not wait in a collective are those that
   the others wait for. Are they overdue, they are the culprits; are they not, it is no hang: an evaluation of rank 0
   may take as long as its own limit says.
3. Are all that are behind in a collective themselves, those ahead that are not and are overdue are the culprits (in a
   loop that is not ours the order of sections is not that of time).
   Otherwise the ranks disagree about the order of collectives: some rank left one out. The side with fewer ranks is
   blamed; with two equal sides nobody can tell, and that is what is said.
4. A rank whose supervisor is silent is blamed only if nobody can be by the rules above.

**Patience.** What hangs again at the same step may be an outage that has to be waited for, so each further attempt at
that step has a longer limit; the budgets (`protocol.budgets`) end a job that gets no further all the same.

A process under a debugger is never judged.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Collection, Mapping, Sequence

WARM_UP_STEPS = 5  # of each process, learned from for other processes only: compilation, lazy set-up, rebuilt buckets
ENOUGH_STEPS = 10  # before what was learned in this run counts
BLOCK_STEPS = 512  # an outlier is forgotten after one to two blocks
COMPILE_LIMIT_S = 1800.0
INQUIRY_LIMIT_S = 15.0
_LEAST_PAUSE_S = 1.0
_PATIENCE_GROWTH, _PATIENCE_MOST = 4.0, 64.0
_LONGEST_PAUSE_S = 60.0


class Section(enum.IntEnum):
    """What a rank is in the middle of. Within one step the order of the values is the order of time."""

    NONE = 0  # not guarded yet, or a script that never is
    START = 1
    CHECKPOINT = 2  # between two updates: snapshots are taken, certified, handed to the writer
    EPOCH = 3  # the first batch of an epoch: workers are started
    DATA = 4
    FORWARD = 5
    BACKWARD = 6
    VOTE = 7  # clipping, the vote, the verdict
    HEAL = 8
    UPDATE = 9
    SCRIPT = 10  # the loop's body, or a loop that is not ours
    SAVE = 11  # the last checkpoint, or the one before leaving
    DONE = 12


NUM_SECTIONS = len(Section)
LABELS = {
    Section.NONE: "nothing guarded",
    Section.START: "start",
    Section.CHECKPOINT: "snapshot",
    Section.EPOCH: "first batch of an epoch",
    Section.DATA: "data wait",
    Section.FORWARD: "forward",
    Section.BACKWARD: "backward",
    Section.VOTE: "vote",
    Section.HEAL: "healing",
    Section.UPDATE: "update",
    Section.SCRIPT: "the script's own code",
    Section.SAVE: "checkpoint",
    Section.DONE: "done",
}
# Learned from their own past. The others hold what may rightly take long at any time, such as an evaluation.
LEARNED = frozenset({Section.CHECKPOINT, Section.DATA, Section.FORWARD, Section.BACKWARD, Section.VOTE, Section.UPDATE})


# ---- deadlines -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class HangPolicy:
    """How patient to be; times in seconds.

    Attributes:
        factor: a learned limit is this many times the longest stay; 0 learns nothing.
        min_s: no learned limit is shorter.
        deadline_s: the limit of every section, set by hand; None learns, 0 watches nothing.
        unseen_s: the limit of what has not been learned: the start, the first steps, a section entered first, and the
            script's own code.
    """

    factor: float = 10.0
    min_s: float = 60.0
    deadline_s: float | None = None
    unseen_s: float = 1800.0

    def limit_s(self, section: Section, longest_s: float | None, *, warming_up: bool) -> float:
        """The limit of a section; 0 for none.

        Args:
            section: which.
            longest_s: its longest stay, or None when too little was seen; of the first steps of earlier processes
                while this one is in its first steps.
            warming_up: the process is in its first steps.
        """
        if self.deadline_s == 0 or section in (Section.NONE, Section.DONE):
            return 0.0
        generous_s = max(self.unseen_s, self.deadline_s or 0.0)
        if section is Section.START or (warming_up and longest_s is None):
            return generous_s
        if self.deadline_s is not None:
            return max(self.deadline_s, self.learned_s(longest_s)) if warming_up else self.deadline_s
        return self.learned_s(longest_s) if section in LEARNED else generous_s

    def named_s(self, longest_s: float | None, own_s: float | None) -> float:
        """The limit of a section that the user named; `own_s` is the one given with it, 0 for none."""
        if self.deadline_s == 0:
            return 0.0
        if own_s is not None:
            return own_s
        return self.deadline_s if self.deadline_s is not None else self.learned_s(longest_s)

    def learned_s(self, longest_s: float | None) -> float:
        """From the longest stay seen, or the generous one when nothing was seen."""
        if longest_s is None or self.factor == 0:
            return self.unseen_s
        return max(self.min_s, self.factor * longest_s)


@dataclasses.dataclass(kw_only=True)
class Longest:
    """The longest stay in a section over the present and the last block of steps: robust, since outliers are forgotten.

    Times are integers of any unit.
    """

    present: int = 0
    last: int = 0

    @property
    def value(self) -> int:
        return max(self.present, self.last)

    def add(self, stay: int) -> None:
        self.present = max(self.present, stay)

    def next_block(self) -> None:
        """The present block becomes the last one. A block without a stay leaves what is known."""
        if self.present:
            self.present, self.last = 0, self.present


def merge_limits(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The limits of two ranks as one: the largest wins. Commutative, associative, idempotent."""
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in one.keys() | other.keys()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """By how much limits are stretched up to a step at which a hang was found before."""

    step: int = -1
    factor: float = 1.0

    def at(self, step: int) -> float:
        """What a limit is multiplied with."""
        return self.factor if step <= self.step else 1.0

    def after_hang(self, step: int) -> Patience:
        """After a hang at `step`."""
        if step > self.step:
            return Patience(step=step, factor=_PATIENCE_GROWTH)
        return dataclasses.replace(self, factor=min(self.factor * _PATIENCE_GROWTH, _PATIENCE_MOST))


# ---- who hangs -------------------------------------------------------------------------------------------------------


class Conduct(enum.Enum):
    """What the kernel says of a process."""

    RUNNING = "R"
    SLEEPING = "S"
    BLOCKED = "D"  # in the kernel, and not to be interrupted: a disk, a network file system, a driver
    STOPPED = "T"
    TRACED = "t"  # a debugger holds it
    GONE = "Z"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sighting:
    """Where one rank is.

    Attributes:
        rank: whose.
        step: the step that it attempts.
        section: which part of it.
        name: the section's name, or that of the user's section inside it.
        elapsed_s: for how long.
        limit_s: how long it may be there; 0 for ever.
        conduct: state of its process.
        busy: share of one core that it used since it is there.
        collective: its stack waits in a collective.
        compiling: its stack is in a compiler.
        stack: identifies the stack of its main thread; "" when there is none.
    """

    rank: int
    step: int
    section: Section
    name: str
    elapsed_s: float
    limit_s: float
    conduct: Conduct = Conduct.SLEEPING
    busy: float = 0.0
    collective: bool = False
    compiling: bool = False
    stack: str = ""

    @property
    def position(self) -> tuple[int, int]:
        return (self.step, self.section)

    @property
    def left_s(self) -> float:
        """For how long it may still be there; below 0 when it is overdue, infinite without a limit."""
        if self.limit_s == 0:
            return math.inf
        limit_s = max(self.limit_s, COMPILE_LIMIT_S) if self.compiling else self.limit_s
        return limit_s - self.elapsed_s

    @property
    def is_overdue(self) -> bool:
        return self.left_s < 0

    def __str__(self) -> str:
        doing = {
            Conduct.STOPPED: "stopped (SIGSTOP)",
            Conduct.TRACED: "held by a debugger",
            Conduct.BLOCKED: "blocked in the kernel",
            Conduct.GONE: "ended",
        }.get(self.conduct, "waiting in a collective" if self.collective else "")
        if not doing:
            doing = "compiling" if self.compiling else "computing" if self.busy > 0.5 else "waiting"
        return f"{self.name} of step {self.step} for {self.elapsed_s:.1f} s, {doing}"


class Kind(enum.Enum):
    """What an inquiry found."""

    MOVING = "moving"  # nobody is overdue any more
    WAITING = "waiting"  # some wait for a rank that is within its limits
    HANG = "hang"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of `judge`.

    Attributes:
        kind: see `Kind`.
        culprits: who the others wait for; empty when it cannot be told.
        condemned: whose processes are ended, so that the job goes on; more than nobody for a hang, if anybody answers.
        reason: for the report.
        pause_s: when to look again, for the other kinds.
    """

    kind: Kind
    reason: str
    culprits: tuple[int, ...] = ()
    condemned: tuple[int, ...] = ()
    pause_s: float = _LEAST_PAUSE_S


def judge(sightings: Sequence[Sighting], silent: Collection[int] = ()) -> Verdict:
    """Who hangs, if anybody: see the module's text.

    Args:
        sightings: of the ranks that answered, one each.
        silent: ranks whose supervisor did not answer.
    """
    overdue = [seen for seen in sightings if seen.is_overdue]
    for seen in sightings:
        if seen.conduct in (Conduct.GONE, Conduct.TRACED):
            return Verdict(kind=Kind.WAITING, reason=f"rank {seen.rank}: {seen}")
    if not overdue:
        return Verdict(kind=Kind.MOVING, reason="nobody is overdue")
    stopped = [seen for seen in sightings if seen.conduct is Conduct.STOPPED]
    if stopped:
        return _blame(stopped)
    first = min(seen.position for seen in sightings)
    behind = [seen for seen in sightings if seen.position == first]
    ahead = [seen for seen in sightings if seen.position != first]
    working = [seen for seen in behind if not seen.collective]
    if working:
        late = [seen for seen in working if seen.is_overdue]
        return _blame(late) if late else _await(working)
    if silent:
        named = _named(silent)
        reason = f"{named} without a word of their supervisors" if len(silent) > 1 else f"{named}: no word"
        return Verdict(
            kind=Kind.HANG, reason=reason, culprits=tuple(sorted(silent)), condemned=(min(s.rank for s in overdue),)
        )
    on_their_way = [seen for seen in ahead if not seen.collective and not seen.is_overdue]
    if on_their_way:
        return _await(on_their_way)
    working = [seen for seen in ahead if not seen.collective]
    if working:
        return _blame(working)
    if not all(seen.is_overdue for seen in behind):
        return _await([seen for seen in behind if not seen.is_overdue])
    return _disagreement(sightings, by_position=bool(ahead))


def _blame(culprits: Sequence[Sighting]) -> Verdict:
    ranks = tuple(sorted(seen.rank for seen in culprits))
    reason = "; ".join(f"rank {seen.rank}: {seen}" for seen in sorted(culprits, key=lambda seen: seen.rank)[:8])
    return Verdict(kind=Kind.HANG, reason=reason, culprits=ranks, condemned=ranks)


def _await(busy: Sequence[Sighting]) -> Verdict:
    """Not a hang: somebody is still within a limit. Looked at again when the first of them is over."""
    pause_s = min(max(_LEAST_PAUSE_S, min(seen.left_s for seen in busy)), _LONGEST_PAUSE_S)
    reason = "; ".join(f"rank {seen.rank} is within its limit: {seen}" for seen in busy[:8])
    return Verdict(kind=Kind.WAITING, reason=reason, pause_s=pause_s)


def _disagreement(sightings: Sequence[Sighting], *, by_position: bool) -> Verdict:
    """All wait in collectives: those who wait elsewhere than most others left one out, or alone did not."""
    groups: dict[object, list[int]] = {}
    for seen in sightings:
        groups.setdefault(seen.position if by_position else seen.stack, []).append(seen.rank)
    largest = max(groups.values(), key=len)
    smallest = min(groups.values(), key=len)
    if 2 * len(largest) > len(sightings) and len(groups) > 1:
        culprits = tuple(sorted(seen.rank for seen in sightings if seen.rank not in largest))
        reason = f"{_named(culprits)} wait{'s' if len(culprits) == 1 else ''} in another collective than the others"
        return Verdict(kind=Kind.HANG, reason=reason, culprits=culprits, condemned=culprits)
    what = "in different collectives" if len(groups) > 1 else "in the same place"
    reason = f"all ranks wait for each other {what}; who is to blame cannot be told"
    return Verdict(kind=Kind.HANG, reason=reason, condemned=(max(smallest),))


def _named(ranks: Collection[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(rank) for rank in sorted(ranks))}"


# ---- the inquiry -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inquiry:
    """The question to all ranks where they are, while the answers come in.

    Attributes:
        number: 1, 2, ...; an answer to an older question is not one to this.
        opened_s: when it was asked.
        awaited: ranks that are asked.
        told: what they answered; the first answer of each counts.
    """

    number: int
    opened_s: float
    awaited: frozenset[int]
    told: Mapping[int, Sighting]

    @property
    def silent(self) -> frozenset[int]:
        return self.awaited - self.told.keys()

    def take(self, number: int, seen: Sighting) -> Inquiry:
        """With the answer of a rank; the same when it answers another question, twice, or was not asked."""
        if number != self.number or seen.rank in self.told or seen.rank not in self.awaited:
            return self
        return dataclasses.replace(self, told={**self.told, seen.rank: seen})

    def is_over(self, now_s: float) -> bool:
        """All have answered, or time is up."""
        return not self.silent or now_s - self.opened_s > INQUIRY_LIMIT_S
