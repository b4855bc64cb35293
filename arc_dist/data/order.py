"""The order of samples that a loader's sampler gives to all ranks together, where it can be told without asking it.

Of two samplers it is known: their order of an epoch is a function of a few numbers, and rank r of W takes every W-th
position from r on. So a rank can make any other rank's batches too, also those of a world of another size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from arc_dist.data.loader import LoaderView
from arc_dist.data.sampler import SeededSampler

REMEDY = (
    "Use a DataLoader over a map-style dataset with sampler=arc_dist.SeededSampler(dataset) (or torch's "
    "DistributedSampler), a batch_size, and persistent_workers=False; docs/elastic.md says why."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What an epoch's batches are a function of, on all ranks.

    Attributes:
        sampler: "SeededSampler" or "DistributedSampler".
        samples: in the dataset.
        seed, shuffle: of the sampler.
        drop_last: the sampler leaves out the samples that do not fill a turn of all ranks; else some are repeated.
        batch_size: samples per batch and rank.
        drop_small: the loader leaves out an epoch's last batch when it is smaller.
    """

    sampler: str
    samples: int
    seed: int
    shuffle: bool
    drop_last: bool
    batch_size: int
    drop_small: bool

    def batches(self, ranks: int) -> int:
        """Batches per epoch of each of `ranks` ranks."""
        count = self._samples_per_rank(ranks)
        return count // self.batch_size if self.drop_small else -(-count // self.batch_size)

    def _samples_per_rank(self, ranks: int) -> int:
        return self.samples // ranks if self.drop_last else -(-self.samples // ranks)

    def of_epoch(self, epoch: int) -> torch.Tensor:
        """All indices in the order of an epoch: int64, shape (samples,)."""
        if not self.shuffle:
            return torch.arange(self.samples)
        if self.sampler == SeededSampler.__name__:
            sampler = SeededSampler(self.samples, num_replicas=1, rank=0, seed=self.seed)
            sampler.set_epoch(epoch)
            return sampler.order()
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.seed + epoch))

    def batch(self, order: torch.Tensor, index: int, *, rank: int, ranks: int) -> list[int]:
        """The indices of one batch of one rank, of the epoch whose order is given."""
        last = min((index + 1) * self.batch_size, self._samples_per_rank(ranks))
        turns = torch.arange(index * self.batch_size, last)
        # Beyond the end the first positions come again, so that all ranks have equally many.
        return order[(turns * ranks + rank) % self.samples].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def order_of(view: LoaderView, *, rank: int, ranks: int) -> Order | str:
    """The order of a loader as one of `ranks` ranks has made it, or why it cannot be told."""
    loader = view.loader
    if not view.is_dataloader:
        return f"the loader is a {view.name}, no DataLoader"
    if not view.is_plain_map:
        return (
            f"the loader ({view.name}) has an order of its own: an iterable dataset, persistent workers, or an "
            "iterator that is not torch's"
        )
    loader = cast("DataLoader[Any]", loader)
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        return "the DataLoader has a batch sampler of its own, or none"
    sampler = loader.sampler
    if type(sampler) is SeededSampler and sampler.begins_epochs:
        samples = sampler.length
    elif type(sampler) is DistributedSampler:
        samples = len(cast("Any", sampler.dataset))
    else:
        return f"the order of a {type(sampler).__name__} is not known for other ranks"
    if (sampler.rank, sampler.num_replicas) != (rank, ranks):
        return (
            f"the {type(sampler).__name__} is for rank {sampler.rank} of {sampler.num_replicas}, and this is rank "
            f"{rank} of {ranks}"
        )
    return Order(
        sampler=type(sampler).__name__,
        samples=samples,
        seed=sampler.seed,
        shuffle=sampler.shuffle,
        drop_last=sampler.drop_last,
        batch_size=loader.batch_size,
        drop_small=loader.drop_last,
    )
