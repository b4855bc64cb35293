"""How supervisors tell `arcrun` how they ended, and what exit code the job gets from that.

torchrun closes the other workers with SIGTERM as soon as one failed, and forgets exit codes when it is itself
signalled; so each supervisor leaves its own in a directory that `arcrun` made.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arc_dist.errors import ExitCode

VARIABLE = "ARC_ENDINGS_DIR"
_RETRYABLE = (ExitCode.PREEMPTED, ExitCode.INFRASTRUCTURE)


def begin(directory: str | None, local_rank: str) -> None:
    """Forgets how an earlier supervisor of this place ended: torchrun has started another since, as when nodes join."""
    if directory is not None:
        (Path(directory) / local_rank).unlink(missing_ok=True)


def leave(
    directory: str | None, local_rank: str, returncode: int, *, was_told: bool = False, is_left_out: bool = False
) -> None:
    """Notes how this supervisor ends.

    Args:
        directory: of all notes; None notes nothing.
        local_rank: of this supervisor.
        returncode: an exit code, or minus a signal.
        was_told: a signal had told it to.
        is_left_out: the job goes on without this host.
    """
    if directory is None:
        return
    # arcrun falls back to what torchrun saw when the directory is gone.
    with contextlib.suppress(OSError):
        path = Path(directory) / local_rank
        draft = path.with_suffix(".draft")
        note = {"returncode": returncode, "was_told": was_told, "is_left_out": is_left_out}
        draft.write_text(json.dumps({"time": time.time(), **note}))
        draft.rename(path)


def read(directory: Path) -> list[int]:
    """Return codes of this node's supervisors, earliest first."""
    return [int(ending["returncode"]) for ending in _notes(directory)]


def _notes(directory: Path) -> list[dict[str, Any]]:
    notes = [json.loads(path.read_text()) for path in directory.iterdir() if path.suffix != ".draft"]
    return sorted(notes, key=lambda note: note["time"])


def is_left_out(directory: Path) -> bool:
    """Whether the job goes on without this host on purpose, so that its agent must not bring it back."""
    return any(note["is_left_out"] for note in _notes(directory))


def verdict(directory: str | None) -> int | None:
    """The exit code that an earlier attempt of this job ended with, if it is one after which no other is worth while.

    torchrun's agent restarts workers whatever their exit code was; a supervisor that finds this ends with it at once.
    The code of a script that was told to end is none: the agent tells all to when it lost one, and a script then fails
    because its peer is gone.
    """
    if directory is None or not os.path.isdir(directory):
        return None
    codes = [int(note["returncode"]) for note in _notes(Path(directory)) if not note["was_told"]]
    return next((code for code in codes if code > 0 and code not in _RETRYABLE), None)


def job_exit_code(
    returncodes: Sequence[int], *, worker_exit_code: int | None = None, signal_number: int | None = None
) -> int:
    """What the launcher ends with.

    Args:
        returncodes: what supervisors noted, earliest first.
        worker_exit_code: what torchrun saw of the first worker that failed; used when no supervisor noted a failure,
            as when one was killed.
        signal_number: the signal that told the launcher to end, if one did.
    """
    failures = [code for code in returncodes if code != 0]
    if signal_number is not None:
        own = [code for code in failures if code in _RETRYABLE]
        if not failures or len(own) < len(failures):
            return 128 + signal_number
        return int(max(own))  # INFRASTRUCTURE, when one of them could not save
    if worker_exit_code is not None and worker_exit_code < 0 and worker_exit_code not in returncodes:
        # A supervisor was killed before it could note anything; what the others noted came of that.
        return int(ExitCode.INFRASTRUCTURE)
    if failures:
        first = failures[0]
    elif worker_exit_code is not None and worker_exit_code > 0:
        first = worker_exit_code
    else:
        return int(ExitCode.INFRASTRUCTURE)  # a supervisor was killed, and torchrun's restarts are used up
    return 128 - first if first < 0 else first


def directory_from_environ() -> str | None:
    """Where to note the ending, when `arcrun` started this."""
    return os.environ.get(VARIABLE)
