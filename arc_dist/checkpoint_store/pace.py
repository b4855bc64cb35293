"""Keeps a background transfer below a rate, so that it leaves disk and network to the training."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Call it after each block; it sleeps for as long as the transfer is ahead of its rate.

    Args:
        max_bytes_per_s: the rate; None for no limit.
        clock: monotonic seconds.
        sleep: waits.
    """

    def __init__(
        self,
        max_bytes_per_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = max_bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = 0.0  # when all bytes so far would have been sent at exactly the rate

    def __call__(self, nbytes: int) -> None:
        if self._rate is None:
            return
        now = self._clock()
        # An idle time is not saved up: a burst after it would be what the limit is there to prevent.
        self._free_at = max(self._free_at, now) + nbytes / self._rate
        if self._free_at > now:
            self._sleep(self._free_at - now)
