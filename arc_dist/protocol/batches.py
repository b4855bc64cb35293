"""A place in the data, as far as it can be told to others: which batches a step was about when it failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MAX_SAMPLES = 64  # that are kept
_MAX_SHOWN = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlace:
    """The batches of one step on one rank, or the one whose loading failed.

    Attributes:
        ordinal: of the first batch in the whole run, from 0; skipped ones count. Equal on all ranks in step.
        epoch: of the first batch, from 0.
        index: of the first batch in its epoch, from 0.
        count: micro-batches, one after the other.
        samples: indices into the dataset, where the order of samples is known; the first `MAX_SAMPLES` of them.
        num_samples: how many there are in all, where that is known.
    """

    ordinal: int
    epoch: int
    index: int
    count: int = 1
    samples: tuple[int, ...] = ()
    num_samples: int = 0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> BatchPlace:
        """Reads the wire form.

        Raises:
            ValueError: it is none.
        """
        try:
            numbers = {name: int(fields[name]) for name in ("ordinal", "epoch", "index", "count", "num_samples")}
            samples = tuple(int(sample) for sample in fields["samples"])[:MAX_SAMPLES]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a place in the data: {fields!r} ({type(error).__name__}: {error})") from None
        return BatchPlace(samples=samples, **numbers)

    def __str__(self) -> str:
        last = self.index + self.count - 1
        what = f"batch {self.index}" if self.count == 1 else f"batches {self.index} to {last}"
        return f"{what} of epoch {self.epoch}{self._told_samples()}"

    def _told_samples(self) -> str:
        if not self.samples:
            return ""
        shown = ", ".join(map(str, self.samples[:_MAX_SHOWN]))
        more = f", ... {self.num_samples} in all" if self.num_samples > _MAX_SHOWN else ""
        return f" (samples {shown}{more})"
