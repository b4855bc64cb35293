"""Escaping (ARC paper, Algorithm 1): the optimizers begin anew, and every trained weight gets noise.

The noise of a tensor is a function of the seed, its name, its whole shape and its values, never of how it is cut: each
shard gets its part of the noise of the whole. So replicas stay equal, and FSDP2 and HSDP end with the bits of a single
process. Two things make that so. Noise comes in blocks with generators of their own, of which a rank makes those that
overlap its part. And its size follows from the median exponent of the tensor's values: counts of exponents add up
to the same whole in any order, which sums of squares do not.

The noise itself is a sum of four uniform 16-bit integers (nearly normal, never beyond 3.5 standard deviations):
logarithms and cosines differ in their last bit between processors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.snapshot.state import TrainingState
from arc_dist.snapshot.tensors import local

_BLOCK_NUMEL = 1 << 16
_WORDS = 4
_WORD_VALUES = 1 << 16
_WORDS_STD = math.sqrt(_WORDS * (_WORD_VALUES**2 - 1) / 12)
_CHUNK_NUMEL = 1 << 22
_LEAST_EXPONENT, _NUM_EXPONENTS = -160, 320  # of float32 as frexp has them, subnormal ones included

Gather = Callable[[Any], list[Any]]


def begins_empty(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer that has not stepped yet makes its state at the first step, as most do."""
    return not optimizer.state


def reset_moments(optimizer: torch.optim.Optimizer, *, is_lazy: bool) -> None:
    """Makes an optimizer begin anew.

    Args:
        optimizer: its parameters' state is removed, or zeroed in place.
        is_lazy: it makes its state at the first step. One that does not (Adagrad) keeps its tensors.
    """
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if is_lazy:
                    optimizer.state.pop(parameter, None)
                    continue
                fields = optimizer.state.get(parameter, {})
                for field, value in fields.items():
                    if isinstance(value, torch.Tensor):
                        local(value).fill_(group.get("initial_accumulator_value", 0.0) if field == "sum" else 0)
                    elif field == "step":
                        fields[field] = 0


def perturb(state: TrainingState, gather: Gather, *, scale: float, seed: str) -> int:
    """Adds noise to every trained weight. Every rank must call this; it blocks.

    Args:
        state: whose models' trained floating parameters are changed, in place.
        gather: brings every rank's JSON-able item to all ranks, in rank order.
        scale: standard deviation of the noise / typical magnitude of the tensor's values.
        seed: equal on all ranks.

    Returns:
        How many tensors were changed, on this rank.
    """
    with torch.no_grad():
        weights = list(_trained(state))
        everyone = gather([_count_exponents(values) for _, values in weights])
        for index, (spec, values) in enumerate(weights):
            magnitude = _magnitude([counts[index] for counts in everyone])
            _add_noise(spec, values, f"{seed}/{spec.name}", scale * magnitude / _WORDS_STD)
    return len(weights)


def _trained(state: TrainingState) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """The trained floating parameters as this rank holds them; complex ones as pairs of real numbers."""
    groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
    trained = {id(local(p)) for group in groups for p in group["params"] if p.requires_grad}
    for spec, tensor in zip(*state.tensors(), strict=True):
        if id(tensor) not in trained or not state.is_parameter(spec.name):
            continue
        if tensor.is_complex():
            shape, whole, offsets = (*spec.shape, 2), (*spec.global_shape, 2), (*spec.offsets, 0)
            spec = TensorSpec(spec.name, spec.dtype, shape, whole, offsets, spec.replicated)
            yield spec, torch.view_as_real(tensor.detach())
        elif tensor.is_floating_point():
            yield spec, tensor.detach()


def _count_exponents(values: torch.Tensor) -> list[list[int]]:
    """(binary exponent, how many of the values have it), for those that are finite and not zero."""
    counts = torch.zeros(_NUM_EXPONENTS, dtype=torch.int64)
    for part in values.reshape(-1).split(_CHUNK_NUMEL):
        magnitudes = part.to(torch.float32).abs()
        magnitudes = magnitudes[(magnitudes > 0) & (magnitudes < math.inf)]
        exponents = torch.frexp(magnitudes).exponent.to(torch.int64) - _LEAST_EXPONENT
        counts += torch.bincount(exponents.cpu(), minlength=_NUM_EXPONENTS)
    present = counts.nonzero().flatten().tolist()
    return [[exponent + _LEAST_EXPONENT, int(counts[exponent])] for exponent in present]


def _magnitude(everyone: Sequence[Sequence[Sequence[int]]]) -> float:
    """The power of two below the median magnitude; 0 where all values are zero.

    Replicas repeat every count as often, which leaves the median as it is.
    """
    whole: dict[int, int] = {}
    for counts in everyone:
        for exponent, count in counts:
            whole[exponent] = whole.get(exponent, 0) + count
    below, half = 0, (sum(whole.values()) + 1) // 2
    for exponent in sorted(whole):
        below += whole[exponent]
        if below >= half:
            return math.ldexp(1.0, exponent - 1)
    return 0.0


def _add_noise(spec: TensorSpec, values: torch.Tensor, key: str, unit: float) -> None:
    """Adds this part's share of the whole tensor's noise, some rows at a time."""
    if not values.numel() or unit == 0.0:
        return
    whole = spec.global_shape or (1,)
    offsets = spec.offsets or (0,)
    values = values if values.dim() else values.view(1)
    row_numel = math.prod(whole[1:])
    rows_at_once = max(1, _CHUNK_NUMEL // row_numel)
    dtype = torch.promote_types(values.dtype, torch.float32)
    for start in range(0, values.shape[0], rows_at_once):
        part = values[start : start + rows_at_once]
        first = (offsets[0] + start) * row_numel
        noise = _noise(key, first, part.shape[0] * row_numel, math.prod(whole)).view(part.shape[0], *whole[1:])
        for dim in range(1, len(whole)):
            noise = noise.narrow(dim, offsets[dim], part.shape[dim])
        part.copy_(part.to(dtype) + (noise * unit).to(part.device))


def _noise(key: str, first: int, numel: int, total: int) -> torch.Tensor:
    """Whole numbers with mean 0, as float32, for the elements from `first` on of a tensor of `total` elements."""
    parts: list[torch.Tensor] = []
    for block in range(first // _BLOCK_NUMEL, (first + numel - 1) // _BLOCK_NUMEL + 1):
        begin = block * _BLOCK_NUMEL
        length = min(_BLOCK_NUMEL, total - begin)
        generator = torch.Generator("cpu").manual_seed(_seed(f"{key}/{block}"))
        words = torch.randint(0, _WORD_VALUES, (_WORDS, length), generator=generator, dtype=torch.int64, device="cpu")
        centred = words.sum(0) - _WORDS * (_WORD_VALUES - 1) // 2
        parts.append(centred[max(first - begin, 0) : first + numel - begin].to(torch.float32))
    return torch.cat(parts)


def _seed(text: str) -> int:
    """32 bits: more are not used by the generator."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
