"""What must be known to find a place in the data again: the record of an epoch, and a position in it.

Two facts about DataLoader shape this. Making its iterator draws a seed for the workers from torch's global generator,
and a random sampler without a generator of its own draws its seed there too, at the first batch: so an epoch's order is
a function of the random state at the epoch's start, which is recorded. With ``num_workers=0`` items may draw random
numbers (augmentation) between those that the model draws (dropout): so a batch can only be made again after the random
state just before its own fetch was restored, which is recorded for the batches by which a position is checked.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Any

from arc_dist.checkpoint_store.codec import decode, encode
from arc_dist.errors import ConfigError, DataNotReproducible

_VERSION = 2  # 2: says of which world it is
_MARK = struct.Struct("<4sQQQ")
_MARK_MAGIC = b"arc1"


@dataclasses.dataclass(frozen=True)
class Check:
    """A batch by which a position is recognised.

    Attributes:
        index: of the batch in its epoch.
        digest: see `batch_digest`.
        before: the packed random state just before its fetch; None when the fetch drew nothing.
    """

    index: int
    digest: str
    before: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Anchor:
    """The loader's own `state_dict()` when it had given `index` batches of the epoch."""

    index: int
    state: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """A place between two batches.

    Attributes:
        ordinal: batches given before it, since the run began; skipped ones count.
        epoch: of the batch before it, from 0.
        index: batches of that epoch given before it; 0 only when the epoch has not begun.
        rng: the packed random state at the epoch's start; None when the epoch has not begun.
        generators: states of the generators that the loader itself holds, at the epoch's start, by path.
        reused_workers: the epoch was given to worker processes that had served an earlier epoch.
        checks: at most one for the epoch's first batch and one for a later one before this position.
        anchor: for a loader with `state_dict`: from where it can go on. It lies before this position.
        items_draw: whether making items draws random numbers in the workers; None when not known.
        length: batches per epoch, if the loader says it.
        batch_size: samples per batch, if the loader says it.
        skipped: ordinals that are never given again.
        world: of how many ranks it is a position, and of which order of samples (see `data.world.Share`); None in
            positions of version 1.
    """

    ordinal: int = 0
    epoch: int = 0
    index: int = 0
    rng: bytes | None = None
    generators: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reused_workers: bool = False
    checks: tuple[Check, ...] = ()
    anchor: Anchor | None = None
    items_draw: bool | None = None
    length: int | None = None
    batch_size: int | None = None
    skipped: tuple[int, ...] = ()
    world: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that the state codec can encode (the anchor's state, if the loader's own values allow)."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["checks"] = [[check.index, check.digest, check.before] for check in self.checks]
        fields["anchor"] = None if self.anchor is None else [self.anchor.index, self.anchor.state]
        fields["generators"] = dict(self.generators)
        fields["skipped"] = list(self.skipped)
        fields["world"] = None if self.world is None else dict(self.world)
        return {"version": _VERSION, **fields}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Position:
        """The inverse of `to_dict`.

        Raises:
            DataNotReproducible: it was recorded by a newer format.
            ConfigError: it is no position.
        """
        fields = dict(value)
        version = fields.pop("version", None)
        if isinstance(version, int) and version > _VERSION:
            raise DataNotReproducible(
                f"the data position has format {version}, this version of arc-dist knows up to {_VERSION}. Upgrade it."
            )
        try:
            fields["checks"] = tuple(Check(*check) for check in fields["checks"])
            fields["anchor"] = None if fields["anchor"] is None else Anchor(*fields["anchor"])
            fields["skipped"] = tuple(fields["skipped"])
            return Position(**fields)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"this is not a data position ({error}). Pass what `position()` returned.") from error


def pack_mark(head: bytes, *, ordinal: int, epoch: int, index: int) -> bytes:
    """A position as bytes, from an encoded head that stays the same for many of them."""
    return _MARK.pack(_MARK_MAGIC, ordinal, epoch, index) + head


def encode_head(position: Position) -> bytes:
    """The part of a mark that does not change from batch to batch."""
    return json.dumps(encode(position.to_dict(), inline=True)[0], allow_nan=False, separators=(",", ":")).encode()


def read_mark(data: bytes) -> dict[str, Any]:
    """The position (as `BatchSource.position` gives it) that `BatchSource.mark` packed."""
    if len(data) < _MARK.size or not data.startswith(_MARK_MAGIC):
        raise ConfigError("this is not a mark of a data position. Pass what `mark()` returned.")
    _, ordinal, epoch, index = _MARK.unpack_from(data)
    head = Position.from_dict(decode(json.loads(data[_MARK.size :])))
    checks = tuple(check for check in head.checks if check.index < index)
    anchor = head.anchor if head.anchor is not None and head.anchor.index < index else None
    return dataclasses.replace(head, ordinal=ordinal, epoch=epoch, index=index, checks=checks, anchor=anchor).to_dict()
