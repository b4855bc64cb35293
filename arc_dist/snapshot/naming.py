"""Names of a job's tensors: fully qualified names as a checkpoint has them, whatever wraps the modules.

DDP, `torch.compile` and activation checkpointing put a module inside another and a word into every name. The names
here are those of the bare model, so that state moves between a wrapped and an unwrapped one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # the one base of BatchNorm, SyncBatchNorm and InstanceNorm
from torch.nn.parameter import is_lazy

from arc_dist.errors import ConfigError

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
else:  # pragma: no cover - builds of torch without distributed
    FSDPModule = FullyShardedDataParallel = DTensor = ()  # type: ignore[assignment,misc]

# Wrappers by the name of the one child that is the wrapped module.
_WRAPPER_CHILDREN = ("_orig_mod", "_checkpoint_wrapped_module")


@dataclasses.dataclass(frozen=True)
class NamedTensor:
    """A parameter or buffer with its name in the bare model.

    Attributes:
        name: without the leading ``model.``.
        tensor: the parameter or buffer itself; a DTensor under FSDP2.
        is_buffer: whether it is a buffer.
        moves: a buffer that a forward pass changes (running statistics).
    """

    name: str
    tensor: torch.Tensor
    is_buffer: bool
    moves: bool = False


def bare(module: nn.Module) -> nn.Module:
    """The module inside any wrappers."""
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
            continue
        for child in _WRAPPER_CHILDREN:
            if child in module._modules:
                break
        else:
            return module
        inner = module._modules[child]
        assert inner is not None
        module = inner


def walk(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every bare module once, with its prefix: ``""``, ``"blocks.0."``; with several models the model's key leads."""
    seen: set[int] = set()
    for key, model in models.items():
        yield from _walk("" if len(models) == 1 else f"{key}.", model, seen)


def _walk(prefix: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = bare(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(f"{prefix}{name}.", child, seen)


def named_tensors(models: Mapping[str, nn.Module]) -> list[NamedTensor]:
    """Parameters and buffers of all models, persistent or not. A tensor with several names (tied) has its first.

    Raises:
        ConfigError: one that has no values yet, or that cannot be copied byte for byte.
    """
    found: list[NamedTensor] = []
    seen: set[int] = set()
    for prefix, module in walk(models):
        if isinstance(module, FullyShardedDataParallel):
            raise ConfigError(
                f"module {prefix or 'model'} is a FullyShardedDataParallel (FSDP1), whose flat parameters are not "
                "supported. Use torch.distributed.fsdp.fully_shard.",
                module=prefix,
            )
        statistics = isinstance(module, _NormBase) and module.track_running_stats
        for entries, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for name, tensor in entries.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                _require_copyable(prefix + name, tensor)
                found.append(NamedTensor(prefix + name, tensor, is_buffer, moves=is_buffer and statistics))
    return found


def _require_copyable(name: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise ConfigError(
            f"{name} is not initialised yet (a lazy module). Run one forward pass before the guard is made.", name=name
        )
    if tensor.device.type == "meta":
        raise ConfigError(
            f"{name} is on the meta device and has no values. Materialise the model (to_empty, then initialise or "
            "load it) before the guard is made.",
            name=name,
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConfigError(
            f"{name} has layout {tensor.layout} and dtype {tensor.dtype}, which cannot be kept in a snapshot. Use a "
            "dense tensor.",
            name=name,
        )
