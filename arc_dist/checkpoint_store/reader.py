"""Reads a committed step: every byte is verified before the tensor or object made of it is used."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

from arc_dist.checkpoint_store import codec
from arc_dist.checkpoint_store.backends import Backend, Source
from arc_dist.checkpoint_store.buffers import as_bytes
from arc_dist.checkpoint_store.format import (
    MAX_OBJECTS_BYTES,
    TensorSpec,
    dtype_name,
    intersect,
    new_hash,
    objects_name,
    parse_json,
    torch_dtype,
)
from arc_dist.checkpoint_store.manifest import Chunk, FileEntry, Manifest, TensorEntry
from arc_dist.checkpoint_store.retry import Retries, retrying
from arc_dist.checkpoint_store.shard import parse_header
from arc_dist.errors import ArcError, CheckpointMismatch, ConfigError, StoreCorrupt, StoreError, StoreGone

_BLOCK_BYTES = 4 << 20
_RETRIES = Retries(attempts=4)
_Result = TypeVar("_Result")
_Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a part of a tensor
_MAX_LISTED = 20  # names in an error message
_REMEDY = "Restore an older step, or this one from a copy."


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Damage found by `Checkpoint.verify`.

    Attributes:
        file: path below the store's root.
        what: what is wrong.
        tensors: names of the tensors that cannot be restored because of it.
    """

    file: str
    what: str
    tensors: tuple[str, ...] = ()


class Checkpoint:
    """A committed step, opened for reading.

    The manifest is verified already; files are verified as they are used. Collective with nobody: each rank reads by
    itself, and the caller makes all ranks agree on success before training goes on.

    Attributes:
        damage: what was found damaged or missing while reading, and taken from another copy of the step instead.
    """

    def __init__(self, backend: Backend, path: str, manifest: Manifest, *, copies: Sequence[Checkpoint] = ()) -> None:
        self.manifest = manifest
        self.path = path  # below the backend's root
        self.damage: list[Problem] = []
        self._copies = tuple(copies)
        self._backend = backend
        self._files = {file.name: file for file in manifest.files}
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}

    def with_copies(self, copies: Sequence[Checkpoint]) -> Checkpoint:
        """The same step, which falls back on equal copies of it elsewhere wherever this one cannot be read."""
        return Checkpoint(self._backend, self.path, self.manifest, copies=copies)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def world_size(self) -> int:
        return self.manifest.world_size

    @property
    def meta(self) -> dict[str, Any]:
        """What the job said about the step when it committed it."""
        return codec.decode(dict(self.manifest.meta))

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the step by name, as a spec that asks for the whole of it."""
        return {name: tensor.spec() for name, tensor in self._tensors.items()}

    def rank_specs(self, rank: int) -> list[TensorSpec]:
        """What a rank had written, as it had cut it. Tensors written once are with the rank that wrote them."""
        file_names = {f.name for f in self.manifest.files if f.kind == "tensors" and f.rank == rank}
        return [
            TensorSpec(t.name, t.dtype, chunk.shape, t.shape, chunk.offsets)
            for t in self.manifest.tensors
            for chunk in t.chunks
            if (chunk.rank == rank if chunk.directory is not None else chunk.file in file_names)
        ]

    def objects(self, rank: int) -> dict[str, Any]:
        """The objects that a rank had written, verified.

        Raises:
            StoreGone: the step has no such rank, or the file is not there.
            StoreCorrupt: its bytes differ from the manifest's digest.
        """
        entry = self._files.get(objects_name(rank))
        if entry is None:
            raise StoreGone(
                f"{self._where()}: has no rank {rank}; it was written by {self.world_size} ranks.", rank=rank
            )
        data = self._from_any_copy(lambda copy: copy._verified_bytes(entry, MAX_OBJECTS_BYTES), ())
        fields = parse_json(data, self._where(entry.name))
        objects = cast("dict[str, Any]", fields).get("objects") if isinstance(fields, dict) else None
        if not isinstance(objects, dict):
            raise StoreCorrupt(f"{self._where(entry.name)}: holds no objects of a rank. {_REMEDY}", rank=rank)
        return cast("dict[str, Any]", objects)

    def read(self, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
        """New CPU tensors with the asked parts, verified.

        Raises:
            CheckpointMismatch: names, dtypes or shapes that the step does not have; all are listed.
            StoreCorrupt: bytes differ from the manifest; file and tensor are named.
            StoreError: see `arc_dist.errors`.
        """
        self.check_specs(specs)
        with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(_num_threads()) as pool:
            files = {copy: stack.enter_context(_OpenFiles(copy)) for copy in (self, *self._copies)}
            for spec in specs:
                self._require_files(files, spec)
            results = [torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in specs]
            jobs = [
                pool.submit(self._read_box, files, spec, box, result)
                for spec, result in zip(specs, results, strict=True)
                for box in _boxes(self._tensors[spec.name])
            ]
            _finish(jobs)
        return results

    def _require_files(self, files: Mapping[Checkpoint, _OpenFiles], spec: TensorSpec) -> None:
        """Opens what `spec` needs, so that sizes are known to be true before memory is allocated for them.

        Raises:
            StoreError: a part of which no copy's file has the size and the head that the manifest says.
        """
        for box in _boxes(self._tensors[spec.name]):
            if intersect(*box, spec.offsets, spec.shape) is None:
                continue
            failures: list[StoreError] = []
            for copy, opened in files.items():
                for chunk in _boxes(copy._tensors[spec.name])[box]:
                    try:
                        retrying(lambda o=opened, c=chunk: o.of(c), _RETRIES)
                    except StoreError as error:
                        failures.append(error)
                    else:
                        break
                else:
                    continue
                break
            else:
                raise failures[0]

    def _read_box(
        self,
        files: Mapping[Checkpoint, _OpenFiles],
        spec: TensorSpec,
        box: _Box,
        result: torch.Tensor,
    ) -> None:
        """Copies what a saved part and the wanted part share into `result`, from the first place that is sound."""
        common = intersect(*box, spec.offsets, spec.shape)
        if common is None:
            return

        def read(copy: Checkpoint) -> None:
            tensor = copy._tensors[spec.name]
            chunks = _boxes(tensor)[box]  # equal in every copy, but not always in the same file
            for index, chunk in enumerate(chunks):
                try:
                    retrying(lambda c=chunk: _read_chunk(files[copy], tensor, c, spec, result, *common), _RETRIES)
                except StoreError:
                    if index == len(chunks) - 1:
                        raise
                else:
                    return

        self._from_any_copy(read, (spec.name,))

    def _from_any_copy(self, read: Callable[[Checkpoint], _Result], tensors: tuple[str, ...]) -> _Result:
        """What `read` makes of the first copy that it does not fail on; the first copy's error when all fail."""
        places = (self, *self._copies)
        failures: list[tuple[Checkpoint, StoreError]] = []
        for place in places:
            try:
                result = read(place)
            except StoreError as error:
                failures.append((place, error))
                continue
            self.damage += [
                Problem(str(error.fields.get("file", copy._where())), error.message, tensors)
                for copy, error in failures
            ]
            return result
        raise failures[0][1]

    def read_into(self, targets: Sequence[tuple[TensorSpec, torch.Tensor]]) -> None:
        """Fills existing tensors with the asked parts: all of them, or none on any error.

        Everything is read and verified aside first, which takes as much memory again as the targets until it returns.

        Args:
            targets: pairs of what is asked and where it goes (any device, any strides, of the spec's shape and dtype).

        Raises:
            CheckpointMismatch, StoreCorrupt, StoreError: as `read`.
            ConfigError: a target whose shape or dtype is not its spec's.
        """
        for spec, target in targets:
            if tuple(target.shape) != tuple(spec.shape) or dtype_name(target.dtype) != spec.dtype:
                raise ConfigError(
                    f"tensor {spec.name}: the target is {dtype_name(target.dtype)} {list(target.shape)}, its spec says "
                    f"{spec.dtype} {list(spec.shape)}. Make the specs anew after changing the model.",
                    tensor=spec.name,
                )
        staged = self.read([spec for spec, _ in targets])
        with torch.no_grad():
            for index, (_, target) in enumerate(targets):
                target.copy_(staged[index])
                staged[index] = target  # lets go of the staged copy

    def check_specs(self, specs: Iterable[TensorSpec], *, all_names: bool = False) -> None:
        """Compares what is wanted with what the step has, touching no file.

        Args:
            specs: what the model wants.
            all_names: also refuse tensors of the step that nobody asked for.

        Raises:
            CheckpointMismatch: with every difference.
        """
        differences: list[str] = []
        wanted: set[str] = set()
        for spec in specs:
            spec.check()
            wanted.add(spec.name)
            saved = self._tensors.get(spec.name)
            if saved is None:
                differences.append(f"{spec.name}: not in the checkpoint")
            elif saved.dtype != spec.dtype or saved.shape != tuple(spec.global_shape):
                differences.append(
                    f"{spec.name}: {saved.dtype} {list(saved.shape)} in the checkpoint, "
                    f"{spec.dtype} {list(spec.global_shape)} in the model"
                )
        if all_names:
            differences += [f"{name}: not in the model" for name in self._tensors if name not in wanted]
        if differences:
            more = len(differences) - _MAX_LISTED
            listed = "\n  ".join(differences[:_MAX_LISTED]) + (f"\n  and {more} more" if more > 0 else "")
            raise CheckpointMismatch(
                f"{self._where()}: it is a checkpoint of another model; {len(differences)} tensors differ:\n  {listed}"
                "\nBuild the model that was saved, or name another run for the new one.",
                differences=differences,
            )

    def verify(self, progress: Callable[[int], None] | None = None) -> list[Problem]:
        """Reads every byte of every file, and those of other steps that this one refers to; compares with the manifest.

        Args:
            progress: called with the number of bytes done since the last call, from several threads.

        Returns:
            All damage; empty when the step is whole.
        """
        with concurrent.futures.ThreadPoolExecutor(_num_threads()) as pool:
            jobs = [pool.submit(self._verify_file, entry, progress) for entry in self.manifest.files]
            jobs += [pool.submit(self._verify_referred, directory, progress) for directory in self.manifest.refers_to]
            problems = [problem for job in jobs for problem in job.result()]
        strangers = sorted(
            entry.name
            for entry in self._backend.list(self.path)
            if entry.name.endswith(".safetensors") and entry.name not in self._files
        )
        return problems + [
            Problem(f"{self.path}/{name}", "not in the manifest, but stock readers would read it: remove it")
            for name in strangers
        ]

    def _verify_file(self, entry: FileEntry, progress: Callable[[int], None] | None) -> list[Problem]:
        path = f"{self.path}/{entry.name}"
        inside = [(t, c) for t in self.manifest.tensors for c in t.chunks if _is_in(c, entry.name)]
        all_names = tuple(sorted({t.name for t, _ in inside}))
        problems: list[Problem] = []
        try:
            with _OpenFiles(self) as files:
                source, header = files.get(entry.name)
                _advance(progress, len(header))
                if entry.kind == "tensors":
                    self._compare_header(entry, header)
                damaged: list[str] = []
                for tensor, chunk in sorted(inside, key=lambda item: item[1].start):
                    if digest_range(source, chunk.start, chunk.nbytes, self.manifest.hash) != chunk.digest:
                        damaged.append(tensor.name)
                    _advance(progress, chunk.nbytes)
                if damaged:
                    problems.append(Problem(path, "bytes differ from the manifest", tuple(sorted(set(damaged)))))
        except StoreError as error:
            problems.append(Problem(path, error.message, all_names))
        return problems

    def _verify_referred(self, directory: str, progress: Callable[[int], None] | None) -> list[Problem]:
        """What another step holds for this one; whether that step is whole otherwise is not this one's concern."""
        problems: list[Problem] = []
        with _OpenFiles(self) as files:
            for tensor in self.manifest.tensors:
                for chunk in tensor.chunks:
                    if chunk.directory != directory:
                        continue
                    path = f"{self._beside(directory)}/{chunk.file}"
                    try:
                        source, _ = files.of(chunk)
                        if digest_range(source, chunk.start, chunk.nbytes, self.manifest.hash) != chunk.digest:
                            problems.append(Problem(path, "bytes differ from the manifest", (tensor.name,)))
                    except StoreError as error:
                        problems.append(Problem(path, error.message, (tensor.name,)))
                    _advance(progress, chunk.nbytes)
        return problems

    def _compare_header(self, entry: FileEntry, header: bytes) -> None:
        """Whether a reader that trusts the header sees the tensors that the manifest names."""
        said = {
            (s.name, s.dtype, s.shape, s.offsets, start) for s, start in parse_header(header, entry.nbytes, entry.name)
        }
        meant = {
            (t.name, t.dtype, c.shape, c.offsets, c.start)
            for t in self.manifest.tensors
            for c in t.chunks
            if _is_in(c, entry.name)
        }
        if said != meant:
            raise StoreCorrupt(f"{self._where(entry.name)}: its header and the manifest differ. {_REMEDY}")

    def _verified_bytes(self, entry: FileEntry, max_bytes: int) -> bytes:
        if entry.nbytes > max_bytes:
            raise StoreCorrupt(f"{self._where(entry.name)}: {entry.nbytes} bytes, more than {max_bytes}. {_REMEDY}")
        with _OpenFiles(self) as files:
            return files.get(entry.name)[1]

    def _where(self, name: str = "") -> str:
        return "/".join(part for part in (self._backend.url.rstrip("/"), self.path, name) if part)

    def open_file(self, name: str) -> tuple[Source, bytes]:
        """Opens a file after checking its size and its verified head: the header of tensors, else the whole of it.

        Raises:
            StoreGone, StoreCorrupt: it is missing, or not what the manifest says.
        """
        entry = self._files[name]
        source = self._backend.open(f"{self.path}/{name}")
        try:
            where = self._where(name)
            if source.nbytes != entry.nbytes:
                raise StoreCorrupt(
                    f"{where}: {source.nbytes} bytes, its manifest says {entry.nbytes}. {_REMEDY}", file=where
                )
            head = bytearray(entry.header_nbytes if entry.kind == "tensors" else entry.nbytes)
            source.read_into(0, memoryview(head))
            hasher = new_hash(self.manifest.hash)
            hasher.update(head)
            if hasher.hexdigest() != entry.digest:
                raise StoreCorrupt(f"{where}: its bytes differ from the manifest's digest. {_REMEDY}", file=where)
            return source, bytes(head)
        except BaseException:
            source.close()
            raise

    def open_referred(self, chunk: Chunk) -> tuple[Source, bytes]:
        """Opens the file of another step that has a chunk of this one; the chunk's digest is what vouches for it.

        Raises:
            StoreGone, StoreCorrupt: it is missing, or too short.
        """
        path = f"{self._beside(chunk.directory or '')}/{chunk.file}"
        source = self._backend.open(path)
        if source.nbytes < chunk.start + chunk.nbytes:
            nbytes = source.nbytes
            source.close()
            where = f"{self._backend.url.rstrip('/')}/{path}"
            raise StoreCorrupt(f"{where}: {nbytes} bytes, step {self.step} needs more of it. {_REMEDY}", file=where)
        return source, b""

    def _beside(self, directory: str) -> str:
        """The path of another directory of the same run."""
        return "/".join([*self.path.split("/")[:-1], directory])

    def corrupt(self, tensor: str, chunk: Chunk) -> StoreCorrupt:
        """The error of a tensor whose bytes differ."""
        where = self._where(chunk.file)
        if chunk.directory is not None:
            where = f"{self._backend.url.rstrip('/')}/{self._beside(chunk.directory)}/{chunk.file}"
        return StoreCorrupt(
            f"{where}: the bytes of tensor {tensor} differ from the manifest's digest. {_REMEDY}",
            file=where,
            tensor=tensor,
        )


class _OpenFiles:
    """The files of a step, each opened and checked once, whichever thread asks first."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._lock = threading.Lock()
        self._open: dict[tuple[str | None, str], tuple[Source, bytes] | ArcError] = {}

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        for opened in self._open.values():
            if not isinstance(opened, ArcError):
                opened[0].close()

    def get(self, name: str) -> tuple[Source, bytes]:
        return self._get((None, name), lambda: self.checkpoint.open_file(name))

    def of(self, chunk: Chunk) -> tuple[Source, bytes]:
        """The file that has a chunk, of whichever step."""
        if chunk.directory is None:
            return self.get(chunk.file)
        return self._get((chunk.directory, chunk.file), lambda: self.checkpoint.open_referred(chunk))

    def _get(self, key: tuple[str | None, str], open_it: Callable[[], tuple[Source, bytes]]) -> tuple[Source, bytes]:
        with self._lock:
            opened = self._open.get(key)
            if opened is None:
                try:
                    opened = open_it()
                except ArcError as error:
                    if error.retryable:
                        raise
                    opened = error
                self._open[key] = opened
        if isinstance(opened, ArcError):
            raise opened
        return opened


def _is_in(chunk: Chunk, file: str) -> bool:
    """Whether a chunk lies in a file of the step's own directory."""
    return chunk.directory is None and chunk.file == file


def _boxes(tensor: TensorEntry) -> Mapping[_Box, list[Chunk]]:
    """The distinct parts of a tensor, each with its copies."""
    boxes: dict[_Box, list[Chunk]] = {}
    for chunk in tensor.chunks:
        boxes.setdefault((chunk.offsets, chunk.shape), []).append(chunk)
    return boxes


def _read_chunk(
    files: _OpenFiles,
    tensor: TensorEntry,
    chunk: Chunk,
    spec: TensorSpec,
    result: torch.Tensor,
    low: tuple[int, ...],
    sizes: tuple[int, ...],
) -> None:
    source, _ = files.of(chunk)
    target = _part(result, low, sizes, spec.offsets)
    # A part is verified as a whole even when a slice of it is wanted: its digest covers all of it.
    direct = sizes == chunk.shape and target.is_contiguous()
    buffer = target if direct else torch.empty(chunk.shape, dtype=result.dtype)
    digest = digest_range(source, chunk.start, chunk.nbytes, files.checkpoint.manifest.hash, as_bytes(buffer))
    if digest != chunk.digest:
        raise files.checkpoint.corrupt(tensor.name, chunk)
    if not direct:
        target.copy_(_part(buffer, low, sizes, chunk.offsets))


def _part(tensor: torch.Tensor, low: tuple[int, ...], sizes: tuple[int, ...], origin: tuple[int, ...]) -> torch.Tensor:
    """The box at `low` of a tensor whose first element lies at `origin`."""
    for dim, (begin, size) in enumerate(zip(low, sizes, strict=True)):
        tensor = tensor.narrow(dim, begin - origin[dim], size)
    return tensor


def digest_range(source: Source, start: int, nbytes: int, algorithm: str, buffer: memoryview | None = None) -> str:
    """Digest of a range of a file, read block by block (into `buffer`, if given) so that it is hashed while cached."""
    hasher = new_hash(algorithm)
    scratch = memoryview(bytearray(min(nbytes, _BLOCK_BYTES))) if buffer is None else None
    for begin in range(0, nbytes, _BLOCK_BYTES):
        size = min(_BLOCK_BYTES, nbytes - begin)
        block = buffer[begin : begin + size] if buffer is not None else cast("memoryview", scratch)[:size]
        source.read_into(start + begin, block)
        hasher.update(block)
    return hasher.hexdigest()


def _finish(jobs: Iterable[concurrent.futures.Future[None]]) -> None:
    """Waits for all jobs; raises the first error once nothing runs any more."""
    errors = [error for job in list(jobs) if (error := job.exception()) is not None]
    if errors:
        raise errors[0]


def _advance(progress: Callable[[int], None] | None, nbytes: int) -> None:
    if progress is not None:
        progress(nbytes)


def _num_threads() -> int:
    return max(2, min(8, len(os.sched_getaffinity(0))))
