"""The guarded loop behind `Arc.train`: it owns the step, so it can skip, roll back, replay and resume exactly."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from arc_dist.data.place import mark
from arc_dist.data.source import Batch, BatchSource
from arc_dist.divided import Calls, Divided
from arc_dist.engine import Engine
from arc_dist.errors import ConfigError
from arc_dist.healing.microbatch import SplitFunction
from arc_dist.leaving import leave
from arc_dist.parallel import Clipper, GradientSync, Parallelism
from arc_dist.protocol.decision import Decision, Rung, Verdict
from arc_dist.protocol.flags import Flag
from arc_dist.protocol.hangs import Section
from arc_dist.telemetry.log import logger

_PREEMPT = int(Flag.PREEMPT)
_APPLY = Rung.APPLY.value
# Plain integers: this is the step's hot path.
_CHECKPOINT, _EPOCH, _DATA = int(Section.CHECKPOINT), int(Section.EPOCH), int(Section.DATA)
_FORWARD, _BACKWARD, _VOTE = int(Section.FORWARD), int(Section.BACKWARD), int(Section.VOTE)
_UPDATE, _SCRIPT = int(Section.UPDATE), int(Section.SCRIPT)

LossFunction = Callable[[Any], torch.Tensor]


class Timings(NamedTuple):
    """Where a step's time went on this rank, in seconds. On a GPU these are times of launching, not of computing."""

    data_s: float
    forward_backward_s: float
    guard_s: float
    update_s: float


class StepResult(NamedTuple):
    """One committed step: its update was applied on every rank.

    Attributes:
        number: 1 for the first update of the run; after a rollback numbers come again.
        loss: this rank's loss, the mean over its micro-batches.
        grad_norm: L2 norm of the gradient before clipping (of this rank's shards under FSDP2 without clipping).
        verdict: HEALTHY, or the worst verdict since the result before this one.
        action: what was done since the result before this one ("skip", "retry", "rollback", "checkpoint", "escape" or
            the name of a rung of the user's own), or "apply".
        reason: why, when something was done.
        repeated: the step had been committed before and was done again after a rollback or a restart.
        epoch: of the step's last batch, from 0.
        timings: where the time went.
    """

    number: int
    loss: float
    grad_norm: float
    verdict: Verdict
    action: str
    reason: str
    repeated: bool
    epoch: int
    timings: Timings


class GuardedLoop:
    """Runs steps until the data or the number of steps is used up.

    Args:
        engine: the started guard and what belongs to it.
        loss_fn: called with a batch; returns a scalar loss that requires grad.
        source: the batches.
        steps: updates in the whole run, or None for as many as the data gives.
        split: how to divide a batch that does not fit into memory; None for the rule of `healing.microbatch`.
    """

    def __init__(
        self,
        engine: Engine,
        loss_fn: LossFunction,
        source: BatchSource,
        steps: int | None,
        split: SplitFunction | None = None,
    ) -> None:
        self._engine = engine
        self._guard = engine.guard
        self._loss_fn = loss_fn
        self._source = source
        self._steps = steps
        self._settings = engine.settings
        self._state = engine.state
        self._sync = GradientSync(engine.state.models.values())
        sharded = engine.parallelism is Parallelism.SHARDED
        self._clip = Clipper(engine.trained_parameters(), self._settings.max_grad_norm, sharded=sharded)
        engine.guard.on_clip_scale = self._clip.tighten
        calls = Calls(loss=self._loss, scaled=self._scaled, last_backward=self._last_backward, clip=self._clip)
        self._divided = Divided(engine, source, self._sync, calls, split)
        self._trouble: Decision | None = None  # the worst decision since the last result
        self._epoch_losses: list[float] = []
        self._exhausted = False
        self._sections = engine.sections
        source.on_open = functools.partial(self._sections.enter, _EPOCH)

    def run(self) -> Iterator[StepResult]:
        """Yields a result per committed step. Every rank must iterate in step."""
        self._divided.begin()
        try:
            yield from self._run()
        finally:
            self._divided.close()

    def _run(self) -> Iterator[StepResult]:
        guard, engine, sections = self._guard, self._engine, self._sections
        while True:
            if self._exhausted or (self._steps is not None and guard.step >= self._steps):
                if self._finish():
                    return
                continue
            is_quiet = guard.step < guard.protection.quiet_until
            sections.begin_step(guard.step + 1, _DATA if is_quiet else _CHECKPOINT)
            guard.boundary()
            if guard.agreed & _PREEMPT:
                leave(engine)
            engine.heed_notices()
            engine.check_boundary()
            if not is_quiet:
                sections.enter(_DATA)
            began = time.perf_counter()
            self._divided.begin_step()
            batches = self._fetch()
            if not batches:
                self._exhausted = True
                continue
            if guard.monitoring.sees_batches:
                for batch in batches:
                    guard.show_batch(batch.data, batch.ordinal, batch.epoch)
            fetched = time.perf_counter()
            try:
                result = self._step(batches, began, fetched)
            except Exception as error:
                mark(error, self._source.whereabouts)
                # The update has not begun, so the state is that of the last committed step: leave it to the survivors.
                engine.part(error)
                raise
            if result is not None:
                engine.progressed()
                sections.enter(_SCRIPT)
                yield result

    def warm_up(self, batch: Any, guard_state: dict[str, Any]) -> None:
        """One forward and backward whose results are thrown away; see `needs_warm_up`."""
        with self._sync.micro_batch(last=True):
            self._loss_fn(self._divided.enough_of(batch, guard_state)).backward()
        self._zero_grad()

    # ------------------------------------------------------------------ one step

    def _step(self, batches: Sequence[Batch], began: float, fetched: float) -> StepResult | None:
        guard, sections = self._guard, self._sections
        sections.enter_computing(_FORWARD)
        try:
            losses = self._forward_backward(batches)
        except (MemoryError, RuntimeError) as error:
            decision = self._divided.failed(error, batches)
            self._heal(decision)
            return None
        sections.enter_computing(_VOTE)
        computed = time.perf_counter()
        norm = self._clip() if self._state.scaler is None else self._unscaled_norm(self._state.scaler)
        decision = guard.conclude(norm)
        judged = time.perf_counter()
        if decision is not None:
            self._heal(decision)
            return None
        if norm is None:
            return None
        sections.enter(_UPDATE)
        self._engine.updating = True
        self._update(losses, batches[-1])
        guard.committed()
        self._engine.updating = self._divided.is_torn
        if not guard.division.is_settled:
            self._divided.committed()
        updated = time.perf_counter()
        if guard.is_measuring:
            guard.observe(updated - began)
        verdict, action, reason = Verdict.HEALTHY, _APPLY, ""
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            verdict, action, reason = trouble.verdict, trouble.action, trouble.reason
        step = guard.step
        timings = Timings(fetched - began, computed - fetched, judged - computed, updated - judged)
        return StepResult(
            step, _mean(losses), norm, verdict, action, reason, step < guard.furthest, batches[-1].epoch, timings
        )

    def _fetch(self) -> list[Batch]:
        """The micro-batches of the next step; fewer at the very end of the data, none after it."""
        guard, source = self._guard, self._source
        batches: list[Batch] = []
        # The next boundary's snapshot wants to recognise the batch before it; the others need not be recognisable.
        source.begin_step(recognisable=guard.step + 1 >= guard.protection.quiet_until)
        try:
            for _ in range(self._engine.accumulate):
                batches.append(source.next())
        except StopIteration:
            pass
        except Exception as error:
            mark(error, functools.partial(source.whereabouts, loading=True))
            raise
        if self._engine.must_agree_on_data:
            everyone = self._engine.voter.gather(len(batches), guard.step)
            if len(set(everyone)) > 1:
                logger.warning("the data ends on some ranks before others (%s batches left); stopping here", everyone)
                return []
        return batches

    def _forward_backward(self, batches: Sequence[Batch]) -> tuple[float, ...]:
        """Forward and backward of all micro-batches; the vote goes out between the last forward and its backward."""
        if self._guard.division.parts > 1:
            return self._divided.forward_backward(batches)
        if len(batches) == 1:
            (batch,) = batches
            loss = self._loss(batch.data)
            losses = (loss.item(),)  # on a GPU this is the step's one synchronisation, and waits for the forward only
            self._last_backward(loss, losses, (batch.ordinal,))
            return losses
        losses = ()
        for number, batch in enumerate(batches[:-1]):
            self._divided.begin_piece(number)
            with self._sync.micro_batch(last=False):
                loss = self._loss(batch.data)
                losses += (loss.item(),)
                self._sections.enter_computing(_BACKWARD)
                self._scaled(loss / len(batches)).backward()
                self._sections.enter_computing(_FORWARD)
        self._divided.begin_piece(len(batches) - 1)
        with self._sync.micro_batch(last=True):
            loss = self._loss(batches[-1].data)
            losses += (loss.item(),)
            self._last_backward(loss / len(batches), losses, tuple([batch.ordinal for batch in batches]))
        return losses

    def _loss(self, data: Any) -> torch.Tensor:
        loss = self._loss_fn(data)
        check_loss(loss)
        return loss

    def _last_backward(self, loss: torch.Tensor, losses: tuple[float, ...], ordinals: tuple[int, ...]) -> None:
        self._engine.remember_step()
        self._sections.enter_computing(_BACKWARD)
        is_void = self._guard.begin_vote(losses, ordinals)
        self._divided.is_reducing = True
        if is_void:
            with self._sync.voided():
                loss.backward()
        else:
            self._scaled(loss).backward()

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self._state.scaler is None else self._state.scaler.scale(loss)

    def _unscaled_norm(self, scaler: Any) -> float | None:
        """The gradient's norm, clipped on the way when asked; None when the gradient scaler drops this step itself."""
        for optimizer in self._state.optimizers:
            scaler.unscale_(optimizer)
        norm = self._clip()
        if not norm < float("inf") and scaler.get_scale() > 1.0:
            # Too large a loss scale is the scaler's everyday business, not a fault.
            self._scaler_step()
            self._zero_grad()
            return None
        return norm

    def _update(self, losses: tuple[float, ...], batch: Batch) -> None:
        guard = self._guard
        guard.rate.apply(self._state.optimizers)
        try:
            if self._state.scaler is not None:
                self._scaler_step()
            else:
                for optimizer in self._state.optimizers:
                    optimizer.step()
        except (MemoryError, RuntimeError) as error:
            self._divided.update_failed(error, batch)
        finally:
            guard.rate.undo()
        self._zero_grad()
        if self._settings.scheduler_every == "step":
            if self._state.schedulers:
                self._step_schedulers(_mean(losses))
        else:
            self._epoch_losses.append(_mean(losses))
            if self._source.ends_epoch(batch):
                self._step_schedulers(_mean(self._epoch_losses))
                self._epoch_losses.clear()

    def _step_schedulers(self, loss: float) -> None:
        for scheduler in self._state.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                # Its decision must not differ between ranks, so it is fed the mean over ranks.
                scheduler.step(self._engine.mean_over_ranks(loss))
            else:
                scheduler.step()
        self._guard.rate_monitor.accept()

    def _scaler_step(self) -> None:
        scaler = self._state.scaler
        assert scaler is not None
        for optimizer in self._state.optimizers:
            scaler.step(optimizer)
        scaler.update()

    def _zero_grad(self) -> None:
        for optimizer in self._state.optimizers:
            optimizer.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------ faults and ends

    def _heal(self, decision: Decision) -> None:
        decision = self._guard.act(decision)
        if self._trouble is None or decision.verdict is Verdict.FAILURE:
            self._trouble = decision
        self._engine.went_elsewhere()
        if decision.rung is Rung.RETRY:
            self._divided.go_back()
            return
        if decision.rung is Rung.ROLLBACK:
            self._engine.updating = self._divided.is_torn = False
        self._epoch_losses.clear()
        self._exhausted = False

    def _finish(self) -> bool:
        """The end of the run: its last state is proven sound and written. False when healing sent the run back."""
        decision = self._guard.seal()
        if decision is not None:
            self._heal(decision)
            return False
        self._engine.save_now(self._guard.step)
        return True


def _mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else sum(values) / len(values)


def check_loss(loss: object) -> None:
    """Refuses what is not a scalar that can be differentiated.

    Raises:
        ConfigError: says what was returned and what to return instead.
    """
    if not isinstance(loss, torch.Tensor):
        raise ConfigError(f"loss_fn returned {type(loss).__name__}. Return the loss as a scalar tensor.")
    if loss.numel() != 1:
        raise ConfigError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}. Return a scalar, such as loss.mean()."
        )
    if not loss.requires_grad:
        raise ConfigError(
            "loss_fn returned a loss without a gradient. Do not call it under torch.no_grad(), and do not detach or "
            ".item() the loss."
        )
