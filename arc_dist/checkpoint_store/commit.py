"""From the parts of all ranks to one manifest: they must fit together, cover every tensor and be there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from arc_dist.checkpoint_store.backends import Backend
from arc_dist.checkpoint_store.format import ATTEMPT_NAME, digest_of
from arc_dist.checkpoint_store.manifest import (
    Chunk,
    Fields,
    FileEntry,
    Manifest,
    TensorEntry,
    chunk_entry,
    coverage_problem,
    fields_of,
    file_entry,
    references_problem,
    segments_problem,
    tensor_head,
)
from arc_dist.errors import StoreCorrupt, StoreError, StoreGone

_POLL_S = 0.1
_NOTHING = "Nothing was committed."


def build_manifest(
    parts: Mapping[Any, Mapping[str, Any]],
    *,
    attempt: bytes,
    where: str,
    certified: bool,
    meta: Mapping[str, Any],
    committed_at: float,
    parent: int | None,
    versions: Mapping[str, str],
) -> Manifest:
    """Merges the parts of all ranks. Pure.

    Raises:
        StoreError: the parts are of different attempts, or a tensor is not covered exactly once.
    """
    ordered = [fields_of(dict(parts[key]), f"{where}: part of rank {key}") for key in sorted(parts, key=int)]
    first = ordered[0]
    for key in ("version", "step", "generation", "owner", "world_size", "directory", "hash"):
        if len({str(part.fields.get(key)) for part in ordered}) != 1:
            told = [str(part.fields.get(key))[:80] for part in ordered[:8]]
            raise StoreError(f"{where}: the ranks differ in {key}: {told}. {_NOTHING}")
    if len({part.text("replicated") for part in ordered}) != 1:
        raise StoreError(
            f"{where}: the ranks disagree on which tensors are replicated (names, dtypes or shapes), so some would be "
            f"written by nobody. Build the same model on every rank. {_NOTHING}"
        )
    files = [file_entry(row) for part in ordered for row in part.rows("files")]
    digest = digest_of(attempt, first.text("hash"))
    files.append(FileEntry(name=ATTEMPT_NAME, kind="attempt", rank=0, nbytes=len(attempt), digest=digest))
    manifest = Manifest(
        step=first.integer("step"),
        generation=first.integer("generation"),
        owner=first.text("owner"),
        world_size=first.integer("world_size"),
        certified=certified,
        committed_at=committed_at,
        directory=first.text("directory"),
        hash=first.text("hash"),
        files=tuple(files),
        tensors=tuple(_merge(ordered, where)),
        meta=meta,
        versions=versions,
        hosts={str(part.integer("rank")): part.text("host") for part in ordered},
        parent=parent,
    )
    problem = segments_problem({file.name: file for file in files}, manifest.tensors) or references_problem(manifest)
    if problem:
        raise StoreError(f"{where}: {problem}. {_NOTHING}")
    return manifest


def _merge(parts: list[Fields], where: str) -> list[TensorEntry]:
    heads: dict[str, tuple[str, tuple[int, ...]]] = {}
    chunks: dict[str, list[Chunk]] = {}
    for part in parts:
        for row in part.rows("tensors"):
            name, head = row.text("name"), tensor_head(row)
            if heads.setdefault(name, head) != head:
                raise StoreError(f"{where}: tensor {name} has {head} on one rank, {heads[name]} on another. {_NOTHING}")
            chunks.setdefault(name, []).append(chunk_entry(row, *head))
    tensors: list[TensorEntry] = []
    for name in sorted(heads):
        dtype, shape = heads[name]
        tensor = TensorEntry(name=name, dtype=dtype, shape=shape, chunks=tuple(chunks[name]))
        problem = coverage_problem(tensor)
        if problem:
            raise StoreError(
                f"{where}: tensor {name}: {problem}. Every element must be written by one rank; a tensor that all "
                f"ranks hold must be marked as replicated. {_NOTHING}",
                tensor=name,
            )
        tensors.append(tensor)
    return tensors


def check_written(backend: Backend, path: str, manifest: Manifest, *, timeout_s: float) -> None:
    """A manifest implies its files: all are there with their sizes, and no other shard is.

    A file that another host has just written may be seen late (NFS), so a missing one is waited for.

    Raises:
        StoreGone: a file is still not there after `timeout_s`.
        StoreCorrupt: a file has another size, or a foreign shard lies in the directory.
    """
    deadline = time.monotonic() + timeout_s
    for file in manifest.files:
        while True:
            try:
                source = backend.open(f"{path}/{file.name}")
                nbytes = source.nbytes
                source.close()
            except StoreGone as error:
                if time.monotonic() >= deadline:
                    raise StoreGone(
                        f"{path}/{file.name}: written by rank {file.rank}, but not there. Do all hosts share this "
                        f"directory? {_NOTHING}",
                        file=file.name,
                    ) from error
                time.sleep(_POLL_S)
                continue
            if nbytes != file.nbytes:
                raise StoreCorrupt(f"{path}/{file.name}: {nbytes} bytes, {file.nbytes} were written. {_NOTHING}")
            break
    known = {file.name for file in manifest.files}
    for entry in backend.list(path):
        if entry.name.endswith(".safetensors") and entry.name not in known:
            raise StoreCorrupt(f"{path}/{entry.name}: a shard that is not of this save. Remove it. {_NOTHING}")
