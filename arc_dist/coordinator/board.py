"""What ranks said lately, for people: incidents, samples of progress, where each rank is. All of it bounded.

It has a lock of its own, held for the time of a copy. Nothing here is asked for by a rule: a job whose board is empty
runs the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

MAX_INCIDENTS = 1000
MAX_SAMPLES = 1000
_MAX_EVENTS = 500
_MAX_STEP_TIMES = 512
_MAX_KINDS = 100
_MAX_TEXT = 2000
_MAX_RANKS = 64
_TAIL_BYTES = 4 << 20
PROGRESS = frozenset({"started", "progress", "finished"})
NOT_INCIDENTS = PROGRESS | {"resumed"}

_TEXTS = ("cause", "reason", "action", "tier", "seen_by", "seen_after", "store")
_NUMBERS = (
    *("step", "generation", "rank", "new_generation", "restored_step", "steps_lost", "exit_code"),
    *("resumed_after_s", "seen_after_s", "died_at"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Where training was at a moment.

    Attributes:
        time: wall clock, in seconds.
        step: committed by then.
        loss: rank 0's, of that step; None when it was not told or is no number.
        generation: that trained it.
    """

    time: float
    step: int
    loss: float | None
    generation: int


@dataclasses.dataclass(frozen=True, slots=True)
class Whereabouts:
    """What one rank's supervisor last said of its training process.

    Attributes:
        generation: that runs there.
        step: committed.
        quiet_s: since the process last said anything, when this was said; None before it has.
        held: steps of the certified snapshots in its memory.
        heard_at: on the board's clock.
    """

    generation: int
    step: int
    quiet_s: float | None
    held: tuple[int, ...]
    heard_at: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """A copy of the board. Lists are oldest first."""

    incidents: Sequence[Mapping[str, Any]]
    num_incidents: int
    by_kind: Mapping[str, int]
    by_action: Mapping[str, int]
    samples: Sequence[Sample]
    events: Sequence[Mapping[str, Any]]
    whereabouts: Mapping[int, Whereabouts]
    goodput: float | None
    last_commit_at: float | None


class Board:
    """See the module's text. Safe to use from several threads.

    Args:
        clock: wall-clock seconds, as in the lines of the incident file.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._incidents: deque[dict[str, Any]] = deque(maxlen=MAX_INCIDENTS)
        self._num_incidents = 0
        self._by_kind: dict[str, int] = {}
        self._by_action: dict[str, int] = {}
        self._samples = _Thinned(MAX_SAMPLES)
        self._events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self._whereabouts: dict[int, Whereabouts] = {}
        self._useful = _UsefulTime()
        self._last_commit_at: float | None = None

    def note(self, line: Mapping[str, Any]) -> None:
        """Takes one line of the incident file: an incident, or how far rank 0 is."""
        kind = _text(line.get("kind")) or "unknown"
        at = _number(line.get("time"))
        at = self._clock() if at is None else at
        with self._guard:
            if kind in PROGRESS:
                self._note_progress(at, line)
            elif kind == "resumed":
                self._events.append({"time": at, "kind": kind, **_picked(line)})
            else:
                self._note_incident(at, kind, line)

    def _note_progress(self, at: float, line: Mapping[str, Any]) -> None:
        step = _whole(line.get("step"))
        if step is None:
            return
        generation = _whole(line.get("generation")) or 0
        self._useful.note(at, step, _number(line.get("median_step_s")))
        now_at = _whole(line.get("now_at"))
        self._samples.add(Sample(at, step if now_at is None else now_at, _number(line.get("loss")), generation))

    def _note_incident(self, at: float, kind: str, line: Mapping[str, Any]) -> None:
        self._num_incidents += 1
        fields = _picked(line)
        self._incidents.append({"id": self._num_incidents, "time": at, "kind": kind, **fields})
        _count(self._by_kind, kind)
        _count(self._by_action, str(fields.get("action", "none")))

    def note_where(self, rank: int, generation: int, step: int, quiet_s: float | None, held: Iterable[int]) -> None:
        """A supervisor says how far its training process is; what it said of a later generation stays."""
        with self._guard:
            before = self._whereabouts.get(rank)
            if before is None or generation >= before.generation:
                self._whereabouts[rank] = Whereabouts(generation, step, quiet_s, tuple(held), self._clock())

    def note_generation(self, generation: int, step: int | None, tier: str, reason: str) -> None:
        """A generation starts to run, from `step`."""
        fields = {"generation": generation, "step": step, "tier": tier, "reason": reason[:_MAX_TEXT]}
        with self._guard:
            self._events.append({"time": self._clock(), "kind": "generation", **fields})

    def note_commit(self, step: int, url: str) -> None:
        """A checkpoint was committed."""
        with self._guard:
            self._last_commit_at = self._clock()
            self._events.append({"time": self._last_commit_at, "kind": "commit", "step": step, "store": url})

    def load(self, path: Path) -> None:
        """Takes the newest lines of an incident file that an earlier coordinator of the job wrote.

        Raises:
            OSError: it is there and cannot be read.
        """
        for line in tail_lines(path):
            self.note(line)

    def read(self) -> Reading:
        """A copy; what is in it does not change."""
        with self._guard:
            return Reading(
                incidents=tuple(self._incidents),
                num_incidents=self._num_incidents,
                by_kind=dict(self._by_kind),
                by_action=dict(self._by_action),
                samples=self._samples.all(),
                events=tuple(self._events),
                whereabouts=dict(self._whereabouts),
                goodput=self._useful.share(),
                last_commit_at=self._last_commit_at,
            )

    def incidents_after(self, after: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """At most `limit` incidents with an id above `after`, oldest first, and how many there ever were."""
        with self._guard:
            newer = [incident for incident in self._incidents if incident["id"] > after]
            return newer[:limit], self._num_incidents


class _Thinned:
    """Keeps at most `limit` samples of however many: when it is full, every other one goes, and half as many come."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[Sample] = []
        self._stride = 1
        self._num_seen = 0
        self._last: Sample | None = None

    def add(self, sample: Sample) -> None:
        self._last = sample
        if self._num_seen % self._stride == 0:
            if len(self._kept) >= self._limit:
                self._kept = self._kept[::2]
                self._stride *= 2
            if self._num_seen % self._stride == 0:
                self._kept.append(sample)
        self._num_seen += 1

    def all(self) -> tuple[Sample, ...]:
        kept = tuple(self._kept)
        return kept if self._last is None or (kept and kept[-1] is self._last) else (*kept, self._last)


class _UsefulTime:
    """Goodput so far: (steps gained x median step time) / time that passed, as `arc report` reckons it."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._last_at = 0.0
        self._furthest = 0
        self._least = 0
        self._step_times: deque[float] = deque(maxlen=_MAX_STEP_TIMES)

    def note(self, at: float, step: int, median_step_s: float | None) -> None:
        if self._first is None:
            self._first = (at, step)
            self._furthest = self._least = step
        self._last_at = at
        self._furthest = max(self._furthest, step)
        self._least = min(self._least, step)
        if median_step_s:
            self._step_times.append(median_step_s)

    def share(self) -> float | None:
        if self._first is None or not self._step_times:
            return None
        passed_s = self._last_at - self._first[0]
        if passed_s <= 0:
            return None
        return min(1.0, (self._furthest - self._least) * statistics.median(self._step_times) / passed_s)


def tail_lines(path: Path, limit_bytes: int = _TAIL_BYTES) -> list[dict[str, Any]]:
    """The JSON objects in the last `limit_bytes` of a file of lines, oldest first; torn ones are left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit_bytes))
            lines = file.read(limit_bytes).split(b"\n")
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for text in lines if size <= limit_bytes else lines[1:]:
        try:
            line: object = json.loads(text)
        except (ValueError, RecursionError):
            continue  # the last line of a writer that was killed, or the empty end
        if isinstance(line, dict):
            found.append(cast("dict[str, Any]", line))
    return found


def _picked(line: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line that people are shown, cut to a bounded size; the whole line is in the file."""
    fields: dict[str, Any] = {name: _text(line[name]) for name in _TEXTS if line.get(name) is not None}
    for name in _NUMBERS:
        value = _number(line.get(name))
        if value is not None:
            fields[name] = value
    ranks = line.get("ranks")
    if isinstance(ranks, list):
        whole = [_whole(rank) for rank in cast("list[object]", ranks)]
        fields["ranks"] = [rank for rank in whole[:_MAX_RANKS] if rank is not None]
        fields["num_ranks"] = len(whole)
    elif "rank" in fields:
        fields["ranks"], fields["num_ranks"] = [fields.pop("rank")], 1
    return fields


def _count(counts: dict[str, int], name: str) -> None:
    name = name[:100]
    if name not in counts and len(counts) >= _MAX_KINDS:
        name = "other"
    counts[name] = counts.get(name, 0) + 1


def _text(value: object) -> str:
    return "" if value is None else str(value)[:_MAX_TEXT]


def _number(value: object) -> float | int | None:
    """A number that JSON has; None for all else, infinities and NaN too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def _whole(value: object) -> int | None:
    number = _number(value)
    return number if isinstance(number, int) and number >= 0 else None
