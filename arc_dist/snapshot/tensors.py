"""Specs of live tensors, their local memory, and bit-exact copies between the two."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.errors import CheckpointMismatch, ConfigError
from arc_dist.snapshot.naming import DTensor

if DTensor != ():
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, as the very object that holds it.

    `DTensor.to_local` makes a new object at each call (5 us) when the DTensor is a parameter, so replacement could not
    be told by identity. `_local_tensor` is the name that `DTensor.__tensor_flatten__` gives it to other subsystems.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # type: ignore[attr-defined]


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec of a live tensor; a plain tensor counts as replicated."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return TensorSpec(name, dtype, shape, shape, (0,) * len(shape), True)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ConfigError(f"{name} is a DTensor with a pending reduction ({placements}). Redistribute it first.")
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    part = tuple(local(tensor).shape)
    # A rank that has nothing of the tensor may be told an offset behind its end.
    offsets = tuple(min(offset, whole) for offset, whole in zip(offsets, shape, strict=True))
    return TensorSpec(name, dtype, part, shape, offsets, all(placement.is_replicate() for placement in placements))


def layout_of(tensor: torch.Tensor) -> list[str] | None:
    """The placements of a DTensor, for a process that has to make the same one; None for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return None
    words: list[str] = []
    for placement in tensor.placements:  # type: ignore[attr-defined]
        if type(placement) is Shard:
            words.append(f"shard {placement.dim}")
        elif placement.is_replicate():
            words.append("replicate")
        else:
            raise ConfigError(f"a state tensor with the placement {placement} is not supported")
    return words


def make_like(
    spec: TensorSpec, owner: torch.Tensor, device: torch.device, layout: Sequence[str] | None
) -> torch.Tensor:
    """A new, uninitialised tensor for a spec, on the mesh of the parameter that owns it if it has a layout."""
    part = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
    if layout is None or not isinstance(owner, DTensor):
        return part
    placements: list[Any] = [Shard(int(word[6:])) if word.startswith("shard ") else Replicate() for word in layout]
    whole = torch.empty(spec.global_shape, device="meta")
    return DTensor.from_local(  # type: ignore[attr-defined]
        part,
        owner.device_mesh,  # type: ignore[attr-defined]
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def fits(spec: TensorSpec, tensor: torch.Tensor) -> bool:
    """Whether the local part of `tensor` has the spec's shape and dtype."""
    part = local(tensor)
    return tuple(part.shape) == spec.shape and part.dtype == getattr(torch, spec.dtype)


def copy_exact(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copies pairs of equal shape and dtype, bit for bit."""
    if not targets:
        return
    targets = [_without_repeats(target) for target in targets]
    sources = [
        source if source.shape == target.shape else _narrowed(source, target)
        for source, target in zip(sources, targets, strict=True)
    ]
    with torch.no_grad():
        torch._foreach_copy_(targets, sources)  # type: ignore[reportPrivateImportUsage]


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """A writable part of an expanded tensor (stride 0: one element in several places) that determines all of it."""
    if 0 not in tensor.stride() or tensor.numel() <= 1:
        return tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.detach().narrow(dim, 0, 1)
    return tensor


def _narrowed(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    for dim, size in enumerate(target.shape):
        source = source.narrow(dim, 0, size)
    return source


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major."""
    part = local(tensor).detach().resolve_conj().resolve_neg().cpu().contiguous()
    return ctypes.string_at(part.data_ptr(), part.numel() * part.element_size()) if part.numel() else b""


def tensor_of(data: bytes | memoryview, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `bytes_of`: a tensor with memory of its own."""
    kind = getattr(torch, dtype)
    if not len(data):
        return torch.empty(tuple(shape), dtype=kind)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind).view(tuple(shape))


def mismatch(what: str, wanted: dict[str, TensorSpec], found: dict[str, TensorSpec]) -> CheckpointMismatch | None:
    """The error that lists how two sets of tensors differ; None when they do not.

    Args:
        what: begins the message: "the snapshot" ...
        wanted: what this process has.
        found: what is to be restored.
    """
    problems: list[str] = []
    problems += [f"{name} {list(wanted[name].shape)} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} {list(found[name].shape)} is not in this model" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        mine, theirs = wanted[name], found[name]
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            problems.append(
                f"{name} is {list(theirs.shape)} {theirs.dtype}, this model has {list(mine.shape)} {mine.dtype}"
            )
        elif (mine.global_shape, mine.offsets) != (theirs.global_shape, theirs.offsets):
            problems.append(
                f"{name} is the part at {list(theirs.offsets)} of {list(theirs.global_shape)}, this rank holds the "
                f"part at {list(mine.offsets)} of {list(mine.global_shape)}"
            )
    if not problems:
        return None
    shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
    return CheckpointMismatch(
        f"{what} does not fit this model: {shown}. Build the model that was saved, or start afresh.", problems=problems
    )
