"""Writes one rank's part of a step: its tensors and its objects, hashed on the way out.

The buffers are read once and never copied whole: a block is written while another thread hashes it, so the file costs
about as much as a plain write. Nothing written here is a checkpoint yet; only the manifest makes it one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from arc_dist.checkpoint_store.backends import Backend, Sink
from arc_dist.checkpoint_store.buffers import as_bytes, plain
from arc_dist.checkpoint_store.format import (
    FAST_HASH,
    FORMAT_VERSION,
    MAX_OBJECTS_BYTES,
    PLAIN_VERSION,
    STRONG_HASH,
    ShardTensor,
    TensorSpec,
    assign_writers,
    digest_of,
    dtype_name,
    is_written_once,
    new_hash,
    objects_name,
    replicated_digest,
    shard_name,
    torch_dtype,
)
from arc_dist.checkpoint_store.pace import Pace
from arc_dist.checkpoint_store.references import Place, Unchanged
from arc_dist.checkpoint_store.shard import build_header, file_order_key
from arc_dist.checkpoint_store.threads import DaemonExecutor
from arc_dist.errors import ConfigError, StoreError

_BLOCK_BYTES = 4 << 20  # between two looks at should_abort; small enough to stay in the cache for the hash

_SMALL_BYTES = 64 << 10  # below this, handing a block to the other thread costs more than hashing it


class SaveAborted(StoreError):
    """The save was given up on request; what it had written is removed."""


def select(tensors: Sequence[ShardTensor], rank: int, world_size: int) -> list[ShardTensor]:
    """What this rank writes: its shards that hold anything, and its share of what is written once.

    Raises:
        ConfigError: a spec that contradicts itself or its tensor.
    """
    writers = assign_writers((t.spec for t in tensors), world_size)
    chosen: list[ShardTensor] = []
    names: set[str] = set()
    for tensor in tensors:
        spec = tensor.spec
        spec.check()
        if spec.name in names:
            raise ConfigError(f"tensor {spec.name} appears twice in the state of one rank. Give each its own name.")
        names.add(spec.name)
        if tuple(tensor.data.shape) != tuple(spec.shape) or not _has_dtype(tensor):
            raise ConfigError(
                f"tensor {spec.name}: its data is {dtype_name(tensor.data.dtype)} {list(tensor.data.shape)}, its spec "
                f"says {spec.dtype} {list(spec.shape)}. Make the specs anew after changing the state.",
                tensor=spec.name,
            )
        # An empty shard (uneven sharding) is left out: it holds no byte, and readers see the whole from the others.
        mine = writers[spec.name] == rank if is_written_once(spec) else math.prod(spec.shape) > 0
        if mine:
            chosen.append(tensor)
    return chosen


def _has_dtype(tensor: ShardTensor) -> bool:
    if not tensor.widens:
        return dtype_name(tensor.data.dtype) == tensor.spec.dtype
    wanted = torch_dtype(tensor.spec.dtype)
    return torch.promote_types(tensor.data.dtype, wanted) == wanted


def write_rank(
    backend: Backend,
    directory: str,
    *,
    step: int,
    generation: int,
    owner: str,
    rank: int,
    world_size: int,
    tensors: Sequence[ShardTensor],
    objects: Mapping[str, Any],
    should_abort: Callable[[], bool] | None,
    pace: Pace | None = None,
    unchanged: Unchanged | None = None,
    places: Mapping[Any, Place] | None = None,
) -> dict[str, Any]:
    """Writes the rank's two files into a claimed directory; returns the rank's part of the manifest (JSON-able).

    With `unchanged`, tensors whose bytes lie at one of `places` are referred to and not written.

    Raises:
        SaveAborted: `should_abort` said so.
        Fenced: another process has written this rank's files in this attempt.
        StoreError: see `arc_dist.errors`; nothing of the part is left behind.
        ConfigError: the state cannot be stored.
    """
    selected = sorted(select(tensors, rank, world_size), key=lambda t: file_order_key(t.spec))
    known = places or {}
    algorithm = FAST_HASH if unchanged is None else STRONG_HASH  # what is referred to later must have the strong one
    found = unchanged.find(selected, known, lambda: _check_abort(should_abort)) if unchanged is not None else {}
    mine = [t for t in selected if t.spec.name not in found]
    specs = [t.spec for t in mine]
    header = build_header(specs)
    objects_bytes = _objects_bytes(step, rank, objects)
    published: list[str] = []
    pace = Pace(None) if pace is None else pace

    def before_block(nbytes: int) -> None:
        pace.spend(nbytes, lambda: _check_abort(should_abort))

    try:
        digests = _write_shard(backend, f"{directory}/{shard_name(rank)}", header, mine, algorithm, before_block)
        published.append(shard_name(rank))
        _write_whole(backend, f"{directory}/{objects_name(rank)}", objects_bytes)
        published.append(objects_name(rank))
        _check_abort(should_abort)
    except BaseException:
        for name in published:
            with contextlib.suppress(StoreError):  # the error that led here is the one to tell
                backend.remove(f"{directory}/{name}")
        raise
    rows: list[dict[str, Any]] = []
    start = len(header)
    for spec, digest in zip(specs, digests, strict=True):
        rows.append(_tensor_row(spec, shard_name(rank), start, digest))
        start += spec.nbytes
    for spec in (t.spec for t in selected if t.spec.name in found):
        place = found[spec.name]
        row = _tensor_row(spec, place.file, place.start, place.digest)
        rows.append({**row, "directory": place.directory, "rank": rank})
    if unchanged is not None:
        unchanged.learn(specs, digests, known)
        unchanged.wrote(directory.rsplit("/", 1)[-1], rows)
    return {
        "version": FORMAT_VERSION,
        "step": step,
        "generation": generation,
        "owner": owner,
        "rank": rank,
        "world_size": world_size,
        "directory": directory.rsplit("/", 1)[-1],
        "hash": algorithm,
        "host": socket.gethostname(),
        "replicated": replicated_digest(t.spec for t in tensors),
        "files": [
            _file_row(shard_name(rank), "tensors", rank, start, digest_of(header, algorithm), len(header)),
            _file_row(objects_name(rank), "objects", rank, len(objects_bytes), digest_of(objects_bytes, algorithm), 0),
        ],
        "tensors": rows,
    }


def _tensor_row(spec: TensorSpec, file: str, start: int, digest: str) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "global_shape": list(spec.global_shape),
        "offsets": list(spec.offsets),
        "shape": list(spec.shape),
        "file": file,
        "start": start,
        "nbytes": spec.nbytes,
        "digest": digest,
    }


def _file_row(name: str, kind: str, rank: int, nbytes: int, digest: str, header: int) -> dict[str, Any]:
    return {"name": name, "kind": kind, "rank": rank, "nbytes": nbytes, "digest": digest, "header_nbytes": header}


def _objects_bytes(step: int, rank: int, objects: Mapping[str, Any]) -> bytes:
    content = {"version": PLAIN_VERSION, "step": step, "rank": rank, "objects": dict(objects)}
    try:
        data = (json.dumps(content, allow_nan=False, indent=1) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"rank {rank}: the objects of step {step} are not JSON: {str(error)[:200]}. Encode them with "
            "checkpoint_store.codec.encode."
        ) from error
    if len(data) > MAX_OBJECTS_BYTES:
        raise ConfigError(
            f"rank {rank}: the objects of step {step} make {len(data)} bytes, more than {MAX_OBJECTS_BYTES}. Store "
            "large data as tensors."
        )
    return data


def _write_shard(
    backend: Backend,
    path: str,
    header: bytes,
    tensors: Sequence[ShardTensor],
    algorithm: str,
    before_block: Callable[[int], None],
) -> list[str]:
    nbytes = len(header) + sum(t.spec.nbytes for t in tensors)
    before_block(len(header))
    sink = backend.create(path, nbytes, exclusive=True)
    digests: list[str] = []
    try:
        sink.write(memoryview(header))
        with DaemonExecutor(1, name="arc-hash") as pool:
            for tensor in tensors:
                digests.append(_stream(sink, pool, tensor, algorithm, before_block))
        sink.publish()
    except BaseException:
        sink.discard()
        raise
    return digests


def _stream(
    sink: Sink,
    pool: concurrent.futures.Executor,
    tensor: ShardTensor,
    algorithm: str,
    before_block: Callable[[int], None],
) -> str:
    """Writes one tensor's bytes while `pool` hashes them; returns the digest."""
    data = plain(tensor.values())  # the tensor itself in the usual case; kept alive while its memory is viewed
    view = as_bytes(data)
    hasher = new_hash(algorithm)
    if len(view) <= _SMALL_BYTES:
        before_block(len(view))
        hasher.update(view)
        sink.write(view)
        return hasher.hexdigest()
    for begin in range(0, len(view), _BLOCK_BYTES):
        block = view[begin : begin + _BLOCK_BYTES]
        before_block(len(block))
        hashing = pool.submit(hasher.update, block)
        try:
            sink.write(block)
        finally:
            hashing.result()
    return hasher.hexdigest()


def _write_whole(backend: Backend, path: str, data: bytes) -> None:
    sink = backend.create(path, len(data), exclusive=True)
    try:
        sink.write(memoryview(data))
        sink.publish()
    except BaseException:
        sink.discard()
        raise


def _check_abort(should_abort: Callable[[], bool] | None) -> None:
    if should_abort is not None and should_abort():
        raise SaveAborted("the save was aborted on request; its files are removed. The next save goes on as usual.")
