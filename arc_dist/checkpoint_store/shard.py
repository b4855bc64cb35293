"""The safetensors file: its header, written by us and read with strict bounds.

A file is ``<8 bytes: header length><header: JSON><the tensors' bytes, back to back>``. The header's metadata carries
the offsets of each part in its whole tensor under the key that torch's HuggingFaceStorageReader looks for, so stock
torch loads and reshards the files of a step without us.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any, cast

from arc_dist.checkpoint_store.format import (
    MAX_HEADER_BYTES,
    TensorSpec,
    itemsize,
    known_dtypes,
    parse_json,
    safetensors_dtype,
)
from arc_dist.errors import ConfigError, StoreCorrupt

# torch/distributed/checkpoint/_hf_utils.py: CUSTOM_METADATA_KEY and SAVED_OFFSETS_KEY
_SHARDING_KEY = "DCP_SHARDING_INFO"
_OFFSETS_KEY = "saved_offsets"


def file_order_key(spec: TensorSpec) -> tuple[int, str]:
    """Sorts tensors in a file: widest elements first, so that each begins at a multiple of its element size."""
    return (-itemsize(spec.dtype), spec.name)


def build_header(specs: Sequence[TensorSpec]) -> bytes:
    """The header of a file that holds these tensors in this order, its length field and padding included.

    Raises:
        ConfigError: a name appears twice, or the header would be larger than readers accept.
    """
    rows: dict[str, Any] = {}
    offset = 0
    for spec in specs:
        if spec.name in rows:
            raise ConfigError(f"tensor {spec.name} appears twice in the state of one rank. Give each its own name.")
        rows[spec.name] = {
            "dtype": safetensors_dtype(spec.dtype, spec.name),
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    sharding = {spec.name: {_OFFSETS_KEY: list(spec.offsets)} for spec in specs}
    metadata = {"format": "pt", _SHARDING_KEY: json.dumps(sharding, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **rows}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ConfigError(f"{len(specs)} tensors on one rank make a header of {len(text)} bytes. Use more ranks.")
    return struct.pack("<Q", len(text)) + text


def header_nbytes(first: bytes, file_nbytes: int, where: str) -> int:
    """Bytes of the header with its length field, from the first 8 bytes of a file.

    Raises:
        StoreCorrupt: the length is impossible; checked before anything is allocated.
    """
    if len(first) < 8 or file_nbytes < 8:
        raise StoreCorrupt(f"{where}: {file_nbytes} bytes cannot be a safetensors file.", file=where)
    (length,) = struct.unpack("<Q", first[:8])
    if length > min(MAX_HEADER_BYTES, file_nbytes - 8):
        raise StoreCorrupt(f"{where}: says its header has {length} bytes; the file has {file_nbytes}.", file=where)
    return length + 8


def parse_header(header: bytes, file_nbytes: int, where: str) -> list[tuple[TensorSpec, int]]:
    """The tensors that a header describes, as (spec, first byte in the file), in file order.

    The specs' `global_shape` is not known to a single file and is given as if the part were the end of the whole.

    Raises:
        StoreCorrupt: unknown dtype, parts that overlap, leave gaps or do not fit the file.
    """
    nbytes = header_nbytes(header, file_nbytes, where)
    fields = parse_json(header[8:nbytes].rstrip(b" "), where)
    try:
        rows = dict(_object(fields))
        metadata = rows.pop("__metadata__", {})
        sharding = _object(parse_json(metadata.get(_SHARDING_KEY, "{}").encode(), where))
        found = [(_ints(row["data_offsets"])[0], _spec(name, row, sharding)) for name, row in rows.items()]
    except (TypeError, KeyError, ValueError, AttributeError, IndexError, ConfigError) as error:
        raise StoreCorrupt(f"{where}: its header cannot be read ({type(error).__name__}).", file=where) from error
    found.sort(key=lambda item: (item[0], item[1].nbytes))
    end = nbytes
    result: list[tuple[TensorSpec, int]] = []
    for start, spec in found:
        if start + nbytes != end:
            raise StoreCorrupt(f"{where}: tensor {spec.name[:200]} overlaps another or leaves a gap.", file=where)
        result.append((spec, end))
        end += spec.nbytes
    if end != file_nbytes:
        raise StoreCorrupt(f"{where}: {file_nbytes} bytes, but its tensors end at {end}.", file=where)
    return result


_BY_SAFETENSORS_NAME = {safetensors_dtype(name): name for name in known_dtypes()}


def _spec(name: str, row: dict[str, Any], sharding: dict[str, Any]) -> TensorSpec:
    shape = _ints(row["shape"])
    offsets = _ints(sharding[name][_OFFSETS_KEY]) if name in sharding else (0,) * len(shape)
    whole = tuple(o + n for o, n in zip(offsets, shape, strict=True))
    spec = TensorSpec(name, _BY_SAFETENSORS_NAME[row["dtype"]], shape, whole, offsets)
    start, end = _ints(row["data_offsets"])
    if end - start != math.prod(shape) * itemsize(spec.dtype):
        raise ValueError(name)
    return spec


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} is not a JSON object")
    return cast("dict[str, Any]", value)


def _ints(values: list[Any]) -> tuple[int, ...]:
    if type(values) is not list or not all(type(n) is int and 0 <= n < 1 << 62 for n in values):
        raise ValueError(str(values)[:80])
    return tuple(values)
