"""A file whose appearance is the notice, for agents of a node that learn of its end and cannot signal a container."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from arc_dist.telemetry.log import logger

_POLL_S = 0.2


class NoticeFile:
    """Watches for the file in a thread, from `start` until `close` or until it was found.

    A file that is older than the job is left from an earlier preemption: it is ignored, with a warning, until it is
    written again.

    Args:
        path: of the file.
        job_started_at: seconds since 1970.
        on_notice: called once, in the watching thread.
    """

    def __init__(self, path: Path, *, job_started_at: float, on_notice: Callable[[], None]) -> None:
        self._path = path
        self._started_at = job_started_at
        self._on_notice = on_notice
        self._closed = threading.Event()
        self._is_warned = False

    def start(self) -> None:
        threading.Thread(target=self._watch, name="arc-notice-file", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self.is_there():
            if self._closed.wait(_POLL_S):
                return
        if not self._closed.is_set():
            self._on_notice()

    def is_there(self) -> bool:
        """Whether the file exists and is of this job's time."""
        try:
            written_at = self._path.stat().st_mtime
        except OSError:  # not there, or its directory is not: it may come
            return False
        if written_at >= self._started_at:
            return True
        if not self._is_warned:
            self._is_warned = True
            logger.warning(
                "the notice file %s is %.0f s older than this job and is ignored: it belongs to an earlier preemption. "
                "Remove it; when it is written again it counts",
                self._path,
                self._started_at - written_at,
            )
        return False


def seconds_since_1970(start_ticks: int | None) -> float:
    """When a process began, from its start time in clock ticks since boot; now when that is not known."""
    if start_ticks is None:
        return time.time()
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
