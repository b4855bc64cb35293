"""The state probe: weights and optimizer state, a sixteenth of the bytes at every step.

All parameters and optimizer tensors of the rank (its local shards under FSDP) are cut into slices of about equal size
and dealt into groups; each step takes the L2 norms of one group, so that a round of 16 steps sees every byte. One pass
over everything costs 4-7 % of a small model's step, a sixteenth of it 0.2 %. For models so small that the call costs
more than the bytes, a round has fewer groups with pauses between them, and takes 64 steps.

A slice is judged against its own norm of the round before:

* not finite (an L2 norm that overflows counts too);
* weights: grew by more than 30 x or shrank below 1/1000 within a round (the paper's magnitude explosion and collapse,
  section 3.2.3, with the run's own past as the scale);
* optimizer state: grew by more than 1e6 x, or became exactly zero after having been something (a reset).

The next update hides that moments were zeroed, so one number of the optimizer's state is looked at in every step: a
reset of the whole state is seen before that.

Buffers are not judged: infinite values are normal there (attention masks), and so are exempt the slices that were not
finite when the run began.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from arc_dist.monitors.base import Finding
from arc_dist.protocol.flags import NO_FLAGS, Flag

_WEIGHT_GROWTH = 30.0
_WEIGHT_COLLAPSE = 1e-3
_OPTIMIZER_GROWTH = 1e6
# Below this a norm says nothing about scale: freshly initialised biases and moments grow from zero.
_SMALLEST_NORM = 1e-6
_MIN_SLICE_NUMEL = 4096
_MIN_GROUP_NUMEL = 1 << 17  # below this a group costs its call, not its bytes
_SMALL_MODEL_NUMEL = 1 << 20
# Moments without gradients decay until they underflow to zero; from below this a zero is no reset.
_DENORMAL_NORM = 1e-20


@dataclasses.dataclass(frozen=True)
class Probed:
    """One tensor under watch: a parameter or a tensor of an optimizer's state."""

    name: str
    tensor: torch.Tensor
    is_weight: bool


@dataclasses.dataclass(eq=False)
class _Slice:
    name: str
    view: torch.Tensor
    is_weight: bool
    norm: float | None = None
    exempt: bool = False


class StateProbe:
    """Round-robin norms over a rank's weights and optimizer state.

    Args:
        rounds: steps after which every byte has been looked at once.
    """

    def __init__(self, *, rounds: int = 16) -> None:
        self._rounds = rounds
        self._groups: list[list[_Slice]] = []
        self.pause = 1  # steps from one group to the next
        self._canary: torch.Tensor | None = None  # one number of the optimizer's state, not zero when last seen
        self._canary_name = ""
        self._source: object | None = None
        self._num_optimizer_tensors = 0
        self.findings: list[Finding] = []

    def watch(self, tensors: Sequence[Probed], source: object) -> Flag:
        """Takes the tensors to watch; cheap when `source` (any object, compared by identity) did not change.

        Returns:
            `Flag.OPTIMIZER_RESET` when optimizer state that was there has vanished.
        """
        if source is self._source:
            return NO_FLAGS
        self._source = source
        floating = [probed for probed in tensors if probed.tensor.is_floating_point() and probed.tensor.numel() > 1]
        num_optimizer = sum(not probed.is_weight for probed in floating)
        vanished = num_optimizer < self._num_optimizer_tensors
        self._num_optimizer_tensors = num_optimizer
        known = {part.name: part for part in self._all()}
        total = sum(probed.tensor.numel() for probed in floating)
        num_groups = max(1, min(self._rounds, -(-total // _MIN_GROUP_NUMEL)))
        rounds = self._rounds if total >= _SMALL_MODEL_NUMEL else 4 * self._rounds
        self.pause = rounds // num_groups
        self._groups = _deal(floating, num_groups)
        self._find_canary(floating)
        for part in self._all():
            if part.name in known:
                part.norm, part.exempt = known[part.name].norm, known[part.name].exempt
        if vanished:
            self.findings = [Finding(Flag.OPTIMIZER_RESET, "optimizer.state", num_optimizer, None)]
            return Flag.OPTIMIZER_RESET
        return NO_FLAGS

    def judge(self, step: int) -> Flag:
        """Looks at the group whose turn it is and returns the flags it raises; `findings` has the details."""
        canary = self._canary
        if canary is not None and canary.item() == 0.0:
            self.findings = [Finding(Flag.OPTIMIZER_RESET, self._canary_name, 0.0, None)]
            return Flag.OPTIMIZER_RESET
        turn, pausing = divmod(step, self.pause)
        if pausing or not self._groups:
            return NO_FLAGS
        return self._judge(self._groups[turn % len(self._groups)])

    def _find_canary(self, tensors: Sequence[Probed]) -> None:
        """The first number of the optimizer's state that is surely not zero; reading it costs no pass."""
        self._canary = None
        for probed in tensors:
            if not probed.is_weight and probed.tensor.numel() and probed.tensor.device.type == "cpu":
                flat = probed.tensor.detach().reshape(-1)[:64]
                largest = int(flat.abs().argmax())
                if float(flat[largest].abs()) > _DENORMAL_NORM and probed.tensor.is_contiguous():
                    self._canary = probed.tensor.detach().view(-1)[largest]
                    self._canary_name = probed.name
                    return

    def scan(self) -> Flag:
        """Looks at everything, for what is not finite only; the slow path."""
        found = NO_FLAGS
        self.findings = []
        parts = self._all()
        for part, norm in zip(parts, _norms(parts), strict=True):
            if not math.isfinite(norm) and not part.exempt:
                found |= self._nonfinite(part, norm)
        return found

    def exempt_present(self) -> None:
        """What is not finite now, at the start of the run, is this model's way and never flagged."""
        parts = self._all()
        for part, norm in zip(parts, _norms(parts), strict=True):
            part.exempt = not math.isfinite(norm)

    def nonfinite(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> str | None:
        """The name of the first of `tensors` (a snapshot's) that is not finite and not exempt, or None."""
        exempt = {part.name.split("[")[0] for part in self._all() if part.exempt}
        for (name, _), norm in zip(tensors, _norms_of([tensor for _, tensor in tensors]), strict=True):
            if not math.isfinite(norm) and name not in exempt:
                return name
        return None

    def forget(self) -> None:
        """The tensors under watch were replaced on purpose; the next `watch` finds no state missing."""
        self._source = None
        self._num_optimizer_tensors = 0

    def _all(self) -> list[_Slice]:
        return [part for group in self._groups for part in group]

    def _judge(self, parts: list[_Slice]) -> Flag:
        found = NO_FLAGS
        self.findings = []
        for part, norm in zip(parts, _norms(parts), strict=True):
            if part.exempt:
                continue
            if not math.isfinite(norm):
                found |= self._nonfinite(part, norm)
                continue
            flag = _judge_change(part, norm)
            if flag:
                self.findings.append(Finding(flag, part.name, norm, part.norm))
                found |= flag
            else:
                part.norm = norm
        return found

    def _nonfinite(self, part: _Slice, norm: float) -> Flag:
        flag = Flag.WEIGHT_NONFINITE if part.is_weight else Flag.OPTIMIZER_NONFINITE
        self.findings.append(Finding(flag, part.name, norm, part.norm))
        return flag

    def state_dict(self) -> dict[str, Any]:
        parts = self._all()
        return {
            "norms": {part.name: part.norm for part in parts if part.norm is not None},
            "exempt": [part.name for part in parts if part.exempt],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        norms, exempt = state["norms"], set(state["exempt"])
        for part in self._all():
            part.norm = norms.get(part.name)
            part.exempt = part.name in exempt


def _judge_change(part: _Slice, norm: float) -> Flag:
    before = part.norm
    if before is None:
        return NO_FLAGS
    if not part.is_weight and norm == 0.0 and before > _DENORMAL_NORM:
        return Flag.OPTIMIZER_RESET
    if before < _SMALLEST_NORM:
        return NO_FLAGS
    if part.is_weight:
        if norm > _WEIGHT_GROWTH * before or norm < _WEIGHT_COLLAPSE * before:
            return Flag.WEIGHT_NORM
        return NO_FLAGS
    return Flag.OPTIMIZER_NORM if norm > _OPTIMIZER_GROWTH * before else NO_FLAGS


def _norms(parts: Sequence[_Slice]) -> list[float]:
    return _norms_of([part.view for part in parts])


def _norms_of(views: list[torch.Tensor]) -> list[float]:
    """L2 norms of all tensors, with one transfer to the host where they share a device and dtype."""
    if not views:
        return []
    norms = torch._foreach_norm(views)
    if all(norm.device == norms[0].device and norm.dtype == norms[0].dtype for norm in norms):
        return torch.stack(norms).tolist()
    return [float(norm) for norm in norms]


def _deal(tensors: Sequence[Probed], rounds: int) -> list[list[_Slice]]:
    """Cuts `tensors` into slices and deals them into `rounds` groups of about equal size."""
    total = sum(probed.tensor.numel() for probed in tensors)
    longest = max(_MIN_SLICE_NUMEL, -(-total // rounds))
    parts: list[_Slice] = []
    for probed in tensors:
        tensor = probed.tensor.detach()
        if tensor.numel() <= longest or not tensor.is_contiguous():
            parts.append(_Slice(probed.name, tensor, probed.is_weight))
            continue
        flat = tensor.view(-1)
        for start in range(0, tensor.numel(), longest):
            parts.append(_Slice(f"{probed.name}[{start}:]", flat[start : start + longest], probed.is_weight))
    groups: list[list[_Slice]] = [[] for _ in range(rounds)]
    sizes = [0] * rounds
    for part in sorted(parts, key=lambda part: -part.view.numel()):
        smallest = min(range(rounds), key=sizes.__getitem__)
        groups[smallest].append(part)
        sizes[smallest] += part.view.numel()
    return groups
