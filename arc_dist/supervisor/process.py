"""What Linux tells about processes: parent-death signals, start times, threads, the OOM killer, names of signals."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

_MAX_LOG_RECORD = 8192  # bytes; the kernel cuts longer ones
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# Resolved at import, so that a freshly forked child does not run the dynamic loader before it is tied to its parent.
_prctl: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent(expected_parent_pid: int) -> None:
    """Makes the kernel SIGKILL this process when the *thread* that forked it ends.

    The parent may have died before the call took effect, in which case no signal ever comes; so the parent is
    checked afterwards and this process ends itself.
    """
    _call_prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != expected_parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Makes descendants whose parent dies children of this process, so that none can outlive its generation unseen."""
    _call_prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _call_prctl(option: int, value: int) -> None:
    if _prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}, {value}): {os.strerror(error)}")


def start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None when there is no such process (zombies included).

    Together with the pid it names a process for ever: pids are used again, the pair is not.
    """
    fields = stat_fields(pid)
    if fields is None or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


def stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third on (the second, the name, may hold spaces and parentheses)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()


def children(pid: int) -> list[int]:
    """Pids of the direct children of a single-threaded process, or of the main thread's children of another."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                text = Path(f"/proc/{pid}/task/{task}/children").read_text()
                found.extend(int(word) for word in text.split())
    return found


def num_threads() -> int:
    """Number of threads of this process, native ones (BLAS, OpenMP) included."""
    return len(os.listdir("/proc/self/task"))


def wait_gone(pid: int, *, ticks: int | None, timeout_s: float) -> bool:
    """Waits until a process that need not be our child is gone (or a zombie); False when it is still there.

    Args:
        pid: the process.
        ticks: its `start_ticks`, so that a later process with the same pid is not waited for.
        timeout_s: how long to wait at most.
    """
    deadline = time.monotonic() + timeout_s
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:  # a kernel or a seccomp filter without pidfd
        while time.monotonic() < deadline:
            if ticks is None or start_ticks(pid) != ticks:
                return True
            time.sleep(0.002)
        return start_ticks(pid) != ticks
    try:
        if ticks is not None and start_ticks(pid) != ticks:
            return True
        readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        return bool(readable)
    finally:
        os.close(descriptor)


def oom_kills() -> dict[str, int]:
    """Counts of processes that the OOM killer ended: in this process's memory cgroup, and on the whole host.

    Best effort: a counter that cannot be read is left out.
    """
    counts: dict[str, int] = {}
    for path in _memory_event_files():
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    counts["cgroup"] = int(value)
                    break
        if "cgroup" in counts:
            break
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                counts["host"] = int(line.split()[1])
    return counts


def named_by_oom_killer(pid: int, since_s: float) -> bool | None:
    """Whether the kernel's log says that the OOM killer ended this process; None when the log cannot be read.

    The log numbers processes as the host does, so in a container with process numbers of its own nothing is found.

    Args:
        pid: of the process.
        since_s: monotonic; what is older is about another process with that number.
    """
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        while True:
            try:
                record = os.read(log, _MAX_LOG_RECORD)
            except BrokenPipeError:
                continue  # this record was overwritten before it was read
            head, _, text = record.decode(errors="replace").partition(";")
            at_s = int(head.split(",")[2]) / 1e6
            if at_s >= since_s - 1 and f"Killed process {pid} (" in text:
                return True
    except BlockingIOError:
        return False  # all of it was read
    except (OSError, ValueError, IndexError):
        return None
    finally:
        os.close(log)


def _memory_event_files() -> list[Path]:
    """Where the memory cgroup (v2, then v1) of this process counts OOM kills, as seen from inside a container too."""
    candidates: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                candidates.append(Path("/sys/fs/cgroup" + path) / "memory.events")
            elif "memory" in controllers.split(","):
                candidates.append(Path("/sys/fs/cgroup/memory" + path) / "memory.oom_control")
    candidates += [Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")]
    return candidates


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; real-time and unknown numbers as `signal 42`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_status(returncode: int) -> str:
    """A return code as `os.waitstatus_to_exitcode` gives it, in words."""
    return f"killed by {signal_name(-returncode)}" if returncode < 0 else f"exit code {returncode}"
