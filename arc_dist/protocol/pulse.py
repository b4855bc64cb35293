"""Who is still there: every supervisor says so now and then, and one that was not heard for too long is lost.

A **node** is what one agent of the launcher started: its ranks come and go together. When a node is lost, the ranks of
the others may go on as a smaller world at once, if that is safe:

- at least `min_nodes` are left, the one of rank 0, where the coordinator is, among them;
- this side holds the **lease**: it can reach the launcher's rendezvous, and has never been without it, or asleep, for
  as long as `timeout_s`. The rendezvous lets nobody begin a round without a node that it hears; it leaves a node out
  only when it was silent for longer than that. So as long as the lease holds, the lost ones cannot have begun anew.

Ranks on the node of rank 0 are there as long as it is: one of them that is silent was stopped, or waits for its turn on
a busy machine, and its agent hears of its death by itself.

Time in which this side itself was asleep (stopped, suspended with its machine) is not the others' silence.
"""

from __future__ import annotations

import dataclasses

Survivors = tuple[tuple[int, int], ...]  # (rank, node) of those that go on, by rank

_RESTLESS_SHARE = 0.5  # a longer gap between two looks than this share of the time-out was sleep


@dataclasses.dataclass(frozen=True, kw_only=True)
class PulseRules:
    """What does not change.

    Attributes:
        timeout_s: silence after which a supervisor is lost; 0 loses nobody.
        min_nodes: the fewest nodes that the launcher allows; 0 when it allows no other number than there are.
        expects_all: ranks that were never heard count as heard at the start; else they may take their time.
        is_replaceable: a launcher may start a lost rank's supervisor again by itself, so the others wait for it.
    """

    timeout_s: float = 0.0
    min_nodes: int = 0
    expects_all: bool = False
    is_replaceable: bool = False


class AwakeClock:
    """Seconds in which this process was running, as far as it looked often enough.

    Args:
        timeout_s: gaps of more than half of it count as half of it.
    """

    def __init__(self, timeout_s: float) -> None:
        self.elapsed_s = 0.0
        self.longest_gap_s = 0.0
        self._max_gap_s = timeout_s * _RESTLESS_SHARE
        self._looked_s: float | None = None

    def look(self, now_s: float) -> float:
        """Takes the time `now_s` (any monotonic clock) into account; returns `elapsed_s`."""
        if self._looked_s is not None:
            gap_s = max(0.0, now_s - self._looked_s)
            self.longest_gap_s = max(self.longest_gap_s, gap_s)
            self.elapsed_s += min(gap_s, self._max_gap_s)
        self._looked_s = now_s
        return self.elapsed_s


class Pulses:
    """When each rank was heard last. Times are any monotonic clock's; not thread-safe."""

    def __init__(self, rules: PulseRules, world_size: int) -> None:
        self._rules = rules
        self._world_size = world_size
        self._clock = AwakeClock(rules.timeout_s)
        self._heard_s: dict[int, float] = dict.fromkeys(range(world_size), 0.0) if rules.expects_all else {}
        self._nodes: dict[int, int] = {}
        self._left: set[int] = set()

    def hear(self, rank: int, node: int, now_s: float) -> None:
        """The supervisor of `rank`, which runs on `node`, lives."""
        self._heard_s[rank] = self._clock.look(now_s)
        self._nodes[rank] = node

    def expect(self, rank: int) -> None:
        """Another supervisor has the rank now, and was not heard yet."""
        self._heard_s[rank] = self._clock.elapsed_s
        self._left.discard(rank)

    def leave(self, rank: int) -> None:
        """It ends as it should, and will not be heard any more."""
        self._left.add(rank)

    @property
    def was_asleep(self) -> bool:
        """Whether this side did not run for so long that others may have given it up."""
        return self._clock.longest_gap_s >= self._rules.timeout_s > 0

    def silent(self, now_s: float) -> dict[int, float]:
        """Ranks that are lost, and for how long they were not heard."""
        awake_s = self._clock.look(now_s)
        if not self._rules.timeout_s:
            return {}
        excused = self._left if self._rules.is_replaceable else self._left | self._near()
        silence = {rank: awake_s - heard_s for rank, heard_s in self._heard_s.items() if rank not in excused}
        return {rank: silent_s for rank, silent_s in sorted(silence.items()) if silent_s > self._rules.timeout_s}

    def _near(self) -> set[int]:
        """Ranks on the node of rank 0, which are not lost without it; their agent sees it when a process dies."""
        return {rank for rank, node in self._nodes.items() if node == self._nodes.get(0)}

    def survivors(self, lost: set[int]) -> Survivors:
        """Who can go on without the nodes of the ranks in `lost`: empty when nobody may."""
        nodes = self._nodes
        if not self._rules.min_nodes or self._left or len(nodes) < self._world_size:
            return ()
        gone = {nodes[rank] for rank in lost}
        left = tuple((rank, nodes[rank]) for rank in sorted(nodes) if nodes[rank] not in gone)
        is_enough = len({node for _, node in left}) >= self._rules.min_nodes
        return left if is_enough and left and left[0][0] == 0 else ()
