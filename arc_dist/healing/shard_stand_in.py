"""Taking part, after a rank's own step has failed, in the collectives of a sharded model (FSDP2).

The pass is done once more on a tiny batch: its collectives do not depend on the data. Those that the failed pass had
done already are left out, the others are done, with NaN in the gradients. See `stand_in` for what this is good for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from arc_dist.healing.stand_in import NotMatched


class _Traffic:
    """Collectives of sharded modules: counted, left out, made NaN."""

    def __init__(self) -> None:
        self.count = 0
        self.left_out = 0  # still to be left out
        self.is_void = False
        self.num_voided = 0


class _AllGather(DefaultAllGather):
    def __init__(self, traffic: _Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        traffic = self._traffic
        if traffic.left_out:
            traffic.left_out -= 1
            output_tensor.zero_()
            return None
        work = super().__call__(output_tensor, input_tensor, group, async_op)
        traffic.count += 1
        return work


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, traffic: _Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        traffic = self._traffic
        if traffic.left_out:
            traffic.left_out -= 1
            output_tensor.fill_(math.nan)
            return None
        if traffic.is_void:
            input_tensor.fill_(math.nan)
            traffic.num_voided += 1
        work = super().__call__(output_tensor, input_tensor, group, op, async_op)
        traffic.count += 1
        return work


class ShardStandIn:
    """For FSDP2 modules over one mesh dimension.

    Args:
        models: the training's models; each sharded one is a root.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._roots = [model for model in models if isinstance(model, FSDPModule)]
        self._traffic = _Traffic()
        self._began = 0  # count at the beginning of the micro-batch
        self._installed: list[tuple[Any, Any, Any]] = []
        self.obstacle = self._find_obstacle(models)
        if not self.obstacle:
            self._install(models)

    def _find_obstacle(self, models: Sequence[nn.Module]) -> str:
        if len(self._roots) != len(models):
            return "not every model is itself sharded by fully_shard"
        if not hasattr(FSDPModule, "reset_iter_state"):
            return "this version of torch cannot reset a sharded model after an error (2.13 can)"
        meshes = {p.device_mesh for model in models for p in model.parameters() if isinstance(p, DTensor)}
        if any(mesh.ndim > 1 for mesh in meshes):
            return "the model is sharded over several mesh dimensions"
        groups = [group for state in self._states(models) for group in state._fsdp_param_groups]
        comms = {type(group._all_gather_comm) for group in groups} | {
            type(group._reduce_scatter_comm) for group in groups
        }
        if comms - {DefaultAllGather, DefaultReduceScatter}:
            return "the model communicates in a way of its own"
        return ""

    @staticmethod
    def _states(models: Sequence[nn.Module]) -> list[Any]:
        sharded = [module for model in models for module in model.modules() if isinstance(module, FSDPModule)]
        return list({id(state): state for state in (module._get_fsdp_state() for module in sharded)}.values())

    def _install(self, models: Sequence[nn.Module]) -> None:
        all_gather, reduce_scatter = _AllGather(self._traffic), _ReduceScatter(self._traffic)
        for state in self._states(models):
            for group in state._fsdp_param_groups:
                self._installed.append((group, group._all_gather_comm, group._reduce_scatter_comm))
                group._all_gather_comm, group._reduce_scatter_comm = all_gather, reduce_scatter

    def remove(self) -> None:
        """Leaves the modules as they were."""
        for group, all_gather, reduce_scatter in self._installed:
            group._all_gather_comm, group._reduce_scatter_comm = all_gather, reduce_scatter
        self._installed.clear()

    def begin_micro_batch(self) -> None:
        """Before the forward of each micro-batch."""
        self._began = self._traffic.count

    def begin(self) -> None:
        """The failed pass is given up. A tiny one over the same micro-batch, and all that follow it, comes next."""
        traffic = self._traffic
        for root in self._roots:
            if root._get_fsdp_state()._is_root is not None:  # else it has not had a forward yet
                root.reset_iter_state()
        traffic.left_out = traffic.count - self._began
        traffic.is_void = True

    def end(self, *, must_void: bool) -> None:
        """After the tiny pass.

        Args:
            must_void: the peers can only learn of the failure from their gradients.

        Raises:
            NotMatched: it had other collectives than the failed pass, or none of its gradients reached the peers.
        """
        traffic = self._traffic
        left, voided = traffic.left_out, traffic.num_voided
        traffic.left_out, traffic.is_void, traffic.num_voided = 0, False, 0
        if left:
            raise NotMatched(f"a pass over a tiny batch has {left} collectives less than the one that failed.")
        if must_void and not voided:
            raise NotMatched("all gradients of this step had been reduced already.")
