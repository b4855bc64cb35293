"""Which ranks hold the same state: the key by which a snapshot of one rank can stand in for another's.

Equal names and shapes are not enough: ranks that each train a model of their own have those too. So a key is made only
where a wrapper promises that gradients are averaged over a group of ranks, and that group is part of the key:

* DDP: all ranks of its process group hold the same parameters.
* HSDP (`fully_shard` on a mesh of replicas and shards): ranks with the same offsets in every parameter do.
* Plain FSDP2, parameters that no wrapper knows, several ways mixed in one parameter: no key.

The key speaks of parameters alone. What an optimizer keeps lies as its parameter does, except in a
ZeroRedundancyOptimizer, with which there is no key; and buffers that a forward pass changes are a rank's own, which it
keeps beside its random state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arc_dist.checkpoint_store.format import FAST_HASH, new_hash
from arc_dist.snapshot.naming import DTensor, FSDPModule, named_tensors
from arc_dist.snapshot.state import TrainingState

_KEY_BITS = 63  # travels as a whole number that is not negative


def replica_key(state: TrainingState) -> int:
    """The key of this rank's state. Never communicates; looks at the models as they are wrapped now.

    Returns:
        A number of 63 bits that is equal on two ranks only if they are replicas; 0 where nothing promises replicas.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return 0
    if any(_shares_out(optimizer) for optimizer in state.optimizers):
        return 0
    specs = {spec.name: spec for spec in state.tensors()[0]}
    averaged = _averaged_by_ddp(state.models)
    rows: list[list[Any]] = []
    has_replicas = False
    for named in named_tensors(state.models):
        if named.is_buffer:
            continue
        sharded = isinstance(named.tensor, DTensor)
        group = averaged.get(id(named.tensor))
        if sharded == (group is not None):
            return 0  # nobody averages it, or two do
        group = _ranks_of_mesh(named.tensor) if group is None else group
        spec = specs[f"model.{named.name}"]
        rows.append([spec.name, spec.dtype, spec.shape, spec.global_shape, spec.offsets, group])
        has_replicas = has_replicas or not sharded or _is_repeated(named.tensor)
    if not has_replicas:
        return 0
    digest = new_hash(FAST_HASH)
    digest.update(json.dumps(sorted(rows)).encode())
    return int(digest.hexdigest()[:16], 16) >> (64 - _KEY_BITS) or 1


def reshards(state: TrainingState, key: int) -> bool:
    """Has FSDP2 put the sharded parameters back, also in the middle of a forward pass that will never end.

    `FSDPModule.reshard` does nothing in a forward pass of a module that stays gathered after it, as the outermost does.

    Args:
        state: of a process that will train no more.
        key: its replica key when it began.

    Returns:
        Whether the state is laid out as it was then.
    """
    for model in state.models.values():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(True, recurse=False)  # type: ignore[attr-defined]
                module.reshard()  # type: ignore[attr-defined]
    return replica_key(state) == key


def _averaged_by_ddp(models: Mapping[str, nn.Module]) -> dict[int, list[int]]:
    """The ranks over which DDP averages a parameter's gradient, by the parameter's id."""
    found: dict[int, list[int]] = {}
    for model in models.values():
        for wrapper in model.modules():
            if not isinstance(wrapper, DistributedDataParallel) or wrapper._comm_hooks or wrapper.process_group is None:
                continue  # some hooks leave replicas different on purpose
            ranks: Sequence[int] = dist.get_process_group_ranks(wrapper.process_group)
            if len(ranks) < 2:
                continue
            for name, parameter in wrapper.module.named_parameters():
                if name not in wrapper.parameters_to_ignore:
                    found[id(parameter)] = list(ranks)
    return found


def _ranks_of_mesh(tensor: torch.Tensor) -> Any:
    return tensor.device_mesh.mesh.tolist()  # type: ignore[attr-defined]


def _is_repeated(tensor: torch.Tensor) -> bool:
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return any(placement.is_replicate() and mesh.size(dim) > 1 for dim, placement in enumerate(placements))


def _shares_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each rank keeps the state of its own part of the parameters (not imported: that would take a second)."""
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)
