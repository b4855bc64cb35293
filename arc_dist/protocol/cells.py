"""Which micro-batches a rank computes when the world is not the one that the run began with.

A run's **origin** is the world it was begun with: W0 ranks, each with A0 micro-batches per update. It says for ever
what a step is made of: W0 x A0 **cells**, each one micro-batch of one rank of the origin, with the samples that this
rank would have used. A **turn** is one step's worth of cells; turns are counted from 0 over all epochs, and a turn
that was skipped counts. The origin's rank `replica` goes through L batches per epoch, so its batch of turn t and micro-
batch m is number n = t x A0 + m of the run: batch n mod L of epoch n div L.

A world of W ranks computes the same cells, each exactly once, with A = W0 x A0 / W micro-batches per rank: cell number
u = m x W0 + replica of a turn goes to rank u mod W. Every rank gets A cells of every turn, so W must divide W0 x A0.
The gradient is the mean over ranks of the mean over micro-batches: over the same cells in every such world, so it is
the same up to rounding. At W = W0, rank r gets the cells of replica r in their order: the origin is a special case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple


class Cell(NamedTuple):
    """One micro-batch.

    Attributes:
        turn: the step's worth of cells that it belongs to.
        replica: the rank of the origin whose batch it is.
        batch: its number in the epoch, from 0.
    """

    turn: int
    replica: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """The world that a run was begun with.

    Attributes:
        ranks: W0, 1 or more.
        accumulate: A0, micro-batches per rank and update, 1 or more.
    """

    ranks: int
    accumulate: int

    @property
    def num_cells(self) -> int:
        """Micro-batches of all ranks together, per update."""
        return self.ranks * self.accumulate

    def fitting_worlds(self) -> list[int]:
        """Numbers of ranks that can share a step, in rising order."""
        return [ranks for ranks in range(1, self.num_cells + 1) if self.num_cells % ranks == 0]

    def accumulate_in(self, ranks: int) -> int | None:
        """Micro-batches per rank and update in a world of `ranks`; None when they cannot share a step evenly."""
        return self.num_cells // ranks if self.num_cells % ranks == 0 else None

    def cells(self, ranks: int, rank: int, *, epoch: int, batches: int, since: int = 0) -> Iterator[Cell]:
        """The cells of one epoch that a rank of another world computes, in their order.

        Args:
            ranks: of that world; divides `num_cells`.
            rank: which of them.
            epoch: from 0.
            batches: L, batches per epoch of each rank of the origin.
            since: turns before this one are left out.
        """
        first = max(epoch * batches, since * self.accumulate)
        for number in range(first, (epoch + 1) * batches):
            turn, micro = divmod(number, self.accumulate)
            # The smallest replica with (micro * self.ranks + replica) % ranks == rank.
            for replica in range((rank - micro * self.ranks) % ranks, self.ranks, ranks):
                yield Cell(turn, replica, number - epoch * batches)

    def shares_the_last_turn(self, ranks: int, *, total_batches: int) -> bool:
        """Whether all ranks get equally many cells of the last turn too, which is short when the data ends in it.

        Args:
            ranks: of the world.
            total_batches: L times the number of epochs.
        """
        return total_batches % self.accumulate * self.ranks % ranks == 0
