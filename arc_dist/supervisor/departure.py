"""A supervisor that was told to go: who told it, who else is to know, and until when its trainer may go on.

Whoever hears of a notice first tells the coordinator, which tells all supervisors (the order LEAVE). Each raises the
word that its trainer looks at before every step. A trainer that does not get to its own save in time is ended while
what it left in memory can still be written; what all ranks hold is then written by a generation of its own.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from arc_dist.errors import ExitCode
from arc_dist.preemption.facts import SavingFacts
from arc_dist.preemption.page import NoticePage
from arc_dist.protocol.leaving import Notices, Response, note, training_s
from arc_dist.snapshot import layout
from arc_dist.supervisor import process
from arc_dist.supervisor.events import Event, Events, GraceEnds, Unsignalled
from arc_dist.supervisor.trainers import Trainer, Trainers
from arc_dist.telemetry.log import logger

_LAUNCHER_SIGNAL_S = 0.5


class Departure:
    """What a supervisor knows of having to go. Used from its main thread.

    Args:
        trainers: of this rank.
        is_guarded: the script's optimizer steps are counted, so that it is known whether there were any.
        shm_dir: this rank's directory, in which the trainer finds the word.
        grace_s: from the notice to the end of all processes.
        numbers: signals that are notices.
        events: where the end of the trainer's own time is told.
        tell: tells the coordinator; called once, at the first notice.

    Attributes:
        is_overdue: the trainer's own time is over.
        is_flushing: the present generation writes what memory holds, and trains no more.
        is_at_once: somebody insisted on an end without saving.
    """

    def __init__(
        self,
        *,
        trainers: Trainers,
        is_guarded: bool,
        shm_dir: Path,
        grace_s: float,
        numbers: tuple[int, ...],
        events: Events[Event],
        tell: Callable[[], None],
    ) -> None:
        self.is_overdue = False
        self.is_at_once = False
        self.is_flushing = False
        self._trainers = trainers
        self._is_guarded = is_guarded
        self._shm_dir = shm_dir
        self._grace_s = grace_s
        self._numbers = numbers
        self._events = events
        self._tell = tell
        self._page = NoticePage.create(shm_dir)
        self._notices = Notices()
        self._has_begun = False

    @property
    def has_begun(self) -> bool:
        """Whether there was a notice: to this supervisor, to its trainer, or to another rank."""
        return self._has_begun or self._page.is_raised

    @property
    def must_cut_short(self) -> bool:
        """Whether the trainer has to be ended so that memory can be saved; not while it saves a newer state itself."""
        return (
            self.is_overdue
            and not self.is_flushing
            and self._trainers.phase() is not layout.Phase.LEAVING
            and self._has_state()
        )

    def holds(self, trainer: Trainer | None) -> bool:
        """Whether this supervisor, though told to go, is still needed: what memory holds may have to be saved."""
        if not self.has_begun or self.is_at_once:
            return False
        is_saved = trainer is not None and trainer.returncode in (0, ExitCode.PREEMPTED)
        return self.is_flushing or (not is_saved and self._has_state())

    def costs_nothing(self, trainer: Trainer | None) -> bool:
        """Whether no optimizer step was made in this job, so that nothing is lost by its end."""
        if not self._is_guarded or self.is_at_once:
            return False
        return trainer is None or (trainer.generation == 0 and not self._trainers.last_step(trainer))

    def _has_state(self) -> bool:
        """Whether memory holds a trusted state of this rank."""
        return any(held["certified"] or held["parting"] for held in self._trainers.inventory())

    def is_notice(self, number: int) -> bool:
        """Whether this signal is one."""
        return number in self._numbers

    def heard(self, number: int) -> None:
        """A signal reached this supervisor. After a notice Ctrl-C is another one."""
        if not self.is_notice(number) and not (self._has_begun and number == signal.SIGINT):
            return
        self._notices, response = note(self._notices, time.monotonic())
        if response is Response.END:
            self.is_at_once = True
        self.begin(f"{process.signal_name(number)} reached this supervisor")

    def begin(self, reason: str, *, is_known: bool = False) -> None:
        """There was a notice; only the first one counts.

        Args:
            reason: for the log.
            is_known: the coordinator has said so itself.
        """
        if self._has_begun:
            return
        self._has_begun = True
        self._page.raise_notice()
        facts = SavingFacts.read(self._shm_dir)
        limit_s = training_s(self._grace_s, facts.needed_s if facts is not None else None)
        log = logger.debug if is_known else logger.warning
        log(
            "told to go: %s. The trainer has %.1f s of %.1f s to save its state",
            reason,
            limit_s,
            self._grace_s,
        )
        self._after(limit_s, GraceEnds())
        self._after(_LAUNCHER_SIGNAL_S, Unsignalled())
        if not is_known:
            self._tell()

    def _after(self, seconds: float, event: Event) -> None:
        timer = threading.Timer(seconds, lambda: self._events.put(event))
        timer.daemon = True
        timer.start()
