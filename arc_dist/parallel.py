"""What kind of data parallelism a model uses, and the few things the loop must do differently for it."""

from __future__ import annotations

import contextlib
import enum
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
    if any(isinstance(parameter, DTensor) for model in models for parameter in model.parameters()):
        return Parallelism.SHARDED
    if models and all(ddp_modules(model) for model in models):
        return Parallelism.REPLICATED
    return Parallelism.UNKNOWN


def ddp_modules(model: nn.Module) -> list[DistributedDataParallel]:
    """The DDP wrappers inside `model`, itself included."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


class GradientSync:
    """Switches the reduction of gradients off for all but the last micro-batch of a step."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        models = list(models)
        self._ddp = [module for model in models for module in ddp_modules(model)]
        self._fsdp: list[FSDPModule] = [model for model in models if isinstance(model, FSDPModule)]

    def micro_batch(self, *, last: bool, only: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `only` is the usual step without accumulation."""
        if only or not (self._ddp or self._fsdp):
            return _NOTHING
        for module in self._fsdp:
            module.set_requires_gradient_sync(last)
            module.set_is_last_backward(last)
        return _NOTHING if last else self._no_sync()

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in self._ddp:
                stack.enter_context(module.no_sync())
            yield


_NOTHING = contextlib.nullcontext()


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
