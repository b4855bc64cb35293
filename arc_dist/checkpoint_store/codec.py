"""Python state to JSON and back, bit for bit and without pickle.

Plain values stay plain, so the files can be read by people: ``{"lr": 0.1, "betas": [0.9, 0.999]}``. What JSON has no
word for is an object with one reserved key, ``"$"``, that names the type. Only the types below exist; a file can make
nothing else, call nothing and import nothing:

    None, bool, int, float (NaN payloads and infinities too), complex, str, bytes, bytearray, list, tuple, torch.Size,
    set, frozenset, range, dict, OrderedDict, defaultdict (of a builtin), Counter, deque, torch.Tensor, nn.Parameter,
    torch.dtype, torch.device, numpy arrays, numpy scalars, numpy.dtype

Not kept: that two places hold the same object (each gets a copy), a tensor's strides and device (it comes back
contiguous, on the CPU). A tensor's `requires_grad` is kept.
"""

from __future__ import annotations

import base64
import collections
import json
import math
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from arc_dist.checkpoint_store.buffers import read_bytes, write_bytes
from arc_dist.checkpoint_store.format import dtype_name, is_known_dtype, itemsize, torch_dtype
from arc_dist.errors import ConfigError, StoreCorrupt

_TAG = "$"
_MAX_DEPTH = 200
_PLAIN_INT = 1 << 63
_NUMPY_KINDS = "biufcSUMm"
_FACTORIES: dict[str, Callable[[], Any]] = {
    "list": list, "dict": dict, "set": set, "tuple": tuple, "int": int, "float": float, "str": str, "bool": bool,
}  # fmt: skip


def encode(obj: object, *, inline: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    """Takes state apart.

    Args:
        obj: what to encode; see the module's list of types.
        inline: put tensors into the JSON (base64). For small ones, such as the states of random generators.

    Returns:
        A value that `json` writes with ``allow_nan=False``, and the tensors that it refers to by path (detached, not
        copied; numpy arrays appear as uint8 tensors). With `inline` there are none.

    Raises:
        ConfigError: a type that is not in the list; the message has its path and the remedy.
    """
    encoder = _Encoder(inline)
    return encoder.value(obj, ()), encoder.tensors


def decode(value: object, tensors: Mapping[str, torch.Tensor] | None = None) -> Any:
    """The inverse of `encode`. Tensors are taken from `tensors` as they are, not copied.

    Raises:
        StoreCorrupt: it is not what `encode` makes, or a tensor is missing.
    """
    try:
        return _decode(value, tensors or {}, 0)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, struct.error) as error:
        raise StoreCorrupt(
            f"encoded state cannot be read ({type(error).__name__}: {str(error)[:200]}). Restore an older step."
        ) from error


class _Encoder:
    def __init__(self, inline: bool) -> None:
        self.inline = inline
        self.tensors: dict[str, torch.Tensor] = {}
        self.open: set[int] = set()  # ids of the containers that the current path leads through

    def value(self, obj: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _MAX_DEPTH:
            raise self.refuse(obj, path[:6], f"is nested more than {_MAX_DEPTH} deep")
        kind = cast("type[Any]", type(obj))
        if obj is None or kind is bool:
            return obj
        if kind is int:
            return obj if -_PLAIN_INT <= obj < _PLAIN_INT else {_TAG: "int", "v": hex(obj)}
        if kind is float:
            return obj if math.isfinite(obj) else {_TAG: "float", "v": struct.pack("<d", obj).hex()}
        if kind is str:
            try:
                obj.encode("utf-8")
            except UnicodeEncodeError:
                return {_TAG: "str", "v": _b64(obj.encode("utf-8", "surrogatepass"))}
            return obj
        if id(obj) in self.open:
            raise self.refuse(obj, path[:6], "contains itself")
        self.open.add(id(obj))
        try:
            return self.compound(obj, kind, path)
        finally:
            self.open.discard(id(obj))

    def compound(self, obj: Any, kind: type[Any], path: tuple[str, ...]) -> Any:
        if kind is list:
            return self.items(obj, path)
        if kind is dict:
            return self.dict(obj, path)
        handler = _ENCODERS.get(kind)
        if handler is not None:
            return {_TAG: handler[0], **handler[1](self, obj, path)}
        if isinstance(obj, torch.Tensor):
            raise self.refuse(obj, path, "is a tensor subclass: store its to_local() or its plain data instead")
        return self.numpy(obj, path)

    def items(self, values: Any, path: tuple[str, ...]) -> list[Any]:
        return [self.value(item, (*path, str(index))) for index, item in enumerate(values)]

    def dict(self, obj: dict[Any, Any], path: tuple[str, ...]) -> Any:
        if all(type(key) is str and key.isprintable() and not key.startswith(_TAG) for key in obj):
            return {key: self.value(item, (*path, key)) for key, item in obj.items()}
        return {_TAG: "dict", "v": self.pairs(obj, path)}

    def pairs(self, obj: Mapping[Any, Any], path: tuple[str, ...]) -> list[Any]:
        return [
            [self.value(key, (*path, f"key {index}")), self.value(item, (*path, str(key)[:80]))]
            for index, (key, item) in enumerate(obj.items())
        ]

    def unordered(self, obj: Any, path: tuple[str, ...]) -> dict[str, Any]:
        # Sorted, so that equal sets are equal bytes in every process, whatever its hash seed.
        return {"v": sorted(self.items(obj, path), key=lambda item: json.dumps(item, sort_keys=True))}

    def defaultdict(self, obj: Any, path: tuple[str, ...]) -> dict[str, Any]:
        factory = obj.default_factory
        name = None if factory is None else getattr(factory, "__name__", "?")
        if factory is not None and _FACTORIES.get(str(name)) is not factory:
            raise self.refuse(obj, path, f"has the default_factory {factory!r}: use a builtin such as list or int")
        return {"factory": name, "v": self.pairs(obj, path)}

    def tensor(self, obj: torch.Tensor, path: tuple[str, ...]) -> dict[str, Any]:
        dtype = dtype_name(obj.dtype)
        if obj.layout != torch.strided or obj.is_quantized or not is_known_dtype(dtype):
            raise self.refuse(obj, path, f"is a tensor of layout {obj.layout} and dtype {dtype}: convert it")
        grad = {"requires_grad": True} if obj.requires_grad else {}
        row: dict[str, Any] = {"dtype": dtype, "shape": list(obj.shape), **grad}
        if self.inline:
            return {**row, "data": _b64(read_bytes(obj.detach().cpu()))}
        return {**row, "at": self.keep(obj.detach(), path)}

    def numpy(self, obj: Any, path: tuple[str, ...]) -> Any:
        # numpy is looked up, never imported: state without numpy objects must not need it.
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(obj, (numpy.ndarray, numpy.generic, numpy.dtype)):
            raise self.refuse(obj, path, "cannot be stored without pickle: use plain containers, numbers and tensors")
        if isinstance(obj, numpy.dtype):
            return {_TAG: "np.dtype", "v": self.dtype_text(obj, obj, path)}
        text = self.dtype_text(obj, obj.dtype, path)
        if isinstance(obj, numpy.generic):
            return {_TAG: "np.scalar", "dtype": text, "v": _b64(obj.tobytes())}
        if type(obj) is not numpy.ndarray:
            raise self.refuse(obj, path, "is a subclass of numpy.ndarray: store numpy.asarray() of it")
        data = obj.tobytes()
        row: dict[str, Any] = {_TAG: "np.ndarray", "dtype": text, "shape": list(obj.shape)}
        if self.inline:
            return {**row, "data": _b64(data)}
        flat = torch.empty(len(data), dtype=torch.uint8)
        write_bytes(flat, data)
        return {**row, "at": self.keep(flat, path)}

    def dtype_text(self, obj: Any, dtype: Any, path: tuple[str, ...]) -> str:
        if dtype.kind not in _NUMPY_KINDS or dtype.fields is not None or dtype.subdtype is not None:
            raise self.refuse(obj, path, f"has the numpy dtype {dtype}: convert it to numbers")
        return str(dtype.str)

    def keep(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        key = base = ".".join(part.replace(".", "_") for part in path) or "value"
        count = 1
        while key in self.tensors:
            count += 1
            key = f"{base}~{count}"
        self.tensors[key] = tensor
        return key

    def refuse(self, obj: object, path: tuple[str, ...], why: str) -> ConfigError:
        where = ".".join(path) or "(top)"
        kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
        return ConfigError(f"state at {where}: {kind} {why}.", path=where, type=kind)


_Handler = Callable[[_Encoder, Any, "tuple[str, ...]"], "dict[str, Any]"]
_ENCODERS: dict[type, tuple[str, _Handler]] = {
    tuple: ("tuple", lambda e, o, p: {"v": e.items(o, p)}),
    torch.Size: ("size", lambda e, o, p: {"v": list(o)}),
    set: ("set", lambda e, o, p: e.unordered(o, p)),
    frozenset: ("frozenset", lambda e, o, p: e.unordered(o, p)),
    bytes: ("bytes", lambda e, o, p: {"v": _b64(o)}),
    bytearray: ("bytearray", lambda e, o, p: {"v": _b64(bytes(o))}),
    complex: ("complex", lambda e, o, p: {"v": struct.pack("<dd", o.real, o.imag).hex()}),
    range: ("range", lambda e, o, p: {"v": [e.value(n, p) for n in (o.start, o.stop, o.step)]}),
    collections.OrderedDict: ("OrderedDict", lambda e, o, p: {"v": e.pairs(o, p)}),
    collections.Counter: ("Counter", lambda e, o, p: {"v": e.pairs(o, p)}),
    collections.defaultdict: ("defaultdict", lambda e, o, p: e.defaultdict(o, p)),
    collections.deque: ("deque", lambda e, o, p: {"maxlen": o.maxlen, "v": e.items(o, p)}),
    torch.Tensor: ("tensor", lambda e, o, p: e.tensor(o, p)),
    torch.nn.Parameter: ("parameter", lambda e, o, p: e.tensor(o, p)),
    torch.dtype: ("dtype", lambda e, o, p: {"v": dtype_name(o)}),
    torch.device: ("device", lambda e, o, p: {"v": str(o)}),
}


def _decode(value: Any, tensors: Mapping[str, torch.Tensor], depth: int) -> Any:
    if depth > 2 * _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_decode(item, tensors, depth + 1) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} is not JSON")
    fields = cast("dict[str, Any]", value)
    tag = fields.get(_TAG)
    if tag is None:
        return {key: _decode(item, tensors, depth + 1) for key, item in fields.items()}
    if tag in ("tensor", "parameter"):
        return _tensor(fields, tensors)
    if tag == "np.ndarray":
        return _array(fields, tensors)
    if tag in _LEAVES:
        return _LEAVES[tag](fields["v"], fields)
    content = [_decode(item, tensors, depth + 1) for item in fields["v"]]
    return _CONTAINERS[tag](content, fields)


_LEAVES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "int": lambda v, f: int(v, 16),
    "float": lambda v, f: struct.unpack("<d", bytes.fromhex(v))[0],
    "complex": lambda v, f: complex(*struct.unpack("<dd", bytes.fromhex(v))),
    "str": lambda v, f: _unb64(v).decode("utf-8", "surrogatepass"),
    "bytes": lambda v, f: _unb64(v),
    "bytearray": lambda v, f: bytearray(_unb64(v)),
    "dtype": lambda v, f: _any_dtype(v),
    "device": lambda v, f: torch.device(v),
    "np.dtype": lambda v, f: _numpy_dtype(v),
    "np.scalar": lambda v, f: _numpy_scalar(_numpy_dtype(f["dtype"]), _unb64(v)),
}
_CONTAINERS: dict[str, Callable[[list[Any], dict[str, Any]], Any]] = {
    "tuple": lambda v, f: tuple(v),
    "size": lambda v, f: torch.Size(v),
    "set": lambda v, f: set(v),
    "frozenset": lambda v, f: frozenset(v),
    "range": lambda v, f: range(*v),
    "dict": lambda v, f: dict(v),
    "OrderedDict": lambda v, f: collections.OrderedDict(v),
    "Counter": lambda v, f: collections.Counter(dict(v)),
    "defaultdict": lambda v, f: collections.defaultdict(None if f["factory"] is None else _FACTORIES[f["factory"]], v),
    "deque": lambda v, f: collections.deque(v, f["maxlen"]),
}


def _tensor(fields: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    dtype, shape = fields["dtype"], _shape(fields)
    if "data" in fields:
        data = _unb64(fields["data"])
        if not is_known_dtype(dtype) or len(data) != math.prod(shape) * itemsize(dtype):
            raise ValueError(f"{len(data)} bytes for a tensor of {dtype} and shape {list(shape)}")
        result = torch.empty(shape, dtype=torch_dtype(dtype))
        write_bytes(result, data)
    else:
        result = tensors[fields["at"]]
        if dtype_name(result.dtype) != dtype or tuple(result.shape) != shape:
            raise ValueError(f"tensor {fields['at']}: {result.dtype} {list(result.shape)}, not {dtype} {list(shape)}")
    grad = fields.get("requires_grad") is True
    if fields[_TAG] == "parameter":
        return torch.nn.Parameter(result, requires_grad=grad)
    return result.requires_grad_() if grad else result


def _array(fields: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    import numpy as np

    dtype = _numpy_dtype(fields["dtype"])
    shape = _shape(fields)
    data = _unb64(fields["data"]) if "data" in fields else bytes(read_bytes(tensors[fields["at"]]))
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for an array of {dtype} and shape {list(shape)}")
    if dtype.itemsize == 0:  # numpy cannot read strings of length 0 from a buffer
        return np.empty(shape, dtype)
    flat: Any = np.frombuffer(data, dtype)
    return flat.reshape(shape).copy()


def _shape(fields: dict[str, Any]) -> tuple[int, ...]:
    shape = fields["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in cast("list[Any]", shape)):
        raise ValueError(f"shape {str(cast('object', shape))[:80]}")
    return tuple(cast("list[int]", shape))


def _numpy_dtype(text: Any) -> Any:
    import numpy as np

    dtype: Any = np.dtype(str(text))
    if dtype.kind not in _NUMPY_KINDS or dtype.str != text:
        raise ValueError(f"numpy dtype {text!r}")
    return dtype


def _numpy_scalar(dtype: Any, data: bytes) -> Any:
    import numpy as np

    if dtype.itemsize == 0:
        return dtype.type()
    return np.frombuffer(data, dtype, count=1)[0]


def _any_dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {name!r}")
    return dtype


def _b64(data: bytes | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
