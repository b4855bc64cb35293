"""Monitors of the data: what the loader yields, before its forward. On request only, since they look at each batch.

They see the tensors of a batch with their places: ``[0]``, ``[1]`` for a tuple, ``[image]`` for a mapping.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from arc_dist.monitors.base import Cost, Finding, Monitor, Sees, register, require

_MAX_DEPTH = 8


@dataclasses.dataclass(frozen=True)
class SeenBatch:
    """A batch as a monitor sees it.

    Attributes:
        data: as the loader yielded it.
        ordinal: its place in the data, counted over epochs.
        epoch: of the batch, from 0.
        step: updates applied before it.
    """

    data: Any
    ordinal: int
    epoch: int
    step: int

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The dense, non-empty tensors in it with their places."""
        yield from _tensors("", self.data, 0)


def _tensors(place: str, item: Any, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(item, torch.Tensor):
        if item.layout == torch.strided and item.numel() and not item.is_meta:
            yield place or "[]", item.detach()
    elif isinstance(item, Mapping) and depth < _MAX_DEPTH:
        for key, value in item.items():
            yield from _tensors(f"{place}[{key}]", value, depth + 1)
    elif isinstance(item, (list, tuple)) and depth < _MAX_DEPTH:
        for index, value in enumerate(item):
            yield from _tensors(f"{place}[{index}]", value, depth + 1)


@register
class RepeatedBatches(Monitor):
    """A batch whose tensors are bit for bit those of one of the last `window` of the same epoch.

    Found by a digest of 64 bits over all its tensors. Steps that are done again after a rollback are no repetition.

    Args:
        window: batches remembered.
    """

    name = "repeated_batches"
    sees = Sees.BATCH
    cost = Cost.PASS

    def __init__(self, *, window: int = 64) -> None:
        self._window = int(require("window", window, 1, 1 << 16))
        self._seen: list[list[int]] = []  # epoch, ordinal, digest

    def look(self, subject: SeenBatch) -> Iterable[Finding]:
        digest = _digest(subject)
        if digest is None:
            return []
        earlier = [
            ordinal
            for epoch, ordinal, theirs in self._seen
            if theirs == digest and epoch == subject.epoch and ordinal != subject.ordinal
        ]
        self._seen = [entry for entry in self._seen if entry[1] != subject.ordinal][-self._window + 1 :]
        self._seen.append([subject.epoch, subject.ordinal, digest])
        return [self.found(f"batch {subject.ordinal}", subject.ordinal, earlier[-1])] if earlier else []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [list(entry) for entry in self._seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = [list(entry) for entry in state["seen"]]


def _digest(batch: SeenBatch) -> int | None:
    word, count = 0, 0
    for _, tensor in batch.tensors():
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        value = int(torch.hash_tensor(tensor).view(torch.int64).item())
        # A sum weighted by place, since the tensor's own hash does not know where a value lies.
        flat = tensor.reshape(-1)[:4096].double()
        spread = float(torch.dot(flat, torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)))
        word = (word * 1_000_003 ^ value ^ _bits(spread)) & (1 << 63) - 1
        count += 1
    return word if count else None


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little")


@register
class NonfiniteBatch(Monitor):
    """A batch with a floating tensor that is not finite.

    Args:
        keys: places that are judged, such as ``("[0]",)``; all when empty. Padding with infinities is common in masks.
    """

    name = "nonfinite_batch"
    sees = Sees.BATCH
    cost = Cost.PASS

    def __init__(self, *, keys: Iterable[str] = ()) -> None:
        self._keys = tuple(keys)

    def look(self, subject: SeenBatch) -> Iterable[Finding]:
        found = []
        for place, tensor in subject.tensors():
            judged = not self._keys or place in self._keys
            if judged and (tensor.is_floating_point() or tensor.is_complex()):
                num_bad = int((~tensor.isfinite()).sum())
                if num_bad:
                    found.append(self.found(f"batch {subject.ordinal} {place}", num_bad, 0.0))
        return found


@register
class LabelRange(Monitor):
    """A batch with labels outside [low, high].

    Args:
        key: where the labels are: ``"[1]"`` for the second of a tuple, ``"[label]"`` for a mapping.
        low: the smallest label.
        high: the largest label.
        ignored: a label that means "none", such as cross entropy's -100.
    """

    name = "label_range"
    sees = Sees.BATCH
    cost = Cost.PASS

    def __init__(self, *, high: float, low: float = 0, key: str = "[1]", ignored: float | None = -100) -> None:
        if not low <= high:
            raise ValueError(f"low={low!r} must not be above high={high!r}")
        self._key, self._low, self._high, self._ignored = key, low, high, ignored

    def look(self, subject: SeenBatch) -> Iterable[Finding]:
        for place, tensor in subject.tensors():
            if place != self._key or tensor.is_complex():
                continue
            labels = tensor if self._ignored is None else tensor[tensor != self._ignored]
            if labels.numel():
                low, high = float(labels.min()), float(labels.max())
                if not (self._low <= low and high <= self._high):
                    value, bound = (low, self._low) if not self._low <= low else (high, self._high)
                    return [self.found(f"batch {subject.ordinal} {place}", value, bound)]
        return []
