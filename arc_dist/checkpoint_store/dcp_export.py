"""Writes a step as a classic DCP directory, through torch's own FileSystemWriter, in bounded memory."""

from __future__ import annotations

import io
import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from arc_dist.checkpoint_store.dcp_layout import DcpLayout
from arc_dist.checkpoint_store.format import torch_dtype
from arc_dist.checkpoint_store.manifest import TensorEntry
from arc_dist.checkpoint_store.reader import Checkpoint


def write_dcp(
    checkpoint: Checkpoint,
    layout: DcpLayout,
    objects: Mapping[str, object],
    directory: Path,
    *,
    group_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the whole step into an empty directory.

    Args:
        checkpoint: the step.
        layout: of the step.
        objects: what is no tensor, by flat name.
        directory: where to.
        group_bytes: about how many bytes go to one file, and are held in memory at once.
        progress: called with the number of bytes done since the last call.

    Raises:
        StoreError: see `Checkpoint.read`.
    """
    planner = _ExportPlanner(checkpoint, layout, objects, progress)
    try:
        cast("Any", state_dict_saver).save(
            {}, storage_writer=_GroupWriter(directory, group_bytes), planner=planner, no_dist=True
        )
    except CheckpointException as error:
        # One process: what failed is one error of ours, which says more by itself.
        raise next(iter(error.failures.values()))[0] from error


class _GroupWriter(FileSystemWriter):
    """Makes several files, because torch holds all tensors of a file in memory until it is written."""

    def __init__(self, directory: Path, group_bytes: int) -> None:
        super().__init__(directory, per_thread_copy_ahead=0)  # pyright: ignore[reportUnknownMemberType]
        self._directory = directory
        self._group_bytes = group_bytes

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        groups: list[list[WriteItem]] = [[]]
        nbytes = 0
        for item in plan.items:
            size = item.tensor_storage_size() or 0
            if groups[-1] and nbytes + size > self._group_bytes:
                groups.append([])
                nbytes = 0
            groups[-1].append(item)
            nbytes += size
        files: queue.Queue[tuple[Any, str, list[WriteItem]]] = queue.Queue()
        for index, group in enumerate(groups):
            name = f"__0_{index}.distcp"
            files.put((self._directory / name, name, group))
        return cast("Any", self)._write_data(planner, files)


class _ExportPlanner(SavePlanner):
    """Plans whole tensors from a manifest and reads each, verified, when the writer asks for it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: DcpLayout,
        objects: Mapping[str, object],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._specs = checkpoint.specs()
        self._layout = layout
        self._objects = objects
        self._progress = progress

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """The state is in the store, not here."""

    def create_local_plan(self) -> SavePlan:
        items = [_tensor_item(tensor) for tensor in self._checkpoint.manifest.tensors]
        items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        names = {*self._specs, *self._objects}
        paths = self._layout.paths
        # Without paths each name is a key of its own, as in a flat state_dict.
        metadata.planner_data = {name: (name,) if paths is None else paths.get(name, (name,)) for name in names}
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self._objects[name], buffer)  # DCP reads objects only so
            return buffer
        (tensor,) = self._checkpoint.read([self._specs[name]])
        if self._progress is not None:
            self._progress(self._specs[name].nbytes)
        return tensor


def _tensor_item(tensor: TensorEntry) -> WriteItem:
    size, origin = torch.Size(tensor.shape), torch.Size([0] * len(tensor.shape))
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(origin, size), properties=TensorProperties(torch_dtype(tensor.dtype)), size=size
    )
    return WriteItem(MetadataIndex(tensor.name, origin), WriteItemType.TENSOR, tensor_data=data)


__all__ = ["write_dcp"]
