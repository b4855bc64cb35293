"""The training processes of a simulated job: ranks that step together, snapshot, certify, save, and die.

A generation's ranks form a group. A step needs them all; a rank that dies or hangs is noticed by its peers as by a
process group: by a broken connection at once, by a time-out later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from arc_dist.coordinator.client import Methods
from arc_dist.errors import ArcError, ExitCode
from arc_dist.protocol.sources import Holding
from arc_dist.testing import invariants, saving
from arc_dist.testing.disks import Disk
from arc_dist.testing.invariants import History, Ring, Truth
from arc_dist.testing.network import Network
from arc_dist.testing.world import Killed, Life, Script, Thread, Wait, World, when_awake

SNAPSHOT_EVERY = 2
SAVE_EVERY = 4
_RING_SLOTS = 4
_STEP_S = 0.05
_RESTORE_S = 0.02
_ECHO_S = 0.03
_HANG_S = 5.0
_RETRY_S = 0.1
_TELLS = 3


@dataclasses.dataclass(eq=False)
class Seat:
    """One life of a rank's place: its supervisor's identity and the memory that goes with it."""

    rank: int
    pid: int
    host: str
    life: Life
    is_noticed: bool = False  # the word that the job is told to go
    ring: Ring = dataclasses.field(default_factory=dict)

    @property
    def shm_dir(self) -> str:
        return f"/shm/{self.pid}"


class Job(Protocol):
    """What training needs of the job that it is part of."""

    world: World
    network: Network
    truth: Truth
    tiers: Sequence[Disk]
    world_size: int
    target_step: int
    keys: Mapping[int, int]
    seats: list[Seat]

    def slowness(self, rank: int) -> float: ...

    def acknowledged(self, tier: int, step: int, generation: int) -> None: ...


class Trainer:
    """One rank's training process of one generation; see `supervisors.TrainerHandle`."""

    def __init__(self, job: Job, seat: Seat, generation: int, plan: dict[str, Any], on_exit: Any) -> None:
        self.job = job
        self.seat = seat
        self.rank = seat.rank
        self.generation = generation
        self.plan = plan
        self.cause: dict[str, Any] | None = None
        self.history: History | None = None
        self.finished = False
        self.is_leaving = False
        self.life = Life(f"trainer {seat.rank}", on_end=lambda: self.exit(_killed(9)))
        self.client = Methods()
        self.saving = False
        self._told_to_end = False
        self._on_exit = on_exit

    @property
    def is_running(self) -> bool:
        return self.life.alive

    @property
    def last_step(self) -> int | None:
        return None if self.history is None else len(self.history)

    def exit(self, cause: dict[str, Any]) -> None:
        """The process is gone."""
        if self.cause is not None:
            return
        self.cause = cause
        self.life.alive = False
        if cause["kind"] != "finished" and not self._told_to_end:
            self.job.truth.num_losses += 1
        self.job.world.note(f"rank {self.rank} of generation {self.generation}: {_describe(cause)}")
        self.job.world.after(0.001, self._on_exit)

    def lose_peer(self) -> None:
        """A collective raised, and the script with it."""
        self.exit(_raised("PeerLost", "connection closed by peer", ExitCode.INFRASTRUCTURE))

    def kill(self) -> None:
        self.exit(_killed(9))

    def part(self, leaving: int) -> float:
        """Saves the last step and ends; seconds until that must be done."""
        self._told_to_end = True
        if self.is_leaving:
            return 10.0 if leaving else 0.0
        if self.life.frozen or not self.life.alive:
            return 0.0
        if self.history is not None and self.job.world.random.random() < 0.8:
            self.hold(parting=True)
        self.job.world.after(0.01, lambda: self.exit(_killed(15)))
        return 10.0

    def hold(self, *, parting: bool) -> None:
        """Takes a snapshot."""
        assert self.history is not None
        ring = self.seat.ring
        free = [slot for slot in range(_RING_SLOTS) if slot not in ring]
        slot = free[0] if free else min(ring, key=lambda slot: (ring[slot][0].step, slot))
        if parting:
            self.job.truth.certified.add(self.history)
        holding = Holding(
            step=len(self.history),
            slot=slot,
            generation=self.generation,
            parting=parting,
            replica_key=self.job.keys[self.rank],
        )
        ring[slot] = (holding, self.history)

    def certify(self) -> list[History]:
        """All ranks have done a step after these snapshots; returns what is now trusted."""
        assert self.history is not None
        ring, trusted = self.seat.ring, []
        for slot, (holding, history) in sorted(ring.items()):
            if not holding.certified and holding.generation == self.generation and holding.step < len(self.history):
                ring[slot] = (dataclasses.replace(holding, certified=True), history)
                trusted.append(history)
        return trusted

    def tell(self, method: str, body: dict[str, Any], *, thread: Thread | None = None) -> Script:
        """One message to the coordinator."""
        assert thread is not None
        return (yield from self.job.network.call(thread, self.client, self.rank, method, body))

    def tell_thrice(self, method: str, body: dict[str, Any], then: Any = None) -> None:
        """Tells the coordinator something, in the background; gives up after some attempts."""
        thread = Thread(self.job.world, self.life)

        def script() -> Script:
            for _ in range(_TELLS):
                try:
                    yield from self.tell(method, body, thread=thread)
                    if then is not None:
                        then()
                    return
                except ArcError:
                    yield Wait(lambda item: False, timeout_s=_RETRY_S)

        thread.start(script())

    def save(self, step: int, history: History, then: Callable[[bool], None] = lambda committed: None) -> None:
        """Writes and reports the shard, in the background; `then` is told whether it was committed."""
        thread = Thread(self.job.world, self.life)
        saver = saving.Saver(
            tiers=self.job.tiers,
            life=self.life,
            rank=self.rank,
            world_size=self.job.world_size,
            generation=self.generation,
            call=lambda method, body: self.tell(method, body, thread=thread),
            rng=self.job.world.random,
        )
        self.saving = True

        def ended(error: BaseException | None, tier: int | None) -> None:
            self.saving = False
            if error is not None:
                raise error
            if tier is not None:
                self.job.acknowledged(tier, step, self.generation)
            then(tier is not None)

        thread.start(saver.save(step, history), ended)

    def leave(self) -> None:
        """Saves the present state, which all ranks hold, and ends."""
        assert self.history is not None
        self.is_leaving = True
        self.job.truth.certified.add(self.history)
        step = len(self.history)
        self.save(step, self.history, lambda committed: self.exit(_left(saved=committed)))

    def flush(self) -> None:
        """Saves what memory holds of the planned step, and ends."""
        source = self.plan["sources"][str(self.rank)]
        holding, history = self.job.seats[source["rank"]].ring.get(source["slot"], (None, ()))
        if holding is None or holding.step != self.plan["step"]:
            self.exit(_left(saved=False))
            return
        self.history = history
        finished = {"kind": "finished"}
        self.save(len(history), history, lambda committed: self.exit(finished if committed else _left(saved=False)))


class Group:
    """The ranks of one generation."""

    def __init__(self, job: Job, generation: int) -> None:
        self.job = job
        self.generation = generation
        self.trainers: dict[int, Trainer] = {}
        self.is_broken = False
        self.is_flushing = False
        self._stalled_s = 0.0

    def add(self, trainer: Trainer) -> None:
        self.trainers[trainer.rank] = trainer
        if trainer.plan.get("flush"):
            self.is_flushing = True
            self.job.world.after(_RESTORE_S, lambda: when_awake(trainer.life, trainer.flush))
        elif len(self.trainers) == self.job.world_size:
            self.job.world.after(_RESTORE_S, self._begin)

    @property
    def all_there(self) -> bool:
        return len(self.trainers) == self.job.world_size and all(t.life.alive for t in self.trainers.values())

    def _begin(self) -> None:
        if self._is_stuck(self._begin):
            return
        plan = self.trainers[0].plan
        try:
            histories, found_step = self._restored(plan)
        except Killed:
            self._break()
            return
        if histories is None:
            for trainer in self.trainers.values():
                trainer.exit(_raised("InfrastructureError", "no whole state is left", ExitCode.INFRASTRUCTURE))
            return
        for rank, trainer in self.trainers.items():
            trainer.history = histories[rank]
            if self.job.world.random.random() < 0.5:  # else it does not come to clearing its memory
                ring = trainer.seat.ring
                for slot in [slot for slot, (_, held) in ring.items() if len(held) > len(histories[rank])]:
                    del ring[slot]
        self._introduce(plan, found_step)
        self.job.world.after(_STEP_S, self._step)

    def _introduce(self, plan: dict[str, Any], found_step: int | None) -> None:
        """Rank 0 tells what the stores hold, and when the ranks went on from another step than was planned."""
        first, truth = self.trainers[0], self.job.truth
        for disk in self.job.tiers:
            try:
                infos = saving.open_store(disk, first.life).steps()
            except ArcError:
                continue
            steps = [{"step": i.step, "generation": i.generation, "certified": i.certified} for i in infos]
            first.tell_thrice("hello_store", {"url": f"sim://{disk.name}", "committed": steps})
        if found_step is not None and found_step != plan["step"]:
            assert first.history is not None
            given_up = set(range(truth.next_token)) - set(first.history)
            body = {"rank": 0, "generation": self.generation, "step": found_step}
            first.tell_thrice("restored", body, lambda: truth.lost.update(given_up))

    def _restored(self, plan: dict[str, Any]) -> tuple[list[History] | None, int | None]:
        """Every rank's state, checked; and the step, or None for a fresh start."""
        if plan["tier"] == "memory":
            sources = [plan["sources"][str(rank)] for rank in range(self.job.world_size)]
            rings = [self.job.seats[source["rank"]].ring for source in sources]
            held = [ring.get(source["slot"]) for ring, source in zip(rings, sources, strict=True)]
            histories = [entry[1] for entry in held if entry is not None and entry[0].step == plan["step"]]
            if len(histories) == self.job.world_size:
                self._check(histories, f"step {plan['step']} in memory")
                return histories, plan["step"]
        reader = self.trainers[0].life
        world_size = self.job.world_size
        found, problems = saving.restore(self.job.tiers, reader, world_size, plan["poisoned"], plan["step"])
        for problem in problems:
            self.job.world.note(f"generation {self.generation} does not restore {problem}")
        if found is None:
            return (None, None) if plan["tier"] != "none" or problems else ([()] * world_size, None)
        written = self.job.truth.manifests[found.disk, found.directory]
        where = f"step {found.step} on {found.disk}"
        for rank in range(world_size):
            expected = written.histories[rank]
            invariants.s14_found_before_use(expected, found.histories[rank], where)
            invariants.s14_found_before_use((saving.weight(expected, rank),), (found.weights[rank],), where)
        self._check(list(found.histories), where)
        return list(found.histories), found.step

    def _check(self, histories: list[History], where: str) -> None:
        self.job.world.note(f"generation {self.generation} restores {where}")
        if len(set(histories)) != 1:
            raise invariants.Violation(f"S3: {where} is not one state on all ranks")
        invariants.s8_never_returns(self.job.truth, histories[0], where)
        invariants.s9_trusted(self.job.truth, histories[0], where)

    def _is_stuck(self, again: Any) -> bool:
        """True when not all ranks are there; then `again` is called later, or the group is given up."""
        if self.is_broken or not self.all_there:
            self._break()
            return True
        frozen = [trainer for trainer in self.trainers.values() if trainer.life.frozen]
        if not frozen:
            self._stalled_s = 0.0
            return False
        self._stalled_s += _STEP_S
        if self._stalled_s > _HANG_S:
            self._break()
        else:
            self.job.world.after(_STEP_S, again)
        return True

    def _break(self) -> None:
        """The survivors see that a peer is gone."""
        if self.is_broken:
            return
        self.is_broken = True
        for trainer in self.trainers.values():
            delay_s = self.job.world.random.uniform(0.0, _ECHO_S)
            self.job.world.after(delay_s, lambda trainer=trainer: when_awake(trainer.life, trainer.lose_peer))

    def _step(self) -> None:
        trainers = list(self.trainers.values())
        if self._is_stuck(self._step):
            if self.is_broken:
                self._step_in_flight()
            return
        history = trainers[0].history
        assert history is not None
        if len(history) >= self.job.target_step:
            if not any(trainer.saving for trainer in trainers):
                self._finish()
            else:
                self.job.world.after(_STEP_S, self._step)
            return
        history = (*history, self.job.truth.new_token())
        for trainer in trainers:
            trainer.history = history
        trusted = [trainer.certify() for trainer in trainers]
        for certified in trusted[0]:
            self.job.truth.certified.add(certified)
        newest = {certified[-1] if certified else None for certified in trusted}
        state = newest.pop() if len(newest) == 1 else None
        if state is not None and len(state) % SAVE_EVERY == 0 and not any(trainer.saving for trainer in trainers):
            for trainer in trainers:
                trainer.save(len(state), state)
        if any(trainer.seat.is_noticed for trainer in trainers) and len(history) < self.job.target_step:
            self._leave()
            return
        if len(history) % SNAPSHOT_EVERY == 0:
            for trainer in trainers:
                trainer.hold(parting=False)
        slowness = max(self.job.slowness(trainer.rank) for trainer in trainers)
        self.job.world.after(_STEP_S * slowness, self._step)

    def _leave(self) -> None:
        """All ranks have agreed to go after this step; a save that is under way comes first."""
        if self._is_stuck(self._leave):
            return
        if any(trainer.saving for trainer in self.trainers.values()):
            self.job.world.after(_STEP_S, self._leave)
            return
        for trainer in self.trainers.values():
            trainer.leave()

    def _step_in_flight(self) -> None:
        """A peer died after the vote of a step: some of the others have committed it, and some have not."""
        alive = [t for t in self.trainers.values() if t.life.alive and not t.life.frozen and t.history is not None]
        rng = self.job.world.random
        if not alive or rng.random() < 0.5:
            return
        history = alive[0].history
        assert history is not None
        if len(history) < self.job.target_step:
            history = (*history, self.job.truth.new_token())
            for trainer in rng.sample(alive, rng.randint(1, len(alive))):
                trainer.history = history

    def _finish(self) -> None:
        for trainer in self.trainers.values():
            delay_s = self.job.world.random.uniform(0.0, _STEP_S)
            self.job.world.after(delay_s, lambda trainer=trainer: trainer.exit({"kind": "finished"}))
            trainer.finished = True

    def go_back(self) -> bool:
        """A fault of the past is found: all ranks go back in memory, and say what is bad. False when they cannot."""
        trainers = list(self.trainers.values())
        if self.is_broken or self.is_flushing or not self.all_there:
            return False
        if any(t.history is None or t.finished or t.is_leaving for t in trainers):
            return False
        now = trainers[0].history
        assert now is not None
        held = [{h for holding, h in t.seat.ring.values() if holding.certified} for t in trainers]
        common = sorted(h for h in set.intersection(*held) if len(h) < len(now) and now[: len(h)] == h)
        if not common:
            return False
        target = self.job.world.random.choice(common)
        bad = set(now[len(target) :])
        for trainer in trainers:
            trainer.history = target
            ring = trainer.seat.ring
            for slot in [slot for slot, (_, history) in ring.items() if bad & set(history)]:
                del ring[slot]
        body = {"from_step": len(target) + 1, "to_step": len(now), "generation": self.generation}
        trainers[0].tell_thrice("poison", body, lambda: self.job.truth.poisoned.update(bad))
        return True


def _killed(number: int) -> dict[str, Any]:
    return {"kind": "signal", "signal": number, "exit_code": None, "exception": None}


def _raised(kind: str, message: str, code: int) -> dict[str, Any]:
    return {"kind": "exception", "exit_code": int(code), "exception": {"type": kind, "message": message}}


def _left(*, saved: bool) -> dict[str, Any]:
    if saved:
        return _raised("Preempted", "it is committed", ExitCode.PREEMPTED)
    return _raised("PreemptedUnsaved", "it is not saved", ExitCode.INFRASTRUCTURE)


def _describe(cause: dict[str, Any]) -> str:
    if cause["kind"] == "finished":
        return "finished"
    return f"signal {cause['signal']}" if cause["kind"] == "signal" else str(cause["exception"]["type"])
