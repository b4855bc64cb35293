"""Reads a committed step: every byte is verified before the tensor or object made of it is used."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

from arc_dist.checkpoint_store import codec, verification
from arc_dist.checkpoint_store.backends import Backend
from arc_dist.checkpoint_store.buffers import as_bytes
from arc_dist.checkpoint_store.format import (
    MAX_OBJECTS_BYTES,
    TensorSpec,
    dtype_name,
    intersect,
    objects_name,
    parse_json,
    torch_dtype,
)
from arc_dist.checkpoint_store.manifest import Chunk, FileEntry, Manifest, TensorEntry
from arc_dist.checkpoint_store.opened import REMEDY, Directory, OpenFiles, digest_range
from arc_dist.checkpoint_store.retry import Retries, retrying
from arc_dist.checkpoint_store.threads import DaemonExecutor
from arc_dist.checkpoint_store.verification import Problem
from arc_dist.errors import CheckpointMismatch, ConfigError, StoreCorrupt, StoreError, StoreGone

_RETRIES = Retries(attempts=4)
_Result = TypeVar("_Result")
_Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a part of a tensor
_MAX_LISTED = 20  # names in an error message


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
        self._directory = Directory(backend, path, manifest)
        self._files = {file.name: file for file in manifest.files}
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}

    def with_copies(self, copies: Sequence[Checkpoint]) -> Checkpoint:
        """The same step, which falls back on equal copies of it elsewhere wherever this one cannot be read."""
        return Checkpoint(self._directory.backend, self.path, self.manifest, copies=copies)

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
                f"{self._directory.where()}: has no rank {rank}; it was written by {self.world_size} ranks.", rank=rank
            )
        data = self._from_any_copy(lambda copy: copy._verified_bytes(entry, MAX_OBJECTS_BYTES), ())
        fields = parse_json(data, self._directory.where(entry.name))
        objects = cast("dict[str, Any]", fields).get("objects") if isinstance(fields, dict) else None
        if not isinstance(objects, dict):
            raise StoreCorrupt(f"{self._directory.where(entry.name)}: holds no objects of a rank. {REMEDY}", rank=rank)
        return cast("dict[str, Any]", objects)

    def read(self, specs: Sequence[TensorSpec], *, progress: Callable[[int], None] | None = None) -> list[torch.Tensor]:
        """New CPU tensors with the asked parts, verified.

        Args:
            specs: what is asked; none of it may be missing.
            progress: called with the number of wanted bytes read since the last call, from several threads.

        Raises:
            CheckpointMismatch: names, dtypes or shapes that the step does not have; all are listed.
            StoreCorrupt: bytes differ from the manifest; file and tensor are named.
            StoreError: see `arc_dist.errors`.
        """
        self.check_specs(specs)
        with contextlib.ExitStack() as stack:
            files = {copy: stack.enter_context(OpenFiles(copy._directory)) for copy in (self, *self._copies)}
            for spec in specs:
                self._require_files(files, spec)
            num_threads = max(opened.num_streams() for opened in files.values())
            pool = stack.enter_context(DaemonExecutor(num_threads))
            results = [torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in specs]
            jobs = [
                pool.submit(self._read_box, files, spec, box, result, progress)
                for spec, result in zip(specs, results, strict=True)
                for box in _boxes(self._tensors[spec.name])
            ]
            _finish(jobs)
        return results

    def _require_files(self, files: Mapping[Checkpoint, OpenFiles], spec: TensorSpec) -> None:
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
        files: Mapping[Checkpoint, OpenFiles],
        spec: TensorSpec,
        box: _Box,
        result: torch.Tensor,
        progress: Callable[[int], None] | None,
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
        if progress is not None:
            progress(math.prod(common[1]) * result.element_size())

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
                Problem(str(error.fields.get("file", copy._directory.where())), error.message, tensors)
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
                f"{self._directory.where()}: it is a checkpoint of another model; {len(differences)} tensors differ:"
                f"\n  {listed}\nBuild the model that was saved, or name another run for the new one.",
                differences=differences,
            )

    def verify(self, progress: Callable[[int], None] | None = None) -> list[Problem]:
        """Reads every byte of every file, and those of other steps that this one refers to; compares with the manifest.

        Args:
            progress: called with the number of bytes done since the last call, from several threads.

        Returns:
            All damage; empty when the step is whole.

        Raises:
            StoreDenied, StoreGone, StoreTransient: the storage refuses, is lost or does not answer; nothing is known.
        """
        return verification.verify(self._directory, progress)

    def _verified_bytes(self, entry: FileEntry, max_bytes: int) -> bytes:
        if entry.nbytes > max_bytes:
            raise StoreCorrupt(
                f"{self._directory.where(entry.name)}: {entry.nbytes} bytes, more than {max_bytes}. {REMEDY}"
            )
        with OpenFiles(self._directory) as files:
            return files.get(entry.name)[1]


def _boxes(tensor: TensorEntry) -> Mapping[_Box, list[Chunk]]:
    """The distinct parts of a tensor, each with its copies."""
    boxes: dict[_Box, list[Chunk]] = {}
    for chunk in tensor.chunks:
        boxes.setdefault((chunk.offsets, chunk.shape), []).append(chunk)
    return boxes


def _read_chunk(
    files: OpenFiles,
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
    digest = digest_range(source, chunk.start, chunk.nbytes, files.directory.manifest.hash, as_bytes(buffer))
    if digest != chunk.digest:
        raise files.directory.corrupt(tensor.name, chunk)
    if not direct:
        target.copy_(_part(buffer, low, sizes, chunk.offsets))


def _part(tensor: torch.Tensor, low: tuple[int, ...], sizes: tuple[int, ...], origin: tuple[int, ...]) -> torch.Tensor:
    """The box at `low` of a tensor whose first element lies at `origin`."""
    for dim, (begin, size) in enumerate(zip(low, sizes, strict=True)):
        tensor = tensor.narrow(dim, begin - origin[dim], size)
    return tensor


def _finish(jobs: Iterable[concurrent.futures.Future[None]]) -> None:
    """Waits for all jobs; raises the first error once nothing runs any more."""
    errors = [error for job in list(jobs) if (error := job.exception()) is not None]
    if errors:
        raise errors[0]
