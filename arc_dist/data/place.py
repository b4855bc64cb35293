"""Names the batches that a step was about when it failed, on the exception itself, for whoever reports it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from arc_dist.data.order import Order
from arc_dist.data.world import Share
from arc_dist.protocol.batches import MAX_SAMPLES, BatchPlace
from arc_dist.protocol.budgets import is_echo_of

ATTRIBUTE = "arc_batch"  # read in supervisor/script.py, which runs before torch is imported and so cannot import this


_MAX_ORDERED = 1 << 24  # samples whose order is worked out for a message: 0.2 s, 128 MB


def mark(error: BaseException, find_place: Callable[[], BatchPlace]) -> None:
    """Leaves on an exception where in the data it happened, unless it only tells of the loss of a peer."""
    if not is_echo_of(type(error).__name__, str(error)):
        setattr(error, ATTRIBUTE, find_place().as_dict())


def place_of(share: Share, *, epoch: int, index: int, ordinal: int, count: int) -> BatchPlace:
    """The place of `count` batches of this rank, with the indices of their samples where the order is known.

    Args:
        share: what of the run this rank computes.
        epoch: of the first batch, from 0.
        index: of the first batch in its epoch.
        ordinal: of the first batch in the run.
        count: micro-batches from there on.
    """
    samples: list[int] = []
    if isinstance(share.order, Order) and share.is_plain and share.order.samples <= _MAX_ORDERED:
        order, batches = share.order, share.order.batches(share.ranks)
        indices: dict[int, torch.Tensor] = {}
        for offset in range(index, index + count):
            ahead, number = divmod(offset, max(batches, 1))
            if epoch + ahead not in indices:
                indices[epoch + ahead] = order.of_epoch(epoch + ahead)
            samples += order.batch(indices[epoch + ahead], number, rank=share.rank, ranks=share.ranks)
    return BatchPlace(
        ordinal=ordinal,
        epoch=epoch,
        index=index,
        count=count,
        samples=tuple(samples[:MAX_SAMPLES]),
        num_samples=len(samples),
    )
