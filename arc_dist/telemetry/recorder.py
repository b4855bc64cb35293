"""Carries incidents from a rank to where they are kept, off the path of training.

With a coordinator the lines go there; without one rank 0 appends them to ``<run_dir>/incidents.jsonl`` itself. Both
happen on a background thread, and a slow or lost coordinator costs at most the oldest unsent lines, which is said.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arc_dist.errors import ArcError
from arc_dist.telemetry.log import logger

INCIDENTS_FILE = "incidents.jsonl"
NOT_INCIDENTS = frozenset({"progress", "resumed", "started", "finished"})
_MAX_QUEUED = 1000
_MAX_LISTENER_FAULTS = 3


def append_line(run_dir: Path, line: dict[str, Any]) -> None:
    """Appends one JSON line to the run's incident file, creating it (mode 0600) when needed."""
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(run_dir / INCIDENTS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, default=str) + "\n")


class Recorder:
    """A queue of lines with one thread that sends them.

    Args:
        send: delivers one line; may raise `ArcError` or `OSError`, which is logged once.
        listener: the user's; called with each incident, in the recorder's thread. One that raises a third time is not
            called again.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any]], object],
        listener: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self._send = send
        self._listener = listener
        self._listener_faults = 0
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_QUEUED)
        self._thread: threading.Thread | None = None
        self._failed = False

    def record(self, **fields: Any) -> None:
        """Queues one line; never blocks."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="arc-recorder", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait({"time": time.time(), **fields})
        except queue.Full:
            logger.warning("an incident line was dropped: %d lines wait to be sent", _MAX_QUEUED)

    def close(self, timeout_s: float = 5.0) -> None:
        """Sends what is queued, waiting at most `timeout_s`."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._thread = None

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._send(line)
            except (ArcError, OSError) as error:
                if not self._failed:
                    logger.warning("incidents cannot be recorded: %s", error)
                self._failed = True
            if self._listener is not None and line.get("kind") not in NOT_INCIDENTS:
                self._let_know(self._listener, line)

    def _let_know(self, listener: Callable[[dict[str, Any]], object], line: dict[str, Any]) -> None:
        try:
            listener(line)
        except Exception as error:  # noqa: BLE001 - the user's; it must not end the thread that records
            self._listener_faults += 1
            logger.warning("on_incident raised %s: %s", type(error).__name__, error)
            if self._listener_faults >= _MAX_LISTENER_FAULTS:
                logger.warning("on_incident is not called any more after %d errors", self._listener_faults)
                self._listener = None
