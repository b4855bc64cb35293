"""`Arc`: what users hold. It takes plain torch objects and neither wraps nor subclasses them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from arc_dist import elastic, inprocess
from arc_dist.checkpoint_store.tiers import Tier, parse_tiers
from arc_dist.config import Env
from arc_dist.engine import Engine, Resumed
from arc_dist.errors import ConfigError
from arc_dist.guard import Guard
from arc_dist.healing.microbatch import SplitFunction
from arc_dist.hooks import StepHooks, managed
from arc_dist.leaving import leave
from arc_dist.loop import GuardedLoop, LossFunction, StepResult, check_loss
from arc_dist.protocol.decision import Rung
from arc_dist.protocol.flags import Flag
from arc_dist.settings import Settings
from arc_dist.snapshot.state import TrainingState


@dataclasses.dataclass(frozen=True, slots=True)
class Action:
    """What `Arc.step` did about a loss; equal on all ranks.

    Attributes:
        kind: "apply" (go on), "skip" (drop this loss), "rollback", "checkpoint", "escape" or the name of a rung of the
            user's own (an older state was restored), "resume" (a state was restored from memory or the store at the
            start).
        step: updates applied so far.
        reason: why, for the log.
    """

    kind: str
    step: int
    reason: str = ""

    @property
    def rolled_back(self) -> bool:
        """True when this loss must not be used: no backward, no optimizer step."""
        return self.kind != "apply"


class Arc:
    """Keeps a training loop alive: monitors, votes, heals, snapshots, checkpoints.

    Args:
        model: a module (plain, DDP or FSDP2), or several by name: ``{"generator": g, "critic": c}``.
        optimizer: an optimizer, a sequence, or several by name. Their parameters must be the models'.
        scheduler: a learning-rate scheduler or several; `train` steps them.
        scaler: a ``torch.amp.GradScaler``, when fp16 is used.
        store: where checkpoints go: a directory or fsspec URL (``s3://...``), or several, fastest first:
            ``"/nvme/ckpt, s3://bucket/prefix"`` (see docs/store.md); default ``ARC_STORE``; None keeps none.
        run: name of the run inside the store.
        extras: further objects with ``state_dict``/``load_state_dict`` that are restored together with the rest.
        on_incident: called with each incident, a mapping as in ``incidents.jsonl``, on rank 0 in a thread of its own.
            It holds up no step; one that raises is told, and not called again after three times.
        **settings: see `arc_dist.settings.Settings`.

    Raises:
        ConfigError: an argument is wrong; the message says which and what to do.

    Constructing it does no I/O and does not communicate; `train`, `step` or `start` do, on every rank.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer],
        *,
        scheduler: Any = None,
        scaler: Any = None,
        store: str | os.PathLike[str] | Sequence[str] | None = None,
        run: str = "run",
        extras: Mapping[str, Any] | None = None,
        on_incident: Callable[[dict[str, Any]], object] | None = None,
        **settings: Any,
    ) -> None:
        known = {field.name for field in dataclasses.fields(Settings)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"Arc() has no setting {', '.join(unknown)}. Known settings: {', '.join(sorted(known))}.")
        env = Env.read()
        settings.setdefault("hang_deadline_s", env.hang_deadline_s)
        if not _by_name(optimizer):
            raise ConfigError("Arc() was given no optimizer. Give the one that trains the model's parameters.")
        self._state = TrainingState(
            models=_by_name(model),
            optimizers=_by_name(optimizer),
            schedulers=_listed(scheduler),
            scaler=scaler,
            extras=dict(extras or {}),
        )
        self._engine = Engine(
            self._state, Settings(**settings), tiers=_tiers(store if store is not None else env.store), run=run, env=env
        )
        if on_incident is not None and not callable(on_incident):
            raise ConfigError(f"on_incident must be callable with a mapping, got {type(on_incident).__name__}.")
        self._engine.on_incident = on_incident
        managed.update(self._state.optimizers)
        self._hooks: StepHooks | None = None
        self._training = False

    # ------------------------------------------------------------------ the full loop

    def train(
        self,
        loss_fn: LossFunction,
        loader: Iterable[Any],
        *,
        steps: int | None = None,
        epochs: int | None = None,
        exact: bool = True,
        split: SplitFunction | None = None,
    ) -> Iterator[StepResult]:
        """Trains, yielding one result per committed step. Every rank must iterate in step.

        Forward, backward, clipping, the vote, the update, schedulers, snapshots and checkpoints are done inside. It
        continues after the newest state found in memory or in the store, at the exact sample.

        Args:
            loss_fn: called with each batch as the loader yields it; returns a scalar loss.
            loader: any DataLoader or iterable; docs/data.md says what it must offer for exact resumption.
            steps: updates in the whole run, over as many epochs as needed.
            epochs: passes over the data in the whole run; one when neither is given.
            exact: stop when a loader cannot give the same batches again; False warns, and goes on at the same place.
            split: divides a batch that does not fit into memory: ``split(batch, parts)`` gives as many pairs of a part
                and the weight of its loss. Without it a batch is divided along the first dimension of its tensors, and
                the loss taken for a mean over samples (docs/oom.md).

        Raises:
            TrainingStopped: healing ran out of budget.
            Preempted: SIGTERM or another notice came; the state was saved (`PreemptedUnsaved`: was not).
            DataNotReproducible: the data cannot be resumed exactly.
        """
        if not callable(loss_fn):
            raise ConfigError(f"loss_fn must be callable with a batch, got {type(loss_fn).__name__}.")
        if self._training or self._hooks is not None:
            raise ConfigError("this Arc is in use already: call train() once, or step(), not both. Make a new Arc.")
        self._training = True
        inprocess.training.add(self)
        engine = self._engine
        try:
            engine.start(norm_is_global=self._clipped_everywhere(), owns_backward=True)
            source = engine.open_data(loader, steps=steps, epochs=epochs, exact=exact)
            loop = GuardedLoop(engine, loss_fn, source, steps, split)
            engine.resume(data=source, warm_up=loop.warm_up)
            elastic.tell_worlds(engine, source, epochs=epochs)
            yield from loop.run()
        except Exception as error:
            self.abandon(error)
            raise
        finally:
            engine.close()
            self._training = False

    def abandon(self, error: BaseException) -> None:
        """Gives up at once, because of `error`. Local: the other ranks may be gone, so nothing waits for them."""
        if inprocess.stays() and self._engine.between:
            self._engine.part(error)
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        self._engine.close(abort=True)
        self._engine.let_go_of_data()

    def _clipped_everywhere(self) -> bool:
        settings = self._engine.settings
        return settings.max_grad_norm is not None and self._state.scaler is None

    # ------------------------------------------------------------------ the three lines

    def step(self, loss: torch.Tensor) -> Action:
        """Judges `loss` together with all ranks, before backward. Every rank must call this; it waits for the vote.

        Use: ``action = arc.step(loss)``, then ``if not action.rolled_back: loss.backward(); optimizer.step()``. The
        gradient is judged when the optimizer steps: a bad one makes that step do nothing, on every rank. The data is
        the script's own: after a rollback it goes on with the next batch.

        Raises:
            TrainingStopped: healing ran out of budget.
            Preempted: as in `train`; the loss was not used.
        """
        if self._training:
            raise ConfigError("step() belongs to a loop of your own; inside train() everything is done already.")
        check_loss(loss)
        if self._hooks is None:
            resumed = self.start()
            if resumed is not None:
                return Action("resume", resumed.step, f"restored step {resumed.step} from {resumed.tier}")
        assert self._hooks is not None
        self._engine.heed_notices()
        decision = self._hooks.judge_loss(loss.item())
        if self._engine.guard.agreed & Flag.PREEMPT:
            self._leave(self._hooks)
        step = self._engine.guard.step
        if decision is None or decision.rung is Rung.APPLY:
            return Action("apply", step)
        return Action(decision.action, step, decision.reason)

    def _leave(self, hooks: StepHooks) -> NoReturn:
        try:
            leave(self._engine)
        finally:
            hooks.remove()
            self._engine.close(abort=True)

    def start(self) -> Resumed | None:
        """Starts the three-line form before the first loss, and restores what there is to restore.

        Optional: the first `step` does it, and then returns the action "resume" for the loss of the stale weights.
        Every rank must call this; it blocks. Returns None when training starts afresh.
        """
        engine = self._engine
        inprocess.training.add(self)
        engine.start(norm_is_global=False)
        resumed = engine.resume()
        self._hooks = StepHooks(engine)
        return resumed

    def observe(self, name: str, value: float) -> None:
        """Tells the layer a number of the script's own, such as a validation loss, found after the present step.

        The newest value of each name goes into the manifests of the checkpoints to come (retention can keep the best:
        ``?keep=last=3;best=val_loss:2``), and the best so far is remembered across rollbacks and restarts. Local: no
        rank waits for another, and rank 0's values are those that manifests show.

        Raises:
            ConfigError: no name, not a number, or training has not begun.
        """
        if not self._engine.started:
            raise ConfigError("observe() was called before training began. Call it inside the loop.")
        guard = self._engine.guard
        guard.observed.add(name, value, guard.step)
        guard.monitoring.metric(name, guard.step, float(value))

    @contextlib.contextmanager
    def section(self, name: str, *, deadline_s: float | None = None) -> Iterator[None]:
        """Names what this rank is doing, such as an evaluation or a download: ``with arc.section("evaluate"): ...``

        What takes long in the loop's body or inside `loss_fn` gets a limit of its own that way, learned by its name,
        and is named when a rank hangs in it (docs/hangs.md). Local: no rank waits for another. Works in every form of
        use, also before training began; only in the thread that trains.

        Args:
            name: at most 48 bytes; at most 48 different ones.
            deadline_s: how long it may take, in seconds; None learns it, 0 is for ever.

        Raises:
            ConfigError: the name or the deadline cannot be used.
        """
        env, sections = self._engine.env, self._engine.sections
        if not sections.is_attached:
            sections.attach(env.shm_dir, env.generation)
        with sections.named(name, deadline_s):
            yield

    def best(self, name: str, *, largest: bool = False) -> tuple[float, int] | None:
        """The smallest (or largest) value of `name` so far and the step it belongs to, also from before a restart."""
        guard: Guard | None = getattr(self._engine, "guard", None)
        return guard.observed.best(name, largest=largest) if guard is not None else None

    @property
    def steps_done(self) -> int:
        """Updates applied in the whole run, including those before a restart."""
        return self._engine.guard.step if self._engine.started else 0

    def close(self) -> None:
        """Writes a last checkpoint when there is a store, and gives memory and threads back.

        The full loop does this by itself. Every rank must call this; it blocks.
        """
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
            if self._engine.store is not None and self._engine.guard.seal() is None:
                self._engine.save_now(self._engine.guard.step)
            self._engine.close()

    def __enter__(self) -> Arc:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._engine.close(abort=True)


def _by_name(items: Any) -> dict[str, Any]:
    """One object, a sequence or a mapping as a mapping; the single object's name is empty."""
    if isinstance(items, Mapping):
        return {str(name): item for name, item in items.items()}
    if isinstance(items, (list, tuple)):
        return {str(i): item for i, item in enumerate(items)} if len(items) != 1 else {"": items[0]}
    return {"": items}


def _tiers(store: str | os.PathLike[str] | Sequence[str] | None) -> tuple[Tier, ...]:
    if store is None:
        return ()
    return parse_tiers(os.fspath(store) if isinstance(store, (str, os.PathLike)) else store)


def _listed(items: Any) -> list[Any]:
    if items is None:
        return []
    if isinstance(items, Mapping):
        return list(items.values())
    return list(items) if isinstance(items, (list, tuple)) else [items]
