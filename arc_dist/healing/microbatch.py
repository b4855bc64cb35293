"""Dividing a batch into micro-batches whose weighted losses add up to the loss of the whole.

Every rank makes the same number of parts, whatever its batch holds, because sharded models communicate in each forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from arc_dist.errors import ConfigError
from arc_dist.protocol.oom import share

SplitFunction = Callable[[Any, int], Sequence[tuple[Any, float]]]
"""(batch, parts) -> as many pairs (part, weight of the part's loss in the loss of the batch)."""

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
_MAX_DEPTH = 8
_REMEDY = "Give train() a function split=, which divides a batch"


def num_samples(batch: Any) -> int:
    """The length of the first dimension that all tensors of a batch share.

    Raises:
        ConfigError: there is no such dimension.
    """
    lengths = sorted({tensor.shape[0] for tensor in _tensors(batch, 0)})
    if not lengths:
        raise ConfigError(f"the batch ({type(batch).__name__}) holds no tensor with a dimension of samples. {_REMEDY}.")
    if len(lengths) > 1:
        raise ConfigError(
            f"the tensors of the batch differ in their first dimension ({', '.join(map(str, lengths))}), so it is not "
            f"that of the samples. {_REMEDY}."
        )
    if lengths[0] == 0:
        raise ConfigError("the batch has no samples.")
    return lengths[0]


def split(batch: Any, parts: int) -> list[tuple[Any, float]]:
    """Divides a batch along the first dimension of its tensors; weights are shares of the samples.

    Tensors become views. Sequences of as many entries as there are samples that hold no tensors (such as texts) are
    divided too; everything else that has no samples is in every part. Of fewer samples than parts the first is
    repeated with weight 0.

    Raises:
        ConfigError: the batch has no dimension of samples, or holds an object that nobody knows how to divide.
    """
    samples = num_samples(batch)
    found: list[tuple[Any, float]] = []
    start = 0
    for size in share(samples, parts):
        first = start if size else 0
        found.append((_narrow(batch, first, max(size, 1), samples, 0), size / samples))
        start += size
    return found


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """The tensors of a batch that have a first dimension.

    Raises:
        ConfigError: there is something in it that may hold samples and cannot be looked into.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_nested:
            raise ConfigError(f"the batch holds a tensor of layout {value.layout}. {_REMEDY}.")
        if value.dim():
            yield value
    elif depth < _MAX_DEPTH and isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry, depth + 1)
    elif depth < _MAX_DEPTH and isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry, depth + 1)
    elif not isinstance(value, _PLAIN):
        raise ConfigError(f"the batch holds a {type(value).__name__}. {_REMEDY}.")


def _narrow(value: Any, start: int, size: int, samples: int, depth: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.narrow(0, start, size) if value.dim() else value
    if isinstance(value, (list, tuple)):
        if len(value) == samples and next(_tensors(value, depth), None) is None:
            return value[start : start + size]
        entries = [_narrow(entry, start, size, samples, depth + 1) for entry in value]
        if isinstance(value, list):
            return entries
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    if isinstance(value, Mapping):
        entries = {key: _narrow(entry, start, size, samples, depth + 1) for key, entry in value.items()}
        if type(value) is dict:
            return entries
        copied = copy.copy(value)
        if not isinstance(copied, MutableMapping):
            raise ConfigError(f"the batch holds a {type(value).__name__}, which cannot be changed. {_REMEDY}.")
        copied.update(entries)
        return copied
    return value


def take(batch: Any, size: int) -> Any:
    """The first `size` samples of a batch, which has at least as many; 0 is allowed.

    Raises:
        ConfigError: as `split`.
    """
    return _narrow(batch, 0, size, num_samples(batch), 0)


class Splitter:
    """Divides batches by the user's function, where there is one.

    Args:
        custom: the function, or None.
    """

    def __init__(self, custom: SplitFunction | None) -> None:
        self._custom = custom

    def __call__(self, batch: Any, parts: int) -> list[tuple[Any, float]]:
        """The parts of a batch, with their weights.

        Raises:
            ConfigError: it cannot be divided into so many.
        """
        if self._custom is None:
            return split(batch, parts)
        found = list(self._custom(batch, parts))
        if len(found) != parts:
            raise ConfigError(
                f"split() gave {len(found)} parts of a batch instead of {parts}. Give as many as asked for."
            )
        return found

    def some(self, batch: Any, size: int) -> Any:
        """About `size` samples of a batch; half of it where only the user's function can divide it."""
        if self._custom is not None:
            return self(batch, 2)[0][0]
        return take(batch, min(size, num_samples(batch)))

    def largest(self, batch: Any, parts: int) -> int | None:
        """Samples in the largest of so many parts; None where only the user's function knows."""
        return None if self._custom is not None else max(share(num_samples(batch), parts))
