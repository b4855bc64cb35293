"""`ArcLoadPlanner`: names all that is missing, unexpected or of another shape, and loads the rest if asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from arc_dist.errors import CheckpointMismatch, ConfigError

_MAX_LISTED = 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """How a state and a checkpoint fit, by flat names.

    Attributes:
        missing: in the state, not in the checkpoint.
        unexpected: in the checkpoint below a top-level key that the state has, but not in the state. All names that
            the state lacks, if the state is flat (no nested mapping in it).
        not_asked: in the checkpoint below other top-level keys: the optimizer, when only the model is loaded.
        different: what has another shape, or is a tensor on one side only.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    not_asked: tuple[str, ...]
    different: tuple[str, ...]


class ArcLoadPlanner(DefaultLoadPlanner):
    """torch's load planner with a full account of differences.

    ::

        planner = ArcLoadPlanner(strict=False)
        dcp.load({"model": sd}, storage_reader=ArcReader("/ckpt"), planner=planner)
        planner.report.missing      # names that kept their values

    Args:
        strict: missing and unexpected names are an error (CheckpointMismatch, with all of them). Without it, what
            both have is loaded. Another shape is an error in any case.

    Parts of a checkpoint are loaded by giving a state with only these: ``{"model": ...}`` loads no optimizer.
    """

    def __init__(self, *, strict: bool = True) -> None:
        super().__init__(allow_partial_load=not strict)
        self._report: LoadReport | None = None

    @property
    def report(self) -> LoadReport:
        """How they fitted; after `dcp.load`, also when it raised CheckpointMismatch."""
        if self._report is None:
            raise ConfigError("ArcLoadPlanner.report: nothing has been loaded with this planner yet.")
        return self._report

    def create_local_plan(self) -> LoadPlan:
        """Every rank.

        Raises:
            CheckpointMismatch: with every difference that matters.
        """
        assert self.metadata is not None
        state = cast("dict[str, Any]", self.state_dict)  # pyright: ignore[reportUnknownMemberType]
        nested = cast("dict[str, Any]", self.original_state_dict)  # pyright: ignore[reportUnknownMemberType]
        self._report = report = compare(state, nested, self.metadata)
        problems = list(report.different)
        if not self.allow_partial_load:
            problems += [f"{name}: not in the checkpoint" for name in report.missing]
            problems += [f"{name}: in the checkpoint, but not in the state" for name in report.unexpected]
        if problems:
            more = len(problems) - _MAX_LISTED
            listed = "\n  ".join(problems[:_MAX_LISTED]) + (f"\n  and {more} more" if more > 0 else "")
            raise CheckpointMismatch(
                f"the state and the checkpoint differ in {len(problems)} names:\n  {listed}\nBuild the model that was "
                "saved, or load what both have with ArcLoadPlanner(strict=False); shapes must agree in any case.",
                differences=problems,
                missing=report.missing,
                unexpected=report.unexpected,
            )
        return create_default_local_load_plan(state, self.metadata, strict=not self.allow_partial_load)


def compare(flat: Mapping[str, Any], nested: Mapping[str, Any], metadata: Metadata) -> LoadReport:
    """Compares a state with what a checkpoint holds. Pure.

    Args:
        flat: the state by flat names.
        nested: the state as the caller has it; its keys are what is asked for.
        metadata: of the checkpoint.
    """
    saved = metadata.state_dict_metadata
    different: list[str] = []
    for name, value in flat.items():
        entry = saved.get(name)
        is_tensor = isinstance(value, torch.Tensor)
        if isinstance(entry, TensorStorageMetadata):
            shape = value.shape if is_tensor else getattr(value, "size", lambda: None)()
            if shape is None:
                different.append(f"{name}: a tensor in the checkpoint, a {type(value).__name__} in the state")
            elif tuple(entry.size) != tuple(shape):
                different.append(f"{name}: {list(entry.size)} in the checkpoint, {list(shape)} in the state")
        elif entry is not None and is_tensor:
            different.append(f"{name}: an object in the checkpoint, a tensor in the state")
    rest = sorted(set(saved) - set(flat))
    is_flat = not any(isinstance(value, (Mapping, list)) for value in nested.values())
    asked = tuple(str(key) for key in nested)
    unexpected = [name for name in rest if is_flat or _below(name, asked)]
    return LoadReport(
        missing=tuple(sorted(set(flat) - set(saved))),
        unexpected=tuple(unexpected),
        not_asked=tuple(name for name in rest if name not in set(unexpected)),
        different=tuple(different),
    )


def _below(name: str, keys: Iterable[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in keys)


__all__ = ["ArcLoadPlanner", "LoadReport", "compare"]
