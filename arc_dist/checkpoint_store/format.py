"""What a checkpoint is made of: tensor specs, dtypes, names of directories and files, who writes what.

Nothing here touches storage. FORMAT.md beside this file is the specification.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import importlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from arc_dist.errors import CheckpointMismatch, ConfigError, StoreCorrupt

FORMAT_NAME = "arc-dist-checkpoint"
FORMAT_VERSION = 2  # the newest that is read; a manifest says 2 only when it needs what 1 had no word for
PLAIN_VERSION = 1
MANIFEST_NAME = "manifest.json"
ATTEMPT_NAME = "attempt.json"
# Digests find accidents, not forgery (FORMAT.md). For that, 128 bits that no accident meets twice are enough. The fast
# hash is about four times as fast as the strong one, which resists collisions as SHA-256 does at two to three times its
# speed (benchmarks/bench_hash.py). In references equal digests stand for equal bytes: only the strong one will do.
FAST_HASH = "xxh3_128"
STRONG_HASH = "blake3"

# A limit on everything that is read before it is verified.
MAX_MANIFEST_BYTES = 256 << 20
MAX_OBJECTS_BYTES = 256 << 20
MAX_ATTEMPT_BYTES = 64 << 10
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DIMS = 64
_MAX_COMPARISONS = 4_000_000  # of parts of one tensor; a 1,000 x 1,000 mesh needs a quarter of it

_STEP_DIRECTORY = re.compile(r"step-([0-9]{8,15})(?:\.g([0-9]{1,9})(?:-([0-9a-f]{8}))?)?")
_FILE_NAME = re.compile(r"(?:rank-[0-9]{5,9}\.(?:safetensors|json)|attempt\.json)")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# torch's name of a dtype -> (the safetensors name, bytes per element)
_DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "complex64": ("C64", 8),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


class Hasher(Protocol):
    """The part of a hashlib object that is used."""

    def update(self, data: Any, /) -> object: ...

    def hexdigest(self) -> str: ...


def _of_package(package: str, name: str) -> Hasher:
    try:
        return getattr(importlib.import_module(package), name)()
    except ImportError as error:
        raise ConfigError(
            f"the checkpoint's hash is {name}, and the package with it is missing: pip install {package}"
        ) from error


_HASHES: dict[str, Callable[[], Hasher]] = {
    "xxh3_128": lambda: _of_package("xxhash", "xxh3_128"),
    "blake3": lambda: _of_package("blake3", "blake3"),
    "sha256": hashlib.sha256,
    "blake2b": hashlib.blake2b,
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One rank's part of one tensor of the state.

    Attributes:
        name: the full name, unique in the state: ``model.<fqn>``, ``optimizer.state.<fqn>.<field>``.
        dtype: torch's name of it without the prefix: ``"bfloat16"`` (see `dtype_name`).
        shape: of the part that this rank holds.
        global_shape: of the whole tensor.
        offsets: where the part lies in the whole, one number per dimension.
        replicated: every rank holds the whole tensor with equal bytes, so one of them writes it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    replicated: bool = False

    @staticmethod
    def whole(name: str, tensor: torch.Tensor, *, replicated: bool = True) -> TensorSpec:
        """The spec of a tensor that is not sharded."""
        shape = tuple(tensor.shape)
        return TensorSpec(name, dtype_name(tensor.dtype), shape, shape, (0,) * len(shape), replicated)

    @property
    def nbytes(self) -> int:
        """Bytes of the local part."""
        return math.prod(self.shape) * itemsize(self.dtype)

    def check(self) -> None:
        """Raises ConfigError when the spec contradicts itself or cannot be stored."""
        safetensors_dtype(self.dtype, self.name)
        if not self.name or self.name == "__metadata__" or not _is_utf8(self.name):
            raise ConfigError(f"{self.name!r} cannot be the name of a tensor in a checkpoint. Rename it.")
        if not len(self.shape) == len(self.global_shape) == len(self.offsets):
            raise ConfigError(f"tensor {self.name}: shape, global_shape and offsets differ in length: {self}")
        if not all(o >= 0 and s >= 0 and o + s <= g for o, s, g in _zip3(self.offsets, self.shape, self.global_shape)):
            raise ConfigError(f"tensor {self.name}: the part does not lie inside the whole tensor: {self}")
        if self.replicated and self.shape != self.global_shape:
            raise ConfigError(f"tensor {self.name}: a replicated tensor must be whole on every rank: {self}")


@dataclasses.dataclass(frozen=True, slots=True)
class ShardTensor:
    """A spec with its bytes. `data` is on the CPU and may be a view of shared memory; it is only read.

    With `widens`, `data` has a narrower dtype than the spec, which holds all its values; it is converted while it is
    written, one tensor at a time.
    """

    spec: TensorSpec
    data: torch.Tensor
    widens: bool = False

    def values(self) -> torch.Tensor:
        """The data in the spec's dtype."""
        return self.data.to(torch_dtype(self.spec.dtype)) if self.widens else self.data


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def known_dtypes() -> tuple[str, ...]:
    """The names of all dtypes that a checkpoint can hold."""
    return tuple(_DTYPES)


def torch_dtype(name: str) -> torch.dtype:
    """The inverse of `dtype_name`, for the dtypes that a checkpoint can hold."""
    safetensors_dtype(name)
    return getattr(torch, name)


def itemsize(dtype: str) -> int:
    """Bytes per element."""
    safetensors_dtype(dtype)
    return _DTYPES[dtype][1]


def is_known_dtype(name: object) -> bool:
    """Whether a checkpoint can hold tensors of this dtype name."""
    return isinstance(name, str) and name in _DTYPES


def safetensors_dtype(dtype: str, tensor_name: str = "") -> str:
    """The safetensors name of a dtype; ConfigError when it has none."""
    entry = _DTYPES.get(dtype)
    if entry is None:
        of = f"tensor {tensor_name}: " if tensor_name else ""
        raise ConfigError(
            f"{of}dtype {dtype} has no place in a safetensors file. Convert the tensor, or keep it out of the state. "
            f"Possible: {', '.join(sorted(_DTYPES))}.",
            tensor=tensor_name,
            dtype=dtype,
        )
    return entry[0]


def new_hash(name: str) -> Hasher:
    """A fresh hash object of the algorithm that a manifest names."""
    maker = _HASHES.get(name)
    if maker is None:
        raise CheckpointMismatch(
            f"the checkpoint uses the hash {name!r}, which this version does not know. Upgrade arc-dist.", hash=name
        )
    return maker()


def digest_of(data: bytes | memoryview, algorithm: str = "sha256") -> str:
    """Hex digest of one piece of bytes; SHA-256 where no manifest names another algorithm."""
    hasher = new_hash(algorithm)
    hasher.update(data)
    return hasher.hexdigest()


def step_directory(step: int, *, generation: int | None = None, owner: str | None = None) -> str:
    """``step-00001200``; for another attempt at the same step ``step-00001200.g3``, ``step-00001200.g3-<hash>``."""
    name = f"step-{step:08d}"
    if generation is not None:
        name += f".g{generation}"
        if owner is not None:
            name += f"-{hashlib.sha256(owner.encode()).hexdigest()[:8]}"
    return name


def step_of_directory(name: str) -> int | None:
    """The step in a directory's name; None when it is not the name of a step directory."""
    match = _STEP_DIRECTORY.fullmatch(name)
    return int(match.group(1)) if match else None


def shard_name(rank: int) -> str:
    """The file that holds a rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def objects_name(rank: int) -> str:
    """The file that holds a rank's objects."""
    return f"rank-{rank:05d}.json"


def is_file_name(name: object) -> bool:
    """Whether a manifest may name this file. The pattern leaves no room for a path separator or a dot-dot."""
    return isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None


def check_run_name(run: str) -> str:
    """Returns `run`; ConfigError when it is not usable as the name of one directory."""
    if not _RUN_NAME.fullmatch(run) or step_of_directory(run) is not None:
        raise ConfigError(
            f"run={run!r} cannot be the name of a run: use letters, digits, '.', '_' and '-', and begin with a letter "
            "or a digit.",
            run=run,
        )
    return run


def parse_json(data: bytes, what: str) -> Any:
    """Strict JSON: UTF-8, no repeated key, bounded depth.

    Raises:
        StoreCorrupt: it is not that; the message begins with `what`.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise StoreCorrupt(f"{what}: not valid JSON ({type(error).__name__}: {str(error)[:200]})") from error


def assign_writers(specs: Iterable[TensorSpec], world_size: int) -> dict[str, int]:
    """Chooses for each replicated tensor the rank that writes it, so that all ranks write about as many bytes.

    Pure and deterministic: every rank gets the same answer from equal specs, in any order, without a message.
    Tensors without elements belong to nobody's shard, so they count as replicated.
    """
    loads = [(0, rank) for rank in range(world_size)]
    writers: dict[str, int] = {}
    for spec in sorted(filter(is_written_once, specs), key=lambda s: (-s.nbytes, s.name)):
        load, rank = heapq.heappop(loads)
        writers[spec.name] = rank
        # The constant spreads many small tensors too; a file's cost is not its bytes alone.
        heapq.heappush(loads, (load + spec.nbytes + 64, rank))
    return writers


def is_written_once(spec: TensorSpec) -> bool:
    """Whether one chosen rank writes the tensor for all."""
    return spec.replicated or math.prod(spec.global_shape) == 0


def replicated_digest(specs: Iterable[TensorSpec]) -> str:
    """Digest of what a rank believes to be written once. Ranks that differ would leave tensors unwritten."""
    rows = sorted((s.name, s.dtype, s.global_shape) for s in specs if is_written_once(s))
    return digest_of(json.dumps(rows).encode())


def uncovered(shape: Sequence[int], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> str | None:
    """Checks that boxes (offsets, sizes) tile a tensor of `shape` exactly; returns what is wrong, or None.

    Boxes inside `shape` that do not overlap and whose volumes add up to its volume leave no hole.
    """
    volume = sum(math.prod(size) for _, size in boxes)
    if volume != math.prod(shape):
        return f"its parts hold {volume} of {math.prod(shape)} elements"
    if not shape:
        return None if len(boxes) == 1 else f"{len(boxes)} parts of a single number"
    # Sorted along the dimension that is cut most often, a part is compared only with those that begin before it ends.
    cut = max(range(len(shape)), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}))
    ordered = sorted((box for box in boxes if math.prod(box[1])), key=lambda box: box[0][cut])
    comparisons = 0
    for index, (offsets, sizes) in enumerate(ordered):
        for other_offsets, other_sizes in itertools.islice(ordered, index + 1, None):
            if other_offsets[cut] >= offsets[cut] + sizes[cut]:
                break
            comparisons += 1
            if comparisons > _MAX_COMPARISONS:
                return f"its {len(boxes)} parts are cut so that they cannot be checked in bounded time"
            if intersect(offsets, sizes, other_offsets, other_sizes) is not None:
                return f"parts at {list(offsets)} and {list(other_offsets)} overlap"
    return None


def intersect(
    a_offsets: Sequence[int], a_sizes: Sequence[int], b_offsets: Sequence[int], b_sizes: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The common box of two boxes as (offsets, sizes); None when they share no element."""
    low = tuple(max(a, b) for a, b in zip(a_offsets, b_offsets, strict=True))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(a_offsets, a_sizes, b_offsets, b_sizes, strict=True))
    sizes = tuple(h - i for i, h in zip(low, high, strict=True))
    return None if any(size <= 0 for size in sizes) else (low, sizes)


def _zip3(a: Sequence[int], b: Sequence[int], c: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    return zip(a, b, c, strict=True)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result
