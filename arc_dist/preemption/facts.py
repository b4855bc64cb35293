"""What a trainer leaves in its rank's shared memory so that the state there can be saved without it.

The supervisor reads how long that will take; the process that writes the state reads where it belongs.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from arc_dist.protocol.leaving import saving_s

_NAME = "saving.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavingFacts:
    """Where checkpoints of a job go, and how fast.

    Attributes:
        tiers: the fields of each `checkpoint_store.tiers.Tier`, fastest first.
        run: name of the run inside the store.
        owner: under which name the job writes there.
        save_timeout_s: how long a rank's part may take in one tier.
        state_bytes: of this rank's part.
        bytes_per_s: at which this rank wrote to the first tier, as it was measured last; None when it was not.
    """

    tiers: tuple[dict[str, Any], ...]
    run: str
    owner: str
    save_timeout_s: float
    state_bytes: int
    bytes_per_s: float | None

    @property
    def needed_s(self) -> float | None:
        """How long saving this rank's state takes, with what surrounds it; None when nothing was measured."""
        return None if self.bytes_per_s is None else saving_s(self.state_bytes, self.bytes_per_s)

    def write(self, directory: Path) -> None:
        """Leaves the facts in a rank's directory, in place of earlier ones: whole or not at all."""
        draft = directory / f".{_NAME}.{os.getpid()}"
        draft.touch(mode=0o600)  # a URL may hold credentials
        draft.write_text(json.dumps(dataclasses.asdict(self)))
        draft.rename(directory / _NAME)

    @staticmethod
    def read(directory: Path) -> SavingFacts | None:
        """What was left there; None when the job has no store, or no trainer got so far."""
        try:
            fields = json.loads((directory / _NAME).read_text())
        except FileNotFoundError:
            return None
        return SavingFacts(**{**fields, "tiers": tuple(fields["tiers"])})
