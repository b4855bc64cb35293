"""The store: where the steps of one run live, and how a step comes to exist."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import platform
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch

from arc_dist.checkpoint_store import codec
from arc_dist.checkpoint_store.attempts import Attempt, claim, find_uncommitted, read_attempt
from arc_dist.checkpoint_store.backends import Backend, Unsupported, open_backend
from arc_dist.checkpoint_store.catalog import Catalog, StepInfo
from arc_dist.checkpoint_store.commit import build_manifest, check_written
from arc_dist.checkpoint_store.format import (
    ATTEMPT_NAME,
    MANIFEST_NAME,
    MAX_ATTEMPT_BYTES,
    MAX_MANIFEST_BYTES,
    ShardTensor,
    check_run_name,
    step_of_directory,
)
from arc_dist.checkpoint_store.manifest import Manifest
from arc_dist.checkpoint_store.orphans import DEFAULT_GRACE_S, Orphan, collect_orphans, collect_own
from arc_dist.checkpoint_store.owners import require_owner, take_over
from arc_dist.checkpoint_store.pace import Pace
from arc_dist.checkpoint_store.pruning import pin_step, prune, quarantine_steps, unpin_step
from arc_dist.checkpoint_store.reader import Checkpoint
from arc_dist.checkpoint_store.references import (
    Place,
    Unchanged,
    announced,
    announcement,
    check_references,
    newest_manifest,
    places,
    remove_step,
    stored_digest,
)
from arc_dist.checkpoint_store.retention import Retention
from arc_dist.checkpoint_store.writer import write_rank
from arc_dist.errors import ConfigError, Fenced, StoreCorrupt, StoreError

_VISIBLE_TIMEOUT_S = 15.0  # NFS clients may not see another client's new file for some seconds (attribute cache)


class Store:
    """The checkpoints of one run below a directory or URL.

    Args:
        url: a directory, ``file:///...``, ``s3://bucket/prefix``, or another fsspec URL that can create exclusively.
        run: names the run; its steps lie in a directory of this name.
        owner: a name of this start of the job: the same on all its ranks, and never used by an earlier start.
            Attempts at a step by different owners never share a directory. None is enough for one process that
            writes alone; a job of several ranks must give one.
        dedup: refer to tensors whose bytes the newest committed step has already (frozen layers, LoRA bases) instead
            of writing them again. Such a step cannot be read without the ones it refers to, so other programs (torch's
            HuggingFaceStorageReader) need a copy of it (`arc copy` makes it whole), a damaged file may harm several
            steps, and retention keeps what is referred to. That is why it is off by default. What was written with it
            is read, copied and pruned without it.
        backend: where the files are, instead of what `url` names.
        wall_clock: seconds since the epoch, for the times that manifests tell.
        visible_timeout_s: how long a commit waits for a file that another host has just written.

    The constructor touches nothing; call `check_writable` before training starts.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        run: str = "run",
        owner: str | None = None,
        dedup: bool = False,
        backend: Backend | None = None,
        wall_clock: Callable[[], float] = time.time,
        visible_timeout_s: float = _VISIBLE_TIMEOUT_S,
    ) -> None:
        self.run = check_run_name(run)
        self._backend: Backend = open_backend(url) if backend is None else backend
        self._wall_clock = wall_clock
        self._visible_timeout_s = visible_timeout_s
        self._owner = owner
        self._alone = uuid.uuid4().hex
        self._unchanged = Unchanged(lambda place: stored_digest(self._backend, self.run, place)) if dedup else None
        self._written: str | None = None  # the directory of the last part, which may have been committed since
        self._catalog = Catalog(self._backend, self.run)

    @property
    def url(self) -> str:
        """The root, absolute, without credentials."""
        return self._backend.url

    @property
    def backend(self) -> Backend:
        """Where the files are."""
        return self._backend

    def check_writable(self) -> None:
        """Writes, reads and removes a small file, as a commit would. Call it before training starts.

        Raises:
            ConfigError: the path is a file, the URL is unknown, a package is missing.
            Unsupported: the storage gives no exclusive create (a ConfigError).
            StoreError: denied, gone, full: see `arc_dist.errors`.
        """
        self._backend.prepare()
        self._backend.make_directory(self.run)
        probe = f"{self.run}/.probe-{uuid.uuid4().hex}"
        data = b"arc-dist checks that it can commit here\n"
        try:
            first = self._backend.create_exclusive(probe, data)
            second = self._backend.create_exclusive(probe, data)
            if self._backend.read(probe, len(data)) != data:
                raise StoreCorrupt(f"store {self.url}: reads other bytes than were written. Choose another store.")
        finally:
            with contextlib.suppress(StoreError):
                self._backend.remove(probe)
        if not first or second:
            raise Unsupported(
                f"store {self.url}: it let a second writer replace a file that only the first may create, so commits "
                "would not be safe there. Choose another store."
            )

    def measure_writing(self, nbytes: int) -> float:
        """Bytes per second at which a file of `nbytes` is written durably; the file is removed again.

        Raises:
            StoreError: as `check_writable`.
        """
        probe = f"{self.run}/.probe-{uuid.uuid4().hex}"
        data = os.urandom(nbytes)  # storage may compress
        began = time.perf_counter()
        try:
            self._backend.create_exclusive(probe, data)
            return nbytes / max(time.perf_counter() - began, 1e-9)
        finally:
            with contextlib.suppress(StoreError):
                self._backend.remove(probe)

    def take_over(self) -> None:
        """Makes this owner the one whose commits count. One rank calls it, after `check_writable`; see `owners`.

        Raises:
            ConfigError: another job that is alive trains into this run, or this store has no owner.
            StoreError: see `arc_dist.errors`.
        """
        take_over(self._backend, self.run, self._owner_of(1))

    def write_part(
        self,
        step: int,
        *,
        generation: int,
        rank: int,
        world_size: int,
        tensors: Sequence[ShardTensor],
        objects: Mapping[str, Any],
        should_abort: Callable[[], bool] | None = None,
        pace: Pace | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes this rank's part of a step, durably. Every rank must call this; it waits for no other rank.

        Args:
            step: number of the step.
            generation: of the ranks that save.
            rank: this rank.
            world_size: how many ranks save.
            tensors: this rank's state; the buffers are only read, block by block, and must not change meanwhile.
                Which rank writes a replicated tensor follows from the specs, so they must be equal on all ranks.
            objects: JSON-able state of this rank (see `codec.encode`).
            should_abort: asked between blocks; True gives the save up with `SaveAborted`.
            about: what the manifest shall say of the step: place in the data, metrics (any state that `codec` knows).
                Rank 0's counts.
            pace: keeps the writing below a rate; shared by all that is written with it.

        Returns:
            The part of the manifest, JSON-able, to hand to `commit`.

        Raises:
            SaveAborted, StoreError, Fenced, ConfigError: nothing of the part is left behind.
        """
        if not 0 <= rank < world_size or step < 0 or generation < 0:
            raise ConfigError(f"write_part(step={step}, generation={generation}, rank={rank}, world_size={world_size})")
        attempt = self._attempt(step, generation, world_size)
        directory = claim(self._backend, self.run, attempt, self._announcement)
        part = write_rank(
            self._backend,
            f"{self.run}/{directory}",
            step=step,
            generation=generation,
            owner=attempt.owner,
            rank=rank,
            world_size=world_size,
            tensors=tensors,
            objects=objects,
            should_abort=should_abort,
            pace=pace,
            unchanged=self._unchanged,
            places=self._places(directory),
        )
        self._written = directory
        return {**part, "run": self.run, "about": codec.encode(dict(about or {}), inline=True)[0]}

    def _places(self, directory: str) -> dict[Any, Place]:
        """What this attempt may refer to: what it announced, as far as that is still there."""
        if self._unchanged is None:
            return {}
        return places(
            self._catalog,
            *announced(read_attempt(self._backend, self.run, directory), f"{self.url}/{self.run}/{directory}"),
        )

    def commit(
        self,
        step: int,
        generation: int,
        world_size: int,
        parts: Mapping[Any, Mapping[str, Any]],
        meta: Mapping[str, Any],
    ) -> None:
        """Makes a step a checkpoint, once all its parts are durable. One caller decides when (the coordinator).

        A commit that is sent twice succeeds twice; there is one manifest.

        Args:
            step: number of the step.
            generation: of the ranks that saved it.
            world_size: how many ranks saved it.
            parts: what `write_part` returned, by rank.
            meta: what the job says about the step (any state that `codec` knows). ``meta["certified"]`` is True when
                enough healthy verdicts followed; without it the step is kept but never restored by itself.

        Raises:
            Fenced: another attempt has committed in this place, or a newer generation of this job has committed.
            StoreError: parts that do not fit together, a file that is not there; no manifest was written.
        """
        self._require_parts(step, generation, world_size, parts)
        directory = str(next(iter(parts.values()))["directory"])
        path = f"{self.run}/{directory}"
        attempt = self._backend.read(f"{path}/{ATTEMPT_NAME}", MAX_ATTEMPT_BYTES)
        earlier = self._catalog.around(step)
        manifest = build_manifest(
            parts,
            attempt=attempt,
            where=f"{self.url}/{path}",
            certified=meta.get("certified") is True,
            meta={**_about(parts), **codec.encode(dict(meta), inline=True)[0]},
            committed_at=self._wall_clock(),
            parent=max((s for s in map(step_of_directory, earlier) if s is not None and s < step), default=None),
            versions=_versions(),
        )
        check_written(self._backend, path, manifest, timeout_s=self._visible_timeout_s)
        check_references(self._catalog, manifest, attempt, f"{self.url}/{path}", timeout_s=self._visible_timeout_s)
        require_owner(self._backend, self.run, manifest.owner)
        manifest = self._fence_and_order(manifest, earlier)
        data = manifest.to_bytes()
        if len(data) > MAX_MANIFEST_BYTES:
            raise StoreError(f"step {step}: the manifest would have {len(data)} bytes. Use fewer, larger tensors.")
        if not self._backend.create_exclusive(f"{path}/{MANIFEST_NAME}", data):
            present = self._catalog.manifest(directory)
            if not present.same_content(manifest):
                raise Fenced(f"step {step}: {self.url}/{path} was committed by another attempt.", step=step)
        self._backend.sync_directory(self.run)

    def steps(self, *, include_damaged: bool = False) -> list[StepInfo]:
        """The committed steps, oldest first; of several commits of one step the newest.

        Args:
            include_damaged: also list steps whose manifest cannot be used (`StepInfo.problem`). They are logged once
                in any case.

        Raises:
            StoreGone: the store itself is not there. A run that has not begun has no steps, which is no error.
            CheckpointMismatch: a step has a newer format (unless `include_damaged`).
        """
        return self._catalog.steps(include_damaged=include_damaged)

    def newest(self, *, certified: bool = True, below: int | None = None) -> StepInfo | None:
        """The newest usable step, reading as few manifests as possible; None when there is none.

        Args:
            certified: only steps that were certified.
            below: only steps smaller than this (to fall back after damage).

        Raises:
            StoreGone, CheckpointMismatch: as `steps`.
        """
        return self._catalog.newest(certified=certified, below=below)

    def manifest(self, step: int) -> Manifest:
        """The verified manifest of a committed step."""
        return self.open(step).manifest

    def open(self, step: int, *, directory: str | None = None) -> Checkpoint:
        """Opens a committed step for reading.

        Args:
            step: its number.
            directory: which commit of the step, when there are several; without it the newest sound one, if possible
                one that is not in quarantine.

        Raises:
            StoreGone: there is no such step; the message has those that there are.
            StoreCorrupt: its manifest was altered.
            CheckpointMismatch: it has a newer format.
        """
        return self._catalog.open(step, directory)

    def prune(self, retention: Retention | None = None, *, keep_last: int | None = None) -> list[int]:
        """Removes the steps that a policy does not keep; returns their numbers.

        The newest certified steps, pinned steps and everything newer than the oldest of the newest are kept by every
        policy (see `retention`). Damaged steps are not touched: someone may want to look.

        Args:
            retention: the policy.
            keep_last: short for ``Retention(last=keep_last)``.

        Raises:
            ConfigError: not exactly one of the two was given, or fewer than 2 steps would be kept.
            StoreCorrupt: the pins cannot be read; nothing is removed.
        """
        if (retention is None) == (keep_last is None):
            raise ConfigError("Store.prune: give either a Retention or keep_last=N.")
        policy = retention or Retention(last=keep_last or 0)
        return [row.step for row in prune(self._backend, self.run, policy).removed]

    def pin(self, step: int, why: str = "") -> None:
        """Keeps a step, whatever the policy, until `unpin`.

        Raises:
            StoreGone: there is no such step (or it was removed at this moment).
        """
        pin_step(self._backend, self.run, step, why)

    def unpin(self, step: int) -> bool:
        """Takes a pin away; False when there was none."""
        return unpin_step(self._backend, self.run, step)

    def quarantine(self, first: int, last: int, why: str) -> list[int]:
        """Marks all commits of steps `first` to `last`, as they are now, as not to be restored by themselves.

        For steps that were committed within the detection lag before a failure. The same steps may be saved again
        after the rollback; those later commits are not affected.

        Returns:
            The steps that have a commit in quarantine now.
        """
        return quarantine_steps(self._backend, self.run, first, last, why)

    def collect_orphans(self, *, grace_s: float = DEFAULT_GRACE_S) -> list[Orphan]:
        """Removes what saves that never ended left, never this owner's attempts nor a save in progress.

        Args:
            grace_s: how long nothing in a directory must have changed; see `orphans` for the whole rule.

        Raises:
            ConfigError: `grace_s` is too short.
        """
        return collect_orphans(self._backend, self.run, grace_s=grace_s, owner=self._owner or self._alone)

    def collect_own(self, held_elsewhere: Collection[int] = ()) -> list[Orphan]:
        """Removes what killed processes of this job left; see `orphans.collect_own`."""
        return collect_own(self._backend, self.run, owner=self._owner or self._alone, held_elsewhere=held_elsewhere)

    def discard(self, step: int, *, generation: int, world_size: int) -> bool:
        """Removes this owner's uncommitted attempt at a step. Call it only when no rank writes to it any more.

        Returns:
            Whether there was one.
        """
        attempt = self._attempt(step, generation, world_size)
        directory = find_uncommitted(self._backend, self.run, attempt)
        # What lost its manifest to a removal that crashed may be referred to; an attempt never is.
        return directory is not None and not remove_step(self._backend, self.run, directory)

    def _attempt(self, step: int, generation: int, world_size: int) -> Attempt:
        owner = self._owner_of(world_size)
        return Attempt(step=step, generation=generation, owner=owner, world_size=world_size)

    def _announcement(self) -> Mapping[str, Any]:
        """What an attempt that begins now may refer to."""
        return {} if self._unchanged is None else announcement(newest_manifest(self._catalog, self._written))

    def _owner_of(self, world_size: int) -> str:
        if self._owner is not None:
            return self._owner
        if world_size == 1:
            return self._alone
        raise ConfigError(
            "Store(owner=...) is missing: a job of several ranks must name this start of the job, so that files left "
            "by an earlier start never mix with its own. Give every rank the same fresh string."
        )

    def _require_parts(
        self, step: int, generation: int, world_size: int, parts: Mapping[Any, Mapping[str, Any]]
    ) -> None:
        ranks = sorted(int(rank) for rank in parts)
        if ranks != list(range(world_size)):
            raise StoreError(
                f"step {step}: parts of ranks {ranks} given, {world_size} ranks needed. Nothing committed."
            )
        expected = {"step": step, "generation": generation, "world_size": world_size, "run": self.run}
        for rank, part in parts.items():
            told = {key: part.get(key) for key in expected}
            if told != expected or part.get("rank") != int(rank):
                raise StoreError(
                    f"step {step}: the part of rank {rank} is of {told}, not {expected}. Nothing committed."
                )

    def _fence_and_order(self, manifest: Manifest, directories: Sequence[str]) -> Manifest:
        """Refuses a commit by a generation that is over; makes commits of one step increase in time."""
        newest = max(directories, key=lambda name: step_of_directory(name) or 0, default=None)
        committed_at = manifest.committed_at
        for name in directories:
            same_step = step_of_directory(name) == manifest.step and name != manifest.directory
            if not same_step and name != newest:
                continue
            if self._catalog.info(name).problem is not None:
                continue
            other = self._catalog.manifest(name)
            if other.owner == manifest.owner and other.generation > manifest.generation:
                raise Fenced(
                    f"step {manifest.step}: generation {manifest.generation} is over; generation {other.generation} "
                    f"has committed step {other.step}.",
                    step=manifest.step,
                )
            if same_step:  # a clock that was set back must not make an older commit look newer
                committed_at = max(committed_at, other.committed_at + 0.001)
        return dataclasses.replace(manifest, committed_at=committed_at)


def default_commit(
    url: str,
    step: int,
    generation: int,
    world_size: int,
    parts: Mapping[Any, Mapping[str, Any]],
    meta: Mapping[str, Any],
) -> None:
    """The coordinator's commit port: `Store.commit` in the run that the parts name.

    Args:
        url: `Store.url` of the ranks that wrote the parts.
        step: as `Store.commit`, like all that follow.
        generation: see there.
        world_size: see there.
        parts: see there; keys may be strings, as JSON makes them.
        meta: see there.
    """
    runs = {str(part.get("run")) for part in parts.values()}
    if len(runs) != 1:
        raise StoreError(f"step {step}: the parts were written to different runs: {sorted(runs)}. Nothing committed.")
    Store(url, run=runs.pop()).commit(step, generation, world_size, parts, meta)


def _about(parts: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """What rank 0 said about the step, already encoded."""
    first = parts[min(parts, key=int)].get("about")
    return dict(cast("dict[str, Any]", first)) if isinstance(first, dict) else {}


@functools.cache
def _versions() -> dict[str, str]:
    try:
        ours = importlib.metadata.version("arc-dist")
    except importlib.metadata.PackageNotFoundError:
        ours = "unknown"
    return {"arc_dist": ours, "torch": torch.__version__, "python": platform.python_version()}
