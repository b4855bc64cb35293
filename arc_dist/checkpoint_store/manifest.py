"""The manifest: what a committed step consists of. It is written last and exclusively, so it is the commit.

It is JSON for people (one tensor per line) and closed by a line with its own digest, so that no byte of it can change
unnoticed. Whatever it says is checked before it is used: it may come from anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from arc_dist.checkpoint_store.fields import MAX_INT, REMEDY, Fields, fields_of
from arc_dist.checkpoint_store.format import (
    ATTEMPT_NAME,
    FAST_HASH,
    FORMAT_NAME,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    PLAIN_VERSION,
    TensorSpec,
    digest_of,
    is_file_name,
    is_known_dtype,
    itemsize,
    new_hash,
    parse_json,
    shard_name,
    step_of_directory,
    uncovered,
)
from arc_dist.errors import CheckpointMismatch, StoreCorrupt

_TAIL = re.compile(rb',\n"manifest_digest": "sha256:([0-9a-f]{64})"\n}\n\Z')
_TAIL_BYTES = len(b',\n"manifest_digest": "sha256:"\n}\n') + 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the step.

    Attributes:
        kind: ``"tensors"``, ``"objects"`` or ``"attempt"``.
        digest: of the whole file; for a file of tensors of its header alone (its first `header_nbytes` bytes), since
            every tensor behind it has a digest of its own.
        header_nbytes: 0 unless `kind` is ``"tensors"``.
    """

    name: str
    kind: str
    rank: int
    nbytes: int
    digest: str
    header_nbytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A saved part of a tensor: where it lies in the tensor, and where its bytes lie.

    Attributes:
        directory: the directory of the same run whose file has the bytes, when it is another step's; None: this step's.
        rank: of a chunk in another directory: the rank that holds this part. Otherwise the file tells.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int
    digest: str
    directory: str | None = None
    rank: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor of the state with all its saved parts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def spec(self) -> TensorSpec:
        """The spec that asks for the whole tensor."""
        return TensorSpec(self.name, self.dtype, self.shape, self.shape, (0,) * len(self.shape), True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A committed step."""

    step: int
    generation: int
    owner: str
    world_size: int
    certified: bool
    committed_at: float  # seconds since 1970; grows with every commit of the same step
    directory: str
    hash: str
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    meta: Mapping[str, Any]
    versions: Mapping[str, str]
    hosts: Mapping[str, str]
    parent: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files of its own, the manifest apart."""
        return sum(file.nbytes for file in self.files)

    @property
    def referred(self) -> tuple[Chunk, ...]:
        """The parts of tensors whose bytes lie in directories of other steps."""
        return tuple(c for tensor in self.tensors for c in tensor.chunks if c.directory is not None)

    @property
    def refers_to(self) -> tuple[str, ...]:
        """The directories of other steps that hold bytes of this one."""
        return tuple(sorted({c.directory for c in self.referred if c.directory is not None}))

    @property
    def version(self) -> int:
        """Of the format that this manifest needs: what has no reference can be read by older programs."""
        return FORMAT_VERSION if self.referred else PLAIN_VERSION

    def same_content(self, other: Manifest) -> bool:
        """Whether both commit the same attempt with the same bytes (a commit that was sent twice)."""
        keys = ("step", "generation", "owner", "world_size", "directory", "hash", "files", "tensors")
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def same_state(self, other: Manifest) -> bool:
        """Whether both hold the same commit's state, wherever the bytes lie (a copy has no references any more)."""
        keys = ("step", "generation", "owner", "world_size", "directory", "hash")
        return all(getattr(self, key) == getattr(other, key) for key in keys) and _state(self) == _state(other)

    def to_bytes(self) -> bytes:
        """The file's content, closed by the line with its digest."""
        head: dict[str, Any] = {"format": FORMAT_NAME, "version": self.version}
        head.update({k: getattr(self, k) for k in _SCALARS})
        head.update({"parent": self.parent, "versions": dict(self.versions), "hosts": dict(self.hosts)})
        head["meta"] = dict(self.meta)
        lines = [f"{json.dumps(key)}: {_dumps(value)}" for key, value in head.items()]
        lines.append('"files": [\n' + ",\n".join(" " + _dumps(dataclasses.asdict(f)) for f in self.files) + "\n]")
        rows = [f" {json.dumps(t.name)}: {_dumps(_tensor_row(t))}" for t in self.tensors]
        lines.append('"tensors": {\n' + ",\n".join(rows) + "\n}")
        body = ("{\n" + ",\n".join(lines)).encode()
        return body + f',\n"manifest_digest": "sha256:{digest_of(body)}"\n}}\n'.encode()


_SCALARS = ("step", "generation", "owner", "world_size", "certified", "committed_at", "directory", "hash")


def parse_manifest(data: bytes, where: str, directory: str) -> Manifest:
    """Reads and checks a manifest.

    Args:
        data: the file's content.
        where: its path, for messages.
        directory: the name of the directory it was found in; a manifest of another directory is refused.

    Raises:
        StoreCorrupt: a byte was altered, or what it says cannot be true.
        CheckpointMismatch: it has a newer format, or a hash that is not known here.
    """
    tail = _TAIL.search(data[-_TAIL_BYTES:])
    if tail is None:
        raise StoreCorrupt(f"{where}: does not end with its digest: torn or altered. {REMEDY}", file=where)
    if digest_of(memoryview(data)[:-_TAIL_BYTES]) != tail.group(1).decode():
        raise StoreCorrupt(f"{where}: its bytes differ from its digest. {REMEDY}", file=where)
    fields = parse_json(data, where)
    if not isinstance(fields, dict) or cast("dict[str, Any]", fields).get("format") != FORMAT_NAME:
        raise StoreCorrupt(f"{where}: not a manifest of a checkpoint. {REMEDY}", file=where)
    checked = Fields(cast("dict[str, Any]", fields), where)
    version = checked.integer("version")
    if version > FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{where}: format version {version}, newer than {FORMAT_VERSION}, the newest that this version reads. "
            "Upgrade arc-dist.",
            file=where,
            version=version,
        )
    manifest = _manifest(checked)
    new_hash(manifest.hash)
    if manifest.directory != directory or step_of_directory(directory) != manifest.step:
        raise StoreCorrupt(
            f"{where}: it is the manifest of step {manifest.step} in {manifest.directory}, not of {directory}. "
            f"{REMEDY}",
            file=where,
        )
    _check_files(manifest, where)
    if version < manifest.version:
        raise StoreCorrupt(f"{where}: refers to other steps, which version {version} cannot. {REMEDY}", file=where)
    if manifest.refers_to and manifest.hash == FAST_HASH:
        raise StoreCorrupt(
            f"{where}: refers to other steps by digests of {FAST_HASH}, too weak for it. {REMEDY}", file=where
        )
    return manifest


def _manifest(fields: Fields) -> Manifest:
    committed_at = fields.fields.get("committed_at")
    certified = fields.fields.get("certified")
    parent = fields.fields.get("parent")
    if type(committed_at) not in (int, float) or not -MAX_INT < cast("float", committed_at) < MAX_INT:
        raise fields.wrong("committed_at", committed_at)
    if not isinstance(certified, bool):
        raise fields.wrong("certified", certified)
    world_size = fields.integer("world_size")
    if world_size < 1:
        raise fields.wrong("world_size", world_size)
    return Manifest(
        step=fields.integer("step"),
        generation=fields.integer("generation"),
        owner=fields.text("owner"),
        world_size=world_size,
        certified=certified,
        committed_at=float(cast("float", committed_at)),
        directory=fields.text("directory"),
        hash=fields.text("hash"),
        files=tuple(file_entry(row) for row in fields.rows("files")),
        tensors=tuple(_tensor_entry(name, row, fields) for name, row in fields.mapping("tensors").items()),
        meta=fields.mapping("meta"),
        versions={str(k): str(v) for k, v in fields.mapping("versions").items()},
        hosts={str(k): str(v) for k, v in fields.mapping("hosts").items()},
        parent=None if parent is None else fields.integer("parent"),
    )


def file_entry(fields: Fields) -> FileEntry:
    """A checked file entry of a manifest or of a rank's part."""
    name, kind = fields.text("name"), fields.text("kind")
    if not is_file_name(name):
        raise fields.wrong("name", name)
    suffix = {"tensors": ".safetensors", "objects": ".json", "attempt": ATTEMPT_NAME}.get(kind)
    if suffix is None or not name.endswith(suffix):
        raise fields.wrong("kind", kind)
    entry = FileEntry(
        name=name,
        kind=kind,
        rank=fields.integer("rank"),
        nbytes=fields.integer("nbytes"),
        digest=fields.digest("digest"),
        header_nbytes=fields.integer("header_nbytes", 0),
    )
    if (kind == "tensors") != (8 <= entry.header_nbytes <= MAX_HEADER_BYTES) or entry.header_nbytes > entry.nbytes:
        raise fields.wrong("header_nbytes", entry.header_nbytes)
    return entry


def chunk_entry(fields: Fields, dtype: str, shape: tuple[int, ...]) -> Chunk:
    """A checked part of a tensor."""
    chunk = Chunk(
        offsets=fields.dims("offsets"),
        shape=fields.dims("shape"),
        file=fields.text("file"),
        start=fields.integer("start"),
        nbytes=fields.integer("nbytes"),
        digest=fields.digest("digest"),
        directory=None if "directory" not in fields.fields else fields.text("directory"),
        rank=None if "directory" not in fields.fields else fields.integer("rank"),
    )
    if chunk.directory is not None:
        # The patterns leave no room for a path separator or a dot-dot: nothing outside the run can be named.
        if step_of_directory(chunk.directory) is None:
            raise fields.wrong("directory", chunk.directory)
        if not is_file_name(chunk.file) or not chunk.file.endswith(".safetensors"):
            raise fields.wrong("file", chunk.file)
    if not len(shape) == len(chunk.offsets) == len(chunk.shape):
        raise fields.wrong("offsets", chunk.offsets)
    if any(o + n > g for o, n, g in zip(chunk.offsets, chunk.shape, shape, strict=True)):
        raise fields.wrong("shape", chunk.shape)
    if math.prod(chunk.shape) * itemsize(dtype) != chunk.nbytes:
        raise fields.wrong("nbytes", chunk.nbytes)
    return chunk


def tensor_head(fields: Fields) -> tuple[str, tuple[int, ...]]:
    """The checked (dtype, whole shape) of a tensor."""
    dtype = fields.text("dtype")
    if not is_known_dtype(dtype):
        raise CheckpointMismatch(f"{fields.where}: dtype {dtype[:40]!r} is not known here. Upgrade arc-dist.")
    shape = fields.dims("global_shape")
    # A tensor without elements may have other dimensions that no tensor library can multiply.
    if math.prod(max(1, n) for n in shape) * itemsize(dtype) >= MAX_INT:
        raise fields.wrong("global_shape", shape)
    return dtype, shape


def _tensor_entry(name: str, row: object, fields: Fields) -> TensorEntry:
    inner = fields.inner(row, f"tensor {name[:200]}")
    dtype, shape = tensor_head(inner)
    chunks = tuple(chunk_entry(chunk, dtype, shape) for chunk in inner.rows("chunks"))
    entry = TensorEntry(name=name, dtype=dtype, shape=shape, chunks=chunks)
    problem = coverage_problem(entry)
    if problem:
        raise StoreCorrupt(f"{inner.where}: {problem}. {REMEDY}", file=fields.where, tensor=name)
    return entry


def coverage_problem(tensor: TensorEntry) -> str | None:
    """What is wrong with the parts of a tensor: a hole, an overlap, copies that differ; None when they are whole."""
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], Chunk] = {}
    for chunk in tensor.chunks:
        copy = boxes.setdefault((chunk.offsets, chunk.shape), chunk)
        if copy.digest != chunk.digest:
            return f"its copies in {copy.file} and {chunk.file} differ"
    if not tensor.chunks:
        return "no part of it was written"
    return uncovered(tensor.shape, list(boxes))


def _check_files(manifest: Manifest, where: str) -> None:
    """Every rank has its files, and in a file of tensors every byte belongs to the header or to one tensor."""
    files = {file.name: file for file in manifest.files}
    if len(files) != len(manifest.files):
        raise StoreCorrupt(f"{where}: names a file twice. {REMEDY}", file=where)
    ranks = {kind: {f.rank for f in manifest.files if f.kind == kind} for kind in ("tensors", "objects")}
    world_size = manifest.world_size  # compared by number first: it may be a lie of any size
    if any(len(found) != world_size or found != set(range(world_size)) for found in ranks.values()):
        raise StoreCorrupt(f"{where}: does not name the files of {manifest.world_size} ranks. {REMEDY}", file=where)
    problem = segments_problem(files, manifest.tensors) or references_problem(manifest)
    if problem:
        raise StoreCorrupt(f"{where}: {problem}. {REMEDY}", file=where)


def segments_problem(files: Mapping[str, FileEntry], tensors: Sequence[TensorEntry]) -> str | None:
    """Checks that tensors tile the files behind their headers: no gap, no overlap, nothing beyond the end."""
    segments: dict[str, list[tuple[int, int]]] = {f.name: [] for f in files.values() if f.kind == "tensors"}
    for tensor in tensors:
        for chunk in tensor.chunks:
            if chunk.directory is not None:
                continue
            if chunk.file not in segments:
                return f"tensor {tensor.name[:200]} lies in {chunk.file[:200]!r}, which is not one of its files"
            segments[chunk.file].append((chunk.start, chunk.nbytes))
    for name, parts in segments.items():
        end = files[name].header_nbytes
        for start, nbytes in sorted(parts):
            if start != end:
                return f"{name}: bytes {min(start, end)} to {max(start, end)} belong to no tensor or to two"
            end += nbytes
        if end != files[name].nbytes:
            return f"{name}: {files[name].nbytes} bytes, but its tensors end at {end}"
        if name != shard_name(files[name].rank):
            return f"{name}: belongs to rank {files[name].rank}"
    return None


def references_problem(manifest: Manifest) -> str | None:
    """What is wrong with the references as such; whether the bytes are there is not looked at."""
    for chunk in manifest.referred:
        if chunk.directory == manifest.directory:
            return f"{chunk.file}: refers to its own directory"
        if chunk.rank is None or chunk.rank >= manifest.world_size:
            return f"{chunk.directory}/{chunk.file}: referred to by rank {chunk.rank} of {manifest.world_size}"
    return None


def _state(manifest: Manifest) -> tuple[object, ...]:
    tensors = [
        (t.name, t.dtype, t.shape, sorted({(c.offsets, c.shape, c.digest) for c in t.chunks})) for t in manifest.tensors
    ]
    return tensors, sorted((f.name, f.digest) for f in manifest.files if f.kind != "tensors")


def _tensor_row(tensor: TensorEntry) -> dict[str, Any]:
    chunks = [{k: v for k, v in dataclasses.asdict(c).items() if v is not None} for c in tensor.chunks]
    return {"dtype": tensor.dtype, "global_shape": list(tensor.shape), "chunks": chunks}


def _dumps(value: object) -> str:
    return json.dumps(value, allow_nan=False)


__all__ = [
    "Fields",
    "Chunk",
    "FileEntry",
    "Manifest",
    "TensorEntry",
    "chunk_entry",
    "coverage_problem",
    "fields_of",
    "file_entry",
    "parse_manifest",
    "references_problem",
    "segments_problem",
    "tensor_head",
]
