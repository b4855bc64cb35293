"""`ArcReader`: `torch.distributed.checkpoint.load` from our format; every byte is verified before a tensor changes.

Who calls what: DCP calls `read_metadata`, `set_up_storage_reader` and `prepare_local_plan` on every rank, then
`prepare_global_plan` on the coordinator, then `read_data` on every rank. Everything is read and verified in
`prepare_local_plan`, aside; a damaged file on one rank then fails the load on all ranks before any rank has changed a
tensor.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, cast

import torch
from torch.distributed.checkpoint import _traverse
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from arc_dist.checkpoint_store.dcp_layout import DcpLayout, layout_of, read_objects
from arc_dist.checkpoint_store.dcp_writer import DEFAULT_TIMEOUT_S, checked_step, step_of_id
from arc_dist.checkpoint_store.deadline import call_within
from arc_dist.checkpoint_store.format import TensorSpec, check_run_name, torch_dtype
from arc_dist.checkpoint_store.manifest import TensorEntry
from arc_dist.checkpoint_store.reader import Checkpoint
from arc_dist.checkpoint_store.store import Store
from arc_dist.errors import CheckpointMismatch, ConfigError, StoreGone, StoreTransient

_Key = tuple[Any, ...]


class ArcReader(StorageReader):
    """Reads one step through DCP, resharded to whatever the state's tensors are.

    ::

        dcp.load(state, storage_reader=ArcReader("/ckpt", run="a"))

    Args:
        url: the store, as for `ArcWriter`.
        run: names the run in the store.
        step: number of the step; None for the newest certified one. Ranks that find different newest steps, because
            one was committed at that moment, get an error and may try again.
        convert_dtype: let a tensor of one dtype be loaded into one of another, as DCP does by itself. Without it that
            is an error, because it changes numbers in silence.
        timeout_s: the longest that reading a rank's share may take. None: no limit.

    It takes as much CPU memory as the rank's share of the state until `dcp.load` returns. With torch's own planner a
    missing name is an error that names the first; `ArcLoadPlanner` names all of them, and can load what there is.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        run: str = "run",
        step: int | None = None,
        convert_dtype: bool = False,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        super().__init__()
        self._url = os.fspath(url)
        self._run = check_run_name(run)
        self._step = None if step is None else checked_step(step)
        self._convert_dtype = convert_dtype
        self._timeout_s = timeout_s
        self._opened: _Opened | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins another load; `checkpoint_id` as for `ArcWriter.reset`."""
        self._opened = None
        if checkpoint_id is not None:
            self._step = step_of_id(checkpoint_id, self._url, self._run)

    def read_metadata(self) -> Metadata:  # pyright: ignore[reportIncompatibleMethodOverride] - torch looks for **kwargs
        """Every rank; what the step holds, made from its manifest.

        Raises:
            StoreGone: there is no such step, or no certified one.
            StoreCorrupt, CheckpointMismatch: its manifest was altered, or is newer than this version.
        """
        checkpoint = call_within(self._timeout_s, f"opening a step of {self._url}", lambda _: self._open())
        layout = layout_of(checkpoint)
        self._opened = _Opened(checkpoint=checkpoint, layout=layout)
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            tensor.name: _tensor_metadata(tensor) for tensor in checkpoint.manifest.tensors
        }
        entries.update({name: BytesStorageMetadata() for name in layout.objects})
        paths = None if layout.paths is None else dict(layout.paths)
        return Metadata(entries, planner_data=paths, storage_meta=StorageMeta(checkpoint_id=checkpoint.path))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Every rank; nothing is left to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Every rank; reads and verifies all that the plan asks for."""
        opened = self._required()
        call_within(
            self._timeout_s,
            f"reading step {opened.checkpoint.step} from {self._url}",
            lambda _: opened.stage(plan.items),
        )
        manifest = opened.checkpoint.manifest
        identity = {"step": manifest.step, "directory": manifest.directory, "committed_at": manifest.committed_at}
        return dataclasses.replace(plan, storage_data=identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The coordinator; all ranks must have opened the same commit."""
        told = [cast("object", plan.storage_data) for plan in plans]
        for rank, one in enumerate(told):
            if one != told[0]:
                raise StoreTransient(
                    f"rank 0 would load {told[0]}, rank {rank} {one}: a step was committed or removed meanwhile. Load "
                    "again, or name the step: ArcReader(step=...).",
                    rank=rank,
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Every rank, once all ranks have verified their shares: fills the tensors."""
        opened = self._required()
        opened.stage(plan.items)  # nothing, unless a planner has changed the plan since
        tensors = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        objects = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        if objects:
            _require_default_load_bytes(planner, objects[0].storage_index.fqn)
        targets = [(item, planner.resolve_tensor(item).detach()) for item in tensors]
        self._check_targets(targets)
        for item, target in targets:
            target.copy_(opened.tensors[_key(item)])
            planner.commit_tensor(item, target)
        for item in objects:
            _put_object(cast("DefaultLoadPlanner", planner), item, opened.objects[item.storage_index.fqn])
        self._opened = None  # lets go of the staged copies
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it could name a step; see `ArcWriter.validate_checkpoint_id`."""
        try:
            step_of_id(os.path.basename(os.fspath(checkpoint_id).rstrip("/")), "", "run")
        except ConfigError:
            return False
        return True

    def _open(self) -> Checkpoint:
        store = Store(self._url, run=self._run)
        if self._step is not None:
            return store.open(self._step)
        info = store.newest()
        if info is None:
            raise StoreGone(
                f"store {store.url}: run {self._run} has no certified step. Look with `arc ls {store.url}`; name an "
                "uncertified one with ArcReader(step=...)."
            )
        return store.open(info.step, directory=info.directory)

    def _required(self) -> _Opened:
        if self._opened is None:
            raise ConfigError("ArcReader: read_metadata() must be called first, as dcp.load does.")
        return self._opened

    def _check_targets(self, targets: list[tuple[ReadItem, torch.Tensor]]) -> None:
        assert self._opened is not None
        differences: list[str] = []
        for item, target in targets:
            saved = self._opened.tensors[_key(item)]
            if target.shape != saved.shape or (target.dtype != saved.dtype and not self._convert_dtype):
                differences.append(
                    f"{item.storage_index.fqn}: {saved.dtype} {list(saved.shape)} in the checkpoint, "
                    f"{target.dtype} {list(target.shape)} in the state"
                )
        if differences:
            listed = "\n  ".join(sorted(set(differences))[:20])
            raise CheckpointMismatch(
                f"{self._opened.checkpoint.path}: {len(differences)} parts of tensors differ:\n  {listed}\nBuild the "
                "state with the dtypes that were saved, or ask for a conversion: ArcReader(convert_dtype=True).",
                differences=differences,
            )


@dataclasses.dataclass(kw_only=True)
class _Opened:
    """A step with what has been read of it."""

    checkpoint: Checkpoint
    layout: DcpLayout
    tensors: dict[_Key, torch.Tensor] = dataclasses.field(default_factory=dict[_Key, torch.Tensor])
    objects: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def stage(self, items: list[ReadItem]) -> None:
        """Reads and verifies what is asked and not there yet."""
        entries = {tensor.name: tensor for tensor in self.checkpoint.manifest.tensors}
        wanted = {
            _key(item): item for item in items if item.type == LoadItemType.TENSOR and _key(item) not in self.tensors
        }
        specs = [_spec(item, entries[item.storage_index.fqn]) for item in wanted.values()]
        self.tensors.update(zip(wanted, self.checkpoint.read(specs), strict=True))
        names = {item.storage_index.fqn for item in items if item.type == LoadItemType.BYTE_IO} - set(self.objects)
        self.objects.update(read_objects(self.checkpoint, self.layout, sorted(names)))


def _tensor_metadata(tensor: TensorEntry) -> TensorStorageMetadata:
    # Copies of a part are one chunk to DCP; which copy is read is our reader's choice.
    boxes = {(chunk.offsets, chunk.shape): None for chunk in tensor.chunks}
    return TensorStorageMetadata(
        TensorProperties(dtype=torch_dtype(tensor.dtype)),
        torch.Size(tensor.shape),
        [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes],
    )


def _key(item: ReadItem) -> _Key:
    index = item.storage_index
    return (index.fqn, tuple(index.offset or ()), tuple(item.storage_offsets), tuple(item.lengths))


def _spec(item: ReadItem, tensor: TensorEntry) -> TensorSpec:
    chunk = tuple(item.storage_index.offset or ())
    offsets = tuple(a + b for a, b in zip(chunk, item.storage_offsets, strict=True))
    return TensorSpec(tensor.name, tensor.dtype, tuple(item.lengths), tensor.shape, offsets)


def _require_default_load_bytes(planner: LoadPlanner, name: str) -> None:
    """Objects are put where `DefaultLoadPlanner` would put them; its own way is `torch.load` of a pickle."""
    if not isinstance(planner, DefaultLoadPlanner) or type(planner).load_bytes is not DefaultLoadPlanner.load_bytes:
        raise ConfigError(
            f"state_dict key {name} is no tensor, and {type(planner).__name__}.load_bytes wants a pickle, which this "
            "checkpoint does not hold. Use a planner with DefaultLoadPlanner's load_bytes, or load only tensors.",
            key=name,
        )


def _put_object(planner: DefaultLoadPlanner, item: ReadItem, value: object) -> None:
    name = item.dest_index.fqn
    fields = cast("Any", planner)  # torch leaves its attributes untyped
    if fields.flatten_state_dict:
        cast("Any", _traverse).set_element(fields.original_state_dict, fields.mappings[name], value)
    else:
        fields.state_dict[name] = value


__all__ = ["ArcReader"]
