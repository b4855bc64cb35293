"""The single-threaded process that forks trainers.

Forking is safe only from a process that runs no other thread: a lock held by a thread that the child does not have
stays locked for ever. The supervisor needs threads (HTTP, stores, reading), so before it starts any it forks the
zygote, which has imported torch and then does nothing but fork, wait and signal. Imports cost about 1-2 s, a fork
about 10 ms; that difference is the whole reason for this process.

Who dies with whom: the kernel kills the zygote when the supervisor's main thread ends, and the trainer when the
zygote ends. Descendants of a trainer (data loader workers, its own children) become children of the zygote when the
trainer dies, and are killed unless the trainer ended well.

Should the zygote itself die, the supervisor cannot fork another (it has threads): `start_zygote` runs its own command
line again with `--zygote-fd`, which imports everything anew and serves the same protocol on that socket.

Messages to the zygote: ``fork {set, unset}``, ``signal {number}``, ``kill``. From it: ``ready {pid, threads}``,
``forked {pid, ticks, at}``, ``exited {pid, status, at}``, ``clean {pid, num_orphans}``; times are `time.monotonic()`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from arc_dist.errors import InfrastructureError
from arc_dist.supervisor import process, stacks, wire

# What a supervisor hands on to its trainer; everything here is blocked in the zygote, which must outlive it.
FORWARDED_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_ORPHAN_LIMIT_S = 1.0
_GROUP_SIGNAL_WAIT_S = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """Returned by `fork_zygote` and `serve` in a freshly forked trainer; the caller unwinds and runs the script."""

    environ: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZygoteProcess:
    """What the supervisor holds of its zygote."""

    pid: int
    ticks: int
    sock: socket.socket


def preload(modules: Sequence[str]) -> None:
    """Imports what every trainer needs, so that a fork has it already.

    Modules that are not installed are left out: the script will say so itself if it needs them.
    """
    for name in modules:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)


def fork_zygote() -> ZygoteProcess | Trainer:
    """Forks the zygote. Call it from the main thread before any thread, store or server exists.

    Returns:
        In the caller: the zygote. In each trainer that the zygote forks later: a `Trainer`. In the zygote itself this
        function does not return.
    """
    ours, theirs = socket.socketpair()
    supervisor_pid = os.getpid()
    _flush()
    with warnings.catch_warnings():
        # numpy's BLAS starts its threads at import and has fork handlers that stop and start them; Python 3.12 and
        # later count them and warn. The zygote checks that it has one thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        process.die_with_parent(supervisor_pid)
        ours.close()
        return serve(theirs)
    theirs.close()
    return ZygoteProcess(pid=pid, ticks=process.start_ticks(pid) or 0, sock=ours)


def start_zygote() -> ZygoteProcess:
    """Starts a zygote as a new program, in place of one that died. Call it from the main thread: see above."""
    ours, theirs = socket.socketpair()
    arguments = sys.orig_argv
    try:
        position = arguments.index("-m") + 2
    except ValueError:
        raise InfrastructureError(
            f"the zygote died and cannot be started again from the command line {arguments!r}: it has no '-m'. "
            f"Start the job with `python -m arc_dist`."
        ) from None
    option = f"--zygote-fd={theirs.fileno()}:{os.getpid()}"
    _flush()
    child = subprocess.Popen(
        [sys.executable, *arguments[1:position], option, *arguments[position:]], pass_fds=[theirs.fileno()]
    )
    child.returncode = 0  # the supervisor notices its end by the socket; Popen need not complain about it
    theirs.close()
    return ZygoteProcess(pid=child.pid, ticks=process.start_ticks(child.pid) or 0, sock=ours)


def serve(sock: socket.socket) -> Trainer:
    """The zygote's loop. Returns only in the trainers that it forks."""
    zygote = _Zygote(sock)
    try:
        trainer = zygote.run()
    except BaseException as error:
        if os.getpid() == zygote.pid:
            sys.excepthook(type(error), error, error.__traceback__)
            _flush()
            os._exit(1)
        raise
    if trainer is None:
        os._exit(0)  # the supervisor is gone; its atexit handlers and buffers are not ours to run
    return trainer


class _Zygote:
    def __init__(self, sock: socket.socket) -> None:
        self.pid = os.getpid()
        self._sock = sock
        self._trainer_pid: int | None = None
        self._wake_read, self._wake_write = os.pipe()
        self._old_mask: set[int] = set()
        self._old_sigchld: Any = signal.SIG_DFL

    def run(self) -> Trainer | None:
        self._old_mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS))
        for number in FORWARDED_SIGNALS:
            # What the launcher does until the supervisor is there is not for trainers.
            if number != signal.SIGINT and callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        process.adopt_orphans()
        for descriptor in (self._wake_read, self._wake_write):
            os.set_blocking(descriptor, False)
        self._old_sigchld = signal.signal(signal.SIGCHLD, _ignore)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        threads = process.num_threads()
        if threads != 1:
            raise RuntimeError(
                f"the zygote runs {threads} threads and cannot fork safely: an import started them. "
                f"Leave modules that start threads out of --preload."
            )
        gc.collect()
        gc.freeze()  # collections in trainers then leave the shared pages alone
        wire.send(self._sock, {"event": "ready", "pid": self.pid, "threads": threads})
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._wake_read:
                    self._reap()
                    continue
                message = wire.receive(self._sock)
                if message is None:
                    return None
                trainer = self._obey(message)
                if trainer is not None:
                    return trainer

    def _obey(self, message: dict[str, Any]) -> Trainer | None:
        command = message["command"]
        if command == "fork":
            return self._fork(message["set"], message["unset"])
        if command == "kill" and self._trainer_pid is not None:
            os.kill(self._trainer_pid, signal.SIGKILL)
        if command == "signal":
            self._forward(int(message["number"]))
        return None

    def _fork(self, to_set: dict[str, str], to_unset: list[str]) -> Trainer | None:
        if self._trainer_pid is not None:
            raise RuntimeError(f"trainer {self._trainer_pid} still lives; one live process per rank")
        _flush()
        pid = os.fork()
        if pid == 0:
            return self._become_trainer(to_set, to_unset)
        self._trainer_pid = pid
        wire.send(
            self._sock,
            {"event": "forked", "pid": pid, "ticks": process.start_ticks(pid), "at": time.monotonic()},
        )
        return None

    def _become_trainer(self, to_set: dict[str, str], to_unset: list[str]) -> Trainer:
        process.die_with_parent(self.pid)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, self._old_sigchld)
        self._sock.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        for name in to_unset:
            os.environ.pop(name, None)
        os.environ.update(to_set)
        fresh_random_state()
        stacks.install(Path(to_set["ARC_SHM_DIR"]))
        signal.pthread_sigmask(signal.SIG_SETMASK, self._old_mask)
        return Trainer(environ=to_set)

    def _forward(self, number: int) -> None:
        """Hands a signal of the supervisor on, unless the trainer has it already.

        Launchers signal the whole process group, people and `kill` only the supervisor. In the first case the same
        signal is pending here too (it is blocked), and a second one would make scripts that count signals exit early.
        """
        if signal.sigtimedwait([number], _GROUP_SIGNAL_WAIT_S) is None and self._trainer_pid is not None:
            os.kill(self._trainer_pid, number)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._trainer_pid:
                self._trainer_pid = None
                code = os.waitstatus_to_exitcode(status)
                wire.send(self._sock, {"event": "exited", "pid": pid, "status": code, "at": time.monotonic()})
                orphans = kill_orphans() if code != 0 else 0
                wire.send(self._sock, {"event": "clean", "pid": pid, "num_orphans": orphans})


def kill_orphans() -> int:
    """Ends what a failed trainer left behind: its children are ours now; theirs follow as they die.

    Bounded, because a process in an uninterruptible wait (a GPU or NFS driver) does not die when told to.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + _ORPHAN_LIMIT_S
    while time.monotonic() < deadline:
        alive = process.children(os.getpid())
        if not alive:
            break
        for pid in alive:
            killed.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
    return len(killed)


def fresh_random_state() -> None:
    """Gives the trainer the random state of a fresh interpreter, where torch and numpy seed themselves from entropy.

    Python's own `random` is seeded again by its fork handler. CUDA generators do not exist yet.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _ignore(number: int, frame: FrameType | None) -> None:
    """SIGCHLD only has to wake the poll."""
