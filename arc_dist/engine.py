"""Everything an `Arc` needs on one rank, put together: guard, snapshots, store, coordinator, supervisor.

Starting it communicates, so every rank must start it at the same point; constructing it does not.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import torch
import torch.distributed as dist

from arc_dist import inprocess, restore
from arc_dist.checkpoint_store.drain import Drainer
from arc_dist.checkpoint_store.tiers import Tier, Tiers
from arc_dist.checkpointer import Checkpointer
from arc_dist.config import Env
from arc_dist.connect import connect, tell_until_heard
from arc_dist.data.source import ENDLESS, BatchSource
from arc_dist.data.world import World
from arc_dist.errors import ArcError, ConfigError, PeerLost
from arc_dist.guard import Guard
from arc_dist.healing.vote import Voter, agree, require_equal_settings
from arc_dist.leaving import Notices, learned, prepare
from arc_dist.memory import open_ring
from arc_dist.parallel import Parallelism, gradients_reach_all, needs_warm_up, parallelism
from arc_dist.protocol.flags import Flag
from arc_dist.protocol.hangs import Section
from arc_dist.sections import Sections
from arc_dist.settings import Settings
from arc_dist.snapshot.layout import Phase, StatusPage
from arc_dist.snapshot.record import StepRecord
from arc_dist.snapshot.replicas import reshards
from arc_dist.snapshot.rng import RngState, capture_rng, same_rng
from arc_dist.snapshot.state import TrainingState
from arc_dist.telemetry.log import logger, set_up_logging
from arc_dist.telemetry.recorder import Recorder, append_line

_PROGRESS_EVERY_S = 2.0
_END_EXPECTED_WITHIN_S = 5.0  # a supervisor ends the peers of a dead rank within milliseconds


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Where training went on.

    Attributes:
        step: updates that the restored state contains.
        tier: "memory" or "checkpoint".
        ranks: how many ranks saved it.
    """

    step: int
    tier: str
    ranks: int = 1


class Engine:
    """One rank's protection.

    Args:
        state: everything that is restored together.
        settings: see `Settings`.
        tiers: where checkpoints go, fastest first; empty for none.
        run: name of the run inside the store.
    """

    def __init__(self, state: TrainingState, settings: Settings, *, tiers: Sequence[Tier], run: str, env: Env) -> None:
        self.state = state
        self.settings = settings
        self.env = env
        self.sections = Sections(settings.hang_policy, settings.straggler_factor)
        self.updating = False
        self.between = False  # a step is committed, and nothing of the next has begun
        self.resumed: Resumed | None = None
        self.on_incident: Callable[[dict[str, Any]], object] | None = None
        self._source: BatchSource | None = None
        self._tiers = tuple(tiers)
        self._run = run
        self._checkpointer: Checkpointer | None = None
        self._drainer: Drainer | None = None
        self._recorder: Recorder | None = None
        self._record: StepRecord | None = None
        self._status: StatusPage | None = None
        self._closers: list[Callable[[], None]] = []
        self._last_progress = 0.0
        self._first_step_reported = False
        self._step_times: list[float] = []
        self._last_step_at = 0.0
        self.must_agree_on_data = False
        self.accumulate = settings.accumulate  # micro-batches per rank and update in this world
        self.started = False
        self._rng: RngState | None = None
        self.owner = ""
        self.notices = Notices(env, self._pass_notice_on)

    # ------------------------------------------------------------------ starting

    def start(self, *, norm_is_global: bool, owns_backward: bool = False) -> None:
        """Sets everything up. Every rank must call this; it blocks.

        Args:
            norm_is_global: see `Guard`.
            owns_backward: the caller can let gradients carry votes.
        """
        settings, env = self.settings, self.env
        self.sections.attach(env.shm_dir, env.generation)
        self.sections.enter(Section.START)
        self.notices.listen()
        self.voter = Voter(timeout_s=settings.vote_timeout_s)
        self.rank, self.world_size = self.voter.rank, self.voter.world_size
        set_up_logging(level=env.log_level, rank=self.rank, world_size=self.world_size)
        self.parallelism = parallelism(self.state.models.values(), self.world_size)
        tiers = [dataclasses.asdict(tier) for tier in self._tiers]
        comparable = {**settings.comparable(), "store": tiers, "run": self._run}
        require_equal_settings(self.voter, {**comparable, "model": self.state.signature()})
        self._start_coordinator()
        store = self._open_store()
        self.ring = open_ring(self.state, settings, self.voter, env, slots=settings.snapshots + (store is not None))
        self._closers.append(self.ring.close)
        if store is not None:
            self._checkpointer = Checkpointer(
                tiers=store,
                ring=self.ring,
                coordinator=self.coordinator,
                rank=self.rank,
                world_size=self.world_size,
                generation=env.generation,
                record=self.record,
                max_bytes_per_s=settings.max_bytes_per_s,
                save_timeout_s=settings.save_timeout_s,
                on_committed=self._wake_drainer,
                on_written=lambda seconds: learned(self, seconds),
            )
        self.store = store
        if store is not None and self.rank == 0 and (len(store) > 1 or any(tier.keep for tier in self._tiers)):
            self._drainer = Drainer(store, record=self.record, max_bytes_per_s=settings.max_bytes_per_s)
        if env.shm_dir is not None:
            self._status = StatusPage.open(env.shm_dir)
            self._status.write(phase=Phase.STARTING, step=0, generation=env.generation)
            if self.parallelism is Parallelism.REPLICATED or self.ring.replica_key:
                self._record = StepRecord(env.shm_dir, self.ring.replica_key)
        self.guard = Guard(
            state=self.state,
            settings=settings,
            voter=self.voter,
            ring=self.ring,
            replicated=self.parallelism is Parallelism.REPLICATED,
            norm_is_global=norm_is_global or self.parallelism is Parallelism.REPLICATED,
            carries_votes=owns_backward and self._gradients_carry_votes(),
            generation=env.generation,
            record=self.record,
            on_certified=self._checkpointer.submit if self._checkpointer is not None else None,
            on_abandoned=self._abandon,
            is_writing=self._checkpointer.is_writing if self._checkpointer is not None else None,
            sections=self.sections,
            read_checkpoint=functools.partial(restore.older_checkpoint, self) if store is not None else None,
            ledger_dir=env.shm_dir if env.supervised else None,
        )
        self.sections.say_sharded(self.parallelism is not Parallelism.REPLICATED)
        self.started = True

    def _wake_drainer(self, step: int, tier: int) -> None:
        if self._drainer is not None:
            self._drainer.wake()

    def _gradients_carry_votes(self) -> bool:
        if self.parallelism is not Parallelism.REPLICATED or self.state.scaler is not None:
            return False  # a gradient scaler drops steps with a NaN by itself, before they are judged
        return gradients_reach_all(self.state.models.values(), self.world_size)

    def _abandon(self, from_step: int, to_step: int) -> None:
        """A rollback went below certified steps: what was saved of them belongs to a history that did not happen."""
        if self._checkpointer is not None:
            self._checkpointer.forget_after(from_step - 1)
        if self.rank == 0:
            say = functools.partial(self.coordinator.poison, from_step, to_step, self.env.generation)
            if not self.tell(say):
                threading.Thread(target=tell_until_heard, args=(say, lambda: not self.started), daemon=True).start()
            if self.store is not None:
                # The coordinator forgets with the job. In a thread, because storage may be slow and training goes on.
                why = f"generation {self.env.generation} rolled back to step {from_step - 1}"
                threading.Thread(target=self.store.quarantine, args=(from_step, to_step, why), daemon=True).start()

    def _pass_notice_on(self) -> None:
        """In a thread, as soon as a signal says that this job is to go: all supervisors hear of it."""
        if self.started:
            self.tell(lambda: self.coordinator.preempt(self.rank))

    def say_phase(self, phase: Phase) -> None:
        """Lets the supervisor know what this process is about to do."""
        if self._status is not None:
            self._status.write(phase=phase, step=self.guard.step, generation=self.env.generation)

    def tell(self, say: Callable[[], object]) -> bool:
        """Tells the coordinator something; training does not stop for one that cannot be reached (False)."""
        try:
            say()
        except ArcError as error:
            logger.warning("the coordinator was not told: %s", error)
            return False
        return True

    def _start_coordinator(self) -> None:
        self.coordinator, close = connect(self.env, self.voter.gather, self.rank, self.world_size)
        self._closers.append(close)
        if self.rank == 0:
            self._recorder = Recorder(self._send, self.on_incident)

    def _send(self, line: dict[str, Any]) -> None:
        if self.env.supervised:
            self.coordinator.incident(**line)
        else:
            append_line(self.env.run_dir, line)

    def _open_store(self) -> Tiers | None:
        """Opens the store on every rank; when one cannot write there, all stop with that rank's reason."""
        if not self._tiers:
            return None
        self.owner = self.voter.gather(uuid.uuid4().hex, step=0)[0]
        store = Tiers(self._tiers, run=self._run, owner=self.owner, dedup=self.settings.dedup)
        agree(self.voter, store.check_writable, "the store cannot be used")
        agree(self.voter, lambda: store.take_over() if self.rank == 0 else None, "the store cannot be used")
        return store

    def resume(
        self, *, data: BatchSource | None = None, warm_up: Callable[[Any, dict[str, Any]], None] | None = None
    ) -> Resumed | None:
        """Restores the newest state that all ranks can have. Every rank must call this; it blocks.

        Args:
            data: positioned at the exact sample too.
            warm_up: one throw-away forward and backward of a batch, before the guard has this state: `needs_warm_up`.
        """
        self.guard.data = data
        planned = self.env.plan is not None and self.env.plan["tier"] != "none"
        if self.env.supervised and self.store is not None and not planned:
            agree(self.voter, self._introduce_store, "the store cannot be listed")
        found = restore.find(self)
        self._correct_plan(found)
        if found is not None:
            if data is not None and found.small["data"] is not None:
                position = found.small["data"]
                agree(self.voter, lambda: data.resume(position), "the data cannot be resumed")
                self.accumulate = data.accumulate
                if warm_up is not None and needs_warm_up(self.state.models.values(), self.world_size, found.step):
                    if data.sample is not None:
                        warm_up(data.sample, found.small["guard"])
                    else:  # an epoch begins here, and no batch of it has been seen
                        warm_up(data.next().data, found.small["guard"])
                        data.resume(position)
            self.guard.load(found.specs, found.tensors, found.small, cold=True)
            self.guard.agree_on_cadence()
            if found.tier == "memory":
                self.ring.drop_after(found.step)
            elif self._checkpointer is not None:
                self.guard.protection.is_stored = True
                self._checkpointer.committed.append(found.step)
            self.resumed = Resumed(found.step, found.tier, found.ranks)
            logger.info("continuing after step %d, restored from %s", found.step, found.tier)
        if self.env.supervised and self.env.generation > 0:
            self.guard.healer.recall()
        self.guard.watch.begin(self.guard.step)
        if self._drainer is not None:
            self._drainer.start()
        if self._recorder is not None:
            self._recorder.record(kind="started", step=self.guard.step, generation=self.env.generation)
        prepare(self)
        self.say_phase(Phase.STEPPING)
        return self.resumed

    def _introduce_store(self) -> None:
        """Lets the supervisors' coordinator know what the script's store holds, for the plans to come."""
        store = self.store
        if self.rank != 0 or store is None:
            return
        steps = [
            {"step": info.step, "generation": info.generation, "certified": info.certified} for info in store.steps()
        ]
        self.tell(lambda: self.coordinator.hello_store(store.url, steps))

    def _correct_plan(self, found: restore.Found | None) -> None:
        """Tells the coordinator when training goes on from another step than it had planned."""
        plan = self.env.plan
        if plan is not None and found is not None and self.rank == 0 and found.step != plan["step"]:
            self.tell(lambda: self.coordinator.restored(self.rank, self.env.generation, found.step))

    def open_data(self, loader: Iterable[Any], *, steps: int | None, epochs: int | None, exact: bool) -> BatchSource:
        """Makes the batch source, and refuses loaders that would leave ranks waiting for each other."""
        try:
            length = len(loader) if isinstance(loader, Sized) else None
        except TypeError:  # a DataLoader over an iterable dataset has a len() that raises
            length = None
        lengths = self.voter.gather(length, step=0)
        if len(set(lengths)) > 1:
            raise ConfigError(
                "the loader has different lengths on different ranks: "
                + ", ".join(f"rank {rank} has {theirs} batches" for rank, theirs in enumerate(lengths))
                + ". Give all ranks the same number, for instance with arc_dist.SeededSampler or DistributedSampler."
            )
        # Without a length nobody knows when a rank runs dry, so the ranks ask each other before every step.
        self.must_agree_on_data = self.world_size > 1 and length is None
        # The loop counts updates; how many batches they need is not known, since some are dropped on the way.
        endless = steps is not None and epochs is None
        world = World(self.rank, self.world_size, self.settings.accumulate)
        source = BatchSource(loader, epochs=epochs, steps=ENDLESS if endless else None, exact=exact, world=world)
        self._source = source
        return source

    def trained_parameters(self) -> list[torch.Tensor]:
        """All parameters of all optimizers, each once, in the models' order.

        Not in the order of the optimizers' groups: the norm of all gradients depends on it in its last bit, and an
        unguarded loop clips ``model.parameters()``.
        """
        groups = [group for optimizer in self.state.optimizers for group in optimizer.param_groups]
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        in_order = {id(p): p for model in self.state.models.values() for p in model.parameters()}
        return [parameter for key, parameter in in_order.items() if key in trained]

    # ------------------------------------------------------------------ while training

    def remember_step(self) -> None:
        """Before the vote: leaves in shared memory what only this rank knows of the state it is about to reach.

        A survivor that completes the vote may commit this step although this process is killed before it does; its
        successor takes the replicated tensors from the survivor and the rest from here.
        """
        if self._record is not None:
            self._rng = capture_rng()
            data = self.guard.data
            mark = data.mark() if isinstance(data, BatchSource) else b""
            self._record.write(self.guard.step + 1, self._rng, self.state.moving_buffers(), mark)

    def heed_notices(self) -> None:
        """Between two steps: a notice that this rank got becomes a request that all ranks agree on."""
        if self.notices.is_told:
            self.guard.request(Flag.PREEMPT)

    def check_boundary(self) -> None:
        """Between two steps: finds out whether the script draws random numbers there.

        If it does, the record made before the vote does not tell the state of the generators at the boundary, and
        survivors cannot stand in exactly for a rank that died; recovery then goes back to the last snapshot.
        """
        self.between = False
        if self._record is not None and self._rng is not None and not same_rng(capture_rng(), self._rng):
            self._record = None
            logger.info("the loop's body draws random numbers: a lost rank will cost the steps since the last snapshot")

    def went_elsewhere(self) -> None:
        """Healing dropped a step or restored another one: the generators are not where the last record says."""
        self._rng = None

    def progressed(self) -> None:
        """A step was committed."""
        self.between = True
        now = time.monotonic()
        step = self.guard.step
        if self._status is not None:
            self._status.write(phase=Phase.STEPPING, step=step, generation=self.env.generation)
        if self._recorder is None:
            return
        if self._last_step_at and len(self._step_times) < 1000:
            self._step_times.append(now - self._last_step_at)
        self._last_step_at = now
        if self.resumed is not None and not self._first_step_reported:
            self._first_step_reported = True
            self._recorder.record(
                kind="resumed",
                generation=self.env.generation,
                step=step,
                restored_step=self.resumed.step,
                tier=self.resumed.tier,
            )
        if now - self._last_progress > _PROGRESS_EVERY_S:
            self._last_progress = now
            self._report_progress("progress")

    def _report_progress(self, kind: str) -> None:
        assert self._recorder is not None
        times = sorted(self._step_times)
        self._recorder.record(
            kind=kind,
            step=self.guard.furthest,
            generation=self.env.generation,
            median_step_s=times[len(times) // 2] if times else None,
            now_at=self.guard.step,
            loss=self.guard.last_loss,
        )

    def record(self, **fields: Any) -> None:
        """Hands an incident to the recorder; on ranks without one, straight to the coordinator's own rank 0 path."""
        if self._recorder is not None:
            self._recorder.record(**fields)

    def mean_over_ranks(self, value: float) -> float:
        """The mean of `value` over all ranks. Every rank must call this; it blocks."""
        values = self.voter.gather(value, self.guard.step)
        return sum(values) / len(values)

    def save_now(self, step: int, *, hurry: bool = False) -> bool:
        """Writes the certified snapshot of `step` and waits for its commit. False without a store.

        Every rank must call this; it blocks.

        Args:
            step: to be saved.
            hurry: write as fast as storage takes it, whatever `max_bytes_per_s` says.
        """
        writer = self._checkpointer
        if writer is None:
            return False
        self.sections.enter(Section.SAVE)
        if hurry:
            writer.hurry()
        writer.wait()
        if step not in writer.committed:
            slot = self.guard.protection.slot_of(step)
            assert slot is not None, f"step {step} was sealed but is not held"
            writer.submit(step, slot)
            writer.wait()
        # The coordinator may live in rank 0's process: nobody leaves before everybody has heard of the commit.
        return any(self.voter.gather(step in writer.committed, step))

    def part(self, error: BaseException) -> None:
        """After an error in a step, under a supervisor: leaves the last committed state for the next generation.

        Where a peer is lost, the error is only the echo of its death: the supervisor ends this process in a moment,
        and a traceback would hide the cause. So that is waited for, within a bound, before the error goes on.
        """
        status = self._status
        if status is None:
            return
        step, generation = self.guard.step, self.env.generation
        if self._record is not None and not self.updating:
            status.write(phase=Phase.PARTING, step=step, generation=generation)
            self._leave_state_behind(self._record)
        status.write(phase=Phase.PARTED, step=step, generation=generation)
        if _is_loss_of_peer(error) and not inprocess.stays():
            logger.debug("after step %d: %s", step, error)
            time.sleep(_END_EXPECTED_WITHIN_S)

    def _leave_state_behind(self, record: StepRecord) -> None:
        """Only where this rank's state is whole (no update had begun), has replicas (DDP, HSDP), and is finite."""
        guard = self.guard
        recorded = record.read(guard.step)
        # A snapshot of this very step that is not trusted yet would be passed over: it is written again, as parting.
        if recorded is None or guard.step in guard.protection.certified_steps():
            return
        if self.parallelism is Parallelism.SHARDED and not reshards(self.state, self.ring.replica_key):
            return  # something else than a step was going on
        small = guard.small()
        small["training"] |= {"rng": recorded.rng, "buffers": recorded.buffers}
        data = guard.data if isinstance(guard.data, BatchSource) else None
        small["data"] = data and (data.position() if self.between else data.position_before_fetch())
        specs, tensors = self.state.tensors()
        if not guard.watch.scan() and small["data"] is not None:
            self.ring.capture(guard.step, self.env.generation, specs, tensors, small, parting=True)

    # ------------------------------------------------------------------ leaving

    def let_go_of_data(self) -> None:
        """Ends the loader's workers now: where only the garbage collector does, each is waited for in vain for 5 s."""
        if self._source is not None:
            self._source.close()

    def close(self, *, abort: bool = False) -> None:
        """Ends threads and gives memory back; does not communicate.

        Args:
            abort: give up a checkpoint that is being written or waits for other ranks.
        """
        self.notices.close()
        if not self.started:
            return
        self.started = False
        self.sections.enter(Section.DONE)
        if not sys.is_finalizing():  # else the interpreter has stopped all threads, and to wait for one is to hang
            self._end_threads(abort)
        if self._status is not None:
            self._status.write(phase=Phase.DONE, step=self.guard.step, generation=self.env.generation)
        self.guard.monitoring.close()
        for close in reversed(self._closers):
            close()
        self.voter.close()

    def _end_threads(self, abort: bool) -> None:
        """Ends the threads that write, copy and report; waits for what they have begun unless `abort`."""
        if self._checkpointer is not None:
            self._checkpointer.close(abort=abort)
        if self._drainer is not None:
            within_s = 0.0 if abort else self.settings.save_timeout_s
            if not self._drainer.close(finish_within_s=within_s) and not abort:
                logger.warning("the newest checkpoint did not reach every tier; the next start goes on copying it")
        if self._recorder is not None:
            self._report_progress("finished")
            self._recorder.close()


def _is_loss_of_peer(error: BaseException) -> bool:
    """Whether a collective failed because a peer went away; gloo says so in plain RuntimeErrors."""
    if isinstance(error, (PeerLost, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
