"""A model of a rank's supervisor, its directive poller and its launcher.

It mirrors `supervisor.supervisor.Supervisor` (`run`, `_run_generation`, `_after_exit`, `_cut_short`, `_insist`,
`_await_directive`, `_take_order`), `supervisor.parting.Parting`, `supervisor.departure.Departure` and
`supervisor.events.DirectivePoller`, method by method, without threads, sockets and processes:
the same calls to the coordinator, in the same order, with the same retries and limits.
tests/test_simulated_supervisor.py gives both the same events and compares what they say. Not mirrored: signals (a
notice of preemption comes as from a file), the zygote, the watch over hangs, incidents.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from arc_dist.coordinator.client import Methods
from arc_dist.errors import ArcError, CoordinatorUnavailable
from arc_dist.testing.network import Network
from arc_dist.testing.world import Life, Script, Thread, Wait, World

_LONG_POLL_S = 20.0
_RETRY_FIRST_S = 0.05
_RETRY_MAX_S = 1.0
_RETRY_S = 0.05
_COORDINATOR_LIMIT_S = 10.0
_ECHO_WAIT_S = 0.25
_PARTING_LIMIT_S = 10.0
_FORK_S = 0.05
_TRAINING_S = 15.0  # of a grace period of 30 s, where nothing was measured


@dataclasses.dataclass(frozen=True)
class Directed:
    """See `supervisor.events`, like the two below."""

    directive: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CoordinatorLost:
    """The coordinator did not answer the poller."""


@dataclasses.dataclass(frozen=True)
class CoordinatorFound:
    """It answers again."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """The poller met an error that the supervisor cannot go on with."""

    error: BaseException


@dataclasses.dataclass(frozen=True)
class Exited:
    """The trainer is gone."""


@dataclasses.dataclass(frozen=True)
class Noticed:
    """The job is told to go."""


@dataclasses.dataclass(frozen=True)
class GraceEnds:
    """The trainer has used up its own share of the grace period."""


class TrainerHandle(Protocol):
    """A trainer, as its supervisor sees it. `cause` is None while it lives, `kind` "finished" after exit 0."""

    generation: int
    cause: dict[str, Any] | None

    @property
    def last_step(self) -> int | None: ...

    @property
    def is_leaving(self) -> bool:
        """Whether it saves its state, after a notice, and will end by itself."""
        ...

    def part(self, leaving: int) -> float:
        """Tells it to save its last step and end; seconds until it must be gone, 0 to kill it now.

        Args:
            leaving: number of the signal by which the job was told to go, 0 if it was not.
        """
        ...

    def kill(self) -> None: ...


class Body(Protocol):
    """What a supervisor works with."""

    host: str
    pid: int
    shm_dir: str

    def fork(self, generation: int, directive: dict[str, Any]) -> TrainerHandle: ...

    def inventory(self) -> list[dict[str, Any]]: ...

    @property
    def is_noticed(self) -> bool:
        """The word that trainers look at before every step: the job is told to go."""
        ...

    def raise_notice(self) -> None:
        """Raises that word; nobody takes it down."""
        ...


class _Poller:
    """As `supervisor.events.DirectivePoller`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._pending: tuple[int, str] | None = None
        self._thread = Thread(supervisor.world, supervisor.life)
        self._thread.start(self._run(), self._ended)

    def ask(self, generation: int, *, after: str = "") -> None:
        if self._pending != (generation, after):
            self._pending = (generation, after)
            self._thread.deliver((generation, after))

    def answered(self) -> None:
        self._pending = None

    def _ended(self, error: BaseException | None, result: object) -> None:
        if error is not None:
            self._supervisor.thread.deliver(Failed(error))

    def _run(self) -> Script:
        while True:
            question = yield Wait(lambda item: isinstance(item, tuple))
            yield from self._settle(*question)

    def _settle(self, generation: int, after: str) -> Script:
        owner = self._supervisor
        pause_s = _RETRY_FIRST_S
        while True:
            body = {"rank": owner.rank, "generation": generation, "timeout_s": _LONG_POLL_S, "after": after}
            try:
                directive = yield from owner.call("directive", body, thread=self._thread)
            except CoordinatorUnavailable:
                owner.thread.deliver(CoordinatorLost())
                yield Wait(lambda item: False, timeout_s=pause_s)
                pause_s = min(2 * pause_s, _RETRY_MAX_S)
                continue
            if pause_s != _RETRY_FIRST_S:
                pause_s = _RETRY_FIRST_S
                owner.thread.deliver(CoordinatorFound())
            if directive["kind"] != "wait":
                owner.thread.deliver(Directed(directive))
                return


class Supervisor:
    """One life of a rank's supervisor.

    Args:
        world: the scheduler.
        network: the way to the coordinator.
        rank: its rank.
        world_size: number of ranks.
        body: its host, its memory, its trainers.
        life: its process.
        on_end: told when it ends by itself: with an exit code, or with the error that it could not go on with.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        rank: int,
        world_size: int,
        body: Body,
        life: Life,
        on_end: Callable[[ArcError | None, int | None], None],
    ) -> None:
        self.world = world
        self.network = network
        self.rank = rank
        self.life = life
        self.body = body
        self.trainer: TrainerHandle | None = None
        self.thread = Thread(world, life)
        self._world_size = world_size
        self._client = Methods()
        self._directive: dict[str, Any] | None = None
        self._lost_at: float | None = None
        self._following = "run"
        self._has_begun = False  # to leave, as the two below
        self._is_overdue = False
        self._is_flushing = False
        self._on_end = on_end
        self._poller = _Poller(self)

    def start(self) -> None:
        """Joins and runs, until the job is over."""
        self.thread.start(self._live(), self._ended)

    def call(self, method: str, body: dict[str, Any], *, thread: Thread | None = None) -> Script:
        """One message and its answer; see `Methods.call`."""
        return (yield from self.network.call(thread or self.thread, self._client, self.rank, method, body))

    def preempt(self) -> None:
        """Somebody tells the supervisor that the job is to go."""
        self.thread.deliver(Noticed())

    @property
    def _is_told(self) -> bool:
        return self._has_begun or self.body.is_noticed

    def _ended(self, error: BaseException | None, result: Any) -> None:
        if error is not None and not isinstance(error, ArcError):
            raise error
        if self.trainer is not None and self.trainer.cause is None:
            self.trainer.kill()
        self.life.end()
        self._on_end(error, result)

    def _live(self) -> Script:
        body = {
            "rank": self.rank,
            "world_size": self._world_size,
            "host": self.body.host,
            "pid": self.body.pid,
            "shm_dir": self.body.shm_dir,
        }
        while True:
            try:
                answer = yield from self.call("join", body)
                break
            except CoordinatorUnavailable:
                yield Wait(lambda item: False, timeout_s=_RETRY_S)
        return (yield from self._run(int(answer["generation"])))

    def _run(self, generation: int) -> Script:
        while True:
            yield from self._say_ready(generation)
            directive = yield from self._await_directive(generation)
            if directive["kind"] == "run":
                generation = int(directive["generation"])
                yield from self._run_generation(generation, directive)
                directive = yield from self._take_directive(generation)
            if directive["kind"] == "end":
                yield from self._part(int(directive.get("leaving", 0)))
                generation = int(directive["generation"]) + 1
            elif directive["kind"] == "stop":
                yield from self._part()
                return int(directive["exit_code"])
            elif directive["kind"] == "done":
                return 0

    def _say_ready(self, generation: int) -> Script:
        body = self.body
        store = {"host": body.host, "port": 1000 + generation} if self.rank == 0 else None
        message = {
            "rank": self.rank,
            "generation": generation,
            "store": store,
            "inventory": body.inventory(),
            "shm_dir": body.shm_dir,
            "host": body.host,
        }
        yield from self._insist("ready", message)

    def _run_generation(self, generation: int, directive: dict[str, Any]) -> Script:
        self._is_flushing = bool(directive["plan"].get("flush"))
        yield Wait(lambda item: False, timeout_s=self.world.random.uniform(0.0, _FORK_S))
        trainer = self.trainer = self.body.fork(generation, directive)
        self._following = "run"
        self._poller.ask(generation, after="run")
        if self._is_told and not self._is_flushing:
            yield from self._tell_notice()
        yield from self._until(
            lambda: trainer.cause is not None or self._directive is not None or self._must_cut_short(trainer)
        )
        if trainer.cause is None and self._directive is None:
            yield from self._cut_short(trainer)
        elif trainer.cause is not None:
            yield from self._after_exit(trainer)

    def _must_cut_short(self, trainer: TrainerHandle) -> bool:
        has_state = any(held["certified"] or held["parting"] for held in self.body.inventory())
        return self._is_overdue and not self._is_flushing and not trainer.is_leaving and has_state

    def _cut_short(self, trainer: TrainerHandle) -> Script:
        trainer.kill()
        yield from self._until(lambda: trainer.cause is not None)
        cause = {"kind": "overdue", "signal": None, "exit_code": None, "exception": None}
        yield from self._report_departed(trainer, cause)

    def _report_departed(self, trainer: TrainerHandle, cause: dict[str, Any]) -> Script:
        body = {"rank": self.rank, "generation": trainer.generation, "cause": cause, "step": trainer.last_step}
        yield from self._insist("died", body)

    def _after_exit(self, trainer: TrainerHandle) -> Script:
        cause = trainer.cause
        assert cause is not None
        if self._is_told and cause["kind"] != "finished" and self._directive is None:
            yield from self._report_departed(trainer, cause)
            return
        is_echo = (cause.get("exception") or {}).get("type") == "PeerLost"
        if is_echo and (yield from self._until(lambda: self._directive is not None, timeout_s=_ECHO_WAIT_S)):
            return
        if self._directive is not None:
            return
        body = {"rank": self.rank, "generation": trainer.generation}
        if cause["kind"] == "finished":
            yield from self._insist("finished", body)
        else:
            yield from self._insist("died", {**body, "cause": cause, "step": trainer.last_step})

    def _part(self, leaving: int = 0) -> Script:
        trainer = self.trainer
        if trainer is None or trainer.cause is not None:
            return
        limit_s = 0.0 if self._is_flushing else min(trainer.part(leaving), _PARTING_LIMIT_S)
        if not (yield from self._until(lambda: trainer.cause is not None, timeout_s=limit_s)):
            trainer.kill()
            yield from self._until(lambda: trainer.cause is not None)

    def _await_directive(self, generation: int, after: str = "") -> Script:
        self._poller.ask(generation, after=after)
        while not (yield from self._until(lambda: self._directive is not None, timeout_s=_RETRY_MAX_S)):
            if self._lost_at is not None and self.world.now_s - self._lost_at > _COORDINATOR_LIMIT_S:
                raise CoordinatorUnavailable(f"rank {self.rank}: the coordinator has not answered")
        return (yield from self._take_directive(generation))

    def _take_directive(self, generation: int) -> Script:
        directive, self._directive = self._directive, None
        if directive is not None:
            return directive
        return (yield from self._await_directive(generation, after=self._following))

    def _insist(self, method: str, body: dict[str, Any]) -> Script:
        deadline_s = self.world.now_s + _COORDINATOR_LIMIT_S
        while True:
            try:
                yield from self.call(method, body)
                return
            except CoordinatorUnavailable:
                if self.world.now_s > deadline_s:
                    raise
                yield from self._until(lambda: False, timeout_s=_RETRY_S)

    def _until(self, done: Callable[[], bool], *, timeout_s: float | None = None) -> Script:
        """As `Supervisor._wait`."""
        deadline_s = None if timeout_s is None else self.world.now_s + timeout_s
        while not done():
            left_s = None if deadline_s is None else deadline_s - self.world.now_s
            if left_s is not None and left_s <= 0:
                return False
            event = yield Wait(_is_event, timeout_s=left_s)
            if event is None:
                return done()
            yield from self._handle(event)
        return True

    def _handle(self, event: Any) -> Script:
        if isinstance(event, Directed):
            self._lost_at = None
            self._poller.answered()
            yield from self._take_order(event.directive)
        elif isinstance(event, CoordinatorLost):
            self._lost_at = self._lost_at if self._lost_at is not None else self.world.now_s
        elif isinstance(event, CoordinatorFound):
            self._lost_at = None
        elif isinstance(event, Noticed):
            yield from self._leave(is_known=False)
        elif isinstance(event, GraceEnds):
            self._is_overdue = True
        elif isinstance(event, Failed):
            raise event.error

    def _take_order(self, directive: dict[str, Any]) -> Script:
        if directive["kind"] != "leave":
            self._directive = directive
            return
        yield from self._leave(is_known=True)
        self._following = "leave"
        self._poller.ask(int(directive["generation"]), after="leave")

    def _leave(self, *, is_known: bool) -> Script:
        """As `Departure.begin`."""
        if self._has_begun:
            return
        self._has_begun = True
        self.body.raise_notice()
        self.world.after(_TRAINING_S, lambda: self.thread.deliver(GraceEnds()))
        if not is_known:
            yield from self._tell_notice()

    def _tell_notice(self) -> Script:
        with contextlib.suppress(ArcError):  # a message that is lost is not sent again before the next generation
            yield from self.call("preempt", {"rank": self.rank})


def _is_event(item: Any) -> bool:
    return isinstance(item, (Directed, CoordinatorLost, CoordinatorFound, Noticed, GraceEnds, Failed, Exited))
