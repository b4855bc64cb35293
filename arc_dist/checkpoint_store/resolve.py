"""A step that refers to others, as the step that it would be had it written all its bytes itself.

Pure and deterministic: whoever copies a step gets the same manifest, so an interrupted copy can be gone on with, and
two copies of one step to one place are one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from arc_dist.checkpoint_store.format import TensorSpec, digest_of
from arc_dist.checkpoint_store.manifest import Chunk, FileEntry, Manifest
from arc_dist.checkpoint_store.shard import build_header, file_order_key


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Where the bytes of a chunk of the resolved step are to be read."""

    directory: str
    file: str
    start: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A step without references.

    Attributes:
        manifest: the same commit, with files that hold everything.
        headers: the new headers of its files of tensors; empty when the step had no reference.
        origins: for each chunk that has bytes, by its file and its first byte there.
    """

    manifest: Manifest
    headers: Mapping[str, bytes]
    origins: Mapping[tuple[str, int], Origin]


def resolve(manifest: Manifest) -> Resolved:
    """The step without references; the manifest itself when it has none."""
    if not manifest.referred:
        return Resolved(manifest=manifest, headers={}, origins={})
    ranks = {file.name: file.rank for file in manifest.files}
    parts: dict[int, list[tuple[TensorSpec, Chunk]]] = {rank: [] for rank in range(manifest.world_size)}
    for tensor in manifest.tensors:
        for chunk in tensor.chunks:
            rank = ranks[chunk.file] if chunk.directory is None else chunk.rank
            assert rank is not None  # checked by parse_manifest
            parts[rank].append((TensorSpec(tensor.name, tensor.dtype, chunk.shape, tensor.shape, chunk.offsets), chunk))
    headers: dict[str, bytes] = {}
    origins: dict[tuple[str, int], Origin] = {}
    moved: dict[tuple[str, Chunk], Chunk] = {}
    files: list[FileEntry] = []
    for file in manifest.files:
        if file.kind != "tensors":
            files.append(file)
            continue
        ordered = sorted(parts[file.rank], key=lambda item: file_order_key(item[0]))
        header = headers[file.name] = build_header([spec for spec, _ in ordered])
        start = len(header)
        for spec, chunk in ordered:
            new = dataclasses.replace(chunk, file=file.name, start=start, directory=None, rank=None)
            moved[spec.name, chunk] = new
            if chunk.nbytes:
                directory = chunk.directory or manifest.directory
                origins[file.name, start] = Origin(directory, chunk.file, chunk.start)
            start += chunk.nbytes
        digest = digest_of(header, manifest.hash)
        files.append(dataclasses.replace(file, nbytes=start, digest=digest, header_nbytes=len(header)))
    tensors = tuple(
        dataclasses.replace(t, chunks=tuple(moved[t.name, chunk] for chunk in t.chunks)) for t in manifest.tensors
    )
    whole = dataclasses.replace(manifest, files=tuple(files), tensors=tensors)
    return Resolved(manifest=whole, headers=headers, origins=origins)
