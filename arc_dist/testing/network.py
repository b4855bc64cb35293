"""The simulated network between ranks and the coordinator, and the coordinator's process at its other end."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arc_dist.checkpoint_store.store import Store
from arc_dist.coordinator.client import Methods
from arc_dist.coordinator.journal import Journal
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ArcError, ConfigError, CoordinatorUnavailable
from arc_dist.protocol.job import Job
from arc_dist.testing.disks import Disk, SimBackend, SimJournalFile
from arc_dist.testing.world import Killed, Life, Script, Thread, Wait, World, when_awake

_CLIENT_TIMEOUT_S = 10.0
_POLLS = ("directive", "commit_status")
_WAKE_S = 0.002
_TICK_S = 1.0
_COMMIT_S = 0.02
_MAX_NESTED = 3


@dataclasses.dataclass(frozen=True)
class Request:
    """A message on its way. `ticket` tells its answer from others; a duplicate has the same."""

    ticket: int
    rank: int
    thread: Thread
    method: str
    message: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answer to the request with the same ticket: an answer or an error."""

    ticket: int
    answer: dict[str, Any] | None
    error: ArcError | None = None


class Network:
    """Carries messages, as well as the faults let it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.host: CoordinatorHost | None = None
        self.unheard: collections.Counter[int] = collections.Counter()  # ranks whose messages are lost: how many causes
        self.deaf: collections.Counter[int] = collections.Counter()
        self.to_lose: collections.Counter[int] = collections.Counter()
        self.replies_to_lose: collections.Counter[int] = collections.Counter()
        self.to_double: collections.Counter[int] = collections.Counter()
        self.to_delay: dict[int, float] = {}
        self.met: collections.Counter[str] = collections.Counter()
        self._tickets = 0

    def call(self, thread: Thread, client: Methods, rank: int, method: str, body: Mapping[str, Any]) -> Script:
        """As `Methods.call`, for a played thread: ``answer = yield from network.call(...)``.

        Raises:
            CoordinatorUnavailable, Fenced, ConfigError: as `Methods.call`.
        """
        message = client.prepare(method, body)
        self._tickets += 1
        ticket = self._tickets
        self._send(Request(ticket, rank, thread, method, message))
        wait_s = float(message.get("timeout_s", 60.0 if method == "shard" else 0.0))
        reply = yield Wait(
            lambda item: isinstance(item, Reply) and item.ticket == ticket, timeout_s=wait_s + _CLIENT_TIMEOUT_S
        )
        if reply is None:
            raise CoordinatorUnavailable(f"{method}: no answer within {wait_s + _CLIENT_TIMEOUT_S:g} s")
        if reply.error is not None:
            raise reply.error
        return client.accept(method, message, dict(reply.answer))

    def _send(self, request: Request) -> None:
        rank = request.rank
        if self.unheard[rank]:
            self.met["partition"] += 1
            return
        if self._use(self.to_lose, rank, "lose"):
            return
        copies = 2 if self._use(self.to_double, rank, "duplicate") else 1
        for _ in range(copies):
            self.world.after(self._latency_s(rank), lambda: self._arrive(request))

    def _arrive(self, request: Request) -> None:
        assert self.host is not None
        if self.unheard[request.rank]:
            self.met["partition"] += 1
            return
        self.host.receive(request)

    def reply(self, request: Request, answer: dict[str, Any] | None, error: ArcError | None = None) -> None:
        """Sends an answer back."""
        rank = request.rank
        if self.deaf[rank]:
            self.met["partition"] += 1
            return
        if self._use(self.replies_to_lose, rank, "lose-reply"):
            return
        reply = Reply(request.ticket, answer, error)
        self.world.after(self._latency_s(rank), lambda: request.thread.deliver(reply))

    def _use(self, stock: collections.Counter[int], rank: int, kind: str) -> bool:
        if stock[rank] <= 0:
            return False
        stock[rank] -= 1
        self.met[kind] += 1
        return True

    def _latency_s(self, rank: int) -> float:
        extra_s = self.to_delay.pop(rank, 0.0)
        if extra_s:
            self.met["delay"] += 1
        return extra_s + self.world.random.uniform(0.0005, 0.003)


class CoordinatorHost:
    """The process that the coordinator runs in: the real service, its journal on a simulated disk, and its restarts.

    Args:
        world: the scheduler.
        network: carries its answers.
        disks: those of the checkpoint tiers, and last the journal's.
        settings: for the service.
        on_change: told after each message that changed the service's state.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        disks: list[Disk],
        settings: dict[str, Any],
        on_change: Callable[[Coordinator], None],
    ) -> None:
        self.world = world
        self.network = network
        self.disks = disks
        self.clock_ahead_s = 0.0
        self.wall_behind_s = 0.0
        self.service: Coordinator | None = None
        self.forgot: set[str] = set()  # what journal errors were shown when a coordinator ended
        self._settings = settings
        self._on_change = on_change
        self._life = Life("coordinator", alive=False)
        self._parked: list[tuple[float, object, Request]] = []
        self._sweeping = False
        self._nested = 0
        self.start()

    def start(self) -> None:
        """Starts a coordinator from the journal, unless one lives."""
        if self._life.alive:
            return
        life = Life(f"coordinator {self.world.num_events}")
        try:
            journal = Journal.open(Path("/sim/journal.log"), SimJournalFile(self.disks[-1], life))
        except ConfigError as error:
            self.world.note(f"the coordinator cannot start: {error.message}")
            self.world.after(0.5, self.start)
            return
        self._life = life
        self._parked = []
        self.service = Coordinator(
            journal=journal,
            clock=lambda: self.world.now_s + self.clock_ahead_s,
            commit=functools.partial(self._commit, life),
            **self._settings,
        )
        life.on_end = self._died
        self.world.note(f"coordinator of epoch {self.service.epoch} starts")
        self.world.after(_TICK_S, lambda: self._tick(life))

    @property
    def job(self) -> Job | None:
        """What the coordinator of the moment believes, if one lives."""
        return self.service.job if self.service is not None and self._life.alive else None

    def _died(self) -> None:
        self._remember_loss()
        self.world.note("coordinator dies while it writes")
        self.world.after(0.3, self.start)

    def crash(self, back_after_s: float) -> None:
        """Ends the process; it is started again later."""
        if not self._life.alive:
            return
        self._remember_loss()
        self._life.alive = False
        self.world.note("coordinator crashes")
        for _, _, request in self._parked:
            self.network.reply(request, None, CoordinatorUnavailable("connection reset by peer"))
        self.world.after(back_after_s, self.start)

    def freeze(self, duration_s: float) -> None:
        life = self._life
        life.frozen = True
        self.world.after(duration_s, life.thaw)

    def replace(self, awake_after_s: float) -> None:
        """Freezes the process and starts another in its place; the old one wakes up when it is too late."""
        if not self._life.alive:
            return
        self._remember_loss()
        zombie = self._life
        zombie.frozen = True
        zombie.name = "zombie"
        self.world.after(awake_after_s, zombie.thaw)
        self._life = Life("coordinator", alive=False)
        self.start()

    def _remember_loss(self) -> None:
        """What was told and not journaled goes with the process; that it would was announced."""
        if self.service is not None:
            error = self.service.call("status", {})["journal_error"]
            if error is not None:
                self.forgot.add(error)

    def receive(self, request: Request) -> None:
        if not self._life.alive or self.service is None:
            self.network.reply(request, None, CoordinatorUnavailable("connection refused"))
            return
        life, service = self._life, self.service
        when_awake(life, lambda: self._serve(life, service, request))

    def _serve(self, life: Life, service: Coordinator, request: Request) -> None:
        body = dict(request.message)
        waits_s = float(body.get("timeout_s", 0.0)) if request.method in _POLLS else 0.0
        if waits_s:
            body["timeout_s"] = 0.0
        try:
            answer = self._call(life, service, request.method, body)
        except Killed:
            return
        except ArcError as error:
            self.network.reply(request, None, error)
            return
        is_pending = answer.get("kind") == "wait" or (
            request.method == "commit_status" and answer["status"] in ("pending", "committing", "unknown")
        )
        if waits_s and is_pending and service is self.service:
            self._parked.append((self.world.now_s + waits_s, self._seen_by(service, request), request))
        else:
            self.network.reply(request, answer)

    def _call(self, life: Life, service: Coordinator, method: str, body: dict[str, Any]) -> dict[str, Any]:
        job, saves = service.job, service.saves
        try:
            answer = service.call(method, body)
            life.check()
        finally:
            if life.alive and service is self.service and (service.job is not job or service.saves is not saves):
                if service.job is not job:
                    self._on_change(service)
                self._wake(life)
        return answer

    def _seen_by(self, service: Coordinator, request: Request) -> object:
        """What the answer to a long poll follows from, except the time."""
        if request.method == "directive":
            return service.job.phase, service.job.generation, request.rank in service.job.ready
        save = service.saves.find(request.message["step"], request.message["generation"])
        return None if save is None else (save.status, save.tier)

    def _wake(self, life: Life) -> None:
        """Long polls look again, all at once, a moment after something changed."""
        if not self._sweeping and self._parked:
            self._sweeping = True
            self.world.after(_WAKE_S, lambda: self._sweep(life))

    def _sweep(self, life: Life) -> None:
        self._sweeping = False
        when_awake(life, lambda: self._answer_parked(life))

    def _answer_parked(self, life: Life) -> None:
        service = self.service
        parked, self._parked = self._parked, []
        assert service is not None
        for until_s, seen, request in parked:
            left_s = until_s - self.world.now_s
            if left_s > 0 and seen == self._seen_by(service, request):
                self._parked.append((until_s, seen, request))  # nothing that it waits for has changed
                continue
            message = {**request.message, "timeout_s": max(0.0, left_s)}
            if life is self._life and life.alive:
                self._serve(life, service, dataclasses.replace(request, message=message))

    def _tick(self, life: Life) -> None:
        """What a long poll does by itself when a deadline of the rules passes."""
        if not life.alive or life is not self._life:
            return
        when_awake(life, lambda: self._pass_time(life))
        self._sweep(life)
        self.world.after(_TICK_S, lambda: self._tick(life))

    def _pass_time(self, life: Life) -> None:
        service = self.service
        if self._parked and service is not None and life is self._life:
            probe = {"rank": 0, "generation": service.job.generation, "timeout_s": 0.0}
            try:
                self._call(life, service, "directive", probe)
            except (ArcError, Killed):
                pass  # those that wait hear it

    def _commit(self, life: Life, url: str, step: int, generation: int, world_size: int, parts: Any, meta: Any) -> None:
        """The commit port: the real store on a simulated disk; other things happen before and after it."""
        self._let_others_run(life)
        disk = next(disk for disk in self.disks if url == f"sim://{disk.name}")
        store = Store(
            url,
            run="run",
            backend=SimBackend(disk, life),
            wall_clock=lambda: 1e9 + self.world.now_s - self.wall_behind_s,
            visible_timeout_s=0.0,
        )
        self.world.note(f"{life.name} writes the manifest of step {step} of generation {generation}")
        store.commit(step, generation, world_size, parts, meta)
        self._let_others_run(life)

    def _let_others_run(self, life: Life) -> None:
        if self._nested >= _MAX_NESTED:
            return
        self._nested += 1
        try:
            self.world.run_for(self.world.random.uniform(0.0, _COMMIT_S))
            while life.frozen and life.alive and self.world.step():
                pass
        finally:
            self._nested -= 1
        life.check()
