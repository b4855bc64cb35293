"""The guard of one rank: judges each step, votes, and acts on what all ranks decided.

The three forms of use (the full loop, the three lines, the hooks of an unmodified script) differ in what they own; this
class is what they share. A step goes through it like this::

    boundary()         between two updates: snapshots are taken, certified, handed to the writer
    begin_vote()       the local flags are sent, without waiting
    conclude()         before the update: the vote and the gradient norm make the verdict
    committed()        the update was applied
    act()              or: a decision other than "apply" is carried out, on every rank alike
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from arc_dist.cadence import VoteCadence
from arc_dist.healer import Healer
from arc_dist.healing.rate import RateScale
from arc_dist.healing.vote import Voter, agree
from arc_dist.incident import Attempt
from arc_dist.mean_loss import MeanLoss
from arc_dist.monitoring import Monitoring, tell
from arc_dist.monitors import GradientMonitor, LearningRateMonitor, LossMonitor
from arc_dist.monitors.base import chosen
from arc_dist.observed import Observed
from arc_dist.parallel import gradients_reach_all, is_sharded
from arc_dist.protection import Protection
from arc_dist.protocol.decision import Decision
from arc_dist.protocol.flags import FAULTS, REQUESTS, Flag
from arc_dist.protocol.healing import History, Mode, healthy
from arc_dist.protocol.oom import Division
from arc_dist.sections import Sections
from arc_dist.settings import Settings
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.state import TrainingState
from arc_dist.watch import ReplicaWatch, StateWatch

if TYPE_CHECKING:
    from arc_dist.restore import Found

_FAULTS = int(FAULTS)
_REQUESTS = int(REQUESTS)
_BUSY = int(Flag.CHECKPOINT_BUSY)
_ALERT = int(Flag.ALERT)
_INF = math.inf


class DataPort(Protocol):
    """What healing asks of the data: to go back, and to leave batches out."""

    def position(self) -> dict[str, Any]: ...
    def rewind(self, position: Mapping[str, Any]) -> None: ...
    def skip(self, *ordinals: int) -> None: ...
    def skipped(self) -> tuple[int, ...]: ...


class Guard:
    """Judges and heals one rank's training, in agreement with all others.

    Args:
        state: everything that is restored together.
        settings: thresholds and budgets.
        voter: the exchange with the other ranks.
        ring: where snapshots are kept.
        replicated: the gradient is the same on all ranks after the reduction (DDP), so its norm is an implicit vote.
        norm_is_global: the norm given to `conclude` is the same number on every rank (DDP, or FSDP with clipping).
        carries_votes: a NaN in one rank's gradient reaches every rank's, and the caller obeys `begin_vote`. Then faults
            need no message; what is left to vote on goes with every few steps if they are short.
        record: called with each incident, on rank 0.
        on_certified: called with (step, slot) when a snapshot that shall become a checkpoint is trusted.
        on_abandoned: called with (first, last) of the steps up to the newest certified one that a rollback gave up.
        is_writing: whether this rank still writes a checkpoint.
        sections: is told what this rank is doing.
        read_checkpoint, ledger_dir: see `Healer`.
        restore_rates: False leaves rates, schedulers and RNG alone in a rollback, for scripts that own them.
    """

    def __init__(
        self,
        *,
        state: TrainingState,
        settings: Settings,
        voter: Voter,
        ring: SnapshotRing,
        replicated: bool,
        norm_is_global: bool,
        carries_votes: bool = False,
        generation: int = 0,
        record: Callable[..., None] | None = None,
        on_certified: Callable[[int, int], None] | None = None,
        on_abandoned: Callable[[int, int], None] | None = None,
        is_writing: Callable[[], bool] | None = None,
        sections: Sections | None = None,
        read_checkpoint: Callable[[int], Found | None] | None = None,
        ledger_dir: Path | None = None,
        restore_rates: bool = True,
    ) -> None:
        self.state = state
        self.settings = settings
        self.voter = voter
        self.ring = ring
        self.replicated = replicated
        self.data: DataPort | None = None
        self.step = 0  # updates applied
        self.furthest = 0  # the highest step ever applied; lower ones are repetitions after a rollback
        self.history, self.division = History(), Division()
        self.rate = RateScale()
        self.clip_scale = 1.0
        self.on_clip_scale: Callable[[float], object] | None = None  # told of each change
        self.sections = sections if sections is not None else Sections(settings.hang_policy, 0.0)
        self.agreed = 0  # requests that all ranks know of
        self._asked = 0  # requests of this rank; they stay up, so a signal in mid-step is not lost
        self.last_decision: Decision | None = None
        self.attempt = Attempt()
        self.carries_votes = carries_votes and bool(settings.heeded & Flag.GRAD_NONFINITE)
        self.vote_cadence = VoteCadence(is_fixed=not self.carries_votes)
        self._is_alone = voter.world_size == 1
        self.votes_early = norm_is_global
        self._is_voting = True  # on the step at hand
        self._generation = generation
        self._record = record
        self._is_writing = is_writing
        self._restore_rates = restore_rates
        self._heeded = int(settings.heeded)
        self.loss_monitor = LossMonitor(explosion_sigmas=settings.loss_explosion_sigmas)
        self.reduced_loss_monitor = LossMonitor(
            explosion_sigmas=settings.loss_explosion_sigmas, explosion_flag=Flag.REDUCED_LOSS_EXPLOSION
        )
        # One per optimizer for the forms in which each is judged on its own; the full loop uses the first for all.
        self.gradient_monitors = [
            GradientMonitor(explosion_factor=settings.grad_explosion_factor) for _ in state.optimizers
        ]
        self.rate_monitor = LearningRateMonitor(state.optimizers)
        self.watch = StateWatch(state)
        self._carried = 0  # flags found outside a ballot, handed in with the next
        self.mean_loss = MeanLoss(voter, self.reduced_loss_monitor, every=settings.reduce_loss_every)
        self.observed = Observed()
        self.monitoring = Monitoring(state, settings, sharded=is_sharded(state.models.values()))
        # What a communication hook (post-local SGD, for one) leaves different on purpose is not compared.
        compares = replicated and gradients_reach_all(state.models.values(), voter.world_size)
        compares = compares and not self._is_alone and "replicas" in chosen(settings.monitors)
        self._replicas = ReplicaWatch(state, settings.compare_replicas_every) if compares else None
        self.healer = Healer(self, ledger_dir=ledger_dir, read_checkpoint=read_checkpoint, on_abandoned=on_abandoned)
        self.protection = Protection(
            state=state,
            settings=settings,
            voter=voter,
            ring=ring,
            probe=self.watch.probe,
            generation=generation,
            small=self.small,
            record=record,
            on_certified=on_certified,
        )

    # ------------------------------------------------------------------ one step

    def begin_vote(self, losses: tuple[float, ...], ordinals: tuple[int, ...]) -> bool:
        """Judges what this rank alone can see and sends its ballot. Does not block.

        Args:
            losses: this rank's loss of each micro-batch.
            ordinals: which batches they were.

        Returns:
            Whether this rank's gradient must carry its ballot: every gradient that the coming backward makes has to be
            NaN, so that all ranks see one after the reduction. Only where `carries_votes` was set.
        """
        flags, self._carried = self._carried, 0
        loss_monitor = self.loss_monitor
        for loss in losses:
            if not -_INF < loss <= loss_monitor.threshold:
                flags |= loss_monitor.judge(loss).value
        flags |= self.rate_monitor.judge().value | self.watch.judge(self.step)
        flags &= self._heeded
        attempt = self.attempt
        attempt.losses = losses
        attempt.ordinals = ordinals
        attempt.flags = flags
        attempt.voids_gradient = False
        if self.monitoring.origin is not None:
            self.monitoring.origin.begin()
        self._is_voting = not self.carries_votes or self._is_vote_due(self.step + 1)
        if not self._is_voting:
            attempt.voids_gradient = flags != 0
            return attempt.voids_gradient
        if self._asked:
            attempt.flags |= self._asked
        if self._is_writing is not None and self._is_writing():
            attempt.flags |= _BUSY
        if self.votes_early and not self._is_alone:
            self._send_ballot()
        return False

    def _is_vote_due(self, step: int) -> bool:
        if step % self.vote_cadence.every == 0 or self.protection.is_checkpoint_near(step):
            return True
        return self._replicas is not None and self._replicas.is_due(self.step, self.protection.cadence.last)

    def _digest_due(self) -> int | None:
        replicas = self._replicas
        if replicas is None or not replicas.is_due(self.step, self.protection.cadence.last):
            return None
        return replicas.digest()

    def _send_ballot(self) -> None:
        self.voter.begin(self.attempt.flags, self._digest_due())
        self.mean_loss.begin()

    def request(self, flag: Flag) -> None:
        """Asks all ranks for something with the next ballot, or tells them of a fault."""
        if flag & FAULTS:
            self._carried |= flag.value
        else:
            self._asked |= flag.value

    def conclude(self, norm: float | None) -> Decision | None:
        """Waits for the vote and judges the step, before its update is applied. Blocks; every rank must call it.

        Args:
            norm: L2 norm of the gradient before clipping, or None when there is none.

        Returns:
            None when the update may be applied, else what all ranks decided.
        """
        attempt = self.attempt
        attempt.norm = norm
        monitor = self.gradient_monitors[0]
        faults = 0
        if norm is not None and not monitor.lowest <= norm <= monitor.threshold:
            faults = monitor.judge(norm).value & self._heeded
        step = self.step + 1
        if self._is_voting:
            merged = attempt.flags
            if not self._is_alone:
                if not self.votes_early:
                    attempt.flags |= faults
                    self._send_ballot()
                merged = self.voter.result(step)
                faults |= self.mean_loss.judge(step) & self._heeded
            self.agreed = merged & _REQUESTS
            faults |= merged & _FAULTS | self._replica_fault()
        if faults:
            return self.healer.decide(Flag(faults), step)
        if norm is not None and self.monitoring.is_due():
            self._look()
        self._pay_back(step)
        return None

    def _pay_back(self, step: int) -> None:
        """The step is healthy: budgets of the ladder, the rate and the clip come back in time."""
        history = self.history
        is_whole = history.lr_scale == 1.0 and history.clip_scale == 1.0
        if is_whole and history.mode is Mode.TRAINING and not history.skips_in_a_row:
            return
        self.history, decision = healthy(self.settings.policy, history, step)
        self.follow(decision)

    def follow(self, scales: Decision | History) -> None:
        """Takes over the factors on rate and clip."""
        self.rate.factor = scales.lr_scale
        if self.clip_scale != scales.clip_scale:
            self.clip_scale = scales.clip_scale
            if self.on_clip_scale is not None:
                self.on_clip_scale(scales.clip_scale)

    def conclude_gradient(self, norm: float, optimizer: int) -> Decision | None:
        """Judges the gradient of one optimizer by itself, in loops that are not ours. Every rank must call it.

        Under DDP the norm is an implicit vote and nothing is sent; otherwise it blocks for a vote.
        """
        attempt = self.attempt
        attempt.norm = norm
        attempt.optimizer = optimizer
        step = self.step + 1
        seen = self.gradient_monitors[optimizer].judge(norm).value & self._heeded
        if not attempt.losses:
            carried, self._carried = self._carried, 0  # no loss was voted on, so this is the step's only ballot
            seen |= (self.watch.judge(self.step) | carried) & self._heeded | self._asked
        local = bool(not attempt.losses) or not self.replicated
        attempt.flags = seen
        if local and not self._is_alone:
            self.voter.begin(seen, self._digest_due())
            seen = self.voter.result(step) | self._replica_fault()
        if not attempt.losses:
            self.agreed = seen & _REQUESTS
        if seen & _FAULTS:
            return self.healer.decide(Flag(seen & _FAULTS), step)
        if not attempt.losses:
            self._pay_back(step)
        if optimizer == 0 and self.monitoring.is_due():
            self._look()
        return None

    def _replica_fault(self) -> int:
        return Flag.REPLICAS_DIFFER.value & self._heeded if self.voter.differs else 0

    def _look(self) -> None:
        """The monitors' turn. What they find goes into the next ballot: it does not hold up this update."""
        self._carried |= self.monitoring.look(self.step)
        if self.monitoring.alerts:
            self._asked |= _ALERT

    def committed(self) -> None:
        """The update that `conclude` allowed has been applied."""
        self.step = step = self.step + 1
        if step > self.furthest:
            self.furthest = step
        attempt = self.attempt
        losses = attempt.losses
        if losses:
            loss = losses[0] if len(losses) == 1 else sum(losses) / len(losses)
            self.loss_monitor.accept(loss)
            self.mean_loss.committed(loss)
            self.monitoring.accepted(step, loss)
        if attempt.norm is not None:
            self.gradient_monitors[attempt.optimizer].accept(attempt.norm)
        if self.rate_monitor.has_risen:
            self.rate_monitor.accept()
        if self.monitoring.watches_updates:
            self.monitoring.updated()

    # ------------------------------------------------------------------ between steps

    def boundary(self) -> None:
        """Certifies and takes snapshots. Call between two updates, on every rank.

        It communicates only while the snapshot cadence is being measured, and to tell alerts.
        """
        if self.agreed & _ALERT:
            self._tell_alerts()
        if self.step >= self.protection.quiet_until:
            self._carried |= self.protection.boundary(self.step, is_writing=bool(self.agreed & _BUSY)).value

    def _tell_alerts(self) -> None:
        """Brings all ranks' alerts to rank 0, which tells them. Every rank gets here after the same vote; it blocks."""
        self.agreed &= ~_ALERT
        self._asked &= ~_ALERT
        everyone = self.voter.gather(self.monitoring.take_alerts(), self.step)
        if self.voter.rank == 0:
            tell(everyone, self._record, generation=self._generation)

    def show_batch(self, data: Any, ordinal: int, epoch: int) -> None:
        """Shows the monitors of batches a batch before its forward."""
        self._carried |= self.monitoring.batch(data, ordinal=ordinal, epoch=epoch, step=self.step)
        if self.monitoring.alerts:
            self._asked |= _ALERT

    @property
    def is_measuring(self) -> bool:
        """Whether `observe` has anything to learn."""
        return self.protection.cadence.every is None or not self.vote_cadence.is_settled

    def observe(self, step_s: float) -> None:
        """The step just committed took this long, without snapshots and what the script did between steps.

        Every rank must call it after the same steps; it may block, once.
        """
        self.protection.cadence.observe(step_s)
        self.vote_cadence.observe(step_s, self.step, self.voter)

    @property
    def last_loss(self) -> float | None:
        """This rank's loss of the last step, the mean over its micro-batches; None where no loss is seen."""
        losses = self.attempt.losses
        return sum(losses) / len(losses) if losses else None

    def small(self) -> dict[str, Any]:
        """Everything a snapshot holds beside tensors."""
        data = self.data.position() if self.data is not None else None
        return {
            "training": self.state.small(),
            "guard": self.state_dict(),
            "data": data,
            "about": self.observed.about(self.step, data, self.last_loss, self.voter.world_size),
        }

    def seal(self) -> Decision | None:
        """Makes the present state trusted at once, by looking at all of it: at the end, or before leaving.

        Every rank must call this; it blocks. Returns None when the state is sound on every rank, else the decision.
        """
        flags = (self.watch.scan().value | self._carried | self.monitoring.look_at_rest()) & self._heeded & _FAULTS
        self._carried = 0
        self.attempt = Attempt(flags=flags, memory=self.attempt.memory)
        self.voter.begin(flags | (_ALERT if self.monitoring.alerts else 0))
        merged = self.voter.result(self.step)
        if merged & _ALERT:
            self._tell_alerts()
        decision = self.healer.decide(Flag(merged & _FAULTS), self.step) if merged & _FAULTS else None
        if decision is not None:
            return decision
        self.protection.seal(self.step)
        return None

    # ------------------------------------------------------------------ faults

    def act(self, decision: Decision) -> Decision:
        """See `Healer.act`."""
        return self.healer.act(decision)

    def record(self, **fields: Any) -> None:
        """Hands an incident on."""
        if self._record is not None:
            self._record(generation=self._generation, **fields)

    def state_was_changed(self) -> None:
        """Healing changed weights or optimizer state on purpose: what monitors remember of them is no measure now."""
        self.watch.load_state_dict({**self.watch.probe.state_dict(), "norms": {}})
        self.monitoring.load_state_dict(self.monitoring.state_dict())

    def load(self, specs: Sequence[Any], tensors: Sequence[torch.Tensor], small: dict[str, Any], *, cold: bool) -> None:
        """Loads a snapshot or checkpoint.

        Args:
            specs: of the tensors.
            tensors: their values, as this rank holds them.
            small: everything else.
            cold: True in a new process, where the ladder's history comes from the snapshot too and the data source
                is positioned by the caller.
        """
        data = self.data
        if data is not None and small["data"] is not None and not cold:
            # May draw random numbers, so the state and its generators come after.
            agree(self.voter, lambda: data.rewind(small["data"]), "the data cannot be rewound")
        self.state.restore(specs, tensors, small["training"] if self._restore_rates else None)
        self.load_state_dict(small["guard"], with_history=cold)

    def agree_on_cadence(self) -> None:
        """After a restore: takes over rank 0's cadences, whose collectives must come at the same steps everywhere.

        Every rank must call this; it blocks. Ranks that were ended while they agreed on a cadence may have left states
        in which some know it and some do not.
        """
        cadences = (self.vote_cadence, self.protection.cadence)
        theirs = self.voter.gather([cadence.state_dict() for cadence in cadences], self.step)[0]
        for cadence, state in zip(cadences, theirs, strict=True):
            cadence.adopt(state)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "furthest": self.furthest,
            "history": self.history.as_dict(),
            "account": list(self.healer.account),
            "division": self.division.as_dict(),
            "loss": self.loss_monitor.state_dict(),
            "reduced_loss": self.reduced_loss_monitor.state_dict(),
            "gradient": [monitor.state_dict() for monitor in self.gradient_monitors],
            "rate": self.rate_monitor.state_dict(),
            "probe": self.watch.probe.state_dict(),
            "loss_sum": self.mean_loss.state_dict(),
            "cadence": self.protection.cadence.state_dict(),
            "vote_cadence": self.vote_cadence.state_dict(),
            "observed": self.observed.state_dict(),
            "sections": self.sections.state_dict(),
            "monitors": self.monitoring.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, with_history: bool) -> None:
        self.step = state["step"]
        if with_history:
            self.furthest = state["furthest"]
            self.history = History.from_dict(state["history"])
            self.healer.account = list(state.get("account", ()))
            self.follow(self.history)
            self.division = Division.from_dict(state.get("division", {}))  # not in checkpoints of earlier versions
        self.loss_monitor.load_state_dict(state["loss"])
        self.reduced_loss_monitor.load_state_dict(state["reduced_loss"])
        for monitor, saved in zip(self.gradient_monitors, state["gradient"], strict=True):
            monitor.load_state_dict(saved)
        self.rate_monitor.load_state_dict(state["rate"])
        self.watch.load_state_dict(state["probe"])
        self.mean_loss.load_state_dict(state["loss_sum"])
        self.observed.load_state_dict(state["observed"])
        if "sections" in state:  # not in checkpoints of earlier versions
            self.sections.load_state_dict(state["sections"])
        self.monitoring.load_state_dict(state.get("monitors", {}))
        self.vote_cadence.load_state_dict(state["vote_cadence"])
        self.protection.cadence.load_state_dict(state["cadence"], step=self.step)
        self._carried = 0
        self.protection.went_to(self.step)
