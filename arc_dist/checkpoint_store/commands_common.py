"""What the commands of the store share: finding runs and steps, tables, times."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import sys

from arc_dist.checkpoint_store.backends import Backend, open_backend
from arc_dist.checkpoint_store.catalog import Catalog, StepInfo, preference, with_marks
from arc_dist.checkpoint_store.format import MANIFEST_NAME, step_of_directory
from arc_dist.checkpoint_store.pins import Marks, read_marks
from arc_dist.checkpoint_store.progress import clean
from arc_dist.checkpoint_store.reader import Checkpoint
from arc_dist.errors import ConfigError, StoreGone

OK = 0
DAMAGED = 1
DIFFERENT = 1
NOTHING_THERE = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A run that a path leads to; `directory` when the path names one step of it."""

    backend: Backend
    name: str
    directory: str | None = None

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.backend, self.name)

    def infos(self, step: int | None, *, newest: bool = False) -> list[StepInfo]:
        """The steps meant, damaged ones included, oldest first."""
        if self.directory is not None:
            infos = [with_marks(self.catalog.info(self.directory), self.marks())]
        else:
            infos = self.catalog.infos(self.marks())
        infos = sorted((i for i in infos if step in (None, i.step)), key=lambda i: (i.step, i.committed_at))
        return infos[-1:] if newest else infos

    def marks(self) -> Marks:
        """Pins and quarantine; damaged ones are said in the log, and older ones used."""
        return read_marks(self.backend, self.name, strict=False)


def find_runs(path: str, run_name: str | None = None) -> list[Run]:
    """The runs that the path leads to: it may name a store, a run or a step.

    Raises:
        StoreGone, StoreDenied, ConfigError: it is not there, not readable, or not a directory.
    """
    url = path.rstrip("/") or "/"
    backend = open_backend(url)
    name = backend.url.rstrip("/").rsplit("/", 1)[-1]
    if step_of_directory(name) is not None:
        rest = backend.url.rstrip("/").rsplit("/", 2)
        if len(rest) == 3 and backend.exists(MANIFEST_NAME):
            return [Run(open_backend(rest[0] or "/"), rest[1], name)]
        raise StoreGone(f"{url}: no committed checkpoint: there is no {MANIFEST_NAME} in it.", file=url)
    if not backend.exists(""):
        raise StoreGone(f"{url}: there is no such store. Correct the path, or mount what should be there.", file=url)
    directories = [entry.name for entry in backend.list("") if entry.is_directory]
    if any(step_of_directory(directory) is not None for directory in directories):
        return [Run(open_backend(backend.url.rstrip("/").rsplit("/", 1)[0] or "/"), name)]
    runs = [d for d in directories if not d.startswith(".") and run_name in (None, d)]
    return [Run(backend, run) for run in sorted(runs)]


def find_step(path: str, run_name: str | None, step: int | None) -> tuple[Run, StepInfo] | None:
    """The one step that is meant: the newest without `step`; None when it is not there.

    Raises:
        ConfigError: several runs have it.
        StoreError: see `find_runs`.
    """
    chosen = [(run, info) for run in find_runs(path, run_name) for info in run.infos(step)]
    names = sorted({run.name for run, _ in chosen})
    if len(names) > 1:
        raise ConfigError(f"{path}: holds several runs ({', '.join(names[:10])}). Choose one with --run-name.")
    # A damaged commit stands for its step only when there is no other.
    sound = [item for item in chosen if item[1].problem is None] or chosen
    return max(sound, key=lambda item: (item[1].step, *preference(item[1])), default=None)


def find_checkpoint(path: str, run_name: str | None, step: int | None) -> Checkpoint | None:
    """As `find_step`, opened. StoreCorrupt or CheckpointMismatch when it is damaged or of a newer format."""
    found = find_step(path, run_name, step)
    if found is None:
        return None
    run, info = found
    return run.catalog.open(info.step, info.directory)


def find_trusted(path: str, run_name: str | None, step: int | None) -> Checkpoint | None:
    """As `find_checkpoint`, but the newest that may be trusted, unless `step` or the path names one.

    Raises:
        ConfigError: several runs have one, or there are steps and none of them is certified.
        StoreError: see `find_runs`.
    """
    runs = find_runs(path, run_name)
    if step is not None or any(run.directory is not None for run in runs):
        return find_checkpoint(path, run_name, step)
    trusted = [(run, info) for run in runs for info in run.infos(None) if info.certified]
    if not trusted:
        if find_step(path, run_name, None) is None:
            return None
        raise ConfigError(f"{path}: no checkpoint is certified and out of quarantine. Choose one with --step.")
    if len({run.name for run, _ in trusted}) > 1:
        names = ", ".join(sorted({run.name for run, _ in trusted})[:10])
        raise ConfigError(f"{path}: holds several runs ({names}). Choose one with --run-name.")
    run, info = max(trusted, key=lambda item: (item[1].step, *preference(item[1])))
    return run.catalog.open(info.step, info.directory)


def format_time(seconds: float) -> str:
    """Seconds since 1970 as UTC to the second; what no calendar knows as the number itself."""
    try:
        return dt.datetime.fromtimestamp(seconds, dt.timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def nothing(path: str, *, step: int | None = None, quiet: bool = False) -> int:
    """Says that there is no checkpoint, or no such step, unless `quiet`; returns the exit code."""
    if not quiet:
        what = "no committed checkpoint" if step is None else f"no committed step {step}; `arc ls` shows what there is"
        print(f"{path}: {what}", file=sys.stderr)
    return NOTHING_THERE


def print_json(value: object) -> None:
    """Prints a value for scripts."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Prints rows, the first of which is the heading, in columns."""
    widths = [max(len(clean(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(clean(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())
