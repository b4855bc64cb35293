"""What the coordinator tells people of a job: its log, its incidents, and what the page shows of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arc_dist.coordinator.board import Board
from arc_dist.coordinator.records import append_incident
from arc_dist.errors import ConfigError
from arc_dist.protocol.events import GenerationOver, JobOver

logger = logging.getLogger("arc_dist.coordinator")


class Chronicle:
    """See the module's text.

    Args:
        job_id: the job's name.
        run_dir: where the file of incidents is; None writes none.
        board: what the page shows.
    """

    def __init__(self, job_id: str, run_dir: Path | None, board: Board) -> None:
        self._job_id = job_id
        self._run_dir = run_dir
        self._board = board

    def record(self, line: Mapping[str, Any]) -> bool:
        """Adds a line to the incidents; whether it is in a file.

        Raises:
            OSError, ConfigError: the file cannot be written, or the line is none.
        """
        # Hosts' clocks differ: what the lines of several hosts are put in order by is read from one of them.
        line = {**line, "heard_at": time.time()}
        if self._run_dir is not None:
            append_incident(self._run_dir, line)
        self._board.note(line)
        return self._run_dir is not None

    def note(self, line: Mapping[str, Any]) -> None:
        """Records what this coordinator found itself; a file that cannot be written stops nothing."""
        try:
            self.record({"time": time.time(), **line})
        except (OSError, ConfigError) as error:
            logger.warning("%s is not in the incident file: %s", line["kind"], error)

    def generation_over(self, action: GenerationOver) -> None:
        """Says what no supervisor knows alone: which of several deaths came first, and the host to take out."""
        root = action.judgement.root
        common = {"generation": action.generation, "seen_by": "coordinator"}
        if len(action.deaths) > 1:
            others = [str(death) for death in action.deaths if death != root]
            line = {"kind": "root_cause", "ranks": [root.rank], "cause": action.judgement.reason, "others": others}
            self.note(line | common | ({} if root.step is None else {"step": root.step}))
        if action.advice:
            logger.warning("%s", action.advice)
            self.note({"kind": "host_suspected", "ranks": [root.rank], "cause": action.advice} | common)

    def job_over(self, action: JobOver) -> None:
        """The job is done, or stops."""
        if action.stop is None:
            logger.info("job %s is done", self._job_id)
            return
        stop = action.stop
        logger.info("job %s stops with exit code %d: %s", self._job_id, stop.exit_code, stop.reason)
        line = {
            "kind": "world_shrinks" if stop.survivors else "job_stopped",
            "generation": action.generation,
            "ranks": [] if stop.blame_rank is None else [stop.blame_rank],
            "cause": stop.reason,
            "exit_code": stop.exit_code,
            "action": "shrink" if stop.survivors else "stop",
        }
        self.note(line)
