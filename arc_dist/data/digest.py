"""A short digest of a batch, by which a batch that comes again is recognised.

It is taken rarely (the first batch of an epoch, and when a position is recorded) and its cost is bounded: of a tensor
larger than 1 MiB it reads evenly spaced elements, about 1 MiB of them. That recognises another order of samples, and
augmentation that draws other random numbers; it is no checksum against single altered bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import sys
from collections.abc import Mapping, Sequence, Set
from typing import Any, cast

import torch

from arc_dist.checkpoint_store.buffers import as_bytes, plain

_SAMPLE_BYTES = 1 << 20
_MAX_DEPTH = 16


def batch_digest(batch: object) -> str:
    """32 hexadecimal digits that depend on a batch's structure, types and values.

    Args:
        batch: tensors (any device), numpy arrays, numbers, strings, bytes, and any nesting of mappings, sequences,
            sets, dataclasses and plain objects (by their attributes). Of any other object only the type counts.

    Raises:
        RecursionError: nested more than 16 deep, or containing itself.
    """
    hasher = hashlib.blake2b(digest_size=16)
    _feed(hasher, batch, 0)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise RecursionError(f"a batch nested more than {_MAX_DEPTH} deep, or one that contains itself, has no digest")
    if isinstance(value, torch.Tensor):
        _feed_tensor(hasher, value)
    elif value is None or isinstance(value, (bool, int, str)):
        _feed_bytes(hasher, type(value).__name__, str(value).encode("utf-8", "surrogatepass"))
    elif isinstance(value, float):
        _feed_bytes(hasher, "float", struct.pack("<d", value))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _feed_bytes(hasher, "bytes", bytes(value))
    elif isinstance(value, Mapping):
        # In the mapping's own order: a batch whose keys come in another order was made in another way.
        _open(hasher, type(value).__name__, len(value))
        for key, entry in value.items():
            _feed(hasher, key, depth + 1)
            _feed(hasher, entry, depth + 1)
    elif isinstance(value, Set):
        # The order of a set of strings changes with every process.
        _open(hasher, type(value).__name__, len(value))
        for entry_digest in sorted(batch_digest(entry) for entry in value):
            hasher.update(entry_digest.encode())
    elif isinstance(value, Sequence):
        _open(hasher, type(value).__name__, len(value))
        for entry in value:
            _feed(hasher, entry, depth + 1)
    elif _is_numpy(value):
        _feed_numpy(hasher, value, depth)
    else:
        _feed_object(hasher, value, depth)


def _open(hasher: Any, kind: str, count: int) -> None:
    hasher.update(f"<{kind}:{count}>".encode())


def _feed_bytes(hasher: Any, kind: str, data: bytes) -> None:
    _open(hasher, kind, len(data))
    hasher.update(data)


def _feed_tensor(hasher: Any, tensor: torch.Tensor) -> None:
    if hasattr(tensor, "to_local"):  # a DTensor: this rank's part of it
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    hasher.update(f"<{tensor.dtype}:{tuple(tensor.shape)}:{tensor.layout}>".encode())
    if tensor.device.type == "meta":
        return
    tensor = tensor.detach()
    if tensor.is_nested:
        for part in tensor.unbind():
            _feed_tensor(hasher, part)
        return
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    flat = tensor.reshape(-1)
    count = flat.numel()
    whole = max(1, _SAMPLE_BYTES // max(1, tensor.element_size()))
    if count > whole:
        # An odd stride does not fall into step with rows and channels, whose sizes are mostly even.
        flat = torch.cat([flat[:: -(-count // whole) | 1], flat[-1:]])
    source = plain(flat)
    hasher.update(as_bytes(source))


def _is_numpy(value: object) -> bool:
    return "numpy" in sys.modules and isinstance(value, (sys.modules["numpy"].ndarray, sys.modules["numpy"].generic))


def _feed_numpy(hasher: Any, value: Any, depth: int) -> None:
    hasher.update(f"<numpy:{value.dtype.str}:{value.shape}>".encode())
    if value.dtype.hasobject:
        for entry in value.reshape(-1).tolist():
            _feed(hasher, entry, depth + 1)
        return
    flat = value.reshape(-1)
    whole = max(1, _SAMPLE_BYTES // max(1, value.dtype.itemsize))
    if flat.size > whole:
        hasher.update(flat[-1:].tobytes())
        flat = flat[:: -(-flat.size // whole) | 1]
    hasher.update(flat.tobytes())


def _feed_object(hasher: Any, value: Any, depth: int) -> None:
    hasher.update(f"<object:{type(value).__qualname__}>".encode())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            hasher.update(field.name.encode())
            _feed(hasher, getattr(value, field.name), depth + 1)
    elif not isinstance(value, type) and hasattr(value, "__array_interface__"):  # such as an image of PIL
        interface = value.__array_interface__
        hasher.update(f"{interface.get('typestr')}:{interface.get('shape')}".encode())
        hasher.update(bytes(cast(Any, value).tobytes()))
    elif isinstance(getattr(value, "__dict__", None), dict):
        for name, entry in vars(value).items():
            hasher.update(name.encode())
            if not callable(entry):
                _feed(hasher, entry, depth + 1)
