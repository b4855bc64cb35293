"""Marks on the steps of a run: pins ("keep this") and quarantine ("never restore this by itself").

The one thing that every kind of storage can do safely is to create a file that must not exist yet, so marks are never
rewritten in place. Each change writes all marks anew, as the next number: `marks-00000007.json`; the highest number
counts. Who loses the race for a number reads again and repeats its change on top of the winner's (FORMAT.md, 8).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from arc_dist.checkpoint_store.backends import Backend
from arc_dist.checkpoint_store.format import digest_of, parse_json, step_of_directory
from arc_dist.checkpoint_store.manifest import Fields, fields_of
from arc_dist.errors import CheckpointMismatch, StoreCorrupt, StoreError, StoreGone

_log = logging.getLogger(__name__)
_FORMAT = "arc-dist-marks"
_VERSION = 1
_NAME = re.compile(r"marks-([0-9]{8,12})\.json")
_TAIL = re.compile(rb',\n"marks_digest": "sha256:([0-9a-f]{64})"\n}\n\Z')
_TAIL_BYTES = len(b',\n"marks_digest": "sha256:"\n}\n') + 64
_MAX_BYTES = 16 << 20
_MAX_WHY = 500  # characters
_NUM_OLD = 8  # numbers below the newest that stay: see `_clean`
_MAX_TRIES = 32
_RETRY_S = 0.02


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Someone wants every commit of a step kept. `at` is in seconds since 1970."""

    step: int
    why: str
    at: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """One commit must not be restored by itself.

    It is known by its directory and its time: after a rollback the same step is saved again, in another directory or,
    once the bad one was removed, in one of the same name, and that later commit is sound.

    Attributes:
        directory: of the commit.
        committed_at: what its manifest says.
        why: what happened.
        at: when it was marked, in seconds since 1970.
    """

    directory: str
    committed_at: float
    why: str
    at: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """All marks of a run.

    Attributes:
        number: of the file they come from; 0 when there is none yet.
        pins: by step.
        quarantined: by directory.
        sightings: directories without a manifest, by name: what they looked like, and since when (see `orphans`).
    """

    number: int = 0
    pins: Mapping[int, Pin] = dataclasses.field(default_factory=dict[int, Pin])
    quarantined: Mapping[str, Quarantine] = dataclasses.field(default_factory=dict[str, Quarantine])
    sightings: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict[str, tuple[str, float]])

    def quarantine_of(self, directory: str, committed_at: float) -> str | None:
        """Why a commit must not be restored by itself; None when it may."""
        mark = self.quarantined.get(directory)
        return mark.why if mark is not None and mark.committed_at == committed_at else None

    def pin_of(self, step: int) -> str | None:
        """Why a step is pinned; None when it is not."""
        pin = self.pins.get(step)
        return None if pin is None else pin.why

    def to_bytes(self) -> bytes:
        """The file's content, closed by the line with its digest."""
        fields: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "number": self.number,
            "pins": [dataclasses.asdict(self.pins[step]) for step in sorted(self.pins)],
            "quarantined": [dataclasses.asdict(self.quarantined[name]) for name in sorted(self.quarantined)],
            "sightings": [
                {"name": name, "look": look, "since": since} for name, (look, since) in sorted(self.sightings.items())
            ],
        }
        lines = ",\n".join(f'"{key}": {json.dumps(value, allow_nan=False)}' for key, value in fields.items())
        body = ("{\n" + lines).encode()
        return body + f',\n"marks_digest": "sha256:{digest_of(body)}"\n}}\n'.encode()


def read_marks(backend: Backend, run: str, *, strict: bool = True) -> Marks:
    """The marks of a run; none when nobody made any.

    Args:
        backend: where the run is.
        run: its name.
        strict: refuse to go on when the newest file is damaged, as whoever deletes must. Without it the newest sound
            one counts and the damaged one is logged, so that a flipped bit in a mark never prevents a restore.

    Raises:
        StoreCorrupt: a file was altered.
        CheckpointMismatch: it has a newer format.
        StoreError: see `arc_dist.errors`.
    """
    for _ in range(_MAX_TRIES):
        numbers = _numbers(backend, run)
        for number in reversed(numbers):
            try:
                return _read(backend, run, number)
            except StoreGone:
                break  # a newer one was made since the listing, and old ones were removed
            except StoreCorrupt as error:
                if strict:
                    raise
                _log.warning("%s Marks before it are used.", error.message)
        else:
            return Marks(number=numbers[-1] if numbers else 0)
        time.sleep(_RETRY_S)
    raise StoreError(f"{backend.url}/{run}: the marks change faster than they can be read. Try again.")


def change_marks(backend: Backend, run: str, change: Callable[[Marks], Marks]) -> Marks:
    """Replaces the marks by what `change` makes of them. Safe when several processes do so at once.

    `change` is pure and may be called several times. When it returns its argument, nothing is written.

    Raises:
        StoreCorrupt, CheckpointMismatch: as `read_marks`.
        StoreError: too many others changed them at the same time; nothing was changed.
    """
    for attempt in range(_MAX_TRIES):
        before = read_marks(backend, run)
        changed = change(before)
        if changed == before:
            return before
        after = dataclasses.replace(changed, number=before.number + 1)
        path = f"{run}/{_name(after.number)}"
        if backend.create_exclusive(path, after.to_bytes()):
            newest = _numbers(backend, run)[-1]
            if newest == after.number or _follows(backend, run, after.number, newest):
                _clean(backend, run, after.number)
                return after
            backend.remove(path)  # its number had been used and removed long ago: ours came too late to count
        time.sleep(_RETRY_S * min(attempt, 10))
    raise StoreError(f"{backend.url}/{run}: others change its marks all the time; nothing was changed. Try again.")


def pin(marks: Marks, step: int, why: str, now: float) -> Marks:
    """Pins a step, or gives its pin another reason."""
    return dataclasses.replace(marks, pins={**marks.pins, step: Pin(step=step, why=why[:_MAX_WHY], at=now)})


def unpin(marks: Marks, step: int) -> Marks:
    """Takes a pin away."""
    return dataclasses.replace(marks, pins={s: p for s, p in marks.pins.items() if s != step})


def quarantine(marks: Marks, commits: Mapping[str, float], why: str, now: float) -> Marks:
    """Quarantines commits, given as directory -> committed_at. Those that are quarantined already keep their reason."""
    added = {
        directory: Quarantine(directory=directory, committed_at=committed_at, why=why[:_MAX_WHY], at=now)
        for directory, committed_at in commits.items()
        if marks.quarantine_of(directory, committed_at) is None
    }
    return dataclasses.replace(marks, quarantined={**marks.quarantined, **added})


def release(marks: Marks, directories: set[str]) -> Marks:
    """Ends the quarantine of commits."""
    left = {name: mark for name, mark in marks.quarantined.items() if name not in directories}
    return dataclasses.replace(marks, quarantined=left)


def _follows(backend: Backend, run: str, number: int, newest: int) -> bool:
    """Whether `newest` was made on top of our number, and not long before it.

    Numbers are made one after another, so when ours and all up to the newest are there, each saw the one below it. A
    gap means that ours had been used, and cleaned away, before.
    """
    return set(range(number, newest + 1)) <= set(_numbers(backend, run)) and newest - number < _NUM_OLD


def _clean(backend: Backend, run: str, newest: int) -> None:
    """Removes old numbers. Some stay: who listed them just now may still read them, and an NFS client may list late.

    What cannot be removed does no harm, and the next change tries again.
    """
    for number in _numbers(backend, run):
        if number < newest - _NUM_OLD:
            with contextlib.suppress(StoreError):
                backend.remove(f"{run}/{_name(number)}")


def _numbers(backend: Backend, run: str) -> list[int]:
    try:
        entries = backend.list(run)
    except StoreGone:
        if backend.exists(""):
            return []  # a run that has not begun
        raise
    matches = (_NAME.fullmatch(entry.name) for entry in entries if not entry.is_directory)
    return sorted(int(match.group(1)) for match in matches if match is not None)


def _name(number: int) -> str:
    return f"marks-{number:08d}.json"


def _read(backend: Backend, run: str, number: int) -> Marks:
    path = f"{run}/{_name(number)}"
    where = f"{backend.url.rstrip('/')}/{path}"
    data = backend.read(path, _MAX_BYTES)
    remedy = "It holds the pins and the quarantine of the run: remove it (the one before it then counts) and pin again."
    tail = _TAIL.search(data[-_TAIL_BYTES:])
    if tail is None or digest_of(memoryview(data)[:-_TAIL_BYTES]) != tail.group(1).decode():
        raise StoreCorrupt(f"{where}: its bytes differ from its digest. {remedy}", file=where)
    fields = fields_of(parse_json(data, where), where)
    if fields.text("format") != _FORMAT or fields.integer("version") > _VERSION:
        raise CheckpointMismatch(f"{where}: a format that this version does not know. Upgrade arc-dist.", file=where)
    if fields.integer("number") != number:
        raise StoreCorrupt(f"{where}: it is number {fields.integer('number')}, renamed. {remedy}", file=where)
    pins = [Pin(step=row.integer("step"), why=row.text("why"), at=_time(row, "at")) for row in fields.rows("pins")]
    quarantined = [
        Quarantine(
            directory=row.text("directory"),
            committed_at=_time(row, "committed_at"),
            why=row.text("why"),
            at=_time(row, "at"),
        )
        for row in fields.rows("quarantined")
    ]
    return Marks(
        number=number,
        pins={p.step: p for p in pins},
        quarantined={q.directory: q for q in quarantined if step_of_directory(q.directory) is not None},
        sightings={row.text("name"): (row.text("look"), _time(row, "since")) for row in fields.rows("sightings")},
    )


def _time(row: Fields, key: str) -> float:
    value = row.fields.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise row.wrong(key, value)
    return float(value)
