"""Which tensors of two checkpoints differ. Compares digests; reads data only where they cannot tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.checkpoint_store.manifest import TensorEntry
from arc_dist.checkpoint_store.reader import Checkpoint

_Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A tensor as one of the two checkpoints has it; `nbytes` is of the whole of it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A tensor that differs.

    Attributes:
        name: its name.
        what: ``"only in a"``, ``"only in b"``, ``"dtype"``, ``"shape"`` or ``"bytes"``, the first that applies.
        a: what the first checkpoint has; None when it has no such tensor.
        b: what the second one has.
    """

    name: str
    what: str
    a: Side | None
    b: Side | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What comparing two checkpoints came to.

    Attributes:
        differences: sorted by name; empty when all tensors are equal, bit for bit.
        num_equal: tensors that are equal.
        num_read: tensors whose data had to be read, because the two are cut differently or hashed differently.
    """

    differences: tuple[Difference, ...]
    num_equal: int
    num_read: int


def compare(a: Checkpoint, b: Checkpoint, *, progress: Callable[[int], None] | None = None) -> Comparison:
    """Compares all tensors of two checkpoints by their bits: NaNs with equal payloads are equal, 0.0 and -0.0 differ.

    Digests of two checkpoints that were cut in the same way are compared without reading data, so damage to the files
    is not seen; `Checkpoint.verify` is for that.

    Args:
        a: the first.
        b: the second.
        progress: called with the number of bytes of tensors done since the last call.

    Raises:
        StoreError: data that had to be read is damaged or not there; see `arc_dist.errors`.
    """
    ours = {tensor.name: tensor for tensor in a.manifest.tensors}
    theirs = {tensor.name: tensor for tensor in b.manifest.tensors}
    same_hash = a.manifest.hash == b.manifest.hash
    differences: list[Difference] = []
    num_read = 0
    for name in sorted(ours.keys() | theirs.keys()):
        left, right = ours.get(name), theirs.get(name)
        if left is None or right is None:
            what = "only in b" if left is None else "only in a"
        elif left.dtype != right.dtype:
            what = "dtype"
        elif left.shape != right.shape:
            what = "shape"
        elif same_hash and _digests(left).keys() == _digests(right).keys():
            what = "" if _digests(left) == _digests(right) else "bytes"
        else:
            num_read += 1
            what = "" if _same_data(a, b, left) else "bytes"
        if what:
            differences.append(Difference(name=name, what=what, a=_side(left), b=_side(right)))
        if progress is not None and left is not None:
            progress(left.spec().nbytes)
    num_equal = len(ours.keys() | theirs.keys()) - len(differences)
    return Comparison(differences=tuple(differences), num_equal=num_equal, num_read=num_read)


def _digests(tensor: TensorEntry) -> dict[_Box, str]:
    """Digests by place. Copies of a part have the same digest, or the manifest would have been refused."""
    return {(chunk.offsets, chunk.shape): chunk.digest for chunk in tensor.chunks}


def _same_data(a: Checkpoint, b: Checkpoint, tensor: TensorEntry) -> bool:
    """Reads both, verified, one part of `a` at a time, so that a large tensor is never in memory whole."""
    for offsets, shape in _digests(tensor):
        spec = TensorSpec(tensor.name, tensor.dtype, shape, tensor.shape, offsets)
        (left,), (right,) = a.read([spec]), b.read([spec])
        if not torch.equal(_bits(left), _bits(right)):
            return False
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _side(tensor: TensorEntry | None) -> Side | None:
    if tensor is None:
        return None
    return Side(dtype=tensor.dtype, shape=tensor.shape, nbytes=tensor.spec().nbytes)
