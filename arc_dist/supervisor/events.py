"""What can happen to a supervisor, and the two threads that tell its main thread about it.

The main thread waits on one queue. It never polls while training runs: a trainer's death comes from the zygote's
socket, another rank's from the long poll at the coordinator, a signal from its handler.
"""

from __future__ import annotations

import dataclasses
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from arc_dist.errors import CoordinatorUnavailable
from arc_dist.supervisor import wire

LONG_POLL_S = 20.0
_RETRY_FIRST_S = 0.05
_RETRY_MAX_S = 1.0


@dataclasses.dataclass(frozen=True)
class ZygoteSaid:
    """A message of the zygote (zygote.py lists them)."""

    message: dict[str, Any]
    zygote_pid: int


@dataclasses.dataclass(frozen=True)
class ZygoteLost:
    """The zygote's end of the socket is closed: it is dead, and with it the trainer."""

    zygote_pid: int


@dataclasses.dataclass(frozen=True)
class TrainerSaid:
    """A message of a trainer that can stay (channel.py lists them), or ``ended``: its end of `sock` is closed."""

    message: dict[str, Any]
    sock: socket.socket


@dataclasses.dataclass(frozen=True)
class Directed:
    """The coordinator answered the question for `generation` with something else than "wait"."""

    generation: int
    directive: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CoordinatorLost:
    """The coordinator did not answer; asked again until it does."""

    error: str


@dataclasses.dataclass(frozen=True)
class CoordinatorFound:
    """The coordinator answers again."""


@dataclasses.dataclass(frozen=True)
class CutOff:
    """The coordinator was not reached for so long that this rank counts as lost."""

    error: str


@dataclasses.dataclass(frozen=True)
class Signalled:
    """A signal reached the supervisor."""

    number: int


@dataclasses.dataclass(frozen=True)
class Condemned:
    """The trainer of `generation` hangs and has to be ended; `reason` says where it is."""

    generation: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Noticed:
    """Something else than a signal to this supervisor says that the job is to go."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Unsignalled:
    """A script that is not ours has had the time to get the launcher's signal, after another rank was told to go."""


@dataclasses.dataclass(frozen=True)
class GraceEnds:
    """The trainer has used up its own share of the grace period."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """A thread met an error that is no one's fault but ours or the configuration's; the main thread raises it."""

    error: BaseException


Event = (
    ZygoteSaid
    | ZygoteLost
    | TrainerSaid
    | Directed
    | CoordinatorLost
    | CoordinatorFound
    | CutOff
    | Signalled
    | Condemned
    | Noticed
    | Unsignalled
    | GraceEnds
    | Failed
)
Events = queue.SimpleQueue  # of Event; its put may be called from a signal handler


def read_zygote(sock: socket.socket, zygote_pid: int, events: Events[Event]) -> None:
    """Starts the thread that turns a zygote's messages into events; it ends with the zygote."""

    def read() -> None:
        try:
            while (message := wire.receive(sock)) is not None:
                events.put(ZygoteSaid(message, zygote_pid))
        except (OSError, ValueError):
            pass  # the socket broke in the middle of a message: the zygote is as lost as after a clean end
        events.put(ZygoteLost(zygote_pid))

    threading.Thread(target=read, name=f"arc-zygote-{zygote_pid}", daemon=True).start()


class DirectivePoller:
    """Asks the coordinator what to do, in a thread of its own, one question at a time.

    Args:
        ask: ``(generation, after, timeout_s) -> directive``; the coordinator's long poll.
        events: where the answers go.
    """

    def __init__(self, ask: Callable[[int, str, float], dict[str, Any]], events: Events[Event]) -> None:
        self._ask = ask
        self._events = events
        self._questions: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._pending: tuple[int, str] | None = None
        threading.Thread(target=self._run, name="arc-directive", daemon=True).start()

    def ask(self, generation: int, *, after: str = "") -> None:
        """Asks for the directive about `generation`, unless that question is on its way already.

        Args:
            generation: the one that runs here, or that this rank is ready for.
            after: the kind of directive that is being followed, which is no answer.
        """
        if self._pending != (generation, after):
            self._pending = (generation, after)
            self._questions.put((generation, after))

    def answered(self) -> None:
        """The main thread has taken the answer; the same question may be asked again."""
        self._pending = None

    def _run(self) -> None:
        try:
            while True:
                self._settle(*self._questions.get())
        except BaseException as error:  # noqa: BLE001  # the main thread raises it again, where it ends the process
            self._events.put(Failed(error))

    def _settle(self, generation: int, after: str) -> None:
        pause_s = _RETRY_FIRST_S
        while True:
            try:
                directive = self._ask(generation, after, LONG_POLL_S)
            except CoordinatorUnavailable as error:
                self._events.put(CoordinatorLost(str(error)))
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_MAX_S)
                continue
            if pause_s != _RETRY_FIRST_S:
                pause_s = _RETRY_FIRST_S
                self._events.put(CoordinatorFound())
            if directive["kind"] != "wait":
                self._events.put(Directed(generation, directive))
                return
