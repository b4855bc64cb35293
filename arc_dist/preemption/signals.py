"""Signals as notices, in the process that trains.

Python runs a handler between two bytecodes of the main thread, so never while that thread waits in a collective. A
second way is therefore taken: the interpreter writes the number of each signal to a pipe at once (`set_wakeup_fd`), and
a thread reads it there and can still tell others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from arc_dist.protocol.leaving import Notices, Response, note

_WORKER_LIMIT_S = 20.0
_END = 0  # no signal's number


class NoticeSignals:
    """Takes signals as notices while a loop of ours runs. A handler that the script has set is called as well.

    A signal that is ignored (nohup) stays ignored. Once there was a notice, Ctrl-C counts as another one, so that it
    does not tear a save; see `protocol.leaving` for what a second and a third do.

    Args:
        numbers: signals that are notices.
        on_notice: called in the main thread at the first notice, between two bytecodes: it may only set something.
        on_arrival: called in a thread of its own as soon as one of the signals arrives, whatever the main thread does.
    """

    def __init__(
        self, numbers: Sequence[int], *, on_notice: Callable[[], None], on_arrival: Callable[[int], None] | None = None
    ) -> None:
        self._numbers = tuple(numbers)
        self._on_notice = on_notice
        self._on_arrival = on_arrival
        self._owner = os.getpid()
        self._notices = Notices()
        self._old: dict[int, Any] = {}
        self._pipe: int | None = None  # its write end

    def install(self) -> None:
        """Takes the signals over; does nothing outside of the main thread, where Python takes none."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._numbers:
            self._take(number)
        if self._on_arrival is not None and self._old:
            self._watch_arrivals(self._on_arrival)

    def remove(self) -> None:
        """Gives the signals back, except one whose handler the script has changed since."""
        if not self._old or threading.current_thread() is not threading.main_thread():
            return
        for number, old in self._old.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, old)
        self._old = {}
        if self._pipe is not None:
            write_end = self._pipe
            self._pipe = None
            if (there := signal.set_wakeup_fd(-1)) not in (-1, write_end):
                signal.set_wakeup_fd(there)  # somebody else's by now
            with contextlib.suppress(BlockingIOError):  # the pipe is full of signals, and nobody reads it
                os.write(write_end, bytes([_END]))  # a forked worker may hold this end, too, so closing says nothing
            os.close(write_end)

    def _take(self, number: int) -> None:
        old = signal.getsignal(number)
        # None: a handler that is not Python's, which could not be called from here.
        if old is not signal.SIG_IGN and old is not None and number not in self._old:
            self._old[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            self._handle_in_fork(number, frame)
            return
        self._notices, response = note(self._notices, time.monotonic())
        if response is Response.END:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if response is Response.LEAVE:
            self._take(signal.SIGINT)
            self._on_notice()
        old = self._old.get(number)
        if callable(old) and number in self._numbers:
            old(number, frame)

    def _handle_in_fork(self, number: int, frame: FrameType | None) -> None:
        """A forked data worker inherited this handler.

        The launcher signals the whole process group, but the trainer still needs its batches to finish the step; it
        ends its workers itself, or the alarm does. Ctrl-C is theirs as before.
        """
        old = self._old.get(number)
        if callable(old):
            old(number, frame)
        elif number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, _WORKER_LIMIT_S)

    def _watch_arrivals(self, tell: Callable[[int], None]) -> None:
        before = signal.set_wakeup_fd(-1)
        if before != -1:  # an event loop of the script's has it, and keeps it
            signal.set_wakeup_fd(before)
            return
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        self._pipe = write_end
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        _forget_in_forks(write_end)

        def watch() -> None:
            while (data := os.read(read_end, 64)) and _END not in data:
                for number in data:
                    if number in self._numbers:
                        tell(number)
            os.close(read_end)

        threading.Thread(target=watch, name="arc-notice-signals", daemon=True).start()


_fork_hooks: list[int] = []  # of the write ends of pipes; a hook can never be unregistered, so there is one


def _forget_in_forks(write_end: int) -> None:
    """A signal that a forked worker gets must not be read as one of ours from the pipe that it inherited."""
    if not _fork_hooks:
        os.register_at_fork(after_in_child=_forget_pipe)
    if write_end not in _fork_hooks:
        _fork_hooks.append(write_end)


def _forget_pipe() -> None:
    if (there := signal.set_wakeup_fd(-1)) not in (-1, *_fork_hooks):
        signal.set_wakeup_fd(there)
