"""Verifies a committed step: every byte of every file, also of those in other steps that it refers to.

Damage is told from storage that does not answer: a refused, lost or unreachable store says nothing about the bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from arc_dist.checkpoint_store.backends import is_missing
from arc_dist.checkpoint_store.manifest import Chunk, FileEntry, TensorEntry
from arc_dist.checkpoint_store.opened import REMEDY, Directory, OpenFiles, digest_range, is_in
from arc_dist.checkpoint_store.retry import Retries, retrying
from arc_dist.checkpoint_store.shard import parse_header
from arc_dist.checkpoint_store.threads import DaemonExecutor
from arc_dist.errors import StoreCorrupt, StoreDenied, StoreError, StoreGone

_NUM_FILES = 8  # that are read at once
_RETRIES = Retries(attempts=4)
_DIFFERS = "bytes differ from the manifest"
_Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Damage found by `verify` or while reading.

    Attributes:
        file: path below the store's root.
        what: what is wrong.
        tensors: names of the tensors that cannot be restored because of it.
    """

    file: str
    what: str
    tensors: tuple[str, ...] = ()


def verify(directory: Directory, progress: _Progress | None = None) -> list[Problem]:
    """See `Checkpoint.verify`."""
    manifest, report = directory.manifest, progress or _silent
    with DaemonExecutor(_NUM_FILES) as pool:
        jobs = [pool.submit(_verify_file, directory, entry, report) for entry in manifest.files]
        jobs += [pool.submit(_verify_referred, directory, other, report) for other in manifest.refers_to]
        problems = [problem for job in jobs for problem in job.result()]
    ours = {entry.name for entry in manifest.files}
    present = retrying(lambda: directory.backend.list(directory.path), _RETRIES)
    strangers = sorted(e.name for e in present if e.name.endswith(".safetensors") and e.name not in ours)
    return problems + [
        Problem(f"{directory.path}/{name}", "not in the manifest, but stock readers would read it: remove it")
        for name in strangers
    ]


def _verify_file(directory: Directory, entry: FileEntry, progress: _Progress) -> list[Problem]:
    path = f"{directory.path}/{entry.name}"
    inside = [(t, c) for t in directory.manifest.tensors for c in t.chunks if is_in(c, entry.name)]
    with OpenFiles(directory) as files:
        try:
            _, header = retrying(lambda: files.get(entry.name), _RETRIES)
            if entry.kind == "tensors":
                _compare_header(directory, entry, header)
        except StoreError as error:
            if not is_damage(error):
                raise
            return [Problem(path, error.message, tuple(sorted({t.name for t, _ in inside})))]
        progress(len(header))
        return _verify_chunks(files, path, sorted(inside, key=lambda item: item[1].start), progress)


def _verify_referred(directory: Directory, other: str, progress: _Progress) -> list[Problem]:
    """What another step holds for this one; whether that step is whole otherwise is not this one's concern."""
    by_file: dict[str, list[tuple[TensorEntry, Chunk]]] = {}
    for tensor in directory.manifest.tensors:
        for chunk in tensor.chunks:
            if chunk.directory == other:
                by_file.setdefault(chunk.file, []).append((tensor, chunk))
    with OpenFiles(directory) as files:
        found = [
            _verify_chunks(files, f"{directory.beside(other)}/{file}", inside, progress)
            for file, inside in by_file.items()
        ]
    return [problem for problems in found for problem in problems]


def _verify_chunks(
    files: OpenFiles, path: str, inside: list[tuple[TensorEntry, Chunk]], progress: _Progress
) -> list[Problem]:
    """Compares chunks of one file with their digests; one problem for each kind of damage, with all its tensors."""
    damaged: dict[str, set[str]] = {}
    for tensor, chunk in inside:
        try:
            if retrying(lambda c=chunk: _digest(files, c), _RETRIES) != chunk.digest:
                damaged.setdefault(_DIFFERS, set()).add(tensor.name)
        except StoreError as error:
            if not is_damage(error):
                raise
            damaged.setdefault(error.message, set()).add(tensor.name)
        progress(chunk.nbytes)
    return [Problem(path, what, tuple(sorted(names))) for what, names in damaged.items()]


def _digest(files: OpenFiles, chunk: Chunk) -> str:
    source, _ = files.of(chunk)
    return digest_range(source, chunk.start, chunk.nbytes, files.directory.manifest.hash)


def _compare_header(directory: Directory, entry: FileEntry, header: bytes) -> None:
    """Whether a reader that trusts the header sees the tensors that the manifest names."""
    said = {(s.name, s.dtype, s.shape, s.offsets, start) for s, start in parse_header(header, entry.nbytes, entry.name)}
    meant = {
        (t.name, t.dtype, c.shape, c.offsets, c.start)
        for t in directory.manifest.tensors
        for c in t.chunks
        if is_in(c, entry.name)
    }
    if said != meant:
        raise StoreCorrupt(f"{directory.where(entry.name)}: its header and the manifest differ. {REMEDY}")


def is_damage(error: StoreError) -> bool:
    """Whether an error tells of the step's bytes, and not of storage that refused, is lost or did not answer."""
    lost = isinstance(error, StoreGone) and not is_missing(error)
    return not (error.retryable or lost or isinstance(error, StoreDenied))


def _silent(nbytes: int) -> None:
    """Progress that nobody wants to see."""
