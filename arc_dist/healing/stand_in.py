"""Taking part, after a rank's own step has failed, in the collectives that its peers are in.

A rank that runs out of memory leaves its peers in the middle of a step: they wait in the reduction of gradients, or in
the gathering of parameters, for a rank that will not come. A stand-in makes the rank come after all, with values that
are not finite, so that every rank sees at the end of this very step that it must not be used.

Here for DDP: the buckets that the failed backward has not sent are filled with NaN and sent. `shard_stand_in` is for
FSDP2. Where it cannot be known to match, `obstacle` says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arc_dist.errors import InfrastructureError


class NotMatched(InfrastructureError):
    """The collectives of this step cannot be completed on this rank; only a restart helps."""


class ReplicaStandIn:
    """For one DDP module.

    Args:
        modules: all DDP modules of the training.
    """

    def __init__(self, modules: Sequence[DistributedDataParallel]) -> None:
        self._module = modules[0]
        self._entered = False  # the module's forward was entered in this step
        self._entered_twice = False  # in any micro-batch so far
        self._is_several = False  # micro-batches in this step
        self._watches = False
        self.obstacle = self._find_obstacle(modules)
        if not self.obstacle and self._module.forward_sync_buffers and list(self._module.module.buffers()):
            # DDP broadcasts buffers in a forward pass, just before the wrapped module's own forward.
            self._watches = True
            self._hook = self._module.module.register_forward_pre_hook(self._note)

    def _find_obstacle(self, modules: Sequence[DistributedDataParallel]) -> str:
        module = modules[0]
        if len(modules) > 1:
            return f"there are {len(modules)} DDP modules, whose reductions may come in any order"
        if module.static_graph:
            return "the DDP module has a static graph"
        if module._use_python_reducer or module._delay_all_reduce_all_params or module.mixed_precision is not None:
            return "the DDP module reduces in a way of its own (compiled, delayed or in mixed precision)"
        if any(module._build_params_for_reducer()[1]):
            return "the DDP module has sparse gradients"
        return ""

    def _note(self, module: nn.Module, inputs: Any) -> None:
        if self._entered and not self._is_several:
            self._entered_twice = True
        self._entered = True

    def begin_step(self, num_micro_batches: int) -> None:
        """Before the first forward of a step."""
        if self._watches:
            # Several micro-batches enter the module several times, of which only the first one broadcasts.
            self._is_several = num_micro_batches > 1
            self._entered = False

    def remove(self) -> None:
        """Leaves the module as it was."""
        if self._watches:
            self._hook.remove()

    def complete(self, *, is_reducing: bool, is_first: bool) -> None:
        """Does what is left of this step's collectives, with NaN for gradients. Blocks until the peers did the same.

        Args:
            is_reducing: the backward that reduces had begun, and some buckets may have been sent.
            is_first: no gradient of an earlier micro-batch of this step is there.

        Raises:
            NotMatched: something else than expected was found.
        """
        module = self._module
        parameters, _ = module._build_params_for_reducer()
        try:
            if is_reducing:
                self._void_the_rest(parameters, is_first)
            else:
                self._forward(parameters)
                torch.autograd.backward(parameters, [_nan_like(parameter) for parameter in parameters])
            module._check_reducer_finalized()
        except RuntimeError as error:
            raise NotMatched(f"the reduction of gradients cannot be completed: {error}") from error

    def _forward(self, parameters: Sequence[nn.Parameter]) -> None:
        """What DDP does around a forward pass, without the pass."""
        module = self._module
        if self._entered_twice:
            raise NotMatched("the model has buffers and is called more than once for a loss.")
        if module.reducer._rebuild_buckets():  # in the second step; does nothing when it has been done
            module._has_rebuilt_buckets = True
        if self._watches and not self._entered:
            module._sync_buffers()
        for parameter in parameters:
            parameter.grad = None
        outputs = [parameter.view_as(parameter) for parameter in parameters] if module.find_unused_parameters else []
        module.reducer.prepare_for_backward(outputs)
        module.require_forward_param_sync = True

    def _void_the_rest(self, parameters: Sequence[nn.Parameter], is_first: bool) -> None:
        """Makes each gradient NaN that the failed backward has not made."""
        if not is_first and not self._module._has_rebuilt_buckets and not self._module.find_unused_parameters:
            # DDP would note twice, for its new buckets, the gradients that have been made, and these cannot be told.
            raise NotMatched("DDP has not arranged its buckets before the second step.")
        for parameter in parameters:
            if is_first and parameter.grad is not None:
                continue
            try:
                torch.autograd.backward(parameter, _nan_like(parameter))
            except RuntimeError as error:
                if "ready only once" not in str(error):
                    raise


def _nan_like(parameter: torch.Tensor) -> torch.Tensor:
    return torch.full((), math.nan, dtype=parameter.dtype, device=parameter.device).expand_as(parameter)
