"""Small states and checkpoints for the store's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from arc_dist.checkpoint_store import ShardTensor, Store, TensorSpec
from arc_dist.checkpoint_store.format import dtype_name, known_dtypes


def random_tensor(shape: Sequence[int], dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    """Random bytes of any dtype (NaNs with payloads included); bools are 0 or 1."""
    target = getattr(torch, dtype)
    count = 1
    for size in shape:
        count *= size
    generator = torch.Generator().manual_seed(seed + 1)
    raw = torch.randint(0, 256, (count * target.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype == "bool":
        raw = raw & 1
    if count == 0:
        return torch.empty(tuple(shape), dtype=target)
    return raw.view(target).reshape(tuple(shape))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def whole(name: str, tensor: torch.Tensor) -> ShardTensor:
    return ShardTensor(TensorSpec.whole(name, tensor), tensor)


def rows(name: str, tensor: torch.Tensor, begin: int, end: int) -> ShardTensor:
    """Rows [begin, end) of a tensor, as a rank of FSDP2 holds them."""
    local = tensor[begin:end]
    offsets = (begin,) + (0,) * (tensor.dim() - 1)
    spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(local.shape), tuple(tensor.shape), offsets)
    return ShardTensor(spec, local)


def fsdp_cut(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows that `torch.chunk`, and so FSDP2, gives to a rank: uneven, the last ranks may get none."""
    size = -(-total // world_size)
    begin = min(rank * size, total)
    return begin, min(begin + size, total)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Replicated tensors of every dtype, with a scalar and empty ones."""
    tensors = {f"model.{name}": random_tensor((3, 5), name, seed + i) for i, name in enumerate(known_dtypes())}
    tensors["optimizer.state.w.step"] = torch.tensor(7.0)
    tensors["model.empty"] = torch.empty(0, 4)
    return tensors


def save(
    store: Store,
    step: int,
    *,
    generation: int = 0,
    world_size: int = 1,
    seed: int = 0,
    meta: dict[str, Any] | None = None,
    sharded: bool = True,
) -> dict[str, torch.Tensor]:
    """Writes and commits a step by all ranks in turn; returns the whole state by name."""
    replicated = state(seed + step)
    split = {
        "model.w": random_tensor((7, 3), "float32", seed + step + 50),
        "model.b": random_tensor((2,), "bfloat16", 9),
    }
    parts = {}
    for rank in range(world_size):
        tensors = [whole(name, tensor) for name, tensor in replicated.items()]
        if sharded:
            tensors += [rows(n, t, *fsdp_cut(t.shape[0], rank, world_size)) for n, t in split.items()]
        parts[rank] = store.write_part(
            step,
            generation=generation,
            rank=rank,
            world_size=world_size,
            tensors=tensors,
            objects={"rank": rank, "step": step},
        )
    store.commit(step, generation, world_size, parts, {"certified": True, "loss": 0.5, **(meta or {})})
    return {**replicated, **(split if sharded else {})}


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())
