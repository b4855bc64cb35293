"""Attempts at a step: which directory belongs to which.

Each directory belongs for ever to the attempt that created it (`attempt.json` appears with it, both at once). So ranks
that go through the same candidates in the same order find the same first one that is theirs, without a message.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from arc_dist.checkpoint_store.backends import Backend, is_missing
from arc_dist.checkpoint_store.format import (
    ATTEMPT_NAME,
    FORMAT_NAME,
    MANIFEST_NAME,
    MAX_ATTEMPT_BYTES,
    PLAIN_VERSION,
    parse_json,
    step_directory,
)
from arc_dist.errors import StoreCorrupt, StoreError, StoreGone

_MAX_REPEATS = 16  # commits of one step by one generation


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A generation of one start of a job that saves a step."""

    step: int
    generation: int
    owner: str
    world_size: int

    def fields(self) -> dict[str, Any]:
        """What tells it from others, as in `attempt.json`."""
        return {"format": FORMAT_NAME, "version": PLAIN_VERSION, **dataclasses.asdict(self)}

    def directories(self) -> list[str]:
        """Where it may be, the plainest name first; the later ones are this owner's alone."""
        names = [step_directory(self.step), step_directory(self.step, generation=self.generation)]
        repeats = (f"{self.owner}#{count}" for count in range(_MAX_REPEATS))
        return names + [step_directory(self.step, generation=self.generation, owner=repeat) for repeat in repeats]


def claim(backend: Backend, run: str, attempt: Attempt, announce: Callable[[], Mapping[str, Any]]) -> str:
    """The directory of an attempt, created if need be. All its ranks get the same one.

    Args:
        backend: where.
        run: the run.
        attempt: whose directory it is.
        announce: more to say in `attempt.json`; whoever creates the directory says it for all ranks.

    Raises:
        StoreError: all candidates are taken; or see `arc_dist.errors`.
    """
    data = (json.dumps({**attempt.fields(), **announce()}) + "\n").encode()
    for name in attempt.directories():
        if not backend.claim(f"{run}/{name}", ATTEMPT_NAME, data) and not _is(backend, run, name, attempt):
            continue
        # A generation that rolled back comes to the same step again; what it committed before stays as it is.
        if not backend.exists(f"{run}/{name}/{MANIFEST_NAME}"):
            return name
    raise StoreError(
        f"store {backend.url}: every directory for step {attempt.step} of generation {attempt.generation} in run {run} "
        "is taken. Remove what is foreign there, or name another run.",
        step=attempt.step,
    )


def find_uncommitted(backend: Backend, run: str, attempt: Attempt) -> str | None:
    """The directory of an attempt that has not committed, if there is one."""
    for name in attempt.directories():
        if _is(backend, run, name, attempt) and not backend.exists(f"{run}/{name}/{MANIFEST_NAME}"):
            return name
    return None


def read_attempt(backend: Backend, run: str, directory: str) -> Any:
    """What `attempt.json` says; None for a foreign, half-deleted or damaged directory, which is nobody's."""
    path = f"{run}/{directory}/{ATTEMPT_NAME}"
    try:
        return parse_json(backend.read(path, MAX_ATTEMPT_BYTES), path)
    except (StoreGone, StoreCorrupt) as error:
        if isinstance(error, StoreGone) and not is_missing(error):
            raise
        return None


def _is(backend: Backend, run: str, directory: str, attempt: Attempt) -> bool:
    """Whether a directory is this attempt's, whatever it has announced."""
    said = read_attempt(backend, run, directory)
    return isinstance(said, dict) and all(
        cast("dict[str, Any]", said).get(key) == value for key, value in attempt.fields().items()
    )
