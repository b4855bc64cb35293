"""A simulated job: nodes, supervisors, training, disks, a coordinator, and the checks after everything that happens."""

from __future__ import annotations

import collections
import dataclasses
import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from arc_dist.checkpoint_store.format import MANIFEST_NAME, objects_name
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ArcError, ExitCode, StoreError
from arc_dist.protocol.commit import CommitStatus
from arc_dist.protocol.job import Job as JobState
from arc_dist.protocol.job import Phase, durable
from arc_dist.protocol.pick import Tier
from arc_dist.testing import invariants, saving
from arc_dist.testing.disks import Disk
from arc_dist.testing.injector import Injector
from arc_dist.testing.invariants import Manifested, Truth
from arc_dist.testing.network import CoordinatorHost, Network
from arc_dist.testing.supervisors import Exited, Supervisor
from arc_dist.testing.training import Group, Seat, Trainer
from arc_dist.testing.world import Life, Violation, World

_LAUNCH_S = 0.2
_RELAUNCH_S = 1.0
_LIMIT_S = 3000.0  # of simulated time after the last fault: more than all time-outs that can follow each other
_MAX_EVENTS_PER_RANK = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is played.

    Attributes:
        num_ranks: ranks of the job.
        ranks_per_node: how many share a host.
        shards: different parts of the state that there are, where replicas can stand in for each other: 1 for DDP, more
            for HSDP; 0 for FSDP, where they cannot.
        target_step: the job is done with it.
        num_faults: how many are drawn, where none are given.
        horizon_s: faults are drawn from the start to this time.
        max_fruitless: see `protocol.budgets`.
    """

    num_ranks: int = 4
    ranks_per_node: int = 2
    shards: int = 0
    target_step: int = 14
    num_faults: int = 8
    horizon_s: float = 1.0
    max_fruitless: int = 25

    @property
    def num_nodes(self) -> int:
        return -(-self.num_ranks // self.ranks_per_node)


class SimJob:
    """One job; `play` plays it to its end and raises `Violation` when an invariant breaks."""

    def __init__(self, world: World, options: Options) -> None:
        self.world = world
        self.options = options
        self.world_size = options.num_ranks
        self.target_step = options.target_step
        self.keys: Mapping[int, int] = {
            rank: 1 + rank % options.shards if options.shards else 0 for rank in range(options.num_ranks)
        }
        hosts = {rank: f"node{rank // options.ranks_per_node}" for rank in range(options.num_ranks)}
        self.truth = Truth(world_size=options.num_ranks, keys=self.keys, hosts=hosts)
        self.network = Network(world)
        self.disks = [Disk("fast"), Disk("slow"), Disk("journal")]
        self.tiers: Sequence[Disk] = self.disks[:2]
        for disk in self.tiers:
            disk.tree[saving.RUN] = {}
            disk.on_publish = lambda path, data, disk=disk: self._published(disk, path, data)
        self.groups: dict[int, Group] = {}
        self.seats: list[Seat] = []
        self.supervisors: dict[int, Supervisor] = {}
        self.ended: dict[int, int] = {}
        self.acknowledgements: dict[tuple[int, int, int], Manifested] = {}
        self._written: dict[tuple[str, str], tuple[int, ...]] = {}  # states of shards, whatever the disk did to them
        self._num_pids = 0
        self._seen: JobState | None = None
        self._done = 0
        self._committing: frozenset[tuple[int, int]] = frozenset()
        self.counts: collections.Counter[str] = collections.Counter()
        settings = {
            "world_size": options.num_ranks,
            "job_id": "sim",
            "max_restarts": 100_000,
            "max_fruitless": options.max_fruitless,
        }
        self.host = CoordinatorHost(world, self.network, self.disks, settings, self._changed)
        self.network.host = self.host
        self.injector = Injector(self)
        for rank in range(options.num_ranks):
            self.seats.append(self._new_seat(rank))
        for rank in range(options.num_ranks):
            world.after(world.random.uniform(0.0, _LAUNCH_S), lambda rank=rank: self.launch(rank))

    # ---- the play

    def play(self) -> None:
        """Until every supervisor has ended."""
        last_fault_s = 0.0
        max_events = _MAX_EVENTS_PER_RANK * self.options.num_ranks
        while len(self.ended) < self.world_size:
            if not self.world.step():
                raise Violation("liveness: nothing will ever happen again")
            last_fault_s = max(last_fault_s, self.injector.quiet_from_s)
            if self.world.now_s > last_fault_s + _LIMIT_S or self.world.num_events > max_events:
                raise Violation(f"liveness: the job goes on {_LIMIT_S:.0f} s after the last fault: {self._where()}")
        self._check_end()

    def _where(self) -> str:
        job = self.host.job
        return "no coordinator" if job is None else f"{job.phase.value} {job.generation}, ready {sorted(job.ready)}"

    def slowness(self, rank: int) -> float:
        return self.injector.slow.get(rank, 1.0)

    # ---- processes

    def _new_seat(self, rank: int) -> Seat:
        self._num_pids += 1
        seat = Seat(rank=rank, pid=self._num_pids, host=self.truth.hosts[rank], life=Life(f"supervisor {rank}"))
        self.truth.rings[rank] = seat.ring
        return seat

    def launch(self, rank: int) -> None:
        """The launcher starts the rank's supervisor."""
        seat = self.seats[rank]
        supervisor = Supervisor(
            self.world,
            self.network,
            rank,
            self.world_size,
            _Body(self, seat),
            seat.life,
            lambda error, code: self._supervisor_ended(seat, error, code),
        )
        self.supervisors[rank] = supervisor
        self.world.note(f"supervisor {seat.pid} of rank {rank} starts")
        supervisor.start()

    def relaunch(self, rank: int, delay_s: float) -> None:
        """The launcher replaces a supervisor that is gone, with new memory."""
        self.seats[rank] = self._new_seat(rank)
        self.world.after(delay_s, lambda: self.launch(rank))

    def crash_supervisor(self, rank: int) -> bool:
        """A supervisor dies, and its trainer with it; False when there is none."""
        seat, supervisor = self.seats[rank], self.supervisors.get(rank)
        if rank in self.ended or supervisor is None or supervisor.life is not seat.life or not seat.life.alive:
            return False
        self.truth.num_losses += 1
        seat.life.alive = False
        trainer = supervisor.trainer
        if trainer is not None:
            trainer.kill()
        self.relaunch(rank, self.world.random.uniform(0.1, 2.0))
        return True

    def _supervisor_ended(self, seat: Seat, error: ArcError | None, code: int | None) -> None:
        rank = seat.rank
        if error is None:
            assert code is not None
            self.world.note(f"supervisor of rank {rank} ends with {code}")
            self.ended[rank] = code
            return
        self.world.note(f"supervisor of rank {rank} fails: {type(error).__name__}")
        self.truth.num_losses += 1
        if seat is self.seats[rank]:  # else its launcher has started another
            self.relaunch(rank, _RELAUNCH_S)

    def fork(self, seat: Seat, generation: int, directive: dict[str, Any]) -> Trainer:
        """A supervisor starts a training process."""
        rank, plan = seat.rank, directive["plan"]
        if not self.truth.excused:
            invariants.s1_acts_on_it(self.truth, rank, generation, plan)
        invariants.s13_one_process(self.truth, rank, generation)
        if not self.truth.excused:
            invariants.s13_one_for_ever(self.truth, rank, generation)
        supervisor = self.supervisors[rank]
        trainer = Trainer(self, seat, generation, plan, lambda: supervisor.thread.deliver(Exited()))
        self.truth.processes[rank] = trainer
        group = self.groups.get(generation)
        if group is None or (rank in group.trainers and self.truth.excused):
            group = self.groups[generation] = Group(self, generation)
        group.add(trainer)
        return trainer

    # ---- what is checked when something changed

    def _changed(self, service: Coordinator) -> None:
        before, job = self._seen, service.job
        self._seen = job
        if self.host.forgot:
            self.truth.excused = True
        if before is None or before.phase is not job.phase or before.generation != job.generation:
            self.world.note(f"{job.phase.value} {job.generation}")
            self.injector.phase_changed(job)
            self._phase_changed(service, job, service.call("status", {})["journal_error"])
        self._check_commits(service)

    def _phase_changed(self, service: Coordinator, job: JobState, error: str | None) -> None:
        truth = self.truth
        if job.phase is Phase.RUNNING:
            assert job.plan is not None
            if job.generation not in truth.plans or truth.plans[job.generation] != job.plan:
                self._check_plan(job)
            if job.flushing:
                truth.flushing.add(job.generation)
            self._check_journal(service, error)
        elif job.phase is Phase.ENDING:
            if not truth.excused:
                invariants.s2_no_end_without_a_loss(truth, job.generation)
            truth.losses_before[job.generation + 1] = truth.num_losses
            self._check_journal(service, error)
        elif job.phase is Phase.STOPPED and job.stop is not None and job.stop.exit_code == ExitCode.PREEMPTED:
            self.counts["flush"] += job.flushing
            if not truth.excused:
                invariants.s6_saved_before_the_end(truth, job.known)
        elif job.phase is Phase.DONE:
            self._done = job.generation
            group = self.groups.get(job.generation)
            finished = 0 if group is None else sum(trainer.finished for trainer in group.trainers.values())
            invariants.s1_done_is_done(finished, self.world_size, job.phase)

    def _check_journal(self, service: Coordinator, error: str | None) -> None:
        """What was just decided is in the journal, or its absence is shown."""
        lines = bytes(self.disks[-1].journals["journal.log"]).split(b"\n")
        last = json.loads(next(line for line in reversed(lines) if line).partition(b" ")[2])
        state, wanted = last["state"] or {}, json.loads(json.dumps(durable(service.job)))
        is_behind = any(state.get(key) != wanted[key] for key in ("phase", "generation", "plan", "deaths", "poison"))
        invariants.s15_announced(is_behind, error)

    def _check_plan(self, job: JobState) -> None:
        truth, plan = self.truth, job.plan
        assert plan is not None
        invariants.s1_one_decision(truth, plan)
        invariants.s13_nobody_runs(truth, plan.generation)
        self.counts[f"plan {plan.tier.value}"] += 1
        self.world.note(f"generation {plan.generation} is to restore step {plan.step} from {plan.tier.value}")
        history = invariants.s3_whole(truth, plan)
        if history is None:
            if plan.tier is Tier.NONE and not truth.excused:
                invariants.s4_newest(truth, job.known, plan, self._newest_in_stores())
            return
        where = f"step {plan.step} of {plan.tier.value}"
        invariants.s8_never_returns(truth, history, where)
        invariants.s9_trusted(truth, history, where)
        if not truth.excused:
            invariants.s4_newest(truth, job.known, plan, history)
        truth.lost |= set(range(truth.next_token)) - set(history)

    def _newest_in_stores(self) -> tuple[int, ...]:
        return max((entry.histories[0] for entry in self.truth.manifests.values()), key=len, default=())

    def _check_commits(self, service: Coordinator) -> None:
        saves = service.saves
        committing = frozenset(k for k, save in saves.saves.items() if save.status is CommitStatus.COMMITTING)
        for step, generation in sorted(committing - self._committing):
            save = saves.saves[step, generation]
            if len(save.parts) != self.world_size:
                raise Violation(f"S5: step {step} is being committed with {len(save.parts)} shards")
        self._committing = committing

    def _published(self, disk: Disk, path: str, data: bytes) -> None:
        """A file got its name; if it is a manifest, a checkpoint has come to exist."""
        if "/rank-" in path and path.endswith(".json"):
            self._written[disk.name, path] = tuple(json.loads(data)["objects"]["history"])
        if posixpath.basename(path) != MANIFEST_NAME:
            return
        fields, directory = json.loads(data), posixpath.dirname(path)
        names = disk.tree[directory]
        files = [row["name"] for row in fields["files"]]
        missing = [name for name in files if names.get(name) is None]
        histories: list[tuple[int, ...]] = []
        for rank in range(self.world_size):
            name = objects_name(rank)
            if name in names:
                histories.append(self._written[disk.name, f"{directory}/{name}"])
        entry = Manifested(
            disk=disk.name,
            directory=posixpath.basename(directory),
            step=fields["step"],
            generation=fields["generation"],
            certified=fields["certified"],
            histories=tuple(histories),
        )
        self.world.note(f"committed: step {entry.step} of generation {entry.generation} on {disk.name}")
        self.counts["commit"] += 1
        invariants.s5_manifest_implies_shards(entry, self.world_size, missing)
        invariants.s7_fenced(self.truth, entry)
        self.truth.manifests[disk.name, entry.directory] = entry

    def acknowledged(self, tier: int, step: int, generation: int) -> None:
        """A rank was told that a step is committed."""
        disk = self.tiers[tier]
        found = [
            entry
            for entry in self.truth.manifests.values()
            if (entry.disk, entry.step, entry.generation) == (disk.name, step, generation)
        ]
        if not found:
            raise Violation(f"S6: step {step} of generation {generation} is called committed, and {disk.name} lacks it")
        self.acknowledgements[tier, step, generation] = found[-1]

    def _check_end(self) -> None:
        newest = {tier: key for key in sorted(self.acknowledgements) for tier in [key[0]]}
        for key, entry in sorted(self.acknowledgements.items()):
            disk = self.tiers[key[0]]
            path = f"{saving.RUN}/{entry.directory}"
            invariants.s6_kept(self.truth, entry, disk.holds(f"{path}/{MANIFEST_NAME}"))
            if key == newest[key[0]] and not any(name.startswith(f"{path}/") for name in disk.damaged):
                self._check_readable(disk, entry)
        codes = set(self.ended.values())
        if len(codes) != 1:
            raise Violation(f"S1: the ranks ended with {sorted(codes)}")
        (code,) = codes
        self.counts[f"ended {code}"] += 1
        allowed = {0, ExitCode.INFRASTRUCTURE, ExitCode.PREEMPTED}
        if self.options.max_fruitless < 25 or any(disk.damaged for disk in self.disks):
            # Where the only state that is left cannot be read, trying again brings no progress.
            allowed.add(ExitCode.NO_PROGRESS)
        if code not in allowed:
            raise Violation(f"liveness: the job ended with {code}")
        if code == 0:
            histories = {trainer.history for trainer in self.groups[self._done].trainers.values()}
            if len(histories) != 1 or len(next(iter(histories)) or ()) != self.target_step:
                raise Violation(f"S3: the job is done, and its ranks hold {sorted(map(str, histories))}")

    def _check_readable(self, disk: Disk, entry: Manifested) -> None:
        disk.broken = disk.lost_answers = 0
        try:
            problems = saving.open_store(disk, Life("reader")).open(entry.step, directory=entry.directory).verify()
        except StoreError as error:
            raise Violation(f"S5: step {entry.step} on {disk.name} cannot be read: {error.message}") from error
        if problems:
            raise Violation(f"S5: step {entry.step} on {disk.name} is damaged: {problems[0]}")


class _Body:
    """See `supervisors.Body`."""

    def __init__(self, job: SimJob, seat: Seat) -> None:
        self.host = seat.host
        self.pid = seat.pid
        self.shm_dir = seat.shm_dir
        self._job = job
        self._seat = seat

    def fork(self, generation: int, directive: dict[str, Any]) -> Trainer:
        return self._job.fork(self._seat, generation, directive)

    def inventory(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(holding) for _, (holding, _) in sorted(self._seat.ring.items())]

    @property
    def is_noticed(self) -> bool:
        return self._seat.is_noticed

    def raise_notice(self) -> None:
        self._seat.is_noticed = True
