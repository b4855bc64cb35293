"""Does to a simulated job what `faults` lists, and counts how often each kind really happened."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from arc_dist.protocol.job import Job as JobState
from arc_dist.protocol.job import Phase
from arc_dist.testing.disks import Disk
from arc_dist.testing.faults import Fault, Kind
from arc_dist.testing.world import Life

if TYPE_CHECKING:
    from arc_dist.testing.job import SimJob

_FLAP_S = 0.2


class Injector:
    """Applies faults at their times.

    Attributes:
        slow: how many times slower a rank steps.
        fired: how often each kind of fault has met something that it could hurt.
        quiet_from_s: when the last fault of all, as far as they are known, will be over.
    """

    def __init__(self, job: SimJob) -> None:
        self.job = job
        self.slow: dict[int, float] = {}
        self.fired: collections.Counter[str] = collections.Counter()
        self.in_recovery = 0
        self.quiet_from_s = 0.0
        self._armed: list[Fault] = []
        self._is_recovering = False
        self._apply: dict[Kind, Callable[[Fault], bool]] = {
            kind: getattr(self, f"_{kind.value.replace('-', '_')}") for kind in Kind
        }

    def schedule(self, faults: Iterable[Fault]) -> None:
        """Lets all of them happen."""
        for fault in faults:
            self.quiet_from_s = max(self.quiet_from_s, fault.at_s + fault.amount)
            self.job.world.after(max(0.0, fault.at_s - self.job.world.now_s), lambda fault=fault: self._due(fault))

    def phase_changed(self, state: JobState) -> None:
        """The coordinator's job is in another phase; faults that wait for a recovery begin with it."""
        starting = state.phase is Phase.STARTING and state.generation > state.first
        self._is_recovering = state.phase is Phase.ENDING or starting
        if self._is_recovering and self._armed:
            armed, self._armed = self._armed, []
            for fault in armed:
                self.quiet_from_s = max(self.quiet_from_s, self.job.world.now_s + fault.amount)
                delay_s = self.job.world.random.uniform(0.0, 0.05)
                self.job.world.after(delay_s, lambda fault=fault: self._do(fault))

    def _due(self, fault: Fault) -> None:
        if fault.in_recovery and not self._is_recovering:
            self._armed.append(fault)
        else:
            self._do(fault)

    def _do(self, fault: Fault) -> None:
        job = self.job.host.job
        if job is not None and job.phase.is_over:
            return
        if self._apply[fault.kind](fault):
            self.job.world.note(f"fault: {dataclasses.replace(fault, at_s=self.job.world.now_s, in_recovery=False)}")
            self.fired[fault.kind.value] += 1
            self.in_recovery += self._is_recovering

    def totals(self) -> collections.Counter[str]:
        """How often each kind did something: at once, or, for those that lie in wait, when they were met."""
        met = collections.Counter(self.fired)
        for counter in (self.job.network.met, *(disk.met for disk in self.job.disks)):
            met.update(counter)
        return met

    # ---- processes

    def _crash_rank(self, fault: Fault) -> bool:
        supervisor = self.job.supervisors.get(fault.target)
        if supervisor is None or supervisor.trainer is None or supervisor.trainer.cause is not None:
            return False
        supervisor.trainer.kill()
        return True

    def _freeze_rank(self, fault: Fault) -> bool:
        for group in self.job.groups.values():
            trainer = group.trainers.get(fault.target)
            if trainer is not None and trainer.life.alive:
                return self._freeze(trainer.life, fault.amount)
        return False

    def _slow_rank(self, fault: Fault) -> bool:
        self.slow[fault.target] = 5.0

        def hurry() -> None:
            self.slow.pop(fault.target, None)

        self.job.world.after(fault.amount, hurry)
        return True

    def _crash_supervisor(self, fault: Fault) -> bool:
        return self.job.crash_supervisor(fault.target)

    def _freeze_supervisor(self, fault: Fault) -> bool:
        return self._freeze(self.job.seats[fault.target].life, fault.amount)

    def _on_node(self, fault: Fault) -> list[int]:
        per_node = self.job.options.ranks_per_node
        return [rank for rank in range(self.job.world_size) if rank // per_node == fault.target]

    def _crash_node(self, fault: Fault) -> bool:
        crashed = [self.job.crash_supervisor(rank) for rank in self._on_node(fault)]
        if fault.target == 0:
            self.job.host.crash(1.0)
        return any(crashed)

    def _freeze_node(self, fault: Fault) -> bool:
        lives = [self.job.seats[rank].life for rank in self._on_node(fault)]
        lives += [
            trainer.life
            for group in self.job.groups.values()
            for rank, trainer in group.trainers.items()
            if rank in self._on_node(fault) and trainer.life.alive
        ]
        frozen = [life for life in lives if self._freeze(life, fault.amount)]
        return bool(frozen)

    def _freeze(self, life: Life, duration_s: float) -> bool:
        if not life.alive or life.frozen:
            return False
        life.frozen = True
        self.job.world.after(duration_s, life.thaw)
        return True

    def _crash_coordinator(self, fault: Fault) -> bool:
        if self.job.host.job is None:
            return False
        self.job.host.crash(fault.amount)
        return True

    def _freeze_coordinator(self, fault: Fault) -> bool:
        self.job.host.freeze(fault.amount)
        return True

    def _replace_coordinator(self, fault: Fault) -> bool:
        if self.job.host.job is None:
            return False
        self.job.host.replace(fault.amount)
        return True

    # ---- messages

    def _lose(self, fault: Fault) -> bool:
        self.job.network.to_lose[fault.target] += int(fault.amount)
        return False  # counted when a message is met

    def _lose_reply(self, fault: Fault) -> bool:
        self.job.network.replies_to_lose[fault.target] += int(fault.amount)
        return False

    def _delay(self, fault: Fault) -> bool:
        self.job.network.to_delay[fault.target] = fault.amount
        return False

    def _duplicate(self, fault: Fault) -> bool:
        self.job.network.to_double[fault.target] += int(fault.amount)
        return False

    def _partition(self, fault: Fault) -> bool:
        network = self.job.network
        self._cut(fault, (network.unheard, network.deaf), fault.amount)
        return True

    def _partition_one_way(self, fault: Fault) -> bool:
        self._cut(fault, (self.job.network.unheard,), fault.amount)
        return True

    def _flap(self, fault: Fault) -> bool:
        network = self.job.network
        for number in range(max(1, int(fault.amount / (2 * _FLAP_S)))):
            self.job.world.after(
                2 * number * _FLAP_S, lambda: self._cut(fault, (network.unheard, network.deaf), _FLAP_S)
            )
        return True

    def _cut(self, fault: Fault, directions: Iterable[collections.Counter[int]], duration_s: float) -> None:
        for direction in directions:
            direction[fault.target] += 1
            self.job.world.after(duration_s, lambda direction=direction: direction.subtract({fault.target: 1}))

    # ---- clocks and disks

    def _jump_clock(self, fault: Fault) -> bool:
        self.job.host.clock_ahead_s += fault.amount
        return True

    def _jump_wall_clock(self, fault: Fault) -> bool:
        self.job.host.wall_behind_s += 1000.0 * fault.amount
        return True

    def _disk(self, fault: Fault) -> Disk:
        return self.job.disks[fault.target]

    def _disk_full(self, fault: Fault) -> bool:
        disk = self._disk(fault)
        disk.full = True

        def free() -> None:
            disk.full = False

        self.job.world.after(fault.amount, free)
        return False  # counted when a write is met, like those below

    def _disk_eio(self, fault: Fault) -> bool:
        self._disk(fault).broken += int(fault.amount)
        return False

    def _lost_answer(self, fault: Fault) -> bool:
        self._disk(fault).lost_answers += int(fault.amount)
        return False

    def _lost_write(self, fault: Fault) -> bool:
        self._disk(fault).lost_writes += int(fault.amount)
        return False

    def _torn_write(self, fault: Fault) -> bool:
        self._disk(fault).kills_writer = True
        return False

    def _bit_flip(self, fault: Fault) -> bool:
        disk, rng = self._disk(fault), self.job.world.random
        files = disk.files("run")
        if not files:
            return False
        disk.flip(rng.choice(files), rng.randrange(1 << 16))
        return False

    # ---- training

    def _corrupt_state(self, fault: Fault) -> bool:
        state = self.job.host.job
        group = self.job.groups.get(state.generation) if state is not None else None
        return group is not None and group.go_back()

    def _preempt(self, fault: Fault) -> bool:
        supervisor = self.job.supervisors.get(fault.target)
        if supervisor is None or not supervisor.life.alive:
            return False
        supervisor.preempt()
        return True
