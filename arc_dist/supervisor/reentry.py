"""The supervisor's side of in-process recovery: asks its trainer to leave a generation, and to enter the next.

What is kept, waited for or ended is decided in protocol/reentry.py. A trainer that is not kept is ended and replaced
as any other; nothing here is needed for that.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arc_dist.protocol import reentry
from arc_dist.protocol.reentry import Choice, Standing, Stay
from arc_dist.snapshot import layout
from arc_dist.supervisor import cause as causes
from arc_dist.supervisor import channel, wire
from arc_dist.supervisor.events import Event, Events, TrainerSaid
from arc_dist.supervisor.trainers import Trainer, Trainers
from arc_dist.telemetry.log import logger

_PARTING_LIMIT_S = 10.0  # while it saves its last step, its time to leave has not begun
_POLL_S = 0.05
_SEND_LIMIT = struct.pack("@2l", 2, 0)  # a struct timeval

Wait = Callable[..., bool]  # handles events until a condition holds; `timeout_s` bounds it


class Reentry:
    """What is known of the present trainer's ability to stay. Used from the supervisor's main thread.

    Args:
        directory: this rank's, where trainers find the socket.
        trainers: of this rank.
        events: where a trainer's words go; the supervisor hands them back to `hear`.
        wait: handles events until a condition holds.
    """

    def __init__(self, directory: Path, trainers: Trainers, events: Events[Event], wait: Wait) -> None:
        self._directory = directory
        self._trainers = trainers
        self._events = events
        self._wait = wait
        self._stay = Stay()
        self._sock: socket.socket | None = None
        self._pid = 0
        self._listener = channel.listen(directory)
        threading.Thread(target=self._accept, name="arc-reentry", daemon=True).start()

    # ------------------------------------------------------------------ hearing

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._read, args=(sock,), name="arc-reentry-read", daemon=True).start()

    def _read(self, sock: socket.socket) -> None:
        try:
            while (message := wire.receive(sock)) is not None:
                self._events.put(TrainerSaid(message, sock))
        except (OSError, ValueError):
            pass  # broken in the middle of a message: over, as after a clean end
        self._events.put(TrainerSaid({"event": "ended"}, sock))

    def hear(self, said: TrainerSaid) -> None:
        """Takes a word of a process that connected; only that of the present trainer counts."""
        message, sock = said.message, said.sock
        if message["event"] == "ended":
            if sock is self._sock:
                self._stay, self._sock = reentry.ended(self._stay), None
            sock.close()
            return
        if message["event"] == "began" and sock is not self._sock:
            self._adopt(sock)
        trainer = self._trainers.current
        if sock is not self._sock or trainer is None:
            return
        generation = int(message["generation"])
        match message["event"]:
            case "began":
                self._stay = reentry.began(self._stay, generation, float(message["within_s"]))
            case "left":
                self._stay = reentry.left(self._stay, generation, progressed=self._progressed(trainer))
            case "stuck":
                self._stay = reentry.stuck(self._stay, generation, str(message["reason"]))

    def _adopt(self, sock: socket.socket) -> None:
        """A function begins. A child of the trainer may run one too, and is none of ours."""
        pid, trainer = channel.peer_pid(sock), self._trainers.current
        if trainer is not None and trainer.pid in (None, pid):
            # A stopped process does not read; waiting for it is the rules' affair, not the kernel's.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_LIMIT)
            self._stay, self._sock, self._pid = Stay(), sock, pid

    def _progressed(self, trainer: Trainer) -> bool:
        step = self._trainers.last_step(trainer)
        return step is not None and step > (trainer.plan.get("step") or 0)

    # ------------------------------------------------------------------ what is known

    def has_left(self, trainer: Trainer) -> bool:
        """Whether this trainer has left its generation, or says that it cannot, though it lives."""
        gone = trainer.returncode is not None or trainer.pid != self._pid
        return not gone and self._stay.standing in (Standing.LEFT, Standing.STUCK)

    def cause(self) -> causes.Cause:
        """Why a trainer has left that nobody had asked: it lost a peer, or thinks so."""
        told = layout.read_exception(self._directory)
        return causes.Cause(kind="exception", returncode=1, exception=told or {"type": "PeerLost"})

    # ------------------------------------------------------------------ acting

    def leaves(self) -> bool:
        """Asks the trainer to leave its generation, and waits for it; False when it has to be ended."""
        trainer = self._trainers.current
        if trainer is None:
            return False
        parting_until = time.monotonic() + _PARTING_LIMIT_S
        while trainer.returncode is None and trainer.pid == self._pid:
            now = time.monotonic()
            choice, reason = reentry.choose(self._stay, now)
            if choice is Choice.KEEP:
                return True
            if choice is Choice.END and self._is_parting() and now < parting_until:
                choice = Choice.WAIT
            if choice is Choice.END:
                self._say_ended(trainer, reason)
                return False
            if choice is Choice.ASK:
                self._stay = reentry.asked(self._stay, now)
                self._tell({"order": "leave", "generation": trainer.generation})
            self._wait(self._changes(trainer), timeout_s=_POLL_S)
        return False

    def _is_parting(self) -> bool:
        return self._stay.standing is Standing.ASKED and self._trainers.phase() is layout.Phase.PARTING

    def enters(self, generation: int, plan: Mapping[str, Any], to_set: Mapping[str, str]) -> Trainer | None:
        """Lets a trainer that has left go on in `generation`; None when a new one has to be forked.

        The trainer is not ended here when it does not enter in time; `Supervisor` ends what lives before it forks.
        """
        old = self._trainers.current
        if old is None or not self.has_left(old) or reentry.choose(self._stay, 0.0)[0] is not Choice.KEEP:
            return None
        if plan.get("flush"):
            return None  # that is written by a process of its own, which runs no script
        self._stay = reentry.entering(self._stay, generation, time.monotonic())
        trainer = self._trainers.keep(generation, plan)
        self._tell({"order": "enter", "generation": generation, "set": dict(to_set)})
        while trainer.returncode is None and self._stay.standing is Standing.ENTERING:
            choice, reason = reentry.choose(self._stay, time.monotonic())
            if choice is Choice.END:
                self._say_ended(trainer, reason)
                return None
            self._wait(self._changes(trainer), timeout_s=_POLL_S)
        if trainer.returncode is not None or self._stay.standing is not Standing.INSIDE:
            return None
        trainer.forked_at = time.monotonic()
        logger.debug("trainer %s stays, in generation %d", trainer.pid, generation)
        return trainer

    def _changes(self, trainer: Trainer) -> Callable[[], bool]:
        before = self._stay
        return lambda: self._stay is not before or trainer.returncode is not None

    def _say_ended(self, trainer: Trainer, reason: str) -> None:
        if self._stay.standing is not Standing.OUTSIDE:
            logger.warning("trainer %s does not stay: %s. It is ended, and another is started", trainer.pid, reason)

    def _tell(self, message: Mapping[str, Any]) -> None:
        """A process that is gone hears nothing; its end is told by the zygote."""
        if self._sock is None:
            return
        try:
            wire.send(self._sock, message)
        except OSError as error:
            logger.debug("an order did not reach trainer %d: %s", self._pid, error)
