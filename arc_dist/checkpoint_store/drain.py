"""Copies committed steps to slower tiers, and keeps each tier to its retention, in the background.

One process of a job drains: rank 0's. What is still to be copied follows from what the tiers hold, so nothing has to be
remembered: after a crash in the middle the next process finds the same answer, and a copy that was begun goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from arc_dist.checkpoint_store.catalog import StepInfo
from arc_dist.checkpoint_store.tiers import Tiers
from arc_dist.checkpoint_store.transfer import TransferAborted, copy_step
from arc_dist.errors import ArcError, StoreFull

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """A step that a slower tier shall get."""

    step: int
    source: int
    target: int


def next_copy(held: Sequence[Collection[int]], every: Sequence[int | None], *, finishing: bool = False) -> Copy | None:
    """What to copy next; None when every tier has what it shall have. Pure.

    The newest step goes first, and to the fastest tier that lacks it. What is older than the newest that a tier has is
    never sent there: it would only take the place and the time of what a restore would use.

    Args:
        held: the certified steps of each tier, fastest first.
        every: of each tier, only the first step of each stretch of so many steps is wanted; None: all. (Not multiples:
            after a rollback or a pre-emption a run may never save at one again.)
        finishing: the newest step is wanted everywhere, whatever `every` says.
    """
    for target in range(1, len(held)):
        there = max(held[target], default=-1)
        newer = {step: tier for tier in reversed(range(target)) for step in held[tier] if step > there}
        if not newer:
            continue
        newest = max(newer)
        stretch = every[target]
        if stretch is None or finishing or newest // stretch > there // stretch:
            return Copy(newest, newer[newest], target)
    return None


class Drainer:
    """The thread that drains.

    Args:
        tiers: two or more, or one with retention.
        record: called with incidents.
        max_bytes_per_s: limit of what is sent; None for none.
    """

    def __init__(
        self,
        tiers: Tiers,
        *,
        record: Callable[..., None] | None = None,
        max_bytes_per_s: float | None = None,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._tiers = tiers
        self._record = record
        self._max_bytes_per_s = max_bytes_per_s
        self._first_pause_s = first_pause_s
        self._changed = threading.Condition()
        self._is_due = True  # an earlier process may have left something to do
        self._finishing = False
        self._stopping = False
        self._failures = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread, which begins with what an earlier process left to do."""
        self._thread = threading.Thread(target=self._run, name="arc-drain", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Something was committed."""
        with self._changed:
            self._is_due = True
            self._changed.notify_all()

    def close(self, *, finish_within_s: float) -> bool:
        """Copies the newest step to every tier within the time given, then ends; False when it was not done.

        A call that never returns (a dead server) does not hold this up; the thread ends with the process.
        """
        thread = self._thread
        if thread is None:
            return True
        with self._changed:
            self._finishing = self._is_due = True
            self._stopping = finish_within_s <= 0
            self._changed.notify_all()
        thread.join(max(0.0, finish_within_s))
        self._stopping = True
        if thread.is_alive():
            thread.join(1.0)
        return not self._finishing

    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                pause_s = min(_LONGEST_PAUSE_S, self._first_pause_s * 2.0 ** (self._failures - 1))
                self._changed.wait_for(lambda: self._is_due or self._stopping, pause_s if self._failures else None)
                self._is_due = False
                finishing = self._finishing
            if self._stopping:
                return
            try:
                self._drain(finishing)
                self._failures = 0
            except TransferAborted:
                return
            except ArcError as error:
                self._failures += 1
                _log.warning("draining the checkpoints failed, it is tried again: %s", error.message)
                if self._record is not None and self._failures == 1:  # once per trouble, not per attempt
                    kind = "tier_full" if isinstance(error, StoreFull) else "drain_failed"
                    self._record(kind=kind, reason=error.message)
                continue
            if finishing:
                self._finishing = False
                return

    def _drain(self, finishing: bool) -> None:
        stores = self._tiers.stores
        every = [tier.every for tier in self._tiers.tiers]
        while not self._stopping:
            infos = [self._sound(number) for number in range(len(stores))]
            held = [[step for step, info in found.items() if info.certified] for found in infos]
            copy = next_copy(held, every, finishing=finishing)
            for number in range(len(stores)):
                elsewhere = {step for other, found in enumerate(infos) if other != number for step in found}
                self._tiers.prune(number, elsewhere)  # never the newest, which is what the slower tiers get
            if copy is None:
                return
            self._copy(copy, infos[copy.source][copy.step])

    def _sound(self, number: int) -> Mapping[int, StepInfo]:
        infos = self._tiers.stores[number].steps(include_damaged=True)
        return {info.step: info for info in infos if info.problem is None}

    def _copy(self, copy: Copy, info: StepInfo) -> None:
        source, target = self._tiers.stores[copy.source], self._tiers.stores[copy.target]
        began = time.perf_counter()
        sent = copy_step(
            source.backend,
            source.run,
            info.directory,
            target.backend,
            should_abort=lambda: self._stopping,
            max_bytes_per_s=self._max_bytes_per_s,
        )
        _log.info(
            "checkpoint of step %d copied to %s: %.1f MB in %.1f s",
            copy.step,
            target.url,
            sent.sent_nbytes / 1e6,
            time.perf_counter() - began,
        )
