"""Where a gradient that is not finite came from: which rank and which layer, before the reduction hid it.

After DDP's or FSDP2's reduction every rank holds the same NaN. On request (the monitor ``gradient_origin``) each rank
remembers the norm of what its own backward made, and the exchange of details after a fault names the rank and the
layers. Nothing waits for these norms in a healthy step, but each takes a pass over a gradient, so it is not in any
preset.

Under DDP, and in one process, it is each parameter's own gradient. FSDP2 gives no access to a parameter's gradient
before its reduce-scatter; there it is the gradient that flows into each module with parameters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from arc_dist.monitors.base import Finding
from arc_dist.protocol.flags import Flag

_MAX_NORMS = 1 << 16  # of one step, with many micro-batches; the oldest are forgotten


class GradientOrigin:
    """Hooks that remember the norms of a step's local gradients.

    Args:
        parameters: with their names; hooked where `modules` is empty.
        modules: with their prefixes; hooked under FSDP2.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, torch.Tensor]], modules: Iterable[tuple[str, nn.Module]] = ()
    ) -> None:
        self._norms: list[tuple[str, torch.Tensor]] = []
        self._handles: list[Any] = []
        modules = list(modules)
        for prefix, module in modules:
            if any(True for _ in module.parameters(recurse=False)):
                self._handles.append(module.register_forward_hook(self._forward_hook(prefix.rstrip(".") or "model")))
        for name, parameter in () if modules else parameters:
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._backward_hook(name)))

    def _backward_hook(self, name: str) -> Any:
        def remember(gradient: torch.Tensor) -> None:
            values = gradient._values() if gradient.is_sparse else gradient
            self._norms.append((name, torch.linalg.vector_norm(values.detach())))
            if len(self._norms) > _MAX_NORMS:
                del self._norms[: _MAX_NORMS // 2]

        return remember

    def _forward_hook(self, name: str) -> Any:
        def follow(module: nn.Module, inputs: Any, outputs: Any) -> None:
            for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
                if isinstance(output, torch.Tensor) and output.requires_grad:
                    output.register_hook(self._backward_hook(name))

        return follow

    def begin(self) -> None:
        """A new step begins: what the last one made is of no interest any more."""
        self._norms.clear()

    def findings(self) -> list[Finding]:
        """The layers whose gradient was not finite in this step on this rank, in the order of the backward pass."""
        found: dict[str, float] = {}
        for name, norm in self._norms:
            value = float(norm)
            if not math.isfinite(value):
                found.setdefault(name, value)
        return [Finding(Flag.GRAD_NONFINITE, f"gradient_origin: {name}", value, None) for name, value in found.items()]

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
