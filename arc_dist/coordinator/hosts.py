"""Listens to the pulses of supervisors, and says when some are lost and who may go on without them.

It has a lock of its own, so that a pulse is never late because something else takes its time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

from arc_dist.protocol.events import Vanished
from arc_dist.protocol.eviction import Outlook
from arc_dist.protocol.pulse import PulseRules, Pulses

_ASLEEP = "this host did not run for a while, and others may have gone on without it"


def _nothing() -> str:
    return ""


class HostDesk:
    """See the module's text.

    Args:
        world_size: number of ranks.
        rules: see `PulseRules`.
        lease: what forbids this side to go on without the others, in words; empty when nothing does.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        world_size: int,
        rules: PulseRules,
        clock: Callable[[], float],
        lease: Callable[[], str] = _nothing,
    ) -> None:
        self._rules = rules
        self._lease = lease
        self._clock = clock
        self._guard = threading.Lock()
        self._pulses = Pulses(rules, world_size)

    def hear(self, rank: int, node: int, *, is_leaving: bool) -> Vanished | None:
        """Takes the pulse of a rank; on that of rank 0, where the coordinator is, also looks who is lost."""
        with self._guard:
            now_s = self._clock()
            self._pulses.hear(rank, node, now_s)
            if is_leaving:
                self._pulses.leave(rank)
            return self._look(now_s) if rank == 0 and not is_leaving else None

    def expect(self, rank: int) -> None:
        """Another supervisor got this rank, and has as long as any to be heard."""
        with self._guard:
            self._pulses.expect(rank)

    def without(self, ranks: Collection[int]) -> Outlook:
        """Who could go on as a smaller world without the nodes of these ranks."""
        with self._guard:
            if not self._rules.min_nodes:
                return Outlook(survivors=(), problem="the number of nodes is fixed (--nnodes is no range)")
            if problem := self._forbidden():
                return Outlook(survivors=(), problem=problem)
            problem = f"fewer than {self._rules.min_nodes} nodes would be left that are known and do not end"
            return Outlook(survivors=self._pulses.survivors(set(ranks)), problem=problem)

    def _look(self, now_s: float) -> Vanished | None:
        silent = self._pulses.silent(now_s)
        problem = self._forbidden()
        if silent:
            first, silent_s = next(iter(silent.items()))
            more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
            reason = f"the supervisor of rank {first}{more} was not heard for {silent_s:.0f} s: its host is lost"
            return Vanished(
                ranks=tuple(silent),
                reason=f"{reason}; {problem}" if problem else reason,
                survivors=() if problem else self._pulses.survivors(set(silent)),
                is_replaceable=self._rules.is_replaceable,
            )
        if problem:
            return Vanished(ranks=(), reason=problem)
        return None

    def _forbidden(self) -> str:
        """Where others might have begun without this side, it must end; elsewhere it has nothing to fear."""
        if not self._rules.min_nodes:
            return ""
        return _ASLEEP if self._pulses.was_asleep else self._lease()
