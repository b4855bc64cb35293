"""What a checkpoint written through torch.distributed.checkpoint says beyond tensors: its objects and nested paths.

DCP keeps both in `.metadata`, a pickle. Here they are JSON: the objects lie, encoded by `codec`, in the ranks' object
files under the key ``"dcp"``; the manifest's ``meta["dcp"]`` says which rank has which and where each name belongs in
the nested state::

    {"version": 1, "objects": {"optimizer.param_groups.0.lr": 2}, "paths": {"model.w": ["model", "w"]}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

from arc_dist.checkpoint_store import codec
from arc_dist.checkpoint_store.reader import Checkpoint
from arc_dist.errors import CheckpointMismatch, ConfigError, StoreCorrupt

META_KEY = "dcp"
_VERSION = 1

Path = tuple["str | int", ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DcpLayout:
    """Objects and paths of a checkpoint.

    Attributes:
        objects: name of each object (what is no tensor) -> the rank whose file holds it.
        paths: flat name -> keys and list indices that lead to it in the nested state. Names may be missing here;
            None when the state was not saved through DCP.
    """

    objects: Mapping[str, int]
    paths: Mapping[str, Path] | None

    def to_meta(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        paths = None if self.paths is None else {name: list(path) for name, path in self.paths.items()}
        return {"version": _VERSION, "objects": dict(self.objects), "paths": paths}


def layout_of(checkpoint: Checkpoint) -> DcpLayout:
    """The layout of a checkpoint; an empty one when it was not written through DCP.

    Raises:
        StoreCorrupt: it makes no sense.
        CheckpointMismatch: a newer version wrote it.
    """
    raw = checkpoint.meta.get(META_KEY)
    if raw is None:
        return DcpLayout(objects={}, paths=None)
    where = checkpoint.path
    if not isinstance(raw, dict):
        raise _wrong(where, raw)
    fields = cast("dict[str, Any]", raw)
    version = fields.get("version")
    if type(version) is not int or version < 1:
        raise _wrong(where, version)
    if version > _VERSION:
        raise CheckpointMismatch(f"{where}: meta.dcp has version {version}, newer than {_VERSION}. Upgrade arc-dist.")
    objects, paths = fields.get("objects"), fields.get("paths")
    if not isinstance(objects, dict) or not isinstance(paths, (dict, type(None))):
        raise _wrong(where, cast("object", objects))
    ranks = cast("dict[str, Any]", objects)
    if not all(type(rank) is int and 0 <= rank < checkpoint.world_size for rank in ranks.values()):
        raise _wrong(where, ranks)
    known = None if paths is None else checked_paths(cast("dict[Any, Any]", paths), where)
    return DcpLayout(objects=ranks, paths=known)


def checked_paths(paths: Mapping[Any, Any], where: str) -> dict[str, Path]:
    """Paths from outside: strings and small indices only.

    Raises:
        StoreCorrupt: something else, or an index that would make a list of absurd length.
    """
    result: dict[str, Path] = {}
    for name, path in paths.items():
        if not isinstance(name, str) or not _is_path(path):
            raise _wrong(where, path)
        result[name] = tuple(path)
    return result


def planner_paths(planner_data: object) -> dict[str, Path] | None:
    """The paths that torch's planners leave in the metadata; None when another planner left something else there.

    What else a planner of the caller's own keeps there is not stored.
    """
    if not isinstance(planner_data, dict):
        return None
    found = cast("dict[Any, Any]", planner_data)
    if not all(isinstance(name, str) and _is_path(path) for name, path in found.items()):
        return None
    return {name: tuple(path) for name, path in found.items()}


def encode_objects(objects: Mapping[str, object]) -> dict[str, Any]:
    """Encodes a rank's objects for its file.

    Raises:
        ConfigError: a value has a type that cannot be stored without pickle; its name is told.
    """
    encoded: dict[str, Any] = {}
    for name, value in objects.items():
        try:
            encoded[name] = codec.encode(value, inline=True)[0]
        except ConfigError as error:
            inside = str(error.fields.get("path", ""))
            key = name if inside in ("", "(top)") else f"{name}.{inside}"
            kind = error.fields.get("type", type(value).__qualname__)
            raise ConfigError(
                f"state_dict key {key}: a {kind} cannot be stored, because checkpoints hold no pickle. Make it of "
                "plain containers, numbers, strings, bytes and tensors (or give its state_dict()), or leave it out.",
                key=key,
                type=kind,
            ) from error
    return {META_KEY: encoded}


def read_objects(checkpoint: Checkpoint, layout: DcpLayout, names: Iterable[str]) -> dict[str, Any]:
    """Reads, verifies and decodes objects by name.

    Raises:
        StoreCorrupt, StoreError: a file is damaged or missing, or does not hold what the manifest says.
    """
    files: dict[int, dict[str, Any]] = {}
    result: dict[str, Any] = {}
    for name in names:
        rank = layout.objects[name]
        if rank not in files:
            files[rank] = checkpoint.objects(rank).get(META_KEY) or {}
        if name not in files[rank]:
            raise StoreCorrupt(
                f"{checkpoint.path}: object {name[:200]} is not in the file of rank {rank}. Restore an older step.",
                key=name,
            )
        result[name] = codec.decode(files[rank][name])
    return result


_MAX_INDEX = 1 << 20


def _is_path(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(_is_part(part) for part in cast("list[Any]", value))


def _is_part(part: object) -> bool:
    return isinstance(part, str) or (type(part) is int and 0 <= part < _MAX_INDEX)


def _wrong(where: str, value: object) -> StoreCorrupt:
    return StoreCorrupt(f"{where}: what it says about DCP is {str(value)[:100]!r}, which cannot be. Use another step.")


__all__ = [
    "META_KEY",
    "DcpLayout",
    "Path",
    "checked_paths",
    "encode_objects",
    "layout_of",
    "planner_paths",
    "read_objects",
]
