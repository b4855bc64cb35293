"""The iterator that knows where it is: batches in order, again after a rollback, and on after a restart."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from arc_dist.data.digest import batch_digest
from arc_dist.data.fast_forward import fast_forward
from arc_dist.data.loader import LoaderView
from arc_dist.data.place import place_of
from arc_dist.data.position import Anchor, Check, Position, encode_head, pack_mark
from arc_dist.data.replay import Entry, Epoch, ReplayBuffer
from arc_dist.data.world import CellView, Share, World, settle, settle_loosely
from arc_dist.errors import CheckpointMismatch, ConfigError, DataNotReproducible
from arc_dist.protocol.batches import BatchPlace
from arc_dist.snapshot.rng import capture_rng, restore_rng
from arc_dist.telemetry.log import logger

ENDLESS = 1 << 62


class Batch(NamedTuple):
    """A batch and its place.

    Attributes:
        data: what the loader gave.
        epoch: pass over the data, from 0.
        index: of the batch in its epoch, from 0.
        ordinal: of the batch in the whole run, from 0; skipped batches count. Equal on all ranks in step.
    """

    data: Any
    epoch: int
    index: int
    ordinal: int


class BatchSource:
    """Gives a loader's batches, and gives exactly the same ones again from any recorded position.

    It draws no random numbers of its own, and asks the loader for batches exactly as ``for batch in loader`` in a loop
    over epochs would. It is local to a rank and never communicates.

    Args:
        loader: a DataLoader or any iterable of batches. docs/data.md says what it must offer for exact resumption.
        epochs: passes over the data; None for one, or for as many as `steps` needs.
        steps: batches to give in all, skipped ones not counted; None for all.
        replay_capacity: batches that `rewind` can give again from memory; further back the loader is asked again.
        replay_bytes: bound on the memory those batches hold, in bytes.
        record_rng: keep the random state around each fetch. False saves a few microseconds per batch and is exact only
            if fetching draws no random numbers in this process.
        exact: refuse to resume where the same batches cannot be had; else warn and go on at the same place.
        world: the ranks that share the data; this one alone if None.

    Attributes:
        sample: between `resume` in mid-epoch and `next`, one of the batches before the position: for a throw-away
            forward pass, which fetching the next batch would not do, because fetching may draw random numbers.

    Raises:
        ConfigError: an argument is out of range, or the loader is none.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        replay_capacity: int = 512,
        replay_bytes: int = 1 << 30,
        record_rng: bool = True,
        exact: bool = True,
        world: World | None = None,
    ) -> None:
        for name, value in (("epochs", epochs), ("steps", steps), ("replay_capacity", replay_capacity)):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ConfigError(f"{name} is {value!r}. Give a whole number, 0 or more.")
        self._given = self._view = LoaderView(loader)
        self._may_draw_here = self._view.may_draw_here
        self._world = world or World()
        self._share = Share.of_origin(self._world, self._view)
        self._epochs = 1 if epochs is None and steps is None else epochs
        self._limit = ENDLESS if steps is None else steps
        self._record_rng = record_rng
        self._exact = exact
        self._buffer = ReplayBuffer(replay_capacity, replay_bytes)
        self._skips: frozenset[int] = frozenset()
        self._length = self._view.length
        # Where the loader's iterator stands: the next batch it gives.
        self._iterator: Iterator[Any] | None = None
        self._epoch: Epoch | None = None  # None: the epoch has not begun
        self._epoch_number = 0
        self._index = 0
        self._live = 0
        # Where the user stands; behind the iterator during a replay.
        self._cursor = 0
        self._counted = 0  # batches before the cursor that were given and not skipped
        self._step_began = 0
        self.sample: Any = None
        self.on_open: Callable[[], object] | None = None  # called before an iterator is made, which may take long
        self._recognisable = True
        self._here: Position | None = None  # a position that was gone to, when the batch before it is not held

    # ------------------------------------------------------------------ going through the data

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self) -> Batch:
        """The next batch; during a replay, with the random state that its first fetch left.

        Raises:
            StopIteration: `epochs` or `steps` are used up.
            ConfigError: an epoch without any batch.
            DataNotReproducible: the loader failed before, and cannot be brought back to this place.
        """
        while True:
            if self._counted >= self._limit:
                raise StopIteration
            ordinal = self._cursor
            if ordinal < self._live:
                entry = self._buffer.get(ordinal)
                assert entry is not None, f"batch {ordinal} was to be replayed and is not held"
                data = entry.data
                if entry.after is not None:
                    restore_rng(entry.after)
            else:
                self.sample = None
                entry, data = self._fetch()
            self._cursor = ordinal + 1
            # A skipped batch is fetched all the same: its draws belong to the sequence, also after a restart.
            if ordinal not in self._skips:
                self._counted += 1
                return Batch(data, entry.epoch.number, entry.index, ordinal)

    def begin_step(self, *, recognisable: bool = True) -> None:
        """Marks that the next batch begins an optimizer step; see `position_before_fetch`.

        Args:
            recognisable: a position taken after the step shall be recognised by its last batch. False spares the
                random state before each fetch; it is then recognised by an earlier batch.
        """
        self._step_began = self._cursor
        self._recognisable = recognisable

    def whereabouts(self, *, loading: bool = False) -> BatchPlace:
        """The batches since `begin_step`; with `loading` the one after them, whose loading failed."""
        ordinal = self._cursor if loading else self._step_began
        entry = self._buffer.get(ordinal)
        here = (self._epoch_number, self._index) if entry is None else (entry.epoch.number, entry.index)
        count = 1 if loading else max(1, self._cursor - ordinal)
        return place_of(self._share, epoch=here[0], index=here[1], ordinal=ordinal, count=count)

    def ends_epoch(self, batch: Batch) -> bool:
        """Whether no batch of the same epoch comes after this one.

        Raises:
            ConfigError: the loader has no length, so this is not known in advance.
        """
        if not self._share.is_plain:
            return self._share.ends_epoch(batch.ordinal, self._skips, epochs=self._epochs)
        if self._length is None:
            raise ConfigError(
                f"the end of an epoch is not known in advance: the loader ({self._view.name}) has no len(). Give it "
                "one, or step the scheduler per step instead of per epoch."
            )
        after = 1
        while batch.ordinal + after in self._skips:
            after += 1
        return batch.index + after >= self._length

    def close(self) -> None:
        """Ends the loader's worker processes, if any, and lets go of the batches kept."""
        self._iterator = None
        self._buffer.clear()

    def _fetch(self) -> tuple[Entry, Any]:
        """The next batch from the loader itself."""
        while True:
            opening = self._iterator is None
            if opening:
                self._open()
            assert self._iterator is not None
            assert self._epoch is not None
            # The first batch of an iterator is special: a sampler's order may be drawn with it.
            record_rng = self._record_rng and (opening or self._may_draw_here)
            before = capture_rng() if record_rng and self._recognisable else None
            try:
                data = next(self._iterator)
            except StopIteration:
                self._end_epoch()
                continue
            except Exception:
                # Many iterators are of no use after an error. A next call opens another and goes to this place.
                self._iterator = None
                raise
            after = capture_rng() if record_rng else None
            entry = Entry(self._live, self._epoch, self._index, data, before, after)
            if record_rng and not self._recognisable:
                entry.forget_before()
            if self._index == 0 and self._epoch.first is None:
                self._epoch.first = Check(0, batch_digest(data))
            self._buffer.append(entry)
            self._live += 1
            self._index += 1
            return entry, data

    def _open(self) -> None:
        """Makes the loader's iterator: at an epoch's beginning, or where it failed."""
        if self._epochs is not None and self._epoch_number >= self._epochs:
            raise StopIteration
        if self.on_open is not None:
            self.on_open()
        if self._index > 0:
            rng = capture_rng()
            self._go_to(self._position(self._live))
            self.sample = None
            restore_rng(rng)
            return
        view = self._view
        self._epoch = Epoch(
            number=self._epoch_number,
            rng=capture_rng(),
            generators=view.generator_states(),
            reused_workers=view.has_used_workers,
        )
        view.set_epoch(self._epoch_number)
        self._iterator, self._epoch.witness = view.iterate()

    def _end_epoch(self) -> None:
        self._iterator = None
        self._epoch = None
        number, count = self._epoch_number, self._index
        self._epoch_number += 1
        self._index = 0
        if count or self._view.has_empty_epochs:
            return
        if number > 0 and isinstance(self._view.loader, Iterator):
            if self._epochs is None:  # `steps` asked for more than there is
                logger.warning("data: the %s ended after %d batches", self._view.name, self._live)
                self._epochs = self._epoch_number
                return
            reason = f"it is a {self._view.name}, which can be gone through only once. Pass an iterable, or epochs=1"
        else:
            reason = "is the dataset empty, or smaller than a batch with drop_last=True"
        raise ConfigError(f"the loader gave no batch in epoch {number}: {reason}.")

    # ------------------------------------------------------------------ positions

    def position(self, ordinal: int | None = None) -> dict[str, Any]:
        """A place to which `rewind` and, in another process, `resume` can go.

        Args:
            ordinal: the batch before which the place lies: one that was given and is still held, or the next. The
                place before the next batch if None.

        Returns:
            Plain values and bytes that the state codec can encode.

        Raises:
            DataNotReproducible: the batch before the place is not held any more.
        """
        place = self._cursor if ordinal is None else ordinal
        position = self._position(place)
        if self._view.is_stateful and place == self._live and self._index > 0 and self._iterator is not None:
            # For the positions to come, which need a state that lies before them.
            assert self._epoch is not None
            state = copy.deepcopy(self._view.loader.state_dict())  # type: ignore[attr-defined]
            self._epoch.add_anchor(Anchor(self._index, state))
        return position.to_dict()

    def position_before_fetch(self) -> dict[str, Any]:
        """The position before the first batch of the present step (since `begin_step`)."""
        return self.position(self._step_began)

    def mark(self) -> bytes:
        """The present position in a form that is cheap enough for every step; `read_mark` makes a position of it.

        It has no check of its own last batch, only those of the position recorded last.
        """
        entry = self._buffer.get(self._cursor - 1)
        if entry is None:
            here = self._position(self._cursor)
            return pack_mark(encode_head(here), ordinal=here.ordinal, epoch=here.epoch, index=here.index)
        epoch = entry.epoch
        key = (epoch.last, len(epoch.anchors), self._skips, epoch.drew)
        if epoch.head is None or epoch.head[0] != key:
            checks = [check for check in (epoch.first, epoch.last) if check is not None]
            epoch.head = (key, encode_head(self._describe(epoch, checks, epoch.anchors[-1:])))
        return pack_mark(epoch.head[1], ordinal=self._cursor, epoch=epoch.number, index=entry.index + 1)

    def _position(self, ordinal: int) -> Position:
        entry = self._buffer.get(ordinal - 1)
        if entry is not None:
            return self._position_after(entry)
        if self._here is not None and self._here.ordinal == ordinal:
            return dataclasses.replace(self._here, skipped=self.skipped())
        first = self._buffer.get(0)
        if ordinal == 0 and (first is not None or self._live == 0):
            return Position(
                generators=first.epoch.generators if first is not None else self._view.generator_states(),
                length=self._length,
                batch_size=self._view.batch_size,
                skipped=self.skipped(),
                world=self._share.to_dict(),
            )
        raise DataNotReproducible(
            f"there is no position before batch {ordinal}: the batch before it is not held any more (the next one is "
            f"{self._cursor}). Record the position earlier, or let more batches be kept for replay.",
            ordinal=ordinal,
        )

    def _position_after(self, entry: Entry) -> Position:
        epoch, index = entry.epoch, entry.index + 1
        last = entry.check() or epoch.last
        if last is not None and (epoch.last is None or last.index > epoch.last.index):
            epoch.last = last
        checks = [check for check in (epoch.first, last) if check is not None and check.index < index]
        anchors = [anchor for anchor in epoch.anchors if anchor.index < index]
        described = self._describe(epoch, checks, anchors[-1:])
        return dataclasses.replace(described, ordinal=entry.ordinal + 1, epoch=epoch.number, index=index)

    def _describe(self, epoch: Epoch, checks: list[Check], anchors: list[Anchor]) -> Position:
        return Position(
            rng=epoch.packed_rng(),
            generators=epoch.generators,
            reused_workers=epoch.reused_workers,
            checks=tuple({check.index: check for check in checks}.values()),
            anchor=anchors[-1] if anchors else None,
            items_draw=epoch.drew,
            length=self._length,
            batch_size=self._view.batch_size,
            skipped=self.skipped(),
            world=self._share.to_dict(),
        )

    # ------------------------------------------------------------------ going elsewhere

    def rewind(self, position: Mapping[str, Any]) -> None:
        """Goes back in this process: the same batches come again, each with the random state its fetch left.

        Batches that are not held any more, or were changed in place, are asked from the loader again as in `resume`.
        The random state itself is the caller's to restore, after this call. Skips made since the position stay.

        Raises:
            DataNotReproducible: the same batches cannot be had.
        """
        target = Position.from_dict(position)
        if self._can_replay(target):
            self._arrive(target)
            return
        self.resume(position)

    def resume(self, position: Mapping[str, Any]) -> None:
        """Goes to a position recorded by an earlier process, by the cheapest way that is proven to be exact.

        Draws random numbers and sets the random state: the caller restores its own after this call, before `next`.
        May take as long as loading the epoch up to the position; a line is logged every 10 s.

        Raises:
            DataNotReproducible: says which batch differs and what to do.
            CheckpointMismatch: it is of another number of ranks, and this one cannot make the same steps.
            ConfigError: `position` is none.
        """
        target = self._settle(Position.from_dict(position))
        self._buffer.clear()
        if target.index == 0:
            self._iterator = None
            if self._view.is_one_shot and self._view.started:
                raise DataNotReproducible(
                    f"the data is a {self._view.name}, which can be gone through only once and has been read already. "
                    "Pass a DataLoader or a list, or let more batches be kept for replay."
                )
            self._view.restore_generators(target.generators)
            self._epoch = None
        else:
            self._go_to(target)
        self._live = target.ordinal
        self._epoch_number = target.epoch
        self._index = target.index
        self._arrive(target)

    def _settle(self, target: Position) -> Position:
        """The position in the present world, for which the loader is looked at anew."""
        try:
            share, target = settle(self._given, target, self._world, epochs=self._epochs)
        except (CheckpointMismatch, DataNotReproducible) as error:
            if self._exact:
                raise
            share, target = settle_loosely(self._given, target, self._world, error)
        if share != self._share:
            logger.info("data: %s", share)
            self._share = share
            self._view = self._given if share.is_plain else CellView(self._given.loader, share)
            self._length = self._view.length
        return target

    def _go_to(self, target: Position) -> None:
        self._iterator = None  # ends its workers before others are started
        found = fast_forward(self._view, target, exact=self._exact)
        self._iterator = found.iterator
        self.sample = found.last
        checks = {check.index: check for check in target.checks}
        last = max(checks) if checks else 0
        self._epoch = Epoch(
            number=target.epoch,
            rng=target.rng,
            generators=target.generators,
            reused_workers=target.reused_workers,
            first=checks.get(0),
            last=checks.get(last),
            anchors=[] if target.anchor is None else [target.anchor],
            witness=found.witness,
            # A fresh witness saw everything if everything was loaded again.
            drew_before=False if found.way == "load" else target.items_draw,
        )
        logger.info("data: at batch %d of epoch %d again (%s)", target.index, target.epoch, found.way)

    def _can_replay(self, target: Position) -> bool:
        if target.ordinal > self._live:
            return False
        wanted = range(target.ordinal, self._live)
        if wanted and self._buffer.get(wanted[0]) is None:
            return False
        if not wanted and self._live != target.ordinal:
            return False
        before = self._buffer.get(target.ordinal - 1)
        if before is not None and (before.epoch.number, before.index + 1) != (target.epoch, target.index):
            return False
        for entry in self._buffer:
            if entry.ordinal >= target.ordinal and not entry.is_intact:
                logger.warning(
                    "data: batch %d was changed in place after it was given; asking the loader again. Changing a copy "
                    "(x = x * 2, not x *= 2) makes rollbacks fast",
                    entry.ordinal,
                )
                return False
        return True

    def _arrive(self, target: Position) -> None:
        self._here = target
        self._cursor = self._step_began = target.ordinal
        self._skips |= set(target.skipped)
        self._count()

    # ------------------------------------------------------------------ skipping and keeping

    def skip(self, *ordinals: int) -> None:
        """Batches that are never given again: not in a replay, and not after a restart from a later position.

        Skips are not undone by `rewind`: they are what healing learned, and outlive the state that is rolled back.
        """
        if min(ordinals, default=0) < 0:
            raise ConfigError(f"batch {min(ordinals)} cannot be skipped. Ordinals are 0 or more.")
        self._skips |= set(ordinals)
        self._count()

    @property
    def accumulate(self) -> int:
        """Batches per update, which is what was asked for unless the number of ranks has changed."""
        return self._share.accumulate

    def skipped(self) -> tuple[int, ...]:
        """Ordinals of all batches that are left out, in order."""
        return tuple(sorted(self._skips))

    def release(self, ordinal: int) -> None:
        """Lets go of batches that only a rewind to before `ordinal` would need."""
        self._buffer.release(ordinal)

    def _count(self) -> None:
        self._counted = self._cursor - sum(1 for skipped in self._skips if skipped < self._cursor)
