"""`ArcWriter`: `torch.distributed.checkpoint.save` and `async_save` into our format.

Who calls what: DCP calls `set_up_storage_writer` and `prepare_local_plan` on every rank, `prepare_global_plan` on the
coordinator, `write_data` on every rank, `finish` on the coordinator. Errors of any of them reach all ranks as one
CheckpointException, and nothing is committed, because only `finish` writes a manifest.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import threading
import uuid
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from arc_dist.checkpoint_store.dcp_layout import META_KEY, DcpLayout, encode_objects, planner_paths
from arc_dist.checkpoint_store.deadline import call_within
from arc_dist.checkpoint_store.format import (
    ShardTensor,
    TensorSpec,
    check_run_name,
    dtype_name,
    step_of_directory,
    torch_dtype,
)
from arc_dist.checkpoint_store.store import Store
from arc_dist.errors import ConfigError, StoreError

_log = logging.getLogger(__name__)

# Below gloo's default group timeout of 30 minutes: a hanging disk is named before the group gives up without a reason.
DEFAULT_TIMEOUT_S = 1500.0


class ArcWriter(StorageWriter):
    """Writes one step through DCP: hashed while written, committed by a manifest, without any pickle.

    ::

        dcp.save({"model": model_sd, "optimizer": optim_sd}, storage_writer=ArcWriter("/ckpt", run="a", step=1200))

    Args:
        url: the store: a directory or an fsspec URL such as ``s3://bucket/prefix``; the same for all ranks.
        run: names the run in the store.
        step: number of the step. May be left out when each save names it: ``dcp.save(..., checkpoint_id="step-1200")``.
        generation: of the ranks that save, if the job counts its restarts.
        owner: a name of this start of the job, fresh and the same on all ranks. Without it the coordinator makes one
            for each save. It is needed only for planners with ``enable_plan_caching=True``.
        certified: whether `ArcReader` and other readers may choose this step by themselves. DCP knows nothing of the
            state's health, so the caller vouches for it.
        meta: what the manifest says about the step beside this: loss, epoch, ... (any state that `codec` knows).
        timeout_s: the longest that writing a rank's part, and committing, may take each; a hanging disk then ends in
            an error on all ranks. Keep it below the timeout of the process group. None: no limit.

    State that is no tensor (learning rates, counters) is encoded as JSON; a type that has no encoding is refused by
    its name. Tensors may be on any device; they are copied to the CPU one at a time.

    Not supported, each with a clear error: ``use_collectives=False``, tensor subclasses other than DTensor and
    ShardedTensor, several parts of one tensor on one rank.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        run: str = "run",
        step: int | None = None,
        generation: int = 0,
        owner: str | None = None,
        certified: bool = True,
        meta: Mapping[str, Any] | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        super().__init__()
        self._url = os.fspath(url)
        self._run = check_run_name(run)
        self._step = None if step is None else checked_step(step)
        self._generation = generation
        self._owner = owner
        self._certified = certified
        self._meta = dict(meta or {})
        self._timeout_s = timeout_s
        self._attempt: _Attempt | None = None  # of the coordinator: what it has begun and not committed
        if {META_KEY, "certified"} & set(self._meta):
            raise ConfigError(f"ArcWriter(meta=...): the keys 'certified' and {META_KEY!r} are reserved. Rename them.")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins another save. `checkpoint_id` names the step: ``"1200"``, ``"step-1200"`` or a path that ends so."""
        if checkpoint_id is not None:
            self._step = step_of_id(checkpoint_id, self._url, self._run)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Every rank; no I/O."""
        if not kwargs.get("use_collectives", True):
            raise ConfigError(
                "ArcWriter commits a step once for all ranks, so it needs dcp.save(..., use_collectives=True)."
            )
        self._required_step()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Every rank; says to the coordinator what this rank is about to write."""
        return dataclasses.replace(plan, storage_data=self._claim())

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The coordinator; compares the ranks, makes sure that the store can be written, and names the attempt."""
        self._check_plans(plans)
        store = Store(self._url, run=self._run)
        owner = self._owner or f"dcp-{uuid.uuid4().hex}"
        call_within(self._timeout_s, f"preparing {store.url}", lambda _: store.check_writable())
        attempt = _Attempt(
            step=self._required_step(),
            generation=self._generation,
            world_size=len(plans),
            owner=owner,
            empty=tuple(_empty_specs(plans)),
        )
        # Every rank is here, so nobody writes to an attempt that failed before; one owner may save a step again.
        for old in {self._attempt, attempt if self._owner else None} - {None}:
            self._discard(cast("_Attempt", old))
        self._attempt = attempt
        return [dataclasses.replace(plan, storage_data=(rank, attempt)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Every rank; writes its part durably and returns it for the manifest. Blocks until it is written."""
        rank, attempt = cast("tuple[int, _Attempt]", plan.storage_data)
        if self._owner is not None:  # a planner that caches its plans gives back those of an earlier step
            attempt = dataclasses.replace(
                attempt, step=self._required_step(), generation=self._generation, owner=self._owner
            )
        tensors = _tensors(plan, planner)
        tensors += [ShardTensor(spec, torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))) for spec in attempt.empty]
        raw = {item.index.fqn: _raw_object(item, planner) for item in plan.items if item.type == WriteItemType.BYTE_IO}
        objects = encode_objects(raw)
        store = Store(self._url, run=self._run, owner=attempt.owner)

        def write(gave_up: threading.Event) -> dict[str, Any]:
            return store.write_part(
                attempt.step,
                generation=attempt.generation,
                rank=rank,
                world_size=attempt.world_size,
                tensors=tensors,
                objects=objects,
                should_abort=gave_up.is_set,
            )

        part = call_within(self._timeout_s, f"rank {rank}: writing step {attempt.step} to {store.url}", write)
        nbytes = sum(int(file["nbytes"]) for file in part["files"])
        result = WriteResult(MetadataIndex("part"), nbytes, {"part": part, "objects": sorted(raw)})
        future: Future[list[WriteResult]] = Future()
        future.set_result([result])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The coordinator, once all ranks have written: commits the step.

        Raises:
            StoreError, Fenced: nothing was committed.
        """
        assert self._attempt is not None
        attempt = self._attempt
        told = [cast("dict[str, Any]", only.storage_data) for (only,) in results]
        layout = DcpLayout(
            objects={name: rank for rank, one in enumerate(told) for name in one["objects"]},
            paths=planner_paths(metadata.planner_data),
        )
        meta = {**self._meta, "certified": self._certified, META_KEY: layout.to_meta()}
        parts = {rank: one["part"] for rank, one in enumerate(told)}
        store = Store(self._url, run=self._run, owner=attempt.owner)
        call_within(
            self._timeout_s,
            f"committing step {attempt.step} to {store.url} (look with `arc ls` whether it came through)",
            lambda _: store.commit(attempt.step, attempt.generation, attempt.world_size, parts, meta),
        )
        self._attempt = None

    def storage_meta(self) -> StorageMeta | None:
        """What planners are told about the place."""
        return StorageMeta(checkpoint_id=None if self._step is None else f"{self._run}/step-{self._step:08d}")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it names a step."""
        return _step_in(os.fspath(checkpoint_id)) is not None

    def _required_step(self) -> int:
        if self._step is None:
            raise ConfigError("ArcWriter: which step? Give ArcWriter(step=...) or dcp.save(checkpoint_id='step-1200').")
        return self._step

    def _claim(self) -> dict[str, Any]:
        return {"run": self._run, "step": self._step, "generation": self._generation, "owner": self._owner}

    def _check_plans(self, plans: list[SavePlan]) -> None:
        for rank, plan in enumerate(plans):
            told = cast("object", plan.storage_data)
            if not plan.usable and self._owner is None:
                raise ConfigError(
                    "the planner reuses the plans of an earlier save (enable_plan_caching=True), which cannot carry "
                    "the name of this one. Give every rank ArcWriter(owner=...), the same fresh string for each start "
                    "of the job, or turn the caching off."
                )
            if isinstance(told, dict) and told != self._claim():
                raise ConfigError(
                    f"rank {rank} saves {told}, the coordinator {self._claim()}. Make the same ArcWriter on all ranks.",
                    rank=rank,
                )

    def _discard(self, old: _Attempt) -> None:
        """Removes what an earlier save left when a rank failed."""
        store = Store(self._url, run=self._run, owner=old.owner)
        try:
            call_within(
                self._timeout_s,
                f"removing an attempt at step {old.step} from {store.url}",
                lambda _: store.discard(old.step, generation=old.generation, world_size=old.world_size),
            )
        except StoreError as error:  # it has no manifest, so it is no checkpoint: it only takes space
            _log.warning("step %d: files of an attempt that failed are left: %s", old.step, error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One save, as the coordinator names it for all ranks.

    Attributes:
        empty: the tensors without elements. They belong to nobody's shard, so every rank must know all of them.
    """

    step: int
    generation: int
    world_size: int
    owner: str
    empty: tuple[TensorSpec, ...]


def _tensors(plan: SavePlan, planner: SavePlanner) -> list[ShardTensor]:
    """The parts that the plan gives to this rank; DCP's planner has left each to one rank only."""
    result: list[ShardTensor] = []
    for item in plan.items:
        if item.type == WriteItemType.BYTE_IO:
            continue
        data = planner.resolve_data(item)
        name = item.index.fqn
        if not isinstance(data, torch.Tensor) or item.tensor_data is None:
            raise ConfigError(f"state_dict key {name}: the planner gave {type(data).__name__}, not a tensor.", key=name)
        if is_traceable_wrapper_subclass(data) or data.layout != torch.strided or data.device.type == "meta":
            raise ConfigError(
                f"state_dict key {name}: a {type(data).__name__} of layout {data.layout} on {data.device} has no plain "
                "bytes to store. Give the state as ordinary tensors.",
                key=name,
            )
        where = item.tensor_data.chunk
        spec = TensorSpec(
            name, dtype_name(data.dtype), tuple(where.sizes), tuple(item.tensor_data.size), tuple(where.offsets)
        )
        if math.prod(spec.global_shape) > 0:
            result.append(ShardTensor(spec, data.detach()))
    return result


def _empty_specs(plans: list[SavePlan]) -> list[TensorSpec]:
    found: dict[str, TensorSpec] = {}
    for plan in plans:
        for item in plan.items:
            data = item.tensor_data
            if data is not None and math.prod(data.size) == 0:
                shape = tuple(data.size)
                dtype = dtype_name(data.properties.dtype)
                found[item.index.fqn] = TensorSpec(item.index.fqn, dtype, shape, shape, (0,) * len(shape), True)
    return [found[name] for name in sorted(found)]


def _raw_object(item: WriteItem, planner: SavePlanner) -> object:
    """The object itself. `resolve_data` would pickle it."""
    if not isinstance(planner, DefaultSavePlanner):
        raise ConfigError(
            f"state_dict key {item.index.fqn} is no tensor, and {type(planner).__name__} is no DefaultSavePlanner, so "
            "it can only be had pickled. Derive the planner from DefaultSavePlanner, or keep only tensors in the state."
        )
    return planner.lookup_object(item.index)


def checked_step(step: object) -> int:
    """Returns `step`; ConfigError when it is no step number."""
    if type(step) is not int or not 0 <= step < 10**15:
        raise ConfigError(f"step={step!r}: a step is a whole number from 0.", step=step)
    return step


def step_of_id(checkpoint_id: str | os.PathLike[str], url: str, run: str) -> int:
    """The step that a DCP checkpoint_id names.

    Raises:
        ConfigError: it names none, or a directory elsewhere than in the run.
    """
    text = os.fspath(checkpoint_id).rstrip("/")
    step = _step_in(text)
    if step is None:
        raise ConfigError(
            f"checkpoint_id={text!r} names no step. Give the number, 'step-1200', or a path that ends so.", id=text
        )
    parent = text.rpartition("/")[0]
    if parent not in ("", url.rstrip("/"), f"{url.rstrip('/')}/{run}"):
        raise ConfigError(
            f"checkpoint_id={text!r} is not in run {run} of the store {url}, and steps are stored nowhere else. "
            "Give only the step, as in checkpoint_id='step-1200'.",
            id=text,
        )
    return step


def _step_in(text: str) -> int | None:
    name = text.rstrip("/").rpartition("/")[2]
    digits = name.removeprefix("step-").removeprefix("step_")
    if digits.isascii() and digits.isdigit() and len(digits) <= 15:
        return int(digits)
    return step_of_directory(name)


__all__ = ["DEFAULT_TIMEOUT_S", "ArcWriter", "checked_step", "step_of_id"]
