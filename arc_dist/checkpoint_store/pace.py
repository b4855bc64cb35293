"""Keeps background transfers below a rate, so that they leave disk and network to the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LOOK_UP_S = 0.1


class Pace:
    """The rate of all transfers that share it, on whatever threads.

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
        self._lock = threading.Lock()
        self._free_at = 0.0  # when all bytes so far have been sent, at exactly the rate

    def lift(self) -> None:
        """Ends the limit, also for a transfer that waits at this moment."""
        self._rate = None

    def spend(self, nbytes: int, check: Callable[[], None]) -> None:
        """Waits until `nbytes` may be sent.

        Args:
            nbytes: size of the next block.
            check: called first, and every 0.1 s of the wait; what it raises ends the wait.
        """
        check()
        rate = self._rate
        if rate is None:
            return
        with self._lock:
            # An idle time is not saved up: a burst after it would be what the limit is there to prevent.
            begin = max(self._free_at, self._clock())
            self._free_at = begin + nbytes / rate
        while self._rate is not None and (wait_s := begin - self._clock()) > 0:
            self._sleep(min(wait_s, _LOOK_UP_S))
            check()
