"""Checkpoints of others, opened for import: what they hold as pieces that are read one after another.

No pickle runs: torch's files are read with ``weights_only=True``, DCP's metadata with `dcp_pickle`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import _traverse

from arc_dist.checkpoint_store.buffers import as_bytes
from arc_dist.checkpoint_store.dcp_pickle import MAX_METADATA_BYTES, DcpChunk, DcpTensor, read_dcp_metadata
from arc_dist.checkpoint_store.format import MANIFEST_NAME, TensorSpec, dtype_name, is_known_dtype, torch_dtype
from arc_dist.checkpoint_store.shard import header_nbytes, parse_header
from arc_dist.errors import ConfigError, StoreCorrupt, StoreGone

METADATA_NAME = ".metadata"
_INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a tensor that can be read."""

    spec: TensorSpec
    read: Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An opened checkpoint of another format.

    Attributes:
        kind: ``"dcp"``, ``"torch.save"`` or ``"safetensors"``.
        objects: flat name -> reads the object.
        paths: flat name -> its path in the nested state.
    """

    kind: str
    pieces: tuple[Piece, ...]
    objects: Mapping[str, Callable[[], object]]
    paths: Mapping[str, tuple[str | int, ...]] | None


def open_source(path: Path) -> Source:
    """Finds out what a path holds and opens it.

    Raises:
        StoreGone: there is nothing.
        ConfigError: it is none of the formats, or needs arbitrary unpickling; with the remedy.
        StoreCorrupt: it contradicts itself or is truncated.
    """
    if not path.exists():
        raise StoreGone(f"{path}: there is no such file or directory. Correct the path.", file=str(path))
    if path.is_file():
        return _single_safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    if (path / MANIFEST_NAME).exists():
        raise ConfigError(f"{path}: is a step of an arc-dist store already; it needs no import.", file=str(path))
    if (path / METADATA_NAME).exists():
        return _dcp_directory(path)
    if any(path.glob("__*" + METADATA_NAME)):
        raise ConfigError(
            f"{path}: was saved with use_collectives=False, one metadata file per rank, so it does not say what is "
            "whole. Load it with the job that wrote it and save it again.",
            file=str(path),
        )
    files = sorted(path.glob("*.safetensors"))
    if files:
        return _safetensors(path, files)
    raise ConfigError(
        f"{path}: holds no checkpoint that is known: neither {METADATA_NAME} (DCP, torchtitan) nor *.safetensors "
        "(HuggingFace). For a file of torch.save name the file itself.",
        file=str(path),
    )


# ---- classic DCP


def _dcp_directory(path: Path) -> Source:
    where = path / METADATA_NAME
    if where.stat().st_size > MAX_METADATA_BYTES:
        raise StoreCorrupt(f"{where}: {where.stat().st_size} bytes, more than metadata can have.", file=str(where))
    metadata = read_dcp_metadata(where.read_bytes(), str(where))
    found: list[tuple[str, int, Piece]] = []
    for tensor in metadata.tensors:
        if 0 in tensor.shape:
            spec = TensorSpec(tensor.name, tensor.dtype, tensor.shape, tensor.shape, (0,) * len(tensor.shape))
            found.append(("", 0, Piece(spec=spec, read=functools.partial(_empty, tensor))))
            continue
        for chunk in tensor.chunks:
            if 0 not in chunk.shape:
                spec = TensorSpec(tensor.name, tensor.dtype, chunk.shape, tensor.shape, chunk.offsets)
                piece = Piece(spec=spec, read=functools.partial(_dcp_tensor, path, tensor, chunk))
                found.append((chunk.file, chunk.start, piece))
    # In the order of the files, each of which holds one part of a tensor at most, and is read once from end to end.
    pieces = [piece for _, _, piece in sorted(found, key=lambda item: item[:2])]
    objects = {n: functools.partial(_dcp_object, path, n, chunk) for n, chunk in metadata.objects.items()}
    return Source(kind="dcp", pieces=tuple(pieces), objects=objects, paths=metadata.paths)


def _empty(tensor: DcpTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))


def _dcp_tensor(path: Path, tensor: DcpTensor, chunk: DcpChunk) -> torch.Tensor:
    where = f"{path / chunk.file}: tensor {tensor.name[:200]}"
    data = _safe_load(io.BytesIO(_slice(path, chunk)), where)
    if not isinstance(data, torch.Tensor) or (dtype_name(data.dtype), tuple(data.shape)) != (tensor.dtype, chunk.shape):
        raise StoreCorrupt(f"{where}: the file holds something else than its metadata says.", file=chunk.file)
    return _plain_tensor(data, where)


def _dcp_object(path: Path, name: str, chunk: DcpChunk) -> object:
    return _safe_load(io.BytesIO(_slice(path, chunk)), f"{path / chunk.file}: object {name[:200]}", key=name)


def _slice(path: Path, chunk: DcpChunk) -> bytes:
    file = path / chunk.file
    if not file.is_file():
        raise StoreGone(f"{file}: named by {METADATA_NAME}, but not there. Copy the whole directory.", file=str(file))
    nbytes = file.stat().st_size
    if chunk.start + chunk.nbytes > nbytes:
        raise StoreCorrupt(f"{file}: {nbytes} bytes, truncated: its metadata needs more.", file=str(file))
    with file.open("rb") as stream:
        stream.seek(chunk.start)
        return stream.read(chunk.nbytes)


# ---- torch.save


def _torch_file(path: Path) -> Source:
    # A zip file's tensors are mapped, not read, until they are written; older files can only be read whole.
    state = _safe_load(path, str(path), mmap=zipfile.is_zipfile(path))
    if isinstance(state, torch.Tensor):
        state = {"tensor": state}
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"{path}: holds a {type(state).__name__}, not a dictionary with a state. Save model.state_dict() instead.",
            file=str(path),
        )
    tensors: dict[str, torch.Tensor] = {}
    objects: dict[str, Callable[[], object]] = {}
    paths: dict[str, tuple[str | int, ...]] = {}

    def visit(at: tuple[str | int, ...], value: object) -> None:
        name = ".".join(map(str, at))
        if name in paths:
            raise ConfigError(f"{path}: two values have the name {name[:200]}. Rename one of the keys.", key=name)
        paths[name] = at
        if isinstance(value, torch.Tensor):
            tensors[name] = _plain_tensor(value, f"{path}: tensor {name[:200]}")
        else:
            objects[name] = lambda: value

    cast("Any", _traverse).traverse_state_dict(state, visit)
    pieces = [
        Piece(spec=TensorSpec.whole(name, tensor, replicated=False), read=functools.partial(_same, tensor))
        for name, tensor in tensors.items()
    ]
    return Source(kind="torch.save", pieces=tuple(pieces), objects=objects, paths=paths)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _safe_load(file: Path | io.BytesIO, where: str, *, key: str = "", mmap: bool = False) -> Any:
    """`torch.load` with ``weights_only=True``: tensors and plain containers, no code; after a look at the checksums."""
    _check_zip(file, where)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap or None)
    except pickle.UnpicklingError as error:
        skip = f" or skip it: --skip {key}" if key else ""
        reason = _first_line(str(error).split("WeightsUnpickler error:")[-1])
        raise ConfigError(
            f"{where}: needs objects that only arbitrary unpickling could make, which could run any code ({reason}). "
            "In the program that wrote it, load it and save it again with tensors, numbers, strings and plain "
            f"containers only (state_dict() of what is no such thing){skip}.",
            key=key,
        ) from error
    except Exception as error:  # damaged files raise nearly anything
        raise StoreCorrupt(
            f"{where}: cannot be read ({type(error).__name__}: {_first_line(str(error))}). It is truncated, altered, "
            "or no file of torch.save.",
            key=key,
        ) from error


def _check_zip(file: Path | io.BytesIO, where: str) -> None:
    """Compares the checksums that torch.save writes into its zip files; torch.load does not look at them."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # as above
        raise StoreCorrupt(
            f"{where}: cannot be read ({_first_line(str(error))}). It is truncated or altered."
        ) from error
    if damaged is not None:
        raise StoreCorrupt(
            f"{where}: the bytes of its record {damaged[:200]} differ from its checksum. Use another copy. (If it was "
            "written with set_crc32_options(False), load it and save it again without.)"
        )
    if isinstance(file, io.BytesIO):
        file.seek(0)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0][:200]


def _plain_tensor(tensor: torch.Tensor, where: str) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise ConfigError(f"{where}: a {type(tensor).__name__}. Save its plain data: full_tensor() of a DTensor.")
    if tensor.layout != torch.strided or tensor.is_quantized or not is_known_dtype(dtype_name(tensor.dtype)):
        raise ConfigError(
            f"{where}: of layout {tensor.layout} and dtype {dtype_name(tensor.dtype)}, which cannot be stored. Convert "
            "it in the program that wrote it."
        )
    return tensor.detach()


# ---- safetensors


def _single_safetensors(path: Path) -> Source:
    return _safetensors(path.parent, [path])


def _safetensors(path: Path, files: list[Path]) -> Source:
    found: list[tuple[TensorSpec, Path, int]] = []
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(8)
            header = first + stream.read(header_nbytes(first, size, str(file)) - 8)
        found += [(spec, file, start) for spec, start in parse_header(header, size, str(file))]
    _check_index(path, files, {(spec.name, file.name) for spec, file, _ in found})
    shapes: dict[str, tuple[int, ...]] = {}
    for spec, file, _ in found:
        known = shapes.setdefault(spec.name, spec.global_shape)
        if len(known) != len(spec.global_shape):
            raise StoreCorrupt(f"{file}: tensor {spec.name[:200]} has another number of dimensions elsewhere.")
        shapes[spec.name] = tuple(max(a, b) for a, b in zip(known, spec.global_shape, strict=True))
    pieces = [
        Piece(
            spec=dataclasses.replace(spec, global_shape=shapes[spec.name]),
            read=functools.partial(_read_range, file, start, spec),
        )
        for spec, file, start in found
    ]
    return Source(kind="safetensors", pieces=tuple(pieces), objects={}, paths={name: (name,) for name in shapes})


def _check_index(path: Path, files: list[Path], found: set[tuple[str, str]]) -> None:
    """All files that the index names are there: a download that broke off would else lose layers in silence."""
    index = path / _INDEX_NAME
    if not index.exists() or (len(files) == 1 and len(list(path.glob("*.safetensors"))) > 1):  # one file was asked for
        return
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise StoreCorrupt(f"{index}: {index.stat().st_size} bytes, more than an index can have.", file=str(index))
    try:
        entries = cast("dict[str, str]", json.loads(index.read_text(encoding="utf-8"))["weight_map"]).items()
        missing = sorted(f"{name} ({file})" for name, file in entries if (name, file) not in found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreCorrupt(f"{index}: is no index of safetensors files ({type(error).__name__}).") from error
    if missing:
        raise StoreCorrupt(
            f"{index}: names {len(missing)} tensors that are not in the files: {', '.join(missing[:5])}. Download the "
            "missing files.",
            file=str(index),
        )


def _read_range(file: Path, start: int, spec: TensorSpec) -> torch.Tensor:
    tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    buffer = as_bytes(tensor)
    with file.open("rb") as stream:
        stream.seek(start)
        if stream.readinto(buffer) != len(buffer):
            raise StoreCorrupt(f"{file}: ends within tensor {spec.name[:200]}. Copy the file again.", file=str(file))
    return tensor


__all__ = ["METADATA_NAME", "Piece", "Source", "open_source"]
