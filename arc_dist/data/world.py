"""Data in a world that changes size: which batches a rank loads when the run was begun with another number of ranks.

A position says of which world it is, so nothing has to be known from elsewhere. In the world that a run was begun with
nothing here is active. Where the number of ranks has changed, the loader's batch sampler is replaced by one that gives
the rank's cells (`protocol.cells`), from the turn on at which the world changed; that place then counts as the
beginning of an epoch, so everything that makes a place exact works as always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from arc_dist.data.fast_forward import fast_forward
from arc_dist.data.loader import LoaderView, replaced
from arc_dist.data.order import REMEDY, Order, order_of
from arc_dist.data.position import Position
from arc_dist.data.witness import Witness
from arc_dist.errors import ArcError, CheckpointMismatch, DataNotReproducible
from arc_dist.protocol.cells import Cell, Origin
from arc_dist.snapshot.rng import capture_rng, restore_rng
from arc_dist.telemetry.log import logger


@dataclasses.dataclass(frozen=True)
class World:
    """The ranks that there are, and the micro-batches per rank and update that the script asks for."""

    rank: int = 0
    ranks: int = 1
    accumulate: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What of the run this rank computes.

    Attributes:
        origin: the world that the run was begun with.
        rank, ranks: this rank, and how many share a step now.
        since: the turn that this world began with; 0 in the origin.
        order: of the samples; why it is not known otherwise.
    """

    origin: Origin
    rank: int
    ranks: int
    since: int
    order: Order | str

    @staticmethod
    def of_origin(world: World, view: LoaderView) -> Share:
        """Of a run that begins, or goes on in the world it began with."""
        order = order_of(view, rank=world.rank, ranks=world.ranks)
        origin = Origin(world.ranks, world.accumulate)
        return Share(origin=origin, rank=world.rank, ranks=world.ranks, since=0, order=order)

    @property
    def accumulate(self) -> int:
        """Micro-batches per rank and update."""
        accumulate = self.origin.accumulate_in(self.ranks)
        assert accumulate is not None
        return accumulate

    @property
    def is_plain(self) -> bool:
        """Whether the loader gives this rank's batches as it is."""
        return self.since == 0 and self.ranks == self.origin.ranks

    def __str__(self) -> str:
        origin = self.origin
        return (
            f"the run began with {origin.ranks} ranks, each with {origin.accumulate} micro-batches per update; since "
            f"turn {self.since} it is {self.ranks} ranks, each with {self.accumulate}"
        )

    def to_dict(self) -> dict[str, Any]:
        """What a position says of it: the same on all ranks."""
        return {
            "ranks": self.ranks,
            "origin": [self.origin.ranks, self.origin.accumulate],
            "since": self.since,
            "order": self.order.to_dict() if isinstance(self.order, Order) else self.order,
        }

    @staticmethod
    def from_dict(fields: Mapping[str, Any], *, rank: int) -> Share:
        """What `to_dict` of a rank gave."""
        order = fields["order"]
        return Share(
            origin=Origin(*fields["origin"]),
            rank=rank,
            ranks=fields["ranks"],
            since=fields["since"],
            order=Order(**order) if isinstance(order, Mapping) else order,
        )

    def fitting_worlds(self, *, epochs: int | None) -> list[int]:
        """Numbers of ranks that can go on with the same samples in every step; only the present one if none can.

        Args:
            epochs: passes over the data in the whole run; None for no bound.
        """
        if not isinstance(self.order, Order):
            return [self.ranks]
        worlds, origin = self.origin.fitting_worlds(), self.origin
        if epochs is None:
            return worlds
        total = epochs * self.batches
        return [ranks for ranks in worlds if origin.shares_the_last_turn(ranks, total_batches=total)]

    def cells(self, epoch: int) -> Iterator[Cell]:
        """This rank's cells of an epoch, in order."""
        return self.origin.cells(self.ranks, self.rank, epoch=epoch, batches=self.batches, since=self.since)

    @property
    def batches(self) -> int:
        """Batches per epoch of each rank of the origin."""
        assert isinstance(self.order, Order)
        return self.order.batches(self.origin.ranks)

    def ends_epoch(self, ordinal: int, skipped: Collection[int], *, epochs: int | None) -> bool:
        """Whether no batch of the same epoch comes after the turn of this batch, on any rank; see `BatchSource`."""
        batches, accumulate = self.batches, self.origin.accumulate
        turn = ordinal // self.accumulate
        last = (turn + 1) * accumulate - 1
        if epochs is not None:
            last = min(last, epochs * batches - 1)
        turns = {number // self.accumulate for number in skipped}
        after = 1
        while (last + after) // accumulate in turns:
            after += 1
        return last % batches + after >= batches


class CellView(LoaderView):
    """A loader whose batches are a rank's cells instead of what its own batch sampler gives."""

    has_empty_epochs = True

    def __init__(self, loader: Any, share: Share) -> None:
        super().__init__(loader)
        self._share = share
        self._epoch_number = 0

    @property
    def length(self) -> int | None:
        return None  # it differs from epoch to epoch and from rank to rank

    @property
    def batch_size(self) -> int | None:
        order = self._share.order
        return order.batch_size if isinstance(order, Order) else None

    def set_epoch(self, epoch: int) -> None:
        self._epoch_number = epoch
        super().set_epoch(epoch)

    def iterate(self, *, wanted: Collection[int] = (), since: int = 0) -> tuple[Iterator[Any], Witness | None]:
        with replaced(vars(self.loader), "batch_sampler", _CellBatches(self._share, self._epoch_number)):
            return super().iterate(wanted=wanted, since=since)


class _CellBatches:
    """The indices of a rank's cells of one epoch, batch by batch. Draws no random numbers."""

    def __init__(self, share: Share, epoch: int) -> None:
        self._share = share
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order, ranks = self._share.order, self._share.origin.ranks
        assert isinstance(order, Order)
        indices = order.of_epoch(self._epoch)
        for cell in self._share.cells(self._epoch):
            yield order.batch(indices, cell.batch, rank=cell.replica, ranks=ranks)


def settle(view: LoaderView, position: Position, world: World, *, epochs: int | None) -> tuple[Share, Position]:
    """What this rank computes from a position on, and the position for this world.

    May load a few batches, to see that the data are those of the position; restores the random state it found.

    Args:
        view: the loader as the script gave it, made for the present world.
        position: of any rank of the world that recorded it.
        world: the present one.
        epochs: passes over the data in the whole run; None for no bound.

    Raises:
        CheckpointMismatch: this number of ranks, or this batch size, cannot make the same steps; says which can.
        DataNotReproducible: the order of samples in another world is not known, or is another one.
    """
    plain = Share.of_origin(world, view)
    recorded = None if position.world is None else Share.from_dict(position.world, rank=world.rank)
    if recorded is None or (recorded.is_plain and recorded.ranks == world.ranks):
        # A position of a version that knew of no worlds is one of this world: `restore` has seen to that.
        return plain, position
    _require_division(recorded.origin, world)
    _require_same_order(recorded, plain, position)
    _require_micro_batches(recorded, plain, world)
    share = dataclasses.replace(recorded, ranks=world.ranks)
    if epochs is not None and not share.origin.shares_the_last_turn(world.ranks, total_batches=epochs * share.batches):
        raise CheckpointMismatch(
            f"the data end within a step whose micro-batches {world.ranks} ranks cannot share evenly. Start with "
            f"{share.origin.ranks} ranks, or give the run a number of steps instead of epochs.",
            ranks=world.ranks,
        )
    if recorded.ranks == world.ranks:
        return share, position
    turn, rest = divmod(position.ordinal, recorded.accumulate)
    if rest:
        raise DataNotReproducible(
            f"batch {position.ordinal} is within a step of {recorded.accumulate} micro-batches per rank, as when the "
            f"data had ended or accumulate was changed. Start with {recorded.ranks} ranks to go on there.",
            ordinal=position.ordinal,
        )
    _recognise(view, recorded, position, rank=world.rank % recorded.ranks)
    share = dataclasses.replace(share, since=turn)
    skipped = {ordinal // recorded.accumulate for ordinal in position.skipped}
    return share, Position(
        ordinal=turn * share.accumulate,
        epoch=turn * share.origin.accumulate // share.batches,
        generators=position.generators,
        batch_size=position.batch_size,
        skipped=tuple(turn * share.accumulate + i for turn in sorted(skipped) for i in range(share.accumulate)),
        world=share.to_dict(),
    )


def settle_loosely(view: LoaderView, position: Position, world: World, why: ArcError) -> tuple[Share, Position]:
    """As `settle`, where exactness was waived: about the same place in the epoch, with the script's own batches."""
    recorded = 1 if position.world is None else position.world["ranks"]
    share = Share.of_origin(world, view)
    logger.warning(
        "data: going on inexactly with %d ranks: samples may be used again or left out, and an update has %d "
        "micro-batches now: %s", world.ranks, share.origin.num_cells, why,
    )  # fmt: skip
    index = position.index * recorded // world.ranks
    return share, Position(
        ordinal=position.ordinal,
        epoch=position.epoch,
        index=index,
        rng=position.rng if index else None,
        generators=position.generators,
        world=share.to_dict(),
    )


def _require_division(origin: Origin, world: World) -> None:
    if origin.accumulate_in(world.ranks) is None:
        worlds = ", ".join(map(str, origin.fitting_worlds()))
        raise CheckpointMismatch(
            f"{world.ranks} ranks cannot share the {origin.num_cells} micro-batches of a step evenly (the run was "
            f"begun with {origin.ranks} ranks x accumulate={origin.accumulate}). Worlds that can: {worlds}. Start one "
            "of them, or begin a new run (Arc(run=...)) with the number you have.",
            ranks=world.ranks,
            worlds=origin.fitting_worlds(),
        )


def _require_same_order(recorded: Share, plain: Share, position: Position) -> None:
    """The present loader's order must be that of the position, but for the batch size."""
    for share, when in ((recorded, "when the checkpoint was written"), (plain, "now")):
        if not isinstance(share.order, Order):
            raise DataNotReproducible(
                f"the number of ranks changed from {recorded.ranks} to {plain.ranks}, and the same samples cannot be "
                f"found in another world: {when}, {share.order}. {REMEDY}",
                epoch=position.epoch,
                index=position.index,
            )
    assert isinstance(recorded.order, Order) and isinstance(plain.order, Order)
    then, now = recorded.order.to_dict(), plain.order.to_dict()
    changed = [f"{key} was {then[key]}, is {now[key]}" for key in then if key != "batch_size" and then[key] != now[key]]
    if changed:
        raise DataNotReproducible(
            f"the loader is not the one that the position was recorded with: {'; '.join(changed)}. Use the same "
            "dataset and sampler, or start a new run.",
            epoch=position.epoch,
            index=position.index,
        )


def _require_micro_batches(recorded: Share, plain: Share, world: World) -> None:
    """The script either asks for what the origin asked for, or divides the same global batch by itself."""
    assert isinstance(recorded.order, Order) and isinstance(plain.order, Order)
    origin, then, now = recorded.origin, recorded.order.batch_size, plain.order.batch_size
    total = origin.num_cells * then
    if (now, world.accumulate) == (then, origin.accumulate) or now * world.accumulate * world.ranks == total:
        return
    asked = world.ranks * world.accumulate * now
    raise CheckpointMismatch(
        f"the global batch would change: the run was begun with {origin.ranks} ranks x accumulate={origin.accumulate} "
        f"x batch_size={then} = {total} samples per update, and this script asks for {world.ranks} x "
        f"{world.accumulate} x {now} = {asked}. Leave accumulate={origin.accumulate} and batch_size={then} as they "
        "were (the micro-batches per rank are adapted to the number of ranks), or begin a new run (Arc(run=...)).",
        ranks=world.ranks,
    )


def _recognise(view: LoaderView, recorded: Share, position: Position, *, rank: int) -> None:
    """Loads the batches by which the position's own rank recognised it, where that needs no others to be loaded."""
    then = CellView(view.loader, dataclasses.replace(recorded, rank=rank))
    if position.index == 0 or not then.can_skip(position.items_draw):
        return
    rng = capture_rng()
    try:
        fast_forward(then, dataclasses.replace(position, length=None), exact=True)
    finally:
        restore_rng(rng)
