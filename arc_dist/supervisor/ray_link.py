"""Starts a bridge to Ray, and talks to it: what a supervisor and the command line know of Ray. Imports no ray."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arc_dist.errors import ConfigError, CoordinatorUnavailable

_MODULE = "arc_dist.supervisor.ray_bridge"


class Link:
    """A bridge process, and the thread that reads what it reports. It dies with the thread that makes this object.

    Args:
        order: see `ray_bridge`.
        hear: gets every report, and None once the process is gone; called in the reader's thread.
        log: a file for what Ray prints; None throws it away.
    """

    def __init__(
        self, order: Mapping[str, Any], hear: Callable[[dict[str, Any] | None], None], log: Path | None = None
    ) -> None:
        self._hear = hear
        with contextlib.ExitStack() as stack:
            errors: Any = subprocess.DEVNULL
            if log is not None:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                errors = stack.enter_context(os.fdopen(descriptor, "wb"))
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C in a terminal is for the job, which tells the bridge when to end
            )
        self._send({**order, "parent": os.getpid()})
        threading.Thread(target=self._read, name="arc-ray-reports", daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the bridge."""
        return self._process.pid

    def stop(self) -> None:
        """Asks for the end of the actor, and then of the bridge."""
        self._send({"do": "stop"})

    def close(self) -> None:
        """Ends the bridge at once; the actor lives on."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()

    def _send(self, fields: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it is gone, which its reader says
            self._process.stdin.write(json.dumps(fields).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # closed on this side
            for line in self._process.stdout:
                self._hear(json.loads(line))
        self._process.wait()
        self._hear(None)


def ask(order: Mapping[str, Any], timeout_s: float) -> Any:
    """Gives an order that has an end, and returns what was done.

    Raises:
        ConfigError: Ray is not installed, or refuses this node.
        CoordinatorUnavailable: Ray was not reached, or did not answer in time.
    """
    reports: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    link = Link(order, reports.put)
    deadline, state = time.monotonic() + timeout_s, "Ray did not let this node connect"
    try:
        while True:
            try:
                report = reports.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise CoordinatorUnavailable(f"{state} within {timeout_s:g} s. Look at ray status.") from None
            if report is None:
                raise CoordinatorUnavailable("the process that is connected to Ray ended without a word")
            if "done" in report:
                return report["done"]
            if "problem" in report:
                raise (ConfigError if report["is_final"] else CoordinatorUnavailable)(report["problem"])
            state = "Ray was reached, but did nothing"
    finally:
        link.close()
