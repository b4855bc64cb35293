"""Reads the `.metadata` pickle of a classic DCP directory without unpickling anything but plain data.

A pickle is a program. This one may name only DCP's own metadata classes, and even these are not built: each name
stands for an inert record that keeps what it is given. Whatever else a file names is refused before it is looked up,
so nothing is imported and nothing is called.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from pathlib import PurePosixPath
from typing import Any, ClassVar, cast

import torch

from arc_dist.checkpoint_store.dcp_layout import checked_paths
from arc_dist.checkpoint_store.format import is_known_dtype
from arc_dist.errors import ConfigError, StoreCorrupt

MAX_METADATA_BYTES = 1 << 30
_DCP = "torch.distributed.checkpoint."
_REMEDY = "Only metadata that torch.distributed.checkpoint wrote itself is read; ask who made the file."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DcpChunk:
    """A saved part of a tensor, or an object: where it lies in the tensor and where its bytes lie."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DcpTensor:
    """A tensor of a classic DCP directory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[DcpChunk, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DcpMetadata:
    """What `.metadata` says, checked.

    Attributes:
        paths: flat name -> path in the nested state; None when the planner did not keep it.
    """

    tensors: tuple[DcpTensor, ...]
    objects: dict[str, DcpChunk]
    paths: dict[str, tuple[str | int, ...]] | None


def read_dcp_metadata(data: bytes, where: str) -> DcpMetadata:
    """Reads and checks the content of a `.metadata` file.

    Raises:
        ConfigError: it names a class or function beyond the closed list, or was written with stream transforms.
        StoreCorrupt: it is no pickle, or says what cannot be.
    """
    unpickler = _Unpickler(io.BytesIO(data), where)
    try:
        root = unpickler.load()
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise StoreCorrupt(
            f"{where}: cannot be read as metadata ({type(error).__name__}: {str(error)[:200]}). {_REMEDY}", file=where
        ) from error
    try:
        return _metadata(_record(root, "Metadata"), where)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise StoreCorrupt(
            f"{where}: its content makes no sense ({type(error).__name__}: {str(error)[:200]}). {_REMEDY}", file=where
        ) from error


class _Record:
    """Stands for an instance of a metadata class: keeps its arguments and its state, does nothing."""

    kind = ""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A field of a dataclass that was pickled by its `__dict__`; None when an older torch had none."""
        state = self.state
        if not isinstance(state, dict):
            raise TypeError(f"{self.kind} without fields")
        return cast("dict[str, Any]", state).get(name)


_CLASSES = {
    *((_DCP + "metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_DCP + "metadata", name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}
_PATHS = {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}


# What metadata never uses: persistent ids, extensions, classic instances, buffers and lengths allocated before reading.
_REFUSED_OPCODES = {
    *pickle.PERSID, *pickle.BINPERSID, *pickle.INST, *pickle.OBJ, *pickle.EXT1, *pickle.EXT2, *pickle.EXT4,
    *pickle.BYTEARRAY8, *pickle.NEXT_BUFFER, *pickle.READONLY_BUFFER,
}  # fmt: skip
# The one written in Python: the one in C lets eight bytes allocate gigabytes (a memo is an array there, not a dict).
_Base = cast("type[pickle.Unpickler]", vars(pickle)["_Unpickler"])


class _Unpickler(_Base):
    """Resolves the names of the closed list to inert stand-ins, made anew for each file, and no other name."""

    dispatch: ClassVar[Any] = {
        code: load for code, load in cast("Any", _Base).dispatch.items() if code not in _REFUSED_OPCODES
    }

    def __init__(self, file: io.BytesIO, where: str) -> None:
        super().__init__(file)
        self._where = where
        # A pickle may set attributes of the classes it names; ones of its own are harmed by nothing.
        self._made: dict[tuple[str, str], type[_Record]] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        key = (module, name)
        if key in _CLASSES:
            if key not in self._made:
                self._made[key] = type(name, (_Record,), {"kind": name})
            return self._made[key]
        if key in _PATHS:
            return PurePosixPath
        if key == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        if key in (("collections", "OrderedDict"), ("builtins", "dict")):
            return dict
        raise ConfigError(
            f"{self._where}: it names {module[:100]}.{name[:100]}, which DCP's own metadata never does, so it was not "
            f"read any further. {_REMEDY}",
            file=self._where,
            name=f"{module}.{name}",
        )

    def persistent_load(self, pid: Any, /) -> Any:
        raise ConfigError(f"{self._where}: it refers to data outside the file. {_REMEDY}", file=self._where)


def _metadata(root: _Record, where: str) -> DcpMetadata:
    storage: dict[tuple[str, tuple[int, ...] | None], _Record] = {}
    for index, info in cast("dict[Any, Any]", root.field("storage_data")).items():
        at = _record(index, "MetadataIndex")
        offset = at.field("offset")
        storage[str(at.field("fqn")), None if offset is None else _ints(offset)] = _record(info, "_StorageInfo")
    tensors: list[DcpTensor] = []
    objects: dict[str, DcpChunk] = {}
    for name, entry in cast("dict[object, Any]", root.field("state_dict_metadata")).items():
        if not isinstance(name, str):
            raise TypeError("a name that is no text")
        if _kind(entry) == "BytesStorageMetadata":
            objects[name] = _chunk(storage[name, None], (), (), where, name)
            continue
        tensor = _record(entry, "TensorStorageMetadata")
        chunks: list[DcpChunk] = []
        for raw in tensor.field("chunks"):
            part = _record(raw, "ChunkStorageMetadata")
            offsets, sizes = _ints(part.field("offsets")), _ints(part.field("sizes"))
            if (name, offsets) in storage:
                chunks.append(_chunk(storage[name, offsets], offsets, sizes, where, name))
            elif math.prod(sizes) > 0:
                raise KeyError(f"{name[:200]} at {list(offsets)}: no file holds it")
        dtype = _dtype(_record(tensor.field("properties"), "TensorProperties"), where, name)
        tensors.append(DcpTensor(name=name, dtype=dtype, shape=_ints(tensor.field("size")), chunks=tuple(chunks)))
    planner_data = root.field("planner_data")
    paths = checked_paths(cast("dict[Any, Any]", planner_data), where) if isinstance(planner_data, dict) else None
    return DcpMetadata(tensors=tuple(tensors), objects=objects, paths=paths)


def _chunk(info: _Record, offsets: tuple[int, ...], sizes: tuple[int, ...], where: str, name: str) -> DcpChunk:
    if info.field("transform_descriptors"):
        raise ConfigError(
            f"{where}: {name[:200]} was written through stream transforms (compression or encryption), which cannot be "
            "undone here. Load it with the program that wrote it, and save it without them.",
            key=name,
        )
    file = info.field("relative_path")
    if not isinstance(file, str) or not file or "/" in file or "\\" in file or file in (".", "..") or "\0" in file:
        raise ValueError(f"{str(file)[:100]!r} is no name of a file in the directory")
    start, nbytes = _ints((info.field("offset"), info.field("length")))
    return DcpChunk(offsets=offsets, shape=sizes, file=file, start=start, nbytes=nbytes)


def _dtype(properties: _Record, where: str, name: str) -> str:
    # TensorProperties pickles itself as a tuple that begins with the dtype.
    state = properties.state
    dtype = cast("tuple[Any, ...]", state)[0] if isinstance(state, tuple) else properties.field("dtype")
    if not is_known_dtype(dtype):
        raise ConfigError(f"{where}: tensor {name[:200]} has the dtype {dtype}, which cannot be stored.", key=name)
    return dtype


def _kind(value: object) -> str:
    return type(value).kind if isinstance(value, _Record) else type(value).__name__


def _record(value: object, kind: str) -> _Record:
    if not isinstance(value, _Record) or _kind(value) != kind:
        raise TypeError(f"a {_kind(value)} in the place of a {kind}")
    return value


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple):
        raise TypeError(f"{type(values).__name__} in the place of sizes")
    numbers = cast("tuple[Any, ...]", values)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(str(numbers)[:80])
    return numbers


__all__ = ["MAX_METADATA_BYTES", "DcpChunk", "DcpMetadata", "DcpTensor", "read_dcp_metadata"]
