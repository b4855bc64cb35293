"""Tells whether making items draws random numbers in a DataLoader's worker processes.

If nothing drew, the batches already used need not be made again after a restart, only their indices; else a worker's
random state can be had only by making all of them. A worker reports through one byte of shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from arc_dist.snapshot.rng import capture_rng, pack_rng

# In the worker: the random state when its last batch was complete. The two wrappers arrive there as separate copies.
_state_in_worker: list[bytes] = []


class Witness:
    """One per iterator. `drew` is read in the training process, the wrappers run in the workers."""

    def __init__(self) -> None:
        self._flag = torch.zeros(1, dtype=torch.uint8).share_memory_()

    @property
    def drew(self) -> bool:
        """Whether any batch that has been given, or a prefetched one, drew."""
        return bool(self._flag.item())

    def init(self, worker_init_fn: Callable[[int], object] | None) -> Callable[[int], None]:
        """The user's `worker_init_fn`, after which the worker's random state is noted."""
        return _Init(worker_init_fn)

    def collate(self, collate_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The user's `collate_fn`, after which the random state is compared with that after the batch before."""
        return _Collate(collate_fn, self._flag)


class _Init:
    def __init__(self, wrapped: Callable[[int], object] | None) -> None:
        self._wrapped = wrapped

    def __call__(self, worker: int) -> None:
        if self._wrapped is not None:
            self._wrapped(worker)
        _state_in_worker[:] = [pack_rng(capture_rng())]


class _Collate:
    def __init__(self, wrapped: Callable[[Any], Any], flag: torch.Tensor) -> None:
        self._wrapped = wrapped
        self._flag = flag

    def __call__(self, samples: Any) -> Any:
        batch = self._wrapped(samples)
        state = pack_rng(capture_rng())
        if state != _state_in_worker[0]:
            self._flag[0] = 1
            _state_in_worker[0] = state
        return batch
