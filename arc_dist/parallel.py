"""What kind of data parallelism a model uses, and the few things the loop must do differently for it."""

from __future__ import annotations

import contextlib
import enum
import math
import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class Parallelism(enum.Enum):
    """How gradients of the ranks become one.

    NONE: one process. REPLICATED: DDP, every rank ends up with the same gradient. SHARDED: FSDP2, every rank holds its
    part of the same gradient. UNKNOWN: several ranks, but the reduction (if any) is the script's own.
    """

    NONE = "none"
    REPLICATED = "ddp"
    SHARDED = "fsdp2"
    UNKNOWN = "unknown"


def parallelism(models: Iterable[nn.Module], world_size: int) -> Parallelism:
    """Looks at the modules; never communicates."""
    if world_size == 1:
        return Parallelism.NONE
    models = list(models)
    if is_sharded(models):
        return Parallelism.SHARDED
    if models and all(ddp_modules(model) for model in models):
        return Parallelism.REPLICATED
    return Parallelism.UNKNOWN


def needs_warm_up(models: Iterable[nn.Module], world_size: int, step: int) -> bool:
    """Whether a fresh process that goes on from `step` needs one throw-away forward and backward before it.

    DDP sums gradients bucket by bucket, and rebuilds its buckets after the first backward. A fresh process that goes on
    from step > 0 would sum its first step in the order of the first buckets, the undisturbed run in that of the rebuilt
    ones: not the same bits with three ranks or more. A throw-away pass makes the order right.
    """
    wrappers = [module for model in models for module in ddp_modules(model)]
    rebuilds = any(not module.find_unused_parameters for module in wrappers)
    return rebuilds and world_size > 2 and step > 0


def is_sharded(models: Iterable[nn.Module]) -> bool:
    """Whether any parameter is a DTensor."""
    return any(isinstance(parameter, DTensor) for model in models for parameter in model.parameters())


def ddp_modules(model: nn.Module) -> list[DistributedDataParallel]:
    """The DDP wrappers inside `model`, itself included."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def gradients_reach_all(models: Iterable[nn.Module], world_size: int) -> bool:
    """Whether a NaN in one rank's gradient makes every rank's gradient NaN: plain DDP over all ranks."""
    modules = [ddp_modules(model) for model in models]
    return all(modules) and all(
        # What a communication hook of the user's makes of a NaN is not known; some remember it.
        not module._comm_hooks and module.process_group is not None and module.process_group.size() == world_size
        for wrappers in modules
        for module in wrappers
    )


class GradientSync:
    """Switches the reduction of gradients off for all but the last micro-batch of a step."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        models = list(models)
        self._ddp = [module for model in models for module in ddp_modules(model)]
        self._fsdp: list[FSDPModule] = [model for model in models if isinstance(model, FSDPModule)]

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one of several micro-batches."""
        for module in self._fsdp:
            module.set_requires_gradient_sync(last)
            module.set_is_last_backward(last)
        return _NOTHING if last else self._no_sync()

    @contextlib.contextmanager
    def voided(self) -> Iterator[None]:
        """Within it, every gradient that flows into a DDP module's parameter is NaN before it is reduced."""
        parameters = [p for module in self._ddp for p in module.parameters() if p.requires_grad]
        handles = [parameter.register_hook(_voided) for parameter in parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in self._ddp:
                stack.enter_context(module.no_sync())
            yield


def _voided(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * math.nan


_GRADIENT = operator.attrgetter("grad")
_NOTHING = contextlib.nullcontext()


class Clipper:
    """Measures the norm of all gradients at each step, and clips them to `max_norm` unless it is None.

    The gradients become, bit for bit, what ``torch.nn.utils.clip_grad_norm_`` makes of them. That multiplies by 1 where
    nothing has to be clipped, so as not to ask for the norm; here the norm is asked for anyway, so where gradients lie
    in the host's memory that pass over them is left out.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], max_norm: float | None, *, sharded: bool) -> None:
        self._parameters = parameters
        self._given = max_norm
        self._sharded = sharded
        is_uniform = len({(parameter.device.type, parameter.dtype) for parameter in parameters}) == 1
        self._is_on_host = is_uniform and not sharded and parameters[0].device.type == "cpu"
        self.tighten(1.0)

    def tighten(self, factor: float) -> None:
        """From now on clips to `factor` times the norm that was given, if one was."""
        self._max_norm = max_norm = None if self._given is None else self._given * factor
        # Torch's coefficient is max_norm / (norm + 1e-6). Below this it is at least 1, also after rounding to bfloat16.
        self._unclipped = math.inf if max_norm is None else 0.99 * max_norm - 1e-6

    def __call__(self) -> float:
        """The L2 norm of all gradients before clipping. On a GPU it waits for the backward pass."""
        if not self._is_on_host:
            return clip_or_measure(self._parameters, self._max_norm, sharded=self._sharded).item()
        gradients = [gradient for gradient in map(_GRADIENT, self._parameters) if gradient is not None]
        if not gradients:
            return 0.0
        with torch.no_grad():
            total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        norm = total.item()
        if not norm < self._unclipped and self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, total)
        return norm


def clip_or_measure(parameters: Sequence[torch.Tensor], max_norm: float | None, *, sharded: bool) -> torch.Tensor:
    """The L2 norm of all gradients before clipping; clips them to `max_norm` unless it is None.

    With clipping this does what ``torch.nn.utils.clip_grad_norm_`` does, bit for bit, and needs no pass of its own;
    under FSDP2 the shards' norms are reduced once, and the result is the same number on every rank. Without clipping
    it is one foreach pass; under FSDP2 the norm of this rank's shards only, without communication.
    """
    if max_norm is not None and not sharded:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if max_norm is None:
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        local = [gradient for gradient in local if gradient.numel()]
        if not local:
            return torch.zeros(())
        norms = torch._foreach_norm(local)
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]))
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
