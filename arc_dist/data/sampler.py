"""A sampler whose order is a pure function of seed, epoch and global position.

The order of an epoch is one permutation of the whole dataset. Position p of it goes to rank ``p mod num_replicas``, so
the samples that all ranks together use in step k are positions ``[k * n, (k + 1) * n)`` with n the global batch size,
whatever the number of ranks that share them. Nothing is drawn from any global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from arc_dist.errors import ConfigError

_CHUNK = 4096


class SeededSampler(Sampler[int]):
    """This rank's part of a seeded order; use it as a DataLoader's `sampler`.

    Over all ranks an epoch gives every index exactly once, with one exception that equal lengths make necessary: when
    the dataset's size is no multiple of `num_replicas`, the last positions are filled by repeating the first ones of
    the same epoch's order (`drop_last` False: up to ``num_replicas - 1`` repeats), or left out (`drop_last` True).

    Args:
        data: the dataset, or its length.
        num_replicas: ranks that share the data; the process group's world size (1 without a group) if None.
        rank: this rank; the process group's (0 without a group) if None.
        shuffle: a permutation per epoch; else positions are indices.
        seed: of the permutations. Equal on all ranks.
        drop_last: see above. A DataLoader's own `drop_last` is another matter: it drops a rank's last, small batch.

    The permutation takes 8 bytes per sample in memory. Its values are those of `torch.randperm` on the CPU.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        data: Sized | int,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.length = data if isinstance(data, int) else len(data)
        self.num_replicas = num_replicas if num_replicas is not None else dist.get_world_size() if grouped else 1
        self.rank = rank if rank is not None else dist.get_rank() if grouped else 0
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        if self.length < 0:
            raise ConfigError(f"SeededSampler: the length is {self.length}. Give a dataset, or a length of 0 or more.")
        if not 0 <= self.rank < self.num_replicas:
            raise ConfigError(
                f"SeededSampler: rank {self.rank} of {self.num_replicas}. Ranks go from 0 to num_replicas - 1."
            )
        self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch whose order the next iteration gives. Another epoch starts at its beginning."""
        if epoch != self.epoch:
            self._start = 0
        self.epoch = epoch

    def start_at(self, position: int) -> None:
        """Lets the iterations of the present epoch begin at this global position (samples used by all ranks together).

        For going on with another number of ranks. It lasts until `set_epoch` selects another epoch.
        """
        if not 0 <= position <= self.length:
            raise ConfigError(f"SeededSampler: position {position} is outside of an epoch of {self.length} samples.")
        self._start = position

    @property
    def begins_epochs(self) -> bool:
        """Whether the next iteration starts at the beginning of its epoch, as it does without `start_at`."""
        return self._start == 0

    def order(self) -> torch.Tensor:
        """The indices of the whole dataset in the order of the present epoch: int64, shape (length,)."""
        if not self.shuffle:
            return torch.arange(self.length)
        # Hashing keeps (seed 0, epoch 1) and (seed 1, epoch 0) apart, which a sum would not.
        text = f"arc-dist/{self.seed}/{self.epoch}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1)
        return torch.randperm(self.length, generator=generator)

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        start, count = self._start, len(self)
        for chunk in range(0, count, _CHUNK):
            turns = torch.arange(chunk, min(chunk + _CHUNK, count))
            positions = start + self.rank + turns * self.num_replicas
            if positions.numel() and int(positions[-1]) >= self.length:
                positions %= self.length
            yield from order[positions].tolist()

    def __len__(self) -> int:
        left = self.length - self._start
        if not self.drop_last:
            left += self.num_replicas - 1
        return left // self.num_replicas
