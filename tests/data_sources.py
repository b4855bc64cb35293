"""Datasets and a stand-in for training, with which the data tests compare whole runs."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from arc_dist.checkpoint_store.codec import decode, encode
from arc_dist.data.digest import batch_digest
from arc_dist.data.source import BatchSource
from arc_dist.snapshot.rng import capture_rng, pack_rng, restore_rng

Step = tuple[int, int, int, str, str]


class Rows(Dataset[Any]):
    """Rows that can be told apart; each draws from the generators named in `draws` (augmentation)."""

    def __init__(self, size: int = 23, draws: str = "") -> None:
        self.size = size
        self.draws = draws
        self.made: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.made.append(index)
        noise = 0.0
        if "torch" in self.draws:
            noise += torch.rand(()).item()
        if "python" in self.draws:
            noise += random.random()
        if "numpy" in self.draws:
            noise += float(np.random.randn())
        return {"x": torch.full((3,), float(index)) + noise, "name": f"row {index}"}


class OwnGenerator(Rows):
    """Augmentation from a generator that the dataset itself holds."""

    def __init__(self, size: int = 23) -> None:
        super().__init__(size)
        self.rng = np.random.default_rng(7)

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(index)) + float(self.rng.random())


class Stream(IterableDataset[Any]):
    """Rows without indices, split among workers."""

    def __init__(self, size: int = 23, draws: str = "") -> None:
        self.rows = Rows(size, draws)

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, self.rows.size, step):
            yield self.rows[index]


def rng_digest() -> str:
    return hashlib.sha256(pack_rng(capture_rng())).hexdigest()[:16]


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def draw_like_a_model() -> None:
    """Dropout and the like, between two fetches."""
    torch.rand(5)
    random.random()
    np.random.randn()


def through_a_file(position: dict[str, Any]) -> dict[str, Any]:
    """What a position is after it was written and read by another process."""
    encoded, tensors = encode(position)
    return decode(json.loads(json.dumps(encoded, allow_nan=False)), tensors)


def train(source: BatchSource, num_batches: int | None = None) -> list[Step]:
    """Goes through batches as training would; says of each its place, its digest, and the random state after it."""
    steps: list[Step] = []
    while num_batches is None or len(steps) < num_batches:
        try:
            batch = source.next()
        except StopIteration:
            break
        steps.append((batch.ordinal, batch.epoch, batch.index, batch_digest(batch.data), rng_digest()))
        draw_like_a_model()
    return steps


class Saved:
    """What a snapshot keeps for the data: the position and the random state, taken between two steps."""

    def __init__(self, source: BatchSource) -> None:
        self.position = source.position()
        self.rng = pack_rng(capture_rng())

    def rewind(self, source: BatchSource) -> None:
        source.rewind(self.position)
        restore_rng(self.rng)

    def resume(self, source: BatchSource) -> None:
        source.resume(through_a_file(self.position))
        restore_rng(self.rng)
