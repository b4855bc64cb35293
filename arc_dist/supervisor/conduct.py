"""What the kernel says of a trainer from outside: running, stopped, blocked, and how much processor time it used."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from arc_dist.protocol.hangs import Conduct
from arc_dist.supervisor import process

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_WORTH_SHOWING = ("wchan", "syscall", "stack")
_MAX_CHARS = 2000


def look(pid: int) -> tuple[Conduct, float]:
    """State of a process, and the processor time of all its threads so far, in seconds."""
    fields = process.stat_fields(pid)
    if fields is None:
        return Conduct.GONE, 0.0
    states = {
        "R": Conduct.RUNNING,
        "D": Conduct.BLOCKED,
        "T": Conduct.STOPPED,
        "t": Conduct.TRACED,
        "Z": Conduct.GONE,
        "X": Conduct.GONE,
    }
    # Fields 14 and 15 of proc(5): user and system time.
    return states.get(fields[0], Conduct.SLEEPING), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def describe(pid: int) -> str:
    """Where in the kernel a process is, as far as that may be read: for the report when it has no stacks to show."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("State:", "Threads:", "TracerPid:", "VmRSS:")):
                lines.append(" ".join(line.split()))
    for name in _WORTH_SHOWING:
        with contextlib.suppress(OSError):  # the kernel's stack needs a privilege
            text = Path(f"/proc/{pid}/{name}").read_text().strip()
            if text:
                lines.append(f"{name}: {text[:_MAX_CHARS]}")
    return "\n".join(lines)
