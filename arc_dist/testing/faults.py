"""The fault model: everything that the simulator may do to a job, and nothing else. docs/faults.md describes each kind.

A fault has a time and a target, so a list of faults together with a seed is a whole story, and can be written down and
read back as text, one fault per line::

    at 0.512 crash-rank 2
    at 0.700 partition 1 for 4.000
    at 0.300 in-recovery lose-reply 0 times 3
"""

from __future__ import annotations

import dataclasses
import enum
import random


class Kind(enum.Enum):
    """What goes wrong. The comment says what `target` and `amount` mean where it is not a rank and seconds."""

    CRASH_RANK = "crash-rank"
    FREEZE_RANK = "freeze-rank"
    SLOW_RANK = "slow-rank"
    CRASH_SUPERVISOR = "crash-supervisor"  # its rank's process and memory go with it; its launcher starts another
    FREEZE_SUPERVISOR = "freeze-supervisor"
    CRASH_NODE = "crash-node"  # target: a node; all supervisors there
    FREEZE_NODE = "freeze-node"
    CRASH_COORDINATOR = "crash-coordinator"  # amount: seconds until it is started again from its journal
    FREEZE_COORDINATOR = "freeze-coordinator"
    REPLACE_COORDINATOR = "replace-coordinator"  # frozen, replaced, and after `amount` seconds awake again
    LOSE = "lose"  # amount: number of messages to the coordinator
    LOSE_REPLY = "lose-reply"  # amount: number of answers
    DELAY = "delay"  # the next message takes `amount` seconds longer, so that later ones overtake it
    DUPLICATE = "duplicate"  # amount: number of messages
    PARTITION = "partition"
    PARTITION_ONE_WAY = "partition-one-way"  # the rank is not heard, but hears
    FLAP = "flap"  # a partition that comes and goes
    JUMP_CLOCK = "jump-clock"  # the coordinator's monotonic clock, forward
    JUMP_WALL_CLOCK = "jump-wall-clock"  # the time that manifests tell, backward
    DISK_FULL = "disk-full"  # target: a disk
    DISK_EIO = "disk-eio"  # amount: number of operations
    LOST_ANSWER = "lost-answer"  # a write is done, and said to have failed
    LOST_WRITE = "lost-write"  # a write is said to be done, and its bytes are zeros when they are read
    TORN_WRITE = "torn-write"  # whoever writes next dies in the middle
    BIT_FLIP = "bit-flip"  # target: a disk; in a file that is committed
    CORRUPT_STATE = "corrupt-state"  # found late: the ranks go back in memory, and say which steps are bad
    PREEMPT = "preempt"  # a notice to one rank; the job saves its state and ends as preempted


_COUNTED = {Kind.LOSE, Kind.LOSE_REPLY, Kind.DUPLICATE, Kind.DISK_EIO, Kind.LOST_ANSWER, Kind.LOST_WRITE}
_MOMENTARY = {
    Kind.CRASH_RANK,
    Kind.CRASH_SUPERVISOR,
    Kind.CRASH_NODE,
    Kind.TORN_WRITE,
    Kind.BIT_FLIP,
    Kind.CORRUPT_STATE,
    Kind.PREEMPT,
}
ON_DISKS = {Kind.DISK_FULL, Kind.DISK_EIO, Kind.LOST_ANSWER, Kind.LOST_WRITE, Kind.TORN_WRITE, Kind.BIT_FLIP}
NUM_DISKS = 3  # two tiers and the journal's
# Rare, because it ends the job and with it what the other faults would have shown.
_RARE = {Kind.PREEMPT: 0.2, Kind.JUMP_CLOCK: 0.3, Kind.CRASH_NODE: 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        at_s: when, in seconds from the start of the job.
        kind: what.
        target: a rank, a node or a disk.
        amount: seconds, or a number where the kind counts.
        in_recovery: only when a generation has ended and the next does not run yet, the first time after `at_s`.
    """

    at_s: float
    kind: Kind
    target: int = 0
    amount: float = 0.0
    in_recovery: bool = False

    def __str__(self) -> str:
        words = [f"at {self.at_s:.3f}", *(["in-recovery"] if self.in_recovery else []), self.kind.value]
        words.append(str(self.target))
        if self.kind in _COUNTED:
            words.append(f"times {self.amount:.0f}")
        elif self.kind not in _MOMENTARY:
            words.append(f"for {self.amount:.3f}")
        return " ".join(words)


def parse(line: str) -> Fault:
    """Reads what `str(Fault)` wrote.

    Raises:
        ValueError: it is something else.
    """
    words = line.split()
    if len(words) < 4 or words[0] != "at":
        raise ValueError(f"not a fault: {line!r}")
    rest = words[2:]
    in_recovery = rest[0] == "in-recovery"
    kind, target, *amount = rest[1:] if in_recovery else rest
    number = float(amount[1]) if amount else 0.0
    return Fault(at_s=float(words[1]), kind=Kind(kind), target=int(target), amount=number, in_recovery=in_recovery)


def draw(rng: random.Random, *, num: int, num_ranks: int, num_nodes: int, horizon_s: float) -> list[Fault]:
    """`num` faults of all kinds at times before `horizon_s`, a third of them during recovery, in the order of time."""
    kinds = list(Kind)
    weights = [_RARE.get(kind, 1.0) for kind in kinds]
    faults: list[Fault] = []
    for kind in rng.choices(kinds, weights, k=num):
        if kind in ON_DISKS:
            target = rng.randrange(NUM_DISKS)
        elif kind in (Kind.CRASH_NODE, Kind.FREEZE_NODE):
            target = rng.randrange(num_nodes)
        else:
            target = rng.randrange(num_ranks)
        faults.append(
            Fault(
                at_s=round(rng.uniform(0.0, horizon_s), 3),
                kind=kind,
                target=target,
                amount=_amount(rng, kind),
                in_recovery=rng.random() < 1 / 3,
            )
        )
    return sorted(faults, key=lambda fault: fault.at_s)


def _amount(rng: random.Random, kind: Kind) -> float:
    if kind in _MOMENTARY:
        return 0.0
    if kind in _COUNTED:
        return float(rng.randint(1, 6))
    if kind is Kind.DELAY:
        return round(rng.choice((0.01, 0.2, 3.0, 30.0)), 3)
    return round(rng.choice((0.05, 0.3, 2.0, 12.0)) * rng.uniform(0.5, 1.5), 3)
