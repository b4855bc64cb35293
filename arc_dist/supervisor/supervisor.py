"""The supervisor of one rank: forks its trainers, generation after generation, and ends when the job does.

It joins no collective, touches no GPU and decides nothing about training: what to run next comes from the coordinator
(`directive`), and what the trainer left in shared memory is only listed, never opened.

One generation, seen from here::

    ready(g, inventory) --> run g --> fork --> trainer lives --+--> exits 0: finished --> done | end g
                                                               +--> dies: died ---------> end g | stop
                                                               +--> end g (another rank died): part, kill
    end g --> wait until every process of g is gone --> ready(g + 1)

The trainer of a generation is always gone before `ready` for the next is said: one live process per rank.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import time
from collections.abc import Callable
from typing import Any

from arc_dist.errors import ArcError, CoordinatorUnavailable, ExitCode, InfrastructureError
from arc_dist.snapshot import layout
from arc_dist.supervisor import cause as causes
from arc_dist.supervisor import process, wire, zygote
from arc_dist.supervisor.copies import Restocker
from arc_dist.supervisor.departure import Departure
from arc_dist.supervisor.events import (
    Condemned,
    CoordinatorFound,
    CoordinatorLost,
    CutOff,
    Directed,
    DirectivePoller,
    Event,
    Events,
    Failed,
    GraceEnds,
    Noticed,
    Signalled,
    TrainerSaid,
    Unsignalled,
    ZygoteLost,
    ZygoteSaid,
)
from arc_dist.supervisor.incidents import Incident
from arc_dist.supervisor.long_run import LongRuns
from arc_dist.supervisor.parting import Parting
from arc_dist.supervisor.reentry import Reentry
from arc_dist.supervisor.roles import Client, Ending, Setup
from arc_dist.supervisor.trainers import Trainer, Trainers
from arc_dist.supervisor.watcher import Watcher
from arc_dist.telemetry.log import logger

_ECHO_WAIT_S = 0.25
_SIGNAL_RACE_S = 0.02
_ZYGOTE_START_LIMIT_S = 300.0
_FAREWELL_LIMIT_S = 5.0
_RETRY_S = 0.05
_RETRY_MAX_S = 1.0

# After these the trainer's end is the job's end, however it ended.
_LEAVING_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})


class Supervisor:
    """See the module's text. Use it from the main thread: the zygote dies with the thread that started it."""

    def __init__(self, setup: Setup, client: Client, trainers: Trainers, events: Events[Event]) -> None:
        self._setup = setup
        self._client = client
        self._events = events
        self._trainers = trainers
        self._directive: dict[str, Any] | None = None
        self._signals: list[int] = []
        self._coordinator_lost_at: float | None = None
        self._coordinator_error = ""
        self._poller = DirectivePoller(self._ask, events)
        self._reentry = Reentry(setup.shm_dir, self._trainers, events, self._wait)
        self._incident: Incident | None = None
        self._long_runs = LongRuns(setup.rank, self._trainers)
        self._watcher = Watcher(setup.rank, setup.shm_dir, lambda: self._trainers.current, client, events)
        self._restocker = Restocker(
            peers=setup.peers,
            rank=setup.rank,
            client=client,
            wait=self._wait,
            insist=self._insist,
            watch=lambda generation: self._poller.ask(generation, after="run"),
            is_over=lambda: self._directive is not None or self._leaving_by is not None,
        )
        self._following = "run"  # the order about the present generation that is being followed
        self._departure = Departure(
            trainers=self._trainers,
            is_guarded=setup.is_guarded,
            shm_dir=setup.shm_dir,
            grace_s=setup.grace_s,
            numbers=setup.preempt_signals,
            events=events,
            tell=self._tell_notice,
        )
        self._parting = Parting(
            rank=setup.rank,
            trainers=self._trainers,
            departure=self._departure,
            own_signal=lambda: self._leaving_by,
            wait=self._wait,
        )

    def run(self, generation: int) -> Ending:
        """Runs generations from `generation` on until the job is done, stopped or told to go.

        Raises:
            ArcError: the job cannot go on; the message is for the user and `exit_code` for the launcher.
        """
        while True:
            if not self._wait(lambda: self._trainers.zygote_ready, timeout_s=_ZYGOTE_START_LIMIT_S):
                raise InfrastructureError(
                    f"rank {self._setup.rank}: the zygote process is not ready after {_ZYGOTE_START_LIMIT_S:.0f} s. "
                    f"Look at its error output above; the node may be overloaded.",
                    rank=self._setup.rank,
                )
            self._say_ready(generation)
            directive = self._await_directive(generation)
            if directive["kind"] == "run":
                generation = int(directive["generation"])
                ending = self._run_generation(generation, directive)
                if ending is not None:
                    return ending
                directive = self._take_directive(generation)
            if directive["kind"] == "end":
                if not self._stays(directive):
                    self._parting.end(directive["reason"], leaving=int(directive.get("leaving", 0)))
                trainer = self._trainers.current
                if trainer is not None and trainer.returncode is not None and self._ends_with(trainer):
                    return self._leave(trainer, self._trainers.cause_of(trainer))
                generation = int(directive["generation"]) + 1
            elif directive["kind"] == "stop":
                return self._stop(directive)
            elif directive["kind"] == "done":
                return Ending(0)

    def _ask(self, generation: int, after: str, timeout_s: float) -> dict[str, Any]:
        return self._client.directive(rank=self._setup.rank, generation=generation, timeout_s=timeout_s, after=after)

    def close(self) -> None:
        """Ends a trainer that still lives, because an error ends this supervisor."""
        self._watcher.close()
        if not self._trainers.gone:
            self._trainers.kill()
            self._wait(lambda: self._trainers.clean, timeout_s=_FAREWELL_LIMIT_S)

    def await_own_signal(self, timeout_s: float) -> bool:
        """Waits until a signal has told this supervisor itself to end; True when one has."""
        return self._wait(lambda: self.was_signalled, timeout_s=timeout_s)

    @property
    def was_signalled(self) -> bool:
        """Whether a signal told this supervisor itself to end."""
        return self._leaving_by is not None

    @property
    def has_run(self) -> bool:
        """Whether it forked a trainer."""
        return self._trainers.current is not None

    @property
    def was_preempted(self) -> bool:
        """Whether the job was told to go."""
        return self._departure.has_begun

    @property
    def _leaving_by(self) -> int | None:
        """The first signal that told this supervisor to end, if one did."""
        return next((number for number in self._signals if number in _LEAVING_SIGNALS), None)

    # --- one generation -----------------------------------------------------------------------------------------------

    def _say_ready(self, generation: int) -> None:
        setup = self._setup
        store = setup.store_for(generation) if setup.store_for is not None else None
        peer = setup.peers.introduction() if setup.peers is not None else None
        inventory = self._trainers.inventory()
        self._insist(
            lambda: self._client.ready(
                rank=setup.rank,
                generation=generation,
                store=store,
                inventory=inventory,
                shm_dir=str(setup.shm_dir),
                host=setup.host,
                peer=peer,
            )
        )

    def _run_generation(self, generation: int, directive: dict[str, Any]) -> Ending | None:
        """Forks the trainer and waits until it is over; None when the next directive says how to go on."""
        self._departure.is_flushing = bool((directive.get("plan") or {}).get("flush"))
        self._following = "run"
        if not self._restocker.prepare(generation, directive):
            return None
        trainer = self._fork(generation, directive)
        self._poller.ask(generation, after="run")
        if self._setup.store_for is not None:
            self._setup.store_for(generation + 1)
        self._setup.generation_began(generation)
        self._finish_incident(trainer)
        if self._departure.has_begun and not self._departure.is_flushing:
            self._tell_notice()  # a new supervisor of another rank made it forgotten, and this one is still to go
        self._wait(
            lambda: (
                trainer.returncode is not None
                or self._directive is not None
                or self._departure.must_cut_short
                or self._reentry.has_left(trainer)
            )
        )
        if self._directive is None and self._reentry.has_left(trainer):
            self._report_death(trainer, self._reentry.cause())
            return None
        if trainer.returncode is None and self._directive is None:
            self._cut_short(trainer)
        if trainer.returncode is None or trainer.killed_by_us:
            return None
        return self._after_exit(trainer)

    def _fork(self, generation: int, directive: dict[str, Any]) -> Trainer:
        setup = self._setup
        plan = directive.get("plan") or {"version": 1, "generation": generation, "step": None, "tier": "none"}
        to_set = {
            **setup.environ,
            "ARC_SUPERVISED": "1",
            "ARC_GENERATION": str(generation),
            "ARC_SHM_DIR": str(setup.shm_dir),
            "ARC_PLAN": wire.dumps(plan),
            "ARC_HAS_PEERS": str(int(bool((directive.get("peers") or {}).get("partners")))),
        }
        if setup.uses_store:
            store = directive["store"]
            to_set |= {
                "MASTER_ADDR": str(store["host"]),
                "MASTER_PORT": str(store["port"]),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(generation),
            }
        trainer = self._reentry.enters(generation, plan, to_set)
        if trainer is None:
            self._await_room()
            trainer = self._trainers.fork(generation, plan, to_set)
        self._wait(lambda: trainer.pid is not None or trainer.returncode is not None)
        return trainer

    def _after_exit(self, trainer: Trainer) -> Ending | None:
        """Reports a trainer that ended by itself; an Ending when this is also the end of the supervisor."""
        assert trainer.returncode is not None and trainer.exited_at is not None
        cause = self._trainers.cause_of(trainer)
        if trainer.returncode < 0 and self._departure.is_notice(-trainer.returncode):
            self._departure.begin(f"its trainer was ended by {process.signal_name(-trainer.returncode)}")
        if self._ends_with(trainer):
            return self._leave(trainer, cause)
        if self._departure.has_begun and cause.kind != "finished":
            self._departure.begin("a notice reached its trainer")  # which may not have lived to tell the coordinator
            if self._directive is None:
                self._report_departed(trainer, cause)
                return None
        if cause.kind != "finished":
            self._report_death(trainer, cause)
        elif self._directive is None:
            self._insist(lambda: self._client.finished(rank=self._setup.rank, generation=trainer.generation))
        return None

    def _report_death(self, trainer: Trainer, cause: causes.Cause) -> None:
        """Tells of a trainer that is gone, or that left its generation, unless the generation is over anyway."""
        if cause.is_echo and self._wait(lambda: self._directive is not None, timeout_s=_ECHO_WAIT_S):
            return  # the peer's own supervisor said what happened, and the generation is over
        if self._directive is not None:
            return
        step = self._trainers.last_step(trainer)
        self._incident = Incident.seen(
            rank=self._setup.rank,
            generation=trainer.generation,
            step=step,
            cause=cause,
            exited_at=trainer.exited_at or time.monotonic(),
            last_progress_at=self._trainers.last_progress_at(trainer),
        )
        report = self._long_runs.report(trainer, step)
        if report is not None:
            self._insist(lambda: self._client.progress(**report))
        self._insist(lambda: self._client.died(**self._death(trainer, cause, step)))
        logger.warning("%s", self._incident.first_line(trainer.pid))

    def _stays(self, directive: dict[str, Any]) -> bool:
        """Whether the trainer lives on through the end of its generation, having left it (supervisor/reentry.py)."""
        is_leaving = directive.get("leaving") or self._leaving_by is not None or self._departure.has_begun
        return not is_leaving and self._reentry.leaves()

    def _await_room(self) -> None:
        """Ends a trainer that stayed and cannot be used after all, with what it started."""
        if not self._trainers.gone:
            self._trainers.kill()
        if self._trainers.current is not None:
            self._parting.await_clean(self._trainers.current)

    def _cut_short(self, trainer: Trainer) -> None:
        """Ends a trainer that did not leave in time, and with it the generation."""
        logger.warning(
            "generation %d: the trainer (step %s) did not save in time; it is ended, and what memory holds is saved",
            trainer.generation,
            self._trainers.last_step(trainer),
        )
        self._trainers.kill()
        self._parting.await_clean(trainer)
        self._report_departed(trainer, causes.Cause(kind="overdue", returncode=-int(signal.SIGKILL)))

    def _report_departed(self, trainer: Trainer, cause: causes.Cause) -> None:
        """Tells of a trainer that ended, after a notice, without having saved; what follows is the coordinator's."""
        if cause.returncode != ExitCode.PREEMPTED:
            logger.warning("generation %d: the trainer ended without a last checkpoint: %s", trainer.generation, cause)
        self._insist(lambda: self._client.died(**self._death(trainer, cause, self._trainers.last_step(trainer))))

    def _death(self, trainer: Trainer, cause: causes.Cause, step: int | None) -> dict[str, Any]:
        generation = trainer.generation
        return {"rank": self._setup.rank, "generation": generation, "cause": cause.to_wire(), "step": step}

    def _finish_incident(self, trainer: Trainer) -> None:
        incident = self._incident
        if incident is None or trainer.forked_at is None:
            return
        self._incident = None
        report = incident.resumed(generation=trainer.generation, plan=trainer.plan, forked_at=trainer.forked_at)
        logger.warning("%s", incident.second_line(report))
        with self._tolerating_coordinator("the incident was not recorded"):
            self._client.incident(**report)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _is_leaving(self, returncode: int) -> bool:
        """Whether a signal that reached this supervisor makes the trainer's end final."""
        if returncode < 0 and -returncode in zygote.FORWARDED_SIGNALS:
            # A launcher signals the whole group; the trainer's death may be seen before our own handler has run.
            self._wait(lambda: -returncode in self._signals, timeout_s=_SIGNAL_RACE_S)
        return self._leaving_by is not None or -returncode in self._signals

    def _ends_with(self, trainer: Trainer) -> bool:
        """Whether the end of this trainer is that of its supervisor, because it was told to go and nothing is left."""
        assert trainer.returncode is not None
        return self._is_leaving(trainer.returncode) and not self._departure.holds(trainer)

    def _leave(self, trainer: Trainer, cause: causes.Cause) -> Ending:
        """Ends as the trainer ended, after telling the coordinator, which tells ranks that were not signalled."""
        assert trainer.returncode is not None
        if trainer.killed_by_us and self._leaving_by is not None:
            return Ending(-self._leaving_by)
        if cause.kind != "finished":
            logger.warning("generation %d: trainer ended, and so does its supervisor: %s", trainer.generation, cause)
        with self._tolerating_coordinator("the end of this rank was not reported"):
            if cause.kind == "finished":
                self._client.finished(rank=self._setup.rank, generation=trainer.generation)
            else:
                told = cause.after_notice(self._leaving_by)
                self._client.died(**self._death(trainer, told, self._trainers.last_step(trainer)))
                if self.was_preempted:
                    self._conclude_preemption(trainer.generation)
        if self._departure.is_notice(-trainer.returncode) and self._departure.costs_nothing(trainer):
            return Ending(int(ExitCode.PREEMPTED), was_told=True)
        return Ending(trainer.returncode, was_told=True)

    def _conclude_preemption(self, generation: int) -> None:
        """Says that nothing runs here any more, so that the other ranks are told to stop without a time-out."""
        if self._wait(lambda: self._trainers.clean, timeout_s=_FAREWELL_LIMIT_S):
            self._say_ready(generation + 1)

    def _stop(self, directive: dict[str, Any]) -> Ending:
        self._parting.end("the job stops")
        code = int(directive["exit_code"])
        survivors = tuple((int(rank), int(node)) for rank, node in directive.get("survivors", ()))
        is_one = any(rank == self._setup.rank for rank, _ in survivors)
        if is_one and not self.was_signalled and not self.was_preempted:
            logger.warning("%s. The world goes on with %d ranks", directive["reason"], len(survivors))
            return Ending(code, survivors=survivors)
        log = logger.error if self._setup.rank == 0 else logger.debug
        reason = directive.get("reason", "no reason given")
        if directive.get("traceback") and self._setup.uses_store:
            # Every rank's own traceback is far above by now, among the echoes; this is the one to read.
            log("what rank %s failed with first:\n%s", directive["blame_rank"], directive["traceback"].rstrip())
        log("the job stops (%s): %s", process.describe_status(code), reason)
        if self._incident is not None and self._incident.cause.returncode != ExitCode.PREEMPTED:
            with self._tolerating_coordinator("the incident was not recorded"):
                self._client.incident(**self._incident.stopped(reason))
        return Ending(code)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _await_directive(self, generation: int, after: str = "") -> dict[str, Any]:
        """Waits for the directive about `generation`. Bounded by the coordinator's own rules; here only its loss is.

        Args:
            generation: the one that runs here, or that this rank is ready for.
            after: the kind of directive that is being followed, which is no answer.
        """
        self._poller.ask(generation, after=after)
        while not self._wait(
            lambda: self._directive is not None or self._leaving_without_trainer(), timeout_s=_RETRY_MAX_S
        ):
            lost_at = self._coordinator_lost_at
            if lost_at is not None and time.monotonic() - lost_at > self._setup.coordinator_limit_s:
                raise CoordinatorUnavailable(
                    f"rank {self._setup.rank}: no answer for {self._setup.coordinator_limit_s:.0f} s: "
                    f"{self._coordinator_error}. If rank 0's host is lost, the launcher must restart the job "
                    f"(torchrun --max-restarts)."
                )
        if self._directive is None:
            return self._leaving_directive()
        return self._take_directive(generation)

    def _leaving_directive(self) -> dict[str, Any]:
        """What a signal means while no trainer runs; a script that ended well is not made a failure by it."""
        assert self._leaving_by is not None
        trainer = self._trainers.current
        if trainer is not None and trainer.returncode == 0:
            return {"kind": "done"}
        is_free = self._departure.is_notice(self._leaving_by) and self._departure.costs_nothing(trainer)
        code = int(ExitCode.PREEMPTED) if is_free else -self._leaving_by
        return {"kind": "stop", "exit_code": code, "reason": "told to end while nothing ran"}

    def _leaving_without_trainer(self) -> bool:
        if self._leaving_by is None or not self._trainers.gone:
            return False
        return not self._departure.holds(self._trainers.current)

    def _take_directive(self, generation: int) -> dict[str, Any]:
        directive, self._directive = self._directive, None
        return directive if directive is not None else self._await_directive(generation, after=self._following)

    def _insist(self, call: Callable[[], Any]) -> None:
        """Makes a call that must reach the coordinator; asks again until it does or is lost for too long."""
        deadline = time.monotonic() + self._setup.coordinator_limit_s
        while True:
            try:
                call()
                return
            except CoordinatorUnavailable as error:
                if time.monotonic() > deadline or self._leaving_without_trainer():
                    raise CoordinatorUnavailable(
                        f"rank {self._setup.rank}: {error}. If rank 0's host is lost, the launcher must restart the "
                        f"job (torchrun --max-restarts)."
                    ) from error
                self._wait(lambda: False, timeout_s=_RETRY_S)

    @contextlib.contextmanager
    def _tolerating_coordinator(self, consequence: str):
        try:
            yield
        except ArcError as error:
            logger.warning("%s: %s", consequence, error)

    def _wait(self, done: Callable[[], bool], *, timeout_s: float | None = None) -> bool:
        """Handles events until `done()`; False when `timeout_s` is over before."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not done():
            remaining_s = None if deadline is None else deadline - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                return False
            try:
                self._handle(self._events.get(timeout=remaining_s))
            except queue.Empty:
                return done()
        return True

    def _handle(self, event: Event) -> None:
        match event:
            case ZygoteSaid(message=message, zygote_pid=pid):
                self._trainers.hear(message, pid)
            case ZygoteLost(zygote_pid=pid):
                self._trainers.lost(pid)
            case TrainerSaid():
                self._reentry.hear(event)
            case Directed(directive=directive):
                self._coordinator_lost_at = None
                self._poller.answered()
                self._take_order(directive)
            case CoordinatorLost(error=error):
                self._coordinator_lost_at = self._coordinator_lost_at or time.monotonic()
                self._coordinator_error = error
            case CoordinatorFound():
                self._coordinator_lost_at = None
            case CutOff(error=error):
                raise CoordinatorUnavailable(error)
            case Signalled(number=number):
                self._take_signal(number)
            case Condemned(generation=generation, reason=reason):
                self._trainers.end_hang(generation, reason)
            case Noticed(reason=reason):
                self._departure.begin(reason)
            case Unsignalled():
                self._signal_script()
            case GraceEnds():
                self._departure.is_overdue = True
            case Failed(error=error):
                raise error

    def _take_order(self, directive: dict[str, Any]) -> None:
        """Keeps a directive for the main loop; LEAVE is obeyed here, because the generation goes on."""
        if directive["kind"] != "leave":
            self._directive = directive
            return
        self._departure.begin(str(directive["reason"]), is_known=True)
        self._following = "leave"
        self._poller.ask(int(directive["generation"]), after="leave")

    def _take_signal(self, number: int) -> None:
        """Hands a signal on to the trainer; one that is a notice is told to the coordinator, so that all ranks know."""
        self._signals.append(number)
        if not self._departure.is_flushing:  # the process that saves what memory holds knows no handler
            self._trainers.forward(number)
        self._departure.heard(number)
        if self._departure.is_at_once and self._departure.is_flushing:
            self._trainers.kill()

    def _tell_notice(self) -> None:
        with self._tolerating_coordinator("the preemption was not reported"):
            self._client.preempt(rank=self._setup.rank)

    def _signal_script(self) -> None:
        """A script without a loop of ours does not see the word of the notice; it gets what it would under torchrun."""
        has_signal = self._leaving_by is not None or any(map(self._departure.is_notice, self._signals))
        if not has_signal and not self._departure.is_flushing and self._trainers.phase() is layout.Phase.NONE:
            self._trainers.forward(signal.SIGTERM)
