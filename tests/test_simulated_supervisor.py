"""The simulator's model of a supervisor says to the coordinator what the real supervisor says, in the same order."""

from __future__ import annotations

import dataclasses
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from arc_dist.errors import ArcError, CoordinatorUnavailable
from arc_dist.supervisor import wire
from arc_dist.supervisor.roles import Setup
from arc_dist.supervisor.supervisor import Supervisor
from arc_dist.supervisor.trainers import Trainers
from arc_dist.supervisor.zygote import ZygoteProcess
from arc_dist.testing import supervisors
from arc_dist.testing.network import Network, Request
from arc_dist.testing.world import Life, World

RUN, LEAVE, END, STOP, DONE = "run", "leave", "end", "stop", "done"
KILLED = -9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What happens around one supervisor.

    Attributes:
        orders: (kind, generation) given one after the other, each when the supervisor asks, and not before it has said
            as much as the number in front.
        fates: how each trainer ends by itself: its exit status, or None when it lives until it is killed.
        refused: how many of its first messages meet no coordinator.
    """

    orders: tuple[tuple[int, str, int], ...]
    fates: tuple[int | None, ...]
    refused: int = 0


SCENES = {
    "finished": Scene(orders=((1, RUN, 0), (2, DONE, 0)), fates=(0,)),
    "killed, and again": Scene(
        orders=((1, RUN, 0), (2, END, 0), (3, RUN, 1), (4, END, 1), (5, RUN, 2), (6, DONE, 2)),
        fates=(KILLED, KILLED, 0),
    ),
    "ended because of another": Scene(orders=((1, RUN, 0), (1, END, 0), (2, RUN, 1), (2, STOP, 1)), fates=(None, None)),
    "asked to be ready again": Scene(orders=((1, END, 2), (2, RUN, 3), (3, DONE, 3)), fates=(0,)),
    "finished, and started again": Scene(orders=((1, RUN, 0), (2, END, 0), (3, RUN, 1), (4, DONE, 1)), fates=(0, 0)),
    "told to leave, and ended because of another": Scene(
        orders=((1, RUN, 0), (1, LEAVE, 0), (1, END, 0), (2, RUN, 1), (4, STOP, 1)), fates=(None, KILLED)
    ),
    "the coordinator comes late": Scene(orders=((1, RUN, 0), (2, STOP, 0)), fates=(KILLED,), refused=3),
}


class Heard:
    """A coordinator that follows a scene. What it heard: (method, generation, what matters of the rest)."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.said: list[tuple[Any, ...]] = []
        self.asked: list[tuple[int, str]] = []
        self._refused = 0
        self._given = 0

    def tell(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        if self._refused < self.scene.refused:
            self._refused += 1
            raise CoordinatorUnavailable("not there yet")
        rest = (body["cause"]["kind"], body["cause"].get("signal")) if method == "died" else ()
        self.said.append((method, body.get("generation"), *rest))
        return {"phase": "any", "generation": 0}

    def order(self, generation: int, after: str) -> dict[str, Any] | None:
        """The next order, or None when it is not time for it."""
        if not self.asked or self.asked[-1] != (generation, after):
            self.asked.append((generation, after))
        needed, kind, about = self.scene.orders[self._given]
        if len(self.said) < needed or after == kind:
            return None
        if needed == len(self.said) and kind in (END, STOP) and after not in (RUN, LEAVE) and self._given:
            return None  # what ends a running generation is for one who runs it
        self._given += 1
        plan = {"version": 1, "generation": about, "step": None, "tier": "none"}
        return {"kind": kind, "generation": about, "reason": "the scene", "exit_code": 76, "plan": plan, "store": None}


class RealClient:
    """Answers the real supervisor from its two threads."""

    def __init__(self, heard: Heard) -> None:
        self._heard = heard
        self._lock = threading.Condition()

    def _tell(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._lock.notify_all()
            return self._heard.tell(method, body)

    def ready(self, **body: Any) -> dict[str, Any]:
        return self._tell("ready", body)

    def died(self, **body: Any) -> dict[str, Any]:
        return self._tell("died", body)

    def finished(self, **body: Any) -> dict[str, Any]:
        return self._tell("finished", body)

    def progress(self, **body: Any) -> dict[str, Any]:
        return {}  # of scripts that count no steps of ours; not modelled

    def preempt(self, *, rank: int) -> dict[str, Any]:
        return self._tell("preempt", {"rank": rank})

    def watched(self, *, rank: int, generation: int, report: dict[str, Any]) -> dict[str, Any]:
        return {}  # of what may hang; not modelled

    def report(self, **body: Any) -> dict[str, Any]:
        return {}  # for people; not modelled

    def incident(self, **line: Any) -> dict[str, Any]:
        return {}

    def directive(self, *, rank: int, generation: int, timeout_s: float, after: str) -> dict[str, Any]:
        with self._lock:
            while True:
                order = self._heard.order(generation, after)
                if order is not None:
                    return order
                self._lock.wait(0.02)


class FakeZygote:
    """The other end of the zygote's socket: trainers that end as the scene says."""

    def __init__(self, fates: tuple[int | None, ...]) -> None:
        self.ours, theirs = socket.socketpair()
        self.process = ZygoteProcess(pid=os.getpid(), ticks=0, sock=theirs)
        self._fates = list(fates)
        self._pid = 1000
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.ours.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(10)
        self.ours.close()

    def _serve(self) -> None:
        wire.send(self.ours, {"event": "ready"})
        while (message := wire.receive(self.ours)) is not None:
            if message["command"] == "fork":
                self._pid += 1
                wire.send(self.ours, {"event": "forked", "pid": self._pid, "ticks": 0, "at": time.monotonic()})
                fate = self._fates.pop(0)
                if fate is not None:
                    self._exit(fate)
            elif message["command"] == "kill":
                self._exit(KILLED)

    def _exit(self, status: int) -> None:
        wire.send(self.ours, {"event": "exited", "pid": self._pid, "status": status, "at": time.monotonic()})
        wire.send(self.ours, {"event": "clean", "pid": self._pid})


def real(scene: Scene, tmp_path: Path) -> tuple[Heard, int]:
    heard = Heard(scene)
    zygote = FakeZygote(scene.fates)
    setup = Setup(
        rank=0,
        host="host",
        shm_dir=tmp_path,
        environ={},
        store_for=None,
        generation_began=lambda generation: None,
        uses_store=False,
        grace_s=3600.0,
        preempt_signals=(15,),
        is_guarded=True,
    )
    events: queue.SimpleQueue = queue.SimpleQueue()
    try:
        ending = Supervisor(setup, RealClient(heard), Trainers(0, tmp_path, zygote.process, events), events).run(0)
    finally:
        zygote.close()
    return heard, ending.returncode


class ModelTrainer:
    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.cause: dict[str, Any] | None = None
        self.last_step = None
        self.is_leaving = False
        self.exited = lambda: None

    def end(self, status: int) -> None:
        if self.cause is None:
            self.cause = {"kind": "finished"} if status == 0 else {"kind": "signal", "signal": -status}
            self.exited()

    def part(self, leaving: int) -> float:
        return 0.0

    def kill(self) -> None:
        self.end(KILLED)


class ModelBody:
    host, pid, shm_dir = "host", 1, "/shm"

    def __init__(self, world: World, scene: Scene) -> None:
        self._world = world
        self._fates = list(scene.fates)
        self.exited = lambda: None
        self.is_noticed = False

    def raise_notice(self) -> None:
        self.is_noticed = True

    def inventory(self) -> list[dict[str, Any]]:
        return []

    def fork(self, generation: int, directive: dict[str, Any]) -> ModelTrainer:
        trainer = ModelTrainer(generation)
        trainer.exited = self.exited
        fate = self._fates.pop(0)
        if fate is not None:
            self._world.after(0.001, lambda: trainer.end(fate))
        return trainer


class ModelHost:
    """Where the model's messages arrive."""

    def __init__(self, world: World, network: Network, heard: Heard) -> None:
        self._world = world
        self._network = network
        self._heard = heard

    def receive(self, request: Request) -> None:
        body = dict(request.message)
        if request.method == "join":
            self._network.reply(request, {"generation": 0, "sender": "s", "epoch": 1})
        elif request.method == "directive":
            order = self._heard.order(body["generation"], body["after"])
            if order is None:
                self._world.after(0.02, lambda: self.receive(request))
            else:
                self._network.reply(request, {**order, "epoch": 1})
        else:
            try:
                self._network.reply(request, {**self._heard.tell(request.method, body), "epoch": 1})
            except ArcError as error:
                self._network.reply(request, None, error)


def model(scene: Scene) -> tuple[Heard, int]:
    world, heard, ended = World(1), Heard(scene), []
    network = Network(world)
    network.host = ModelHost(world, network, heard)  # type: ignore[assignment]
    body = ModelBody(world, scene)
    life = Life("supervisor")
    supervisor = supervisors.Supervisor(world, network, 0, 1, body, life, lambda error, code: ended.append(code))
    body.exited = lambda: supervisor.thread.deliver(supervisors.Exited())
    supervisor.start()
    for _ in range(10_000):
        if ended:
            break
        assert world.step()
    return heard, ended[0]


@pytest.mark.parametrize("name", SCENES)
def test_the_model_says_what_the_real_supervisor_says(name: str, tmp_path: Path):
    theirs, their_code = real(SCENES[name], tmp_path)
    ours, our_code = model(SCENES[name])
    assert theirs.said == ours.said
    assert len(theirs.said) >= len(SCENES[name].fates)
    assert theirs.asked == ours.asked
    assert their_code == our_code
