"""Tells the coordinator now and then how far this rank's training process is, for people; nothing depends on it.

What is told lies in shared memory already: the status page, which the training process writes without a system call,
and the headers of its snapshots. So a step costs nothing more.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Protocol

from arc_dist.errors import ArcError, CoordinatorUnavailable
from arc_dist.snapshot import layout
from arc_dist.telemetry.log import logger

_EVERY_S = 2.0
_MAX_REPORTS_PER_S = 200.0  # of all ranks together: in a large job each speaks less often


class Client(Protocol):
    """What is asked of the coordinator."""

    def report(
        self, *, rank: int, generation: int, step: int, quiet_s: float | None, held: list[dict[str, Any]]
    ) -> dict[str, Any]: ...


class StepReporter:
    """A thread that reads and reports until it is closed.

    Args:
        rank: this rank.
        world_size: number of ranks.
        shm_dir: this rank's directory in shared memory, with its status page.
        client: the coordinator's.
    """

    def __init__(self, rank: int, world_size: int, shm_dir: Path, client: Client) -> None:
        self._rank = rank
        self._shm_dir = shm_dir
        self._client = client
        self._every_s = max(_EVERY_S, world_size / _MAX_REPORTS_PER_S)
        self._closing = threading.Event()
        self._page = layout.StatusPage.open(shm_dir)
        threading.Thread(target=self._run, name="arc-reporter", daemon=True).start()

    def close(self) -> None:
        """No further report is begun; one on its way ends with the process."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                self._report()
            except CoordinatorUnavailable as error:
                logger.debug("the step was not reported: %s", error)
            except (ArcError, OSError) as error:
                # Replaced, or the directory is gone: this supervisor is about to end.
                logger.debug("steps are not reported any more: %s", error)
                return

    def _report(self) -> None:
        status = self._page.read()
        held = [{"step": slot.step} for slot in layout.inspect(self._shm_dir) if slot.certified]
        quiet_s = max(0.0, time.monotonic() - status.progress_ns / 1e9)
        self._client.report(rank=self._rank, generation=status.generation, step=status.step, quiet_s=quiet_s, held=held)
