"""Guarding optimizer steps that belong to the script: the three-line form, and scripts that know nothing of us.

Torch calls hooks before and after every ``optimizer.step()``. The one before judges the gradient together with all
ranks; a bad gradient is answered by setting every ``.grad`` to None, which makes the step a bit-exact no-op for torch's
optimizers (and under ``GradScaler.step``). The one after counts the update and takes snapshots, at the one moment of a
foreign loop at which the state is whole.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from arc_dist import inprocess
from arc_dist.config import Env
from arc_dist.coordinator.following import follow
from arc_dist.guard import Guard
from arc_dist.healing.vote import Voter
from arc_dist.parallel import Parallelism, clip_or_measure, parallelism
from arc_dist.protocol.decision import Decision, Rung
from arc_dist.protocol.hangs import HangPolicy, Section
from arc_dist.sections import Sections
from arc_dist.settings import Settings
from arc_dist.snapshot.layout import Phase, StatusPage
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.state import TrainingState
from arc_dist.telemetry.log import logger, set_up_logging
from arc_dist.telemetry.recorder import Recorder, append_line

if TYPE_CHECKING:
    from arc_dist.engine import Engine

managed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers that an `Arc` looks after; the global hooks leave them alone."""


class ClipListener:
    """Overhears the norm that ``torch.nn.utils.clip_grad_norm_`` computes, so that judging it costs no second pass.

    It stands in for the function inside torch that computes the norm. Where a later torch has none of that name,
    nothing is overheard and the norm is computed again: slower, not wrong.
    """

    _NAMES = ("_get_total_norm", "get_total_norm")

    def __init__(self) -> None:
        self._heard: tuple[int, torch.Tensor] | None = None
        self._originals = {name: getattr(clip_grad, name) for name in self._NAMES if hasattr(clip_grad, name)}

    def install(self) -> None:
        for name, original in self._originals.items():
            setattr(clip_grad, name, self._wrap(original))

    def remove(self) -> None:
        for name, original in self._originals.items():
            setattr(clip_grad, name, original)

    def _wrap(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def get_total_norm(tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            norm = original(tensors, *args, **kwargs)
            if args[:1] in ((), (2.0,)) and kwargs.get("norm_type", 2.0) == 2.0:
                self._heard = (len(tensors), norm)
            return norm

        return get_total_norm

    def take(self, num_gradients: int) -> torch.Tensor | None:
        """The norm heard since the last call, when it was over as many gradients and is a plain tensor."""
        heard, self._heard = self._heard, None
        if heard is None or heard[0] != num_gradients or type(heard[1]) is not torch.Tensor:
            return None
        return heard[1]


class OptimizerJudge:
    """Judges and counts the steps of some optimizers on behalf of a guard."""

    def __init__(self, guard: Guard, listener: ClipListener, on_commit: Callable[[], None] | None = None) -> None:
        self._guard = guard
        self._listener = listener
        self._optimizers = list(guard.state.optimizers)
        self._stepped: set[int] = set()  # optimizers that have stepped since the last commit
        self._voided = False
        self._on_commit = on_commit
        self._began = False
        self._last_commit = 0.0

    def begin(self) -> None:
        """Before the first step: the first snapshot."""
        if not self._began:
            self._began = True
            self._guard.sections.begin_step(self._guard.step + 1, Section.CHECKPOINT)
            self._guard.boundary()
            self._guard.sections.enter(Section.SCRIPT)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The pre-step hook."""
        guard = self._guard
        index = next(i for i, own in enumerate(self._optimizers) if own is optimizer)
        if index in self._stepped:
            self._commit()  # another round begins, though not every optimizer took part in the last
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        num_gradients = sum(parameter.grad is not None for parameter in parameters)
        self._voided = num_gradients == 0
        guard.sections.enter(Section.VOTE)
        heard = self._listener.take(num_gradients)
        norm = heard if heard is not None else clip_or_measure(parameters, None, sharded=False)
        decision = guard.conclude_gradient(norm.item(), index)
        if decision is not None and decision.rung is not Rung.APPLY:
            guard.act(decision)
            for parameter in parameters:
                parameter.grad = None
            self._voided = True
            self._stepped.clear()
            guard.sections.enter(Section.SCRIPT)
            return
        guard.sections.enter(Section.UPDATE)
        guard.rate.undo()  # in case the last step raised between its hooks
        guard.rate.apply([optimizer])

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The post-step hook."""
        self._guard.rate.undo()
        if self._voided:
            return
        self._guard.sections.enter(Section.SCRIPT)
        self._stepped.add(next(i for i, own in enumerate(self._optimizers) if own is optimizer))
        if len(self._stepped) == len(self._optimizers):
            self._commit()

    def _commit(self) -> None:
        self._stepped.clear()
        self._guard.committed()
        now = time.perf_counter()
        if self._last_commit:
            self._guard.observe(now - self._last_commit)
        self._guard.sections.begin_step(self._guard.step + 1, Section.CHECKPOINT)
        self._guard.boundary()
        self._guard.sections.enter(Section.SCRIPT)
        self._last_commit = time.perf_counter()
        if self._on_commit is not None:
            self._on_commit()


class StepHooks:
    """The three-line form: hooks on the `Arc`'s own optimizers, and the vote on each loss."""

    def __init__(self, engine: Engine) -> None:
        self._guard = engine.guard
        self._listener = ClipListener()
        self._listener.install()
        self._judge = OptimizerJudge(engine.guard, self._listener, engine.progressed)
        self._handles = []
        for optimizer in engine.state.optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self._judge.before_step(optimizer)),
                optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._judge.after_step(optimizer)),
            ]

    def judge_loss(self, loss: float) -> Decision | None:
        """Votes on a loss before its backward; acts when something is wrong. Every rank must call this; it blocks."""
        self._judge.begin()
        self._guard.sections.enter(Section.VOTE)
        self._guard.begin_vote((loss,), ())
        decision = self._guard.conclude(None)
        if decision is not None:
            decision = self._guard.act(decision)
        self._guard.sections.enter(Section.SCRIPT)
        return decision

    def remove(self) -> None:
        """Leaves the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._listener.remove()


class ScriptGuard:
    """Guards every optimizer of a script that knows nothing of us, through torch's global hooks.

    What it cannot know it leaves alone: the loss is not seen, so faults are found in the gradient, the weights and the
    optimizer state; after a rollback the script goes on with its next batch, its own schedule and its own RNG. After a
    restart of the process the script starts from its beginning (from its own checkpoint, if it keeps any).
    """

    def __init__(self) -> None:
        self._env = Env.read()
        self._listener = ClipListener()
        self._judges: weakref.WeakKeyDictionary[torch.optim.Optimizer, OptimizerJudge] = weakref.WeakKeyDictionary()
        self._modules: list[weakref.ref[nn.Module]] = []
        self._rings: list[SnapshotRing] = []
        self._recorder: Recorder | None = None
        self._status = StatusPage.open(self._env.shm_dir) if self._env.shm_dir is not None else None
        self._seen = nn.modules.module.register_module_forward_pre_hook(self._see_module)
        self._listener.install()
        inprocess.at_reentry(self._renew)
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: self._before(optimizer))
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: self._after(optimizer))

    def abandon(self, error: BaseException) -> None:
        """Gives up all optimizers because of `error`. Local; their guards hold process groups, which must go."""
        for ring in self._rings:
            ring.close()
        self._rings.clear()
        self._modules.clear()
        self._judges.clear()

    def _renew(self) -> None:
        """The script's function is called again: its optimizers will be others, in another generation."""
        self._env = Env.read()
        self._seen.remove()
        self._seen = nn.modules.module.register_module_forward_pre_hook(self._see_module)

    def _see_module(self, module: nn.Module, inputs: Any) -> None:
        """Remembers the modules of the first forward pass, outermost first: one of them is the optimizer's model."""
        self._modules.append(weakref.ref(module))

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer in managed:
            return
        judge = self._judges.get(optimizer)
        if judge is None:
            judge = self._judges[optimizer] = self._adopt(optimizer)
            judge.begin()
        judge.before_step(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        judge = self._judges.get(optimizer)
        if judge is not None:
            judge.after_step(optimizer)

    def _adopt(self, optimizer: torch.optim.Optimizer) -> OptimizerJudge:
        """Makes a guard for an optimizer at its first step. Every rank gets here at the same step."""
        inprocess.training.add(self)
        settings, env = Settings(), self._env
        voter = Voter(timeout_s=settings.vote_timeout_s)
        set_up_logging(level=env.log_level, rank=voter.rank, world_size=voter.world_size)
        model = self._model_of(optimizer)
        kind = parallelism([model], voter.world_size)
        if self._recorder is None and voter.rank == 0:
            self._recorder = Recorder(self._sender())
        ring = SnapshotRing(None, slots=settings.snapshots, root=env.shm_root)
        self._rings.append(ring)
        guard = Guard(
            state=TrainingState(models={"": model}, optimizers={"": optimizer}, schedulers=[], scaler=None, extras={}),
            settings=settings,
            voter=voter,
            ring=ring,
            replicated=kind is Parallelism.REPLICATED,
            norm_is_global=False,
            generation=env.generation,
            record=self._recorder.record if self._recorder is not None else None,
            sections=self._sections(),
            restore_rates=False,
        )
        guard.watch.begin(guard.step)
        logger.info("guarding %s (%s, %d ranks)", type(optimizer).__name__, kind.value, voter.world_size)
        return OptimizerJudge(guard, self._listener, lambda: self._progressed(guard))

    def _sections(self) -> Sections:
        """What is learned is the votes alone: what such a script does between two steps may rightly take long."""
        env = self._env
        sections = Sections(HangPolicy(deadline_s=env.hang_deadline_s, unseen_s=0.0), 0.0)
        sections.attach(env.shm_dir, env.generation)
        return sections

    def _progressed(self, guard: Guard) -> None:
        self._seen.remove()
        if self._status is not None:
            self._status.write(phase=Phase.NONE, step=guard.step, generation=self._env.generation)

    def _sender(self) -> Callable[[dict[str, Any]], object]:
        env = self._env
        if env.coordinator is None or env.token is None:
            return lambda line: append_line(env.run_dir, line)
        client = follow(env)
        return lambda line: client.incident(**line)

    def _model_of(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The outermost module seen that has all of the optimizer's parameters; else just those parameters."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        wanted = {id(parameter) for parameter in parameters}
        for reference in self._modules:
            module = reference()
            if module is not None and wanted <= {id(parameter) for parameter in module.parameters()}:
                return module
        return nn.ParameterList(_unique(parameters))


def _unique(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())


_script_guard: ScriptGuard | None = None


def guard_script() -> None:
    """Installs the global hooks, once per process; called by the launcher before the script runs."""
    global _script_guard
    if _script_guard is None:
        _script_guard = ScriptGuard()
