"""Whose directory in shared memory it is when its owner is gone, and how long it waits for its job's next life.

Standard library only, for the supervisor's sake.

A supervisor signs its directory once it knows its job: with the *lineage*, a random name that the coordinator's journal
carries through all restarts of the job. Who does not know the journal cannot mean the same job, whatever its name.

A signed directory without an owner is *awaited* while the launcher's agent that had started its owner lives, since that
may start the ranks again at any time, and for `KEEP_S` after the last sign of life of its training process otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import time
from pathlib import Path

_NAME = "signature.json"
_STATUS_NAME = "status"  # layout.StatusPage: the time of its last write is the last sign of life
_STATUS_COPIES = struct.Struct("@24q")
KEEP_S = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """To whom a directory belongs.

    Attributes:
        lineage: of the job.
        rank: of its owner.
        world_size: number of ranks then.
        agent_pid, agent_ticks: the launcher's agent on this host, by its pid and start time (proc(5)); 0 for none.
    """

    lineage: str
    rank: int
    world_size: int
    agent_pid: int = 0
    agent_ticks: int = 0

    def write(self, directory: Path) -> None:
        draft = directory / f".{_NAME}"
        draft.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        draft.rename(directory / _NAME)

    @staticmethod
    def read(directory: Path) -> Signature | None:
        """The signature of a directory; None when it has none, or is gone."""
        try:
            return Signature(**json.loads((directory / _NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def is_awaited(directory: Path) -> bool:
    """Whether the next life of the job may still come for a directory."""
    signature = Signature.read(directory)
    if signature is None:
        return False
    return _lives(signature.agent_pid, signature.agent_ticks) or _quiet_s(directory) < KEEP_S


def is_of_agent(directory: Path, pid: int) -> bool:
    """Whether the directory's owner was started by this agent, which lives."""
    signature = Signature.read(directory)
    return signature is not None and signature.agent_pid == pid and _lives(pid, signature.agent_ticks)


def _lives(pid: int, ticks: int) -> bool:
    if not pid:
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[19]) == ticks  # starttime, field 22


def _quiet_s(directory: Path) -> float:
    """Seconds since the newest write of the status page; on the clock that all processes of a host share."""
    try:
        with (directory / _STATUS_NAME).open("rb") as file:
            words = _STATUS_COPIES.unpack(file.read(_STATUS_COPIES.size))
    except (OSError, struct.error):
        return KEEP_S
    return time.monotonic() - max(words[8 + 3], words[16 + 3]) / 1e9
