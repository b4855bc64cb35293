"""Processes that strace kills at one system call, each forked from one that has imported everything already.

A call is addressed by the thread that makes it, its name and how many of that name the thread made before: that is how
strace counts. The victim waits at the beginning of that thread until strace has hold of it, so nothing is missed. It
talks over a socket with `send`, which is no call that is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forkserver

# All that changes a disk but the creation of a file, which is always followed by one of these.
CALLS = (
    "write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat",
    "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "ftruncate", "fallocate",
)  # fmt: skip
_TIMEOUT_S = 60.0
_MAX_MESSAGE_BYTES = 1 << 17


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """The `number`th call of this name by the first thread of this name (a prefix); `line` is how strace shows it."""

    thread: str
    call: str
    number: int
    line: str = dataclasses.field(compare=False)


@dataclasses.dataclass
class Outcome:
    """How a process ended: its wait status, what it said, strace's lines."""

    status: int
    said: list[Any]
    lines: list[str]


def why_not() -> str | None:
    """Why strace cannot be used here; None when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed (Debian's package strace)"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, timeout=_TIMEOUT_S)
    return None if tried.returncode == 0 else f"strace may not trace here: {tried.stderr[:200]}"


class Nursery:
    """The test's handle on the process that forks the others."""

    def __init__(self, output: Path) -> None:
        self._log = output / "strace.log"
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_TIMEOUT_S)
        args = (theirs, dict(os.environ), str(output / "victims.log"))
        self._process = forkserver.context().Process(target=_serve, args=args, name="nursery")
        self._process.start()
        theirs.close()

    def close(self) -> None:
        self._socket.close()  # ends its loop
        self._process.join(_TIMEOUT_S)
        forkserver.kill_group(self._process)

    def call(self, body: Callable[..., Any], *args: Any) -> Any:
        """What `body(say, *args)` returns in a fresh process; AssertionError with its traceback when it raises."""
        self._send((body, args, None))
        said = self._until_exit()
        assert said[-2][0] == "returned", f"a process ended with {said[-1]}:\n{said[-2][1]}"
        return said[-2][1]

    def calls(self, thread: str, root: Path, body: Callable[..., Any], *args: Any) -> list[Point]:
        """The calls below `root` that a thread makes when nobody kills it."""
        outcome = self._traced(thread, [], body, args)
        assert outcome.status == 0, outcome.said
        found: list[Point] = []
        seen: dict[str, int] = {}
        for line in outcome.lines:
            if match := re.match(r"(\w+)\(", line):
                seen[match[1]] = seen.get(match[1], 0) + 1
                if f"{root}/" in line or f"<{root}>" in line:
                    found.append(Point(thread, match[1], seen[match[1]], line))
        return found

    def kill(self, point: Point, root: Path, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Kills a process at that call, proves that it was killed there, and returns what it had said before."""
        inject = ["-e", f"inject={point.call}:signal=SIGKILL:when={point.number}"]
        outcome = self._traced(point.thread, inject, body, args)
        where = f"{point}: {outcome.lines[-3:]}, {outcome.said}"
        assert os.WIFSIGNALED(outcome.status) and os.WTERMSIG(outcome.status) == signal.SIGKILL, where
        made = [line for line in outcome.lines if line.startswith(f"{point.call}(")]
        assert len(made) == point.number, where
        assert outcome.lines[-1] == "+++ killed by SIGKILL +++", where
        assert outcome.lines[-2] == made[-1] and made[-1].endswith("= ?") and str(root) in made[-1], where
        return outcome.said

    def _traced(self, thread: str, options: list[str], body: Callable[..., Any], args: tuple[Any, ...]) -> Outcome:
        self._send((body, args, thread))
        before = [self._receive()]
        while before[-1][0] == "said":  # by a thread that came before the one that is waited for
            before.append(self._receive())
        kind, thread_id = before.pop()
        assert kind == "attach", f"no thread {thread} was started: {kind}, {thread_id}"
        only = ["-y", "-s", "0", "-e", f"trace={','.join(CALLS)}"]
        command = ["strace", "-p", str(thread_id), "-o", str(self._log), *only, *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            hello = strace.stderr.readline()
            try:
                assert "attached" in hello, hello
                self._send("go")
                said = self._until_exit()
                strace.wait(_TIMEOUT_S)
            finally:
                strace.kill()
        return Outcome(said[-1][1], [*before, *said[:-1]], self._log.read_text().splitlines())

    def _until_exit(self) -> list[Any]:
        said = [self._receive()]
        while said[-1][0] != "exit":
            said.append(self._receive())
        return [("returned", None), *said] if len(said) == 1 else said

    def _send(self, message: Any) -> None:
        self._socket.send(pickle.dumps(message))

    def _receive(self) -> Any:
        data = self._socket.recv(_MAX_MESSAGE_BYTES)
        assert data, "the process that forks the others has ended"
        return pickle.loads(data)


@contextlib.contextmanager
def nursery(output: Path) -> Iterator[Nursery]:
    found = Nursery(output)
    try:
        yield found
    finally:
        found.close()


def _serve(sock: socket.socket, env: dict[str, str], output: str) -> None:
    """The process that forks the others, one at a time, and tells how each ended."""
    forkserver.settle_in(env, Path(output), Path(output))
    import arc_dist.checkpoint_store.drain  # noqa: F401

    while data := sock.recv(_MAX_MESSAGE_BYTES):
        body, args, thread = pickle.loads(data)
        pid = os.fork()
        if pid == 0:
            _live(sock, body, args, thread)
        _, status = os.waitpid(pid, 0)
        sock.send(pickle.dumps(("exit", status)))


def _live(sock: socket.socket, body: Callable[..., Any], args: tuple[Any, ...], thread: str | None) -> None:
    code = 1
    try:
        if thread == "main":
            _wait_for_strace(sock)
        elif thread is not None:
            _hold(thread, sock)
        result = body(lambda *what: sock.send(pickle.dumps(("said", what))), *args)
        sock.send(pickle.dumps(("returned", result)))
        code = 0
    except BaseException:  # noqa: BLE001 - told, and asserted by the test
        sock.send(pickle.dumps(("raised", traceback.format_exc())))
    finally:
        os._exit(code)


def _hold(prefix: str, sock: socket.socket) -> None:
    """Makes the first thread of this name wait for strace before it does anything."""
    left = [prefix]

    def hook(*_: Any) -> None:
        sys.setprofile(None)  # of this thread, which is at its beginning
        if left and threading.current_thread().name.startswith(left[0]):
            left.clear()
            _wait_for_strace(sock)

    threading.setprofile(hook)


def _wait_for_strace(sock: socket.socket) -> None:
    sock.send(pickle.dumps(("attach", threading.get_native_id())))
    assert pickle.loads(sock.recv(_MAX_MESSAGE_BYTES)) == "go"
