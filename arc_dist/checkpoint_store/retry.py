"""Trying again what may succeed: bounded attempts, growing pauses with jitter, one deadline for all."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from arc_dist.errors import ArcError

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retries:
    """How often and how long.

    Attributes:
        attempts: calls in all, the first included.
        first_pause_s: before the second attempt; each further pause is twice as long, at most `longest_pause_s`.
        longest_pause_s: bound on a pause. Each is cut by a random factor between 1/2 and 1, so that the ranks of a job
            do not all come back to a struggling server at the same moment.
    """

    attempts: int = 5
    first_pause_s: float = 0.2
    longest_pause_s: float = 10.0

    def pause_s(self, failures: int, jitter: float) -> float:
        """The pause after so many failures; `jitter` is a random number from 0 to 1."""
        longest = min(self.longest_pause_s, self.first_pause_s * 2.0 ** (failures - 1))
        return longest * (0.5 + 0.5 * jitter)


def retrying(
    action: Callable[[], _Result],
    retries: Retries,
    *,
    deadline: float | None = None,
    should_abort: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    jitter: Callable[[], float] = random.random,
) -> _Result:
    """Calls `action` until it succeeds or fails for good, and raises its last error.

    Args:
        action: safe to repeat.
        retries: how often.
        deadline: no attempt begins after it, in seconds of `clock`; it is never moved by a retry. None: no limit.
        should_abort: True ends the attempts with the error at hand.
        clock: monotonic seconds.
        sleep: waits.
        jitter: a random number from 0 to 1.

    Raises:
        ArcError: one that is not `retryable`, at once; a retryable one when attempts or time are used up.
    """
    failures = 0
    while True:
        try:
            return action()
        except ArcError as error:
            failures += 1
            pause_s = retries.pause_s(failures, jitter())
            is_late = deadline is not None and clock() + pause_s >= deadline
            if not error.retryable or failures >= retries.attempts or is_late or (should_abort and should_abort()):
                raise
            _log.info("attempt %d of %d failed, next in %.1f s: %s", failures, retries.attempts, pause_s, error.message)
        sleep(pause_s)
