"""Who may commit in a run: the job that took it over last.

Each start of a job takes the run over by creating the next number of `owner-00000007.json`, which only one of several
can (exclusive create). Whoever sees a higher number than its own has been replaced, and its commits are refused: a job
that was thought dead and wakes up, or one started twice by mistake, never mixes its steps with its successor's.

A successor cannot always know that its predecessor still lives. Where it can (same host, same process numbers), it does
not take the run away from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any, cast

from arc_dist.checkpoint_store.backends import Backend, is_missing
from arc_dist.checkpoint_store.format import parse_json
from arc_dist.errors import ConfigError, Fenced, StoreCorrupt, StoreError, StoreGone

_NAME = re.compile(r"owner-([0-9]{8,12})\.json")
_MAX_BYTES = 1 << 16
_MAX_TRIES = 16
_GOING_WITHIN_S = 5.0
_POLL_S = 0.1
_NUM_KEPT = 64  # an owner whose file is gone counts as one that never took over, so many are kept; they are small


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """A start of a job.

    Attributes:
        owner: its name, see `Store`.
        host: where its rank 0 runs.
        pid: of that process.
        process: tells that process from others that get the same number, there or in another container; empty when
            the system does not say.
        at: seconds since 1970.
    """

    owner: str
    host: str
    pid: int
    process: str
    at: float

    @property
    def is_alive_here(self) -> bool:
        """Whether that process is known to live on this host. False when it is not known."""
        return self.host == socket.gethostname() and self.process != "" and self.process == _identity(self.pid)


def take_over(backend: Backend, run: str, owner: str) -> None:
    """Makes `owner` the one whose commits count. One rank of the job does it, before any saves.

    Raises:
        ConfigError: another job that is alive trains into this run.
        Fenced: another job keeps taking it over at the same time.
        StoreError: see `arc_dist.errors`.
    """
    mine = Owner(
        owner=owner, host=socket.gethostname(), pid=os.getpid(), process=_identity(os.getpid()), at=time.time()
    )
    data = (json.dumps(dataclasses.asdict(mine)) + "\n").encode()
    for _ in range(_MAX_TRIES):
        numbers = _numbers(backend, run)
        newest = _read(backend, run, numbers[-1]) if numbers else None
        if newest is not None and newest.pid != mine.pid and _outlives(newest, _GOING_WITHIN_S):
            raise ConfigError(
                f"store {backend.url}: run {run} belongs to another job that is running on this host (process "
                f"{newest.pid}). Stop it, or name another run (Arc(run=...))."
            )
        number = numbers[-1] + 1 if numbers else 1
        if backend.create_exclusive(f"{run}/{_file(number)}", data):
            for old in numbers[:-_NUM_KEPT]:
                with contextlib.suppress(StoreError):  # litter, of no consequence
                    backend.remove(f"{run}/{_file(old)}")
            return
    raise Fenced(f"store {backend.url}: other jobs take over run {run} all the time. Name another run.")


def require_owner(backend: Backend, run: str, owner: str) -> None:
    """Refuses an owner that was replaced. One that never took the run over is let pass: it has no successor.

    Raises:
        Fenced: says by whom.
    """
    numbers = _numbers(backend, run)
    if not numbers:
        return
    newest = _read(backend, run, numbers[-1])
    if newest is None or newest.owner == owner:
        return
    for number in reversed(numbers[:-1]):
        earlier = _read(backend, run, number)
        if earlier is not None and earlier.owner == owner:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(newest.at))
            raise Fenced(
                f"store {backend.url}: run {run} was taken over by another job at {when} (process {newest.pid} on "
                f"{newest.host}). This one may not commit there any more: stop it, or name another run."
            )


def replaced_owners(backend: Backend, run: str, owner: str) -> frozenset[str]:
    """Those that may not commit in the run any more, as `owner` knows: none unless it is the newest itself.

    Raises:
        StoreError: see `arc_dist.errors`.
    """
    known = [_read(backend, run, number) for number in _numbers(backend, run)]
    if not known or known[-1] is None or known[-1].owner != owner:
        return frozenset()
    return frozenset(earlier.owner for earlier in known[:-1] if earlier is not None) - {owner}


def _outlives(owner: Owner, seconds: float) -> bool:
    """Whether that process is still alive after a while: one that was just killed takes a moment to be gone."""
    deadline = time.monotonic() + seconds
    while owner.is_alive_here:
        if time.monotonic() >= deadline:
            return True
        time.sleep(_POLL_S)
    return False


def _numbers(backend: Backend, run: str) -> list[int]:
    try:
        entries = backend.list(run)
    except StoreGone as error:
        if is_missing(error) and backend.exists(""):
            return []  # an object store has no directory of a run that has not begun
        raise
    matches = (_NAME.fullmatch(entry.name) for entry in entries if not entry.is_directory)
    return sorted(int(match[1]) for match in matches if match)


def _read(backend: Backend, run: str, number: int) -> Owner | None:
    """None for a file that is no owner's: it was damaged, or is gone since it was listed."""
    path = f"{run}/{_file(number)}"
    try:
        fields = cast("dict[str, Any]", parse_json(backend.read(path, _MAX_BYTES), path))
        return Owner(**{field.name: fields[field.name] for field in dataclasses.fields(Owner)})
    except (StoreGone, StoreCorrupt, KeyError, TypeError):
        return None


def _file(number: int) -> str:
    return f"owner-{number:08d}.json"


def _identity(pid: int) -> str:
    """A process and the numbering it belongs to; empty when it is gone or the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":  # dead, and not yet waited for
            return ""
        return f"{os.readlink(f'/proc/{pid}/ns/pid')} {fields[19]}"
    except (OSError, IndexError):
        return ""
