"""Saves of large tensors by one or more ranks, for tests of what is referred to and not written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.manifest import Manifest
from arc_dist.checkpoint_store.references import MIN_REFERRED_BYTES
from store_helpers import fsdp_cut, random_tensor, rows, same_bits, whole

State = dict[str, torch.Tensor]
LARGE = (MIN_REFERRED_BYTES // 4 // 8, 8)  # float32: the least that is referred to


def open_store(root: Path, **options: Any) -> Store:
    store = Store(root, **{"owner": "o", "dedup": True, **options})
    store.check_writable()
    return store


def large_state(seed: int = 0, count: int = 3) -> State:
    return {f"model.{i}": random_tensor(LARGE, seed=seed * 100 + i) for i in range(count)}


def write(store: Store, step: int, state: State, world_size: int = 1, *, generation: int = 0) -> list[dict[str, Any]]:
    """The parts of all ranks, each tensor cut by rows as FSDP2 cuts it."""
    parts: list[dict[str, Any]] = []
    for rank in range(world_size):
        tensors = [rows(n, t, *fsdp_cut(t.shape[0], rank, world_size)) for n, t in state.items()]
        if world_size == 1:
            tensors = [whole(n, t) for n, t in state.items()]
        options: dict[str, Any] = {"tensors": tensors, "objects": {"step": step}}
        parts.append(store.write_part(step, generation=generation, rank=rank, world_size=world_size, **options))
    return parts


def commit(store: Store, step: int, parts: list[dict[str, Any]], *, generation: int = 0) -> None:
    store.commit(step, generation, len(parts), dict(enumerate(parts)), {"certified": True})


def save_state(store: Store, step: int, state: State, world_size: int = 1) -> Manifest:
    commit(store, step, write(store, step, state, world_size))
    return store.manifest(step)


def require_equal(store: Store, step: int, state: State) -> None:
    checkpoint = store.open(step)
    specs = checkpoint.specs()
    loaded = checkpoint.read([specs[name] for name in state])
    assert specs.keys() == state.keys()
    assert all(same_bits(tensor, state[name]) for name, tensor in zip(state, loaded)), step
    assert checkpoint.verify() == []
