"""What a run holds: its committed steps, read from their manifests, and their removal."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from arc_dist.checkpoint_store.backends import Backend, is_missing
from arc_dist.checkpoint_store.format import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    is_file_name,
    step_of_directory,
)
from arc_dist.checkpoint_store.manifest import Manifest, parse_manifest
from arc_dist.checkpoint_store.pins import Marks, read_marks
from arc_dist.checkpoint_store.reader import Checkpoint
from arc_dist.checkpoint_store.threads import DaemonExecutor
from arc_dist.errors import CheckpointMismatch, StoreCorrupt, StoreError, StoreGone

_log = logging.getLogger(__name__)
_NUM_READERS = 8  # manifests read at once; a request to an object store takes tens of milliseconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """A committed step, as listed.

    Attributes:
        directory: its name below the run.
        certified: whether it may be restored by itself: it was certified, and nobody has put it in quarantine.
        committed_at: seconds since 1970.
        nbytes: of all its files.
        problem: why its manifest cannot be used; None when it can. The files are not looked at.
        newer_format: the problem is that this version is too old to read it.
        pinned: why someone wants the step kept; None when nobody does.
        quarantined: why it must not be restored by itself; None when it may.
        refers_to: directories of other steps that hold bytes of this one, which `nbytes` does not count.
        referred_nbytes: how many.
        metrics: the finite numbers in its metadata, and in the ``metrics`` there, by name.
    """

    step: int
    directory: str
    world_size: int = 0
    generation: int = 0
    certified: bool = False
    committed_at: float = 0.0
    nbytes: int = 0
    num_tensors: int = 0
    problem: str | None = None
    newer_format: bool = False
    pinned: str | None = None
    quarantined: str | None = None
    refers_to: tuple[str, ...] = ()
    referred_nbytes: int = 0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])


class Catalog:
    """The committed steps of one run."""

    def __init__(self, backend: Backend, run: str) -> None:
        self._backend = backend
        self._run = run
        self._warned: set[str] = set()

    def directories(self) -> list[str]:
        """Names of the directories that hold a manifest, sound or not. One listing, and one look per directory."""
        return self._committed(self.all_directories())

    def around(self, step: int) -> list[str]:
        """What a commit of `step` is compared with: the committed directories of it, of the step below, of the newest.

        A store of thousands of steps must not cost a look at each of them in every commit.
        """
        by_step = self._by_step()
        none: list[str] = []
        newest = next(self._newest_first(by_step), none)
        before = next(self._newest_first(by_step, below=step), none)
        return sorted({*newest, *before, *self._committed(by_step.get(step, []))})

    def all_directories(self) -> list[str]:
        """Names of the directories of steps, attempts and what is left of removed steps included."""
        try:
            entries = self._backend.list(self._run)
        except StoreGone as error:
            if is_missing(error) and self._backend.exists(""):
                return []  # a run that has not begun
            raise
        return sorted(e.name for e in entries if e.is_directory and step_of_directory(e.name) is not None)

    def _committed(self, directories: Sequence[str]) -> list[str]:
        """Those that hold a manifest."""
        paths = [f"{self._run}/{name}/{MANIFEST_NAME}" for name in directories]
        if len(paths) < 2:
            there = [self._backend.exists(path) for path in paths]
        else:
            with DaemonExecutor(_NUM_READERS) as pool:
                there = list(pool.map(self._backend.exists, paths))
        return [name for name, is_there in zip(directories, there) if is_there]

    def _by_step(self) -> dict[int, list[str]]:
        """The directories of each step, with a manifest or without."""
        by_step: dict[int, list[str]] = {}
        for directory in self.all_directories():
            step = step_of_directory(directory)
            assert step is not None
            by_step.setdefault(step, []).append(directory)
        return by_step

    def _newest_first(self, by_step: Mapping[int, Sequence[str]], *, below: int | None = None) -> Iterator[list[str]]:
        """The directories with a manifest, step by step, the newest step first; looks only as far as it is asked to."""
        for step in sorted(by_step, reverse=True):
            if (below is None or step < below) and (committed := self._committed(by_step[step])):
                yield committed

    def file_nbytes(self, directory: str, name: str) -> int:
        """The size of a file of a step; StoreGone when it is not there."""
        with contextlib.closing(self._backend.open(f"{self._run}/{directory}/{name}")) as source:
            return source.nbytes

    def manifest(self, directory: str) -> Manifest:
        """The verified manifest in a directory."""
        path = f"{self._run}/{directory}/{MANIFEST_NAME}"
        where = f"{self._backend.url.rstrip('/')}/{path}"
        return parse_manifest(self._backend.read(path, MAX_MANIFEST_BYTES), where, directory)

    def info(self, directory: str) -> StepInfo:
        """What a manifest says, or what is wrong with it. Errors that may pass (network, rights) are raised."""
        step = step_of_directory(directory)
        assert step is not None
        try:
            m = self.manifest(directory)
        except (StoreCorrupt, StoreGone) as error:
            if isinstance(error, StoreGone) and not is_missing(error):
                raise  # storage that does not answer is no damage
            return StepInfo(step=step, directory=directory, problem=error.message)
        except CheckpointMismatch as error:
            return StepInfo(step=step, directory=directory, problem=error.message, newer_format=True)
        return StepInfo(
            step=step,
            directory=directory,
            world_size=m.world_size,
            generation=m.generation,
            certified=m.certified,
            committed_at=m.committed_at,
            nbytes=m.nbytes,
            num_tensors=len(m.tensors),
            refers_to=m.refers_to,
            referred_nbytes=sum(chunk.nbytes for chunk in m.referred),
            metrics=metrics_of(m.meta),
        )

    def infos(self, marks: Marks) -> list[StepInfo]:
        """What every manifest says, damaged ones and older commits of a step included."""
        directories = self.directories()
        with DaemonExecutor(_NUM_READERS) as pool:
            return [with_marks(info, marks) for info in pool.map(self.info, directories)]

    def steps(self, *, include_damaged: bool) -> list[StepInfo]:
        """See `Store.steps`."""
        infos = self.infos(read_marks(self._backend, self._run, strict=False))
        sound: dict[int, StepInfo] = {}
        for info in infos:
            if info.problem is None and (info.step not in sound or preference(info) > preference(sound[info.step])):
                sound[info.step] = info
        damaged = [info for info in infos if info.problem is not None]
        for info in damaged:
            self._pass_over(info, refuse_newer=not include_damaged)
        chosen = [*sound.values(), *(damaged if include_damaged else [])]
        return sorted(chosen, key=lambda info: (info.step, info.directory))

    def newest(self, *, certified: bool, below: int | None) -> StepInfo | None:
        """See `Store.newest`."""
        marks = read_marks(self._backend, self._run, strict=False)
        for directories in self._newest_first(self._by_step(), below=below):
            infos = [with_marks(self.info(directory), marks) for directory in directories]
            for info in infos:
                self._pass_over(info, refuse_newer=True)
            sound = [info for info in infos if info.problem is None and info.quarantined is None]
            usable = [info for info in sound if info.certified or not certified]
            if usable:
                return max(usable, key=order)
        return None

    def open(self, step: int, directory: str | None) -> Checkpoint:
        """See `Store.open`."""
        candidates = [name for name in self._by_step().get(step, []) if directory in (None, name)]
        names = self._committed(candidates)
        if not names:
            steps = sorted({s for s in map(step_of_directory, self.directories()) if s is not None})
            raise StoreGone(
                f"store {self._backend.url}: run {self._run} has no committed step {step}. It has: "
                f"{', '.join(map(str, steps[-10:])) or 'none'}.",
                step=step,
            )
        manifests: list[Manifest] = []
        problem: StoreError | None = None
        for name in names:
            try:
                manifests.append(self.manifest(name))
            except (StoreCorrupt, CheckpointMismatch) as error:
                problem = error
        if not manifests:
            assert problem is not None
            raise problem
        manifest = manifests[0]
        if len(manifests) > 1:
            marks = read_marks(self._backend, self._run, strict=False)
            manifest = max(
                manifests, key=lambda m: (marks.quarantine_of(m.directory, m.committed_at) is None, *order(m))
            )
        return Checkpoint(self._backend, f"{self._run}/{manifest.directory}", manifest)

    def delete(self, directory: str) -> None:
        """Removes a step: the manifest first, durably, so that a half-removed step is no checkpoint.

        Only for what nothing refers to: see `references.remove_step`.
        """
        with contextlib.suppress(StoreGone):  # another process removes it too, and was faster
            self._delete(f"{self._run}/{directory}")
        self._backend.sync_directory(self._run)

    def _delete(self, path: str) -> None:
        self._backend.remove(f"{path}/{MANIFEST_NAME}")
        self._backend.sync_directory(path)
        foreign: list[str] = []
        for entry in self._backend.list(path):
            name = entry.name.removesuffix(".claim")  # left by file systems without hard links
            if is_file_name(name) or name == MANIFEST_NAME or name.startswith("."):
                self._backend.remove(f"{path}/{entry.name}")
            else:
                foreign.append(entry.name)
        if foreign:
            _log.warning("%s: left in place, it holds files that are not ours: %s", path, foreign[:10])
        else:
            self._backend.remove_directory(path)

    def _pass_over(self, info: StepInfo, *, refuse_newer: bool) -> None:
        """Says once that a step cannot be used. A newer format is no damage: going on without it would lose work."""
        if info.problem is None:
            return
        if info.newer_format and refuse_newer:
            raise CheckpointMismatch(info.problem, step=info.step)
        if info.directory not in self._warned:
            self._warned.add(info.directory)
            _log.warning("the checkpoint of step %d is passed over: %s", info.step, info.problem)


def order(item: StepInfo | Manifest) -> tuple[float, int]:
    """Sorts commits of one step: the newest last."""
    return (item.committed_at, item.generation)


def preference(info: StepInfo) -> tuple[bool, float, int]:
    """Sorts commits of one step: the one that stands for the step last."""
    return (info.quarantined is None, *order(info))


def with_marks(info: StepInfo, marks: Marks) -> StepInfo:
    """A listed commit with what people and the job said about it later. What is in quarantine counts as uncertified."""
    quarantined = marks.quarantine_of(info.directory, info.committed_at)
    return dataclasses.replace(
        info,
        certified=info.certified and quarantined is None,
        pinned=marks.pin_of(info.step),
        quarantined=quarantined,
    )


def metrics_of(meta: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a step's metadata by name; those under ``metrics`` win over equal names beside it."""
    inner = meta.get("metrics")
    values = {**meta, **(cast("dict[str, Any]", inner) if isinstance(inner, dict) else {})}
    numbers = ((name, value) for name, value in values.items() if type(value) in (int, float))
    return {name: float(value) for name, value in numbers if abs(value) < 1 << 1000 and math.isfinite(value)}
