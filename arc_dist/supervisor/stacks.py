"""Stacks of a trainer that need not cooperate: taken by a signal that is answered in C, without Python's lock.

`install` is called in the freshly forked trainer. Its supervisor sends the signal and reads what `faulthandler` wrote
to a file in shared memory. That works while the trainer spins, sleeps, waits in a system call or runs C code that holds
the interpreter's lock; not while it is stopped or in an uninterruptible wait. For these py-spy is asked where it is
installed and may trace, and else /proc has to do (conduct.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Far from both ends of the range, which C libraries, profilers and debuggers take first.
SIGNAL = signal.SIGRTMIN + 13
_FILE = "stacks.txt"
_HIGH_DESCRIPTOR = 700  # out of the way of scripts that count, close or reuse low ones
_MAX_BYTES = 32 * 1024
_POLL_S = 0.01
_QUIET_POLLS = 3  # the file is whole when it has not grown for so long and ends with a line
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_PY_SPY_LIMIT_S = 10.0
# Where the innermost frames of a rank lie that waits for others, or compiles.
_COLLECTIVE = ("/torch/distributed/", "/arc_dist/healing/vote.py")
_SEEN_THROUGH = ("/torch/_ops.py", "/torch/_compile.py", "/torch/_tensor.py")  # on the way to an operation in C++
_BACKWARD = "/torch/autograd/graph.py"
# On the stack while something is compiled, and not when it runs: torch/_dynamo/eval_frame.py, for one, is under every
# hook of FSDP.
_COMPILER = (
    "/torch/_dynamo/convert_frame.py",
    "/torch/_inductor/compile_fx.py",
    "/torch/_inductor/async_compile.py",
    "/torch/utils/cpp_extension.py",
    "/triton/compiler/",
)
_IDLE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacks:
    """What was seen of a trainer's threads.

    Attributes:
        text: of all threads, as `faulthandler` or py-spy wrote it; "" when there was no answer.
        frames: of the main thread, innermost first: (file, line, function).
    """

    text: str = ""
    frames: tuple[tuple[str, int, str], ...] = ()

    @property
    def key(self) -> str:
        """Equal for equal stacks of the main thread; "" without one."""
        if not self.frames:
            return ""
        return hashlib.blake2b(repr(self.frames).encode(), digest_size=8).hexdigest()

    def in_collective(self, busy: float) -> bool:
        """Whether the main thread waits for other ranks.

        The innermost frame decides: code of the script's that is called back from inside a collective or a backward
        pass is the script's. What the autograd engine does is not seen; it waits when it uses no processor.

        Args:
            busy: share of one core that the process uses.
        """
        for file, _, _ in self.frames:
            if any(part in file for part in _SEEN_THROUGH):
                continue
            return any(part in file for part in _COLLECTIVE) or (_BACKWARD in file and busy < _IDLE)
        return False

    @property
    def in_compiler(self) -> bool:
        """Whether the main thread compiles, or waits for compilers that it started."""
        return any(part in file for file, _, _ in self.frames for part in _COMPILER)


def install(directory: Path) -> None:
    """Makes this process answer the signal, by writing its stacks to a file in `directory`."""
    low = os.open(directory / _FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptor = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, min(_HIGH_DESCRIPTOR, max(0, limit - 1)))
    finally:
        os.close(low)
    faulthandler.register(SIGNAL, file=descriptor, all_threads=True, chain=False)


def answers(pid: int) -> bool:
    """Whether a process catches the signal; one that does not would die of it."""
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", _read(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (SIGNAL - 1) & 1)


def take(pid: int, thread: int, directory: Path, timeout_s: float) -> Stacks:
    """The stacks of a trainer; without frames when it does not answer in time.

    Args:
        pid: of the trainer, which must not be waited for meanwhile by anybody else.
        thread: `threading.get_ident()` of the thread that trains; 0 when it is not known.
        directory: the one given to `install`.
        timeout_s: how long to wait for the answer.
    """
    text = _ask(pid, directory, timeout_s) if answers(pid) else ""
    if not text:
        text = _ask_py_spy(pid)
    return Stacks(text=text, frames=main_frames(text, thread))


def _ask(pid: int, directory: Path, timeout_s: float) -> str:
    path = directory / _FILE
    try:
        before = path.stat().st_size
        os.kill(pid, SIGNAL)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    deadline, size, quiet = time.monotonic() + timeout_s, before, 0
    while time.monotonic() < deadline and quiet < _QUIET_POLLS:
        time.sleep(_POLL_S)
        now = path.stat().st_size
        quiet = quiet + 1 if now > before and now == size else 0
        size = now
    with path.open("rb") as file:
        file.seek(before)
        return file.read(_MAX_BYTES).decode(errors="replace")


def _ask_py_spy(pid: int) -> str:
    """For a trainer that is stopped or blocked the signal. py-spy needs the right to trace it, as root has."""
    beside = os.path.dirname(sys.executable)  # where pip put it, also when the environment is not activated
    program = shutil.which("py-spy", path=os.pathsep.join((beside, os.environ.get("PATH", os.defpath))))
    if program is None:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired, ValueError):
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--json", "--pid", str(pid)],
            capture_output=True,
            timeout=_PY_SPY_LIMIT_S,
            check=False,
        )
        if done.returncode == 0:
            return _as_faulthandler_writes(json.loads(done.stdout))[:_MAX_BYTES]
    return ""


def _as_faulthandler_writes(threads: Sequence[Mapping[str, Any]]) -> str:
    """What `py-spy dump --json` says, in the form that `main_frames` reads."""
    lines: list[str] = []
    for thread in threads:
        lines.append(f"Thread 0x{thread['thread_id']:016x} (most recent call first, by py-spy):")
        for frame in thread["frames"]:
            lines.append(f'  File "{frame["filename"]}", line {frame["line"]} in {frame["name"]}')
        lines.append("")
    return "\n".join(lines)


def main_frames(text: str, thread: int) -> tuple[tuple[str, int, str], ...]:
    """The frames of one thread in what `faulthandler` wrote, innermost first.

    Args:
        text: of all threads.
        thread: its identity. When the text does not have it the last one is taken, which is the main thread.
    """
    threads: dict[int, list[tuple[str, int, str]]] = {}
    frames: list[tuple[str, int, str]] = []
    for line in text.splitlines():
        if (head := _THREAD.match(line)) is not None:
            frames = threads.setdefault(int(head[1], 16), [])
        elif (frame := _FRAME.match(line)) is not None:
            frames.append((frame[1], int(frame[2]), frame[3]))
    if not threads:
        return ()
    found = threads.get(thread)
    return tuple(found if found is not None else list(threads.values())[-1])


def render(frames: Sequence[tuple[str, int, str]]) -> str:
    """Frames as lines, innermost first."""
    return "\n".join(f'  File "{file}", line {line}, in {function}' for file, line, function in frames)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
