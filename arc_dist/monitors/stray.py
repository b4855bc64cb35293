"""Stray writes: a weight may change from one step to the next only by what the optimizer applied.

After an update a part of the weights is hashed, and again right before the next update. Between the two nothing writes
to weights, so a difference is a flipped bit or a write that went astray, however small. The part rolls over all
weights. How much of them it covers at a time follows from the time it may take: everything where a step is long against
a pass over the weights, less where it is not. What happens outside the part that is being watched is not seen here;
with replicas (DDP) the comparison of their digests sees it.

A script may write to its weights between two steps itself: clamping (WGAN), renormalised embeddings, a moving average
that is swapped in. Such a tensor is told from a stray write by two signs, and is then left alone, with a word:

* it changed before it had been seen unchanged `trusted` times;
* it changed again at the same step or before, when the steps since the snapshot were done again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from arc_dist.monitors.base import Finding
from arc_dist.protocol.flags import Flag

_SLICE_NUMEL = 1 << 16
_MAX_STRIKES = 3
_TRUSTED = 8


@dataclasses.dataclass(eq=False)
class _Slice:
    name: str
    tensor: torch.Tensor


class StrayWrites:
    """Watches a rolling part of the weights between updates.

    Args:
        acts: whether a stray write makes all ranks roll back; else it is told.
        trusted: looks at a tensor without a change after which a change counts.
    """

    def __init__(self, *, acts: bool = True, trusted: int = _TRUSTED) -> None:
        self._acts = acts
        self._trusted = trusted
        self._slices: list[_Slice] = []
        self._next = 0
        self._held: list[tuple[_Slice, torch.Tensor]] = []
        self._clean: dict[str, int] = {}
        # Never rolled back: what a script does itself shows by coming back.
        self._strikes: dict[str, list[int]] = {}
        self.left_alone: set[str] = set()

    def watch(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Takes the weights, as this rank holds them."""
        self._slices = []
        self._held = []
        for name, tensor in tensors:
            tensor = tensor.detach()
            if not tensor.is_contiguous():
                self._slices.append(_Slice(name, tensor))
                continue
            flat = tensor.view(-1)
            for start in range(0, flat.numel(), _SLICE_NUMEL):
                self._slices.append(_Slice(name, flat[start : start + _SLICE_NUMEL]))

    def hold(self) -> bool:
        """After an update: takes the hash of the next slice. False when the part covers everything."""
        if len(self._held) >= len(self._slices):
            return False
        part = self._slices[self._next % len(self._slices)]
        self._next = (self._next + 1) % len(self._slices)
        if part.name not in self.left_alone:
            self._held.append((part, torch.hash_tensor(part.tensor)))
        return bool(self._next)

    def compare(self, step: int) -> list[Finding]:
        """Before the next update: what changed of what was held.

        Args:
            step: updates applied.
        """
        held, self._held = self._held, []
        if not held:
            return []
        before = torch.stack([word.view(torch.int64) for _, word in held])
        now = torch.stack([torch.hash_tensor(part.tensor).view(torch.int64) for part, _ in held])
        if torch.equal(before, now):
            for name in {part.name for part, _ in held}:
                self._clean[name] = self._clean.get(name, 0) + 1
            return []
        changed = {part.name for (part, _), same in zip(held, (before == now).tolist(), strict=True) if not same}
        return [self._judge(name, step) for name in sorted(changed)]

    def _judge(self, name: str, step: int) -> Finding:
        strikes = self._strikes.setdefault(name, [])
        came_back = any(step <= strike for strike in strikes)
        strikes.append(step)
        if self._clean.get(name, 0) < self._trusted or came_back or len(strikes) >= _MAX_STRIKES:
            self.left_alone.add(name)
            return Finding(Flag(0), f"stray_writes: the script writes to {name}; it is left alone", step, None)
        flag = Flag.STRAY_WRITE if self._acts else Flag(0)
        return Finding(flag, f"stray_writes: {name}", step, None)

    def forget(self) -> None:
        """The state was restored: what is held is of another one."""
        self._held = []

    def state_dict(self) -> dict[str, Any]:
        return {"clean": dict(self._clean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clean = dict(state["clean"])
        self._held = []
