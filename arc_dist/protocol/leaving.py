"""Being told to go: which notices are one, and how long training may go on before its memory must be saved.

A **notice** (a signal, a file) says that the job's processes will be killed after a **grace period**. The ranks agree
to leave and save; that is the newest state there can be. A training process that does not get that far (a long step, a
hung collective) is ended while there is still time to write what its shared memory holds: see `training_s`.

One preemption reaches a process by several ways: schedulers signal every process, launchers hand the signal on, and
supervisors do. So what comes within a second is the same notice. A second one changes nothing: a save that is under
way is worth more than haste. A third ends the process at once.
"""

from __future__ import annotations

import dataclasses
import enum

_SAME_WITHIN_S = 1.0
_AT_ONCE_FROM = 3
OVERHEAD_S = 3.0  # ending the training process, starting the one that writes, the commit
_SAFETY = 1.5  # storage is rarely as fast as when it was measured: every other job leaves at the same time
_LEAST_SHARE = 0.5


class Response(enum.Enum):
    """What a notice asks of the process that gets it."""

    LEAVE = "leave"
    NOTHING = "nothing"  # known already
    END = "end"  # at once, without saving


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notices:
    """The notices so far: how many different ones, and when the last signal came."""

    count: int = 0
    last_s: float = 0.0


def note(notices: Notices, now_s: float) -> tuple[Notices, Response]:
    """Takes one more signal or file into account."""
    is_same = notices.count > 0 and now_s - notices.last_s < _SAME_WITHIN_S
    count = notices.count + (not is_same)
    after = Notices(count=count, last_s=now_s)
    if is_same:
        return after, Response.NOTHING
    if count == 1:
        return after, Response.LEAVE
    return after, Response.END if count >= _AT_ONCE_FROM else Response.NOTHING


def saving_s(state_bytes: int, bytes_per_s: float) -> float:
    """How long a checkpoint of a rank's state takes from memory, with what surrounds it, in seconds."""
    return OVERHEAD_S + _SAFETY * state_bytes / bytes_per_s


def training_s(grace_s: float, needed_s: float | None) -> float:
    """How long after the notice a training process may go on by itself, in seconds.

    Then as much of the grace period is left as saving its memory needs; but at least half of it is the training
    process's own, since what it saves itself is newer.

    Args:
        grace_s: from the notice to the end of all processes.
        needed_s: `saving_s`, or None when nothing was measured.
    """
    least_s = _LEAST_SHARE * grace_s
    return least_s if needed_s is None else max(least_s, grace_s - needed_s)
