"""References between steps: bytes of an earlier step that a later one names instead of writing them again.

Why no bytes that are referred to can be lost. An attempt names the directories that it may refer to in its
`attempt.json`, which appears together with its directory, before it looks at them; and it refers only to what it then
finds in a manifest that is still there. Who removes a step removes its manifest first, and looks only then at all
attempts and manifests of the run. Each of the two makes its own intention durable before it looks for the other's, so
at least one of them sees the other: either the attempt finds no manifest and writes the bytes itself, or the remover
finds the attempt, puts the manifest back and leaves the files. A crash between leaves a directory without a manifest
but with its files; what collects such directories asks `protectors` first (FORMAT.md, 6.7), and no new attempt can
refer to them. A reference always names the directory where the bytes are, never another reference, so there are no
chains to follow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from arc_dist.checkpoint_store.backends import Backend
from arc_dist.checkpoint_store.buffers import as_bytes, plain
from arc_dist.checkpoint_store.catalog import Catalog
from arc_dist.checkpoint_store.format import (
    ATTEMPT_NAME,
    MANIFEST_NAME,
    MAX_ATTEMPT_BYTES,
    MAX_MANIFEST_BYTES,
    STRONG_HASH,
    ShardTensor,
    TensorSpec,
    new_hash,
    parse_json,
    step_of_directory,
)
from arc_dist.checkpoint_store.manifest import Chunk, FileEntry, Manifest
from arc_dist.checkpoint_store.opened import digest_range
from arc_dist.checkpoint_store.threads import DaemonExecutor
from arc_dist.errors import CheckpointMismatch, StoreCorrupt, StoreError, StoreGone

_log = logging.getLogger(__name__)
_BLOCK_BYTES = 4 << 20
# A smaller tensor is written again: a row of the manifest and one more file to open cost as much as its bytes.
MIN_REFERRED_BYTES = 64 << 10
_MAX_DIRECTORIES = 256  # that one step may refer to; a bound for `attempt.json` and for the files that a restore opens
_MAX_LOOKS = 16  # at the newest directories, in the search of a step to refer to; some are attempts, some damaged
_NUM_READERS = 8
_POLL_S = 0.1
_NOTHING = "Nothing was committed."
_PLAIN_FIELDS = {"format", "version", "step", "generation", "owner", "world_size"}  # of an attempt without references

_Key = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a part of a tensor lie, and what they are."""

    directory: str
    file: str
    start: int
    nbytes: int
    dtype: str
    global_shape: tuple[int, ...]
    digest: str


def announcement(base: Manifest | None) -> dict[str, Any]:
    """The fields of `attempt.json` that say what the attempt may refer to: the base, and what has bytes of it."""
    held: dict[str, int] = {}
    if base is not None and base.hash == STRONG_HASH:
        for tensor in base.tensors:
            for chunk in tensor.chunks:
                if chunk.nbytes >= MIN_REFERRED_BYTES:
                    directory = chunk.directory or base.directory
                    held[directory] = held.get(directory, 0) + chunk.nbytes
    most = sorted(held, key=lambda name: (-held[name], name))[:_MAX_DIRECTORIES]
    name, refers = (base.directory if base is not None and most else None), sorted(most)
    return {"base": name, "refers": refers}


def announced(attempt: Any, where: str) -> tuple[str | None, frozenset[str]]:
    """The base and the directories that an attempt has announced.

    Raises:
        StoreCorrupt: it cannot be read. An altered byte must not make it look as if nothing had been announced, so an
            attempt that has other fields than those of one without references must have these.
    """
    fields = cast("dict[str, Any]", attempt) if isinstance(attempt, dict) else {"": None}
    if fields.keys() <= _PLAIN_FIELDS:
        return None, frozenset()
    base, refers = fields.get("base"), fields.get("refers")
    names = cast("list[str]", refers) if isinstance(refers, list) else [""]
    sound = len(names) <= _MAX_DIRECTORIES and all(_is_directory(name) for name in names)
    if not sound or not (base is None or _is_directory(base)):
        raise StoreCorrupt(f"{where}: what it may refer to cannot be read.", file=where)
    return base, frozenset(names)


def _is_directory(name: object) -> bool:
    return isinstance(name, str) and step_of_directory(name) is not None


def newest_manifest(catalog: Catalog, hint: str | None) -> Manifest | None:
    """What a new attempt is based on: `hint` (what this process wrote last) if it was committed, else the newest."""
    if hint is not None and (manifest := _sound(catalog, hint)) is not None:
        return manifest
    newest = sorted(catalog.all_directories(), key=lambda name: (step_of_directory(name) or 0, name), reverse=True)
    return next((m for name in newest[:_MAX_LOOKS] if (m := _sound(catalog, name)) is not None), None)


def places(catalog: Catalog, base: str | None, refers: Iterable[str]) -> dict[_Key, Place]:
    """What an attempt may refer to. Call it only after the attempt has announced these directories.

    Only parts whose bytes lie in a directory that has its sound manifest now, with exactly these parts, in a file of
    the right size: what is damaged is written again, not referred to until nobody can restore anything.
    """
    manifest = None if base is None else _sound(catalog, base)
    if manifest is None or manifest.hash != STRONG_HASH:
        return {}
    present: dict[str, set[tuple[object, ...]]] = {}
    for name in refers:
        holder = manifest if name == manifest.directory else _sound(catalog, name)
        if holder is not None and holder.hash == STRONG_HASH:
            whole = {f.name for f in holder.files if f.kind == "tensors" and _has_size(catalog, name, f)}
            present[name] = {part for part in _own_parts(holder) if part[3] in whole}
    found: dict[_Key, Place] = {}
    for tensor in manifest.tensors:
        for chunk in tensor.chunks:
            directory = chunk.directory or manifest.directory
            if chunk.nbytes < MIN_REFERRED_BYTES or _part(tensor.name, chunk) not in present.get(directory, ()):
                continue
            place = Place(directory, chunk.file, chunk.start, chunk.nbytes, tensor.dtype, tensor.shape, chunk.digest)
            found.setdefault((tensor.name, chunk.offsets, chunk.shape), place)
    return found


class Unchanged:
    """Finds the tensors of one rank whose bytes are in the store already.

    What a tensor's bytes are is known only after hashing all of them. A tensor that is looked up is hashed before it
    is written, which costs time when it turns out to have changed; so one that had changed in the last save is expected
    to change again, is written at once, and is looked up again only after its digest has stayed the same. A frozen
    tensor is thus written at most once more than needed, and a training that changes everything hashes twice only once.
    The expectation decides about time alone: what is referred to is decided by the digest.

    What lies in the store is read and hashed once, the first time that this process refers to it, unless the process
    wrote it: otherwise bytes that were damaged before it started would go on being referred to by each new step.

    Args:
        stored_digest: reads a place and returns the digest of what is there.
    """

    def __init__(self, stored_digest: Callable[[Place], str]) -> None:
        self._stored_digest = stored_digest
        self._changing: set[str] = set()
        self._trusted: set[tuple[str, str, int, str]] = set()

    def find(
        self,
        tensors: Sequence[ShardTensor],
        places: Mapping[_Key, Place],
        check_abort: Callable[[], None],
    ) -> dict[str, Place]:
        """The tensors, by name, that are to be referred to. Their buffers are read."""
        found: dict[str, Place] = {}
        for tensor in tensors:
            place = _place_of(tensor.spec, places)
            if place is None or tensor.spec.name in self._changing:
                continue
            if _digest(tensor, check_abort) == place.digest and self._is_sound(place):
                found[tensor.spec.name] = place
        return found

    def _is_sound(self, place: Place) -> bool:
        key = (place.directory, place.file, place.start, place.digest)
        if key not in self._trusted:
            try:
                stored = self._stored_digest(place)
            except (StoreGone, StoreCorrupt) as error:
                _log.warning("%s is damaged and not referred to: %s", place.directory, error.message)
                return False
            if stored != place.digest:
                _log.warning("%s/%s is damaged; its tensors are written again", place.directory, place.file)
                return False
            self._trusted.add(key)
        return True

    def wrote(self, directory: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Told what this process has written itself, in rows of its part of the manifest."""
        self._trusted.update(
            (directory, row["file"], row["start"], row["digest"]) for row in rows if "directory" not in row
        )

    def learn(self, specs: Sequence[TensorSpec], digests: Sequence[str], places: Mapping[_Key, Place]) -> None:
        """Told what was written, so that the next save looks up what is likely to have stayed."""
        for spec, digest in zip(specs, digests, strict=True):
            place = _place_of(spec, places)
            if place is not None and place.digest != digest:
                self._changing.add(spec.name)
            else:
                self._changing.discard(spec.name)


def stored_digest(backend: Backend, run: str, place: Place) -> str:
    """The digest of what is at a place now.

    Raises:
        StoreGone, StoreCorrupt: it is not there, or too short.
        StoreError: it cannot be read at all.
    """
    with contextlib.closing(backend.open(f"{run}/{place.directory}/{place.file}")) as source:
        return digest_range(source, place.start, place.nbytes, STRONG_HASH)


def check_references(catalog: Catalog, manifest: Manifest, attempt: bytes, where: str, *, timeout_s: float) -> None:
    """A commit's look at what it refers to: announced, and there, in sound manifests and files of the right sizes.

    A manifest that is missing is waited for: who removes a step that an attempt refers to puts it back.

    Raises:
        StoreError: a reference that was not announced, or does not lead to exactly these bytes.
    """
    if not manifest.refers_to:
        return
    _, refers = announced(parse_json(attempt, f"{where}/{ATTEMPT_NAME}"), f"{where}/{ATTEMPT_NAME}")
    unannounced = set(manifest.refers_to) - refers
    if unannounced:
        raise StoreError(f"{where}: refers to {sorted(unannounced)[:5]}, which it had not announced. {_NOTHING}")
    deadline = time.monotonic() + timeout_s
    for directory in manifest.refers_to:
        holder = _wait_for(catalog, directory, where, deadline)
        parts = _own_parts(holder)
        missing = [
            tensor.name
            for tensor in manifest.tensors
            for chunk in tensor.chunks
            if chunk.directory == directory and _part(tensor.name, chunk) not in parts
        ]
        if missing or holder.hash != manifest.hash:
            raise StoreError(
                f"{where}: refers to tensors {missing[:5]} in {directory}, which has other ones. {_NOTHING} The next "
                "save writes them in full."
            )
        needed = {c.file for c in manifest.referred if c.directory == directory}
        for file in holder.files:
            if file.name in needed and not _has_size(catalog, directory, file):
                raise StoreCorrupt(
                    f"{where}: refers to {directory}/{file.name}, which is missing or has not its {file.nbytes} bytes. "
                    f"{_NOTHING} The next save writes them in full.",
                    file=f"{directory}/{file.name}",
                )


def _wait_for(catalog: Catalog, directory: str, where: str, deadline: float) -> Manifest:
    while True:
        try:
            return catalog.manifest(directory)
        except StoreGone as error:
            if time.monotonic() >= deadline:
                raise StoreGone(
                    f"{where}: refers to {directory}, which is no checkpoint any more. {_NOTHING} The next save "
                    "writes everything that it needs.",
                    file=directory,
                ) from error
            time.sleep(_POLL_S)


def protectors(backend: Backend, run: str, directories: Iterable[str] | None = None) -> dict[str, list[str]]:
    """Who refers to what: ``{directory: [directories of steps and attempts that refer to it]}``.

    A committed step refers to what its manifest names; an attempt, and a step whose manifest is damaged (it may be
    repaired from a copy), to all that it announced. What has no readable `attempt.json` can neither be committed nor,
    without a sound manifest, be restored.

    Args:
        backend: where the run is.
        run: its name.
        directories: only what these refer to; None: all of the run.
    """
    catalog = Catalog(backend, run)
    names = catalog.all_directories() if directories is None else sorted(directories)
    found: dict[str, list[str]] = {}

    def refers_of(name: str) -> frozenset[str]:
        return _refers_to(backend, run, catalog, name)

    with DaemonExecutor(_NUM_READERS) as pool:
        for name, refers in zip(names, pool.map(refers_of, names)):
            for directory in sorted(refers):
                found.setdefault(directory, []).append(name)
    return found


def _refers_to(backend: Backend, run: str, catalog: Catalog, directory: str) -> frozenset[str]:
    path = f"{run}/{directory}/{ATTEMPT_NAME}"
    refers: frozenset[str] | None = None
    try:
        _, refers = announced(parse_json(backend.read(path, MAX_ATTEMPT_BYTES), path), path)
    except (StoreGone, StoreCorrupt):
        pass  # the manifest, if there is one, says it all
    if refers is not None and not refers:
        return refers  # the usual case: a manifest never refers to more than was announced
    try:
        return frozenset(catalog.manifest(directory).refers_to)
    except (StoreGone, StoreCorrupt, CheckpointMismatch):
        return refers or frozenset()


def remove_step(backend: Backend, run: str, directory: str) -> list[str]:
    """Removes a step unless something refers to it; returns what does, so nothing was removed unless it is empty.

    The manifest goes first, durably, so that a half-removed step is no checkpoint and nothing new refers to it. Only
    then is it certain who refers to it (see the top of this file).
    """
    catalog = Catalog(backend, run)
    path = f"{run}/{directory}/{MANIFEST_NAME}"
    try:
        data = backend.read(path, MAX_MANIFEST_BYTES)
    except StoreGone:
        data = None  # never committed, or somebody removes it too
    if data is not None:
        backend.remove(path)
        backend.sync_directory(f"{run}/{directory}")
    referring = [name for name in protectors(backend, run).get(directory, []) if name != directory]
    if not referring:
        if backend.exists(path):
            return [directory]  # another process began to remove it too, and put the manifest back for a reason
        catalog.delete(directory)
        return []
    if data is not None:
        with contextlib.suppress(StoreGone):  # the directory: another process found nothing that refers to it
            backend.create_exclusive(path, data)
            backend.sync_directory(f"{run}/{directory}")
    _log.info("%s/%s is kept: %s refers to it", run, directory, ", ".join(referring[:5]))
    return referring


def _sound(catalog: Catalog, directory: str) -> Manifest | None:
    try:
        return catalog.manifest(directory)
    except (StoreGone, StoreCorrupt, CheckpointMismatch):
        return None  # nothing to refer to: the bytes are written


def _has_size(catalog: Catalog, directory: str, file: FileEntry) -> bool:
    try:
        return catalog.file_nbytes(directory, file.name) == file.nbytes
    except (StoreGone, StoreCorrupt):
        return False


def _own_parts(manifest: Manifest) -> set[tuple[object, ...]]:
    return {_part(t.name, c) for t in manifest.tensors for c in t.chunks if c.directory is None}


def _part(tensor: str, chunk: Chunk) -> tuple[object, ...]:
    """What must be equal for a reference to lead to the right bytes."""
    return (tensor, chunk.offsets, chunk.shape, chunk.file, chunk.start, chunk.nbytes, chunk.digest)


def _place_of(spec: TensorSpec, places: Mapping[_Key, Place]) -> Place | None:
    place = places.get((spec.name, tuple(spec.offsets), tuple(spec.shape)))
    if place is None or (place.dtype, place.global_shape) != (spec.dtype, tuple(spec.global_shape)):
        return None
    return place


def _digest(tensor: ShardTensor, check_abort: Callable[[], None]) -> str:
    data = plain(tensor.values())  # kept alive while its memory is viewed
    view = as_bytes(data)
    hasher = new_hash(STRONG_HASH)
    for begin in range(0, len(view), _BLOCK_BYTES):
        check_abort()
        hasher.update(view[begin : begin + _BLOCK_BYTES])
    return hasher.hexdigest()
