"""Between our steps and the formats of others: `import_checkpoint` and `export_dcp`.

Both go through the data in bounded memory, by groups of about a gibibyte: in an import each becomes the part of one
"rank" of the step, in an export one file.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from arc_dist.checkpoint_store.backends import open_backend
from arc_dist.checkpoint_store.dcp_export import write_dcp
from arc_dist.checkpoint_store.dcp_layout import META_KEY, DcpLayout, encode_objects, layout_of, read_objects
from arc_dist.checkpoint_store.format import MANIFEST_NAME, ShardTensor, step_of_directory, torch_dtype
from arc_dist.checkpoint_store.import_sources import Piece, Source, open_source
from arc_dist.checkpoint_store.reader import Checkpoint
from arc_dist.checkpoint_store.store import Store
from arc_dist.errors import ArcError, ConfigError, StoreError, StoreGone

_log = logging.getLogger(__name__)
_GROUP_BYTES = 1 << 30
_STEP_IN_NAME = re.compile(r"(?:(?:global_)?step|checkpoint|ckpt|iter)?[-_=]?([0-9]{1,15})(?:\.[A-Za-z]+)?")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was imported.

    Attributes:
        kind: ``"dcp"``, ``"torch.save"`` or ``"safetensors"``.
        skipped: names that were left out because the caller said so.
    """

    kind: str
    step: int
    num_tensors: int
    num_objects: int
    nbytes: int
    skipped: tuple[str, ...]


def import_checkpoint(
    path: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    run: str = "run",
    step: int | None = None,
    *,
    skip: Sequence[str] = (),
    certified: bool = True,
    group_bytes: int = _GROUP_BYTES,
    progress: Callable[[int], None] | None = None,
) -> Imported:
    """Turns a checkpoint of another format into a step of a store, tensors bit for bit.

    Args:
        path: a directory of DCP (also as torchtitan writes it), a file of `torch.save`, a directory of safetensors
            files (HuggingFace; only the tensors), or one safetensors file.
        store_path: the store.
        run: run in the store.
        step: number of the step; by default the number at the end of the path's name (``step-1200``).
        skip: names of objects or tensors to leave out, for what cannot be stored; each must be there.
        certified: whether readers may choose the step by themselves.
        group_bytes: about how many bytes are held in memory at once.
        progress: called with the number of bytes done since the last call.

    Raises:
        ConfigError: not one of these formats; it would need arbitrary unpickling; the step is there already.
        StoreGone, StoreCorrupt: the source is missing, truncated or contradicts itself.
        StoreError: the store cannot be written. Nothing is committed in any of these cases.
    """
    source = _without(open_source(Path(path)), skip, str(path))
    if not source.pieces:
        raise ConfigError(f"{path}: holds no tensor, so there is nothing to import.")
    number = _step_of(path) if step is None else step
    objects = encode_objects({name: read() for name, read in source.objects.items()})
    store = Store(store_path, run=run, owner=f"import-{uuid.uuid4().hex}")
    store.check_writable()
    if any(info.step == number for info in store.steps()):
        raise ConfigError(f"store {store.url}: run {run} has a step {number} already. Give another --step or --run.")
    groups = list(_groups(source.pieces, group_bytes))
    layout = DcpLayout(objects=dict.fromkeys(source.objects, 0), paths=source.paths)
    meta = {
        "certified": certified,
        "imported": {"format": source.kind, "skipped": sorted(skip)},
        META_KEY: layout.to_meta(),
    }
    empty = list({p.spec.name: p.spec for p in source.pieces if 0 in p.spec.global_shape}.values())
    try:
        parts: dict[int, dict[str, Any]] = {}
        for rank, group in enumerate(groups):
            tensors = [ShardTensor(piece.spec, piece.read()) for piece in group]
            tensors += [ShardTensor(spec, torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))) for spec in empty]
            parts[rank] = store.write_part(
                number,
                generation=0,
                rank=rank,
                world_size=len(groups),
                tensors=tensors,
                objects=objects if rank == 0 else {},
            )
            if progress is not None:
                progress(sum(tensor.spec.nbytes for tensor in tensors))
        store.commit(number, 0, len(groups), parts, meta)
    except ArcError:
        _discard(store, number, len(groups))
        raise
    return Imported(
        kind=source.kind,
        step=number,
        num_tensors=len({piece.spec.name for piece in source.pieces}),
        num_objects=len(source.objects),
        nbytes=sum(piece.spec.nbytes for piece in source.pieces),
        skipped=tuple(sorted(skip)),
    )


def export_dcp(
    store_path: str | os.PathLike[str],
    step: int | None,
    out: str | os.PathLike[str],
    *,
    run: str | None = None,
    group_bytes: int = _GROUP_BYTES,
    progress: Callable[[int], None] | None = None,
) -> Checkpoint:
    """Writes a step as a classic DCP directory, which stock ``dcp.load(..., FileSystemReader(out))`` reads.

    Every byte is verified on the way. The directory appears under its name when it is whole. It holds DCP's own
    `.metadata` pickle, and pickled objects, because DCP reads nothing else; we never read them back unrestricted.

    Args:
        store_path: a store, a run in it or a step's directory.
        step: number of the step; None for the newest certified one.
        out: a local directory that is not there yet, or is empty.
        run: run in the store; needed only when there are several.
        group_bytes: about how many bytes are held in memory at once, and go to one file.
        progress: called with the number of bytes done since the last call.

    Returns:
        The step that was written.

    Raises:
        StoreGone, StoreCorrupt, StoreError: the step is not there or damaged.
        ConfigError: `out` holds something, or the store has several runs.
    """
    checkpoint = find_step(store_path, run=run, step=step)
    write_dcp_directory(checkpoint, out, group_bytes=group_bytes, progress=progress)
    return checkpoint


def write_dcp_directory(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    group_bytes: int = _GROUP_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """`export_dcp` for a step that is open already."""
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already. Name a directory that is not, or remove it.", file=str(target))
    if not target.parent.is_dir():
        raise StoreGone(f"{target.parent}: there is no such directory. Create it.", file=str(target.parent))
    layout = layout_of(checkpoint)
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        draft.mkdir(mode=0o700)
        objects = read_objects(checkpoint, layout, layout.objects)
        write_dcp(checkpoint, layout, objects, draft, group_bytes=group_bytes, progress=progress)
        os.replace(draft, target)
    except OSError as error:
        raise StoreError(f"{target}: cannot be written ({error}). Look at the space and rights there.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # nothing is there any more when all went well


def find_step(path: str | os.PathLike[str], *, run: str | None = None, step: int | None = None) -> Checkpoint:
    """Opens the step that a path and a number name.

    Args:
        path: a store, a run in it or a step's directory; local or a URL.
        run: which run of a store.
        step: which step; None for the newest certified one, or the one that the path names.

    Raises:
        StoreGone: there is none.
        ConfigError: the store has several runs and none was named.
    """
    backend = open_backend(path)
    parent, _, name = backend.url.rstrip("/").rpartition("/")
    if step_of_directory(name) is not None and backend.exists(MANIFEST_NAME):
        root, _, run_name = parent.rpartition("/")
        return Store(root or "/", run=run_name).open(_same_step(name, step), directory=name)
    if not backend.exists(""):
        raise StoreGone(f"{backend.url}: there is no such store. Correct the path, or mount what should be there.")
    names = [entry.name for entry in backend.list("") if entry.is_directory]
    if any(step_of_directory(one) is not None for one in names):
        store = Store(parent or "/", run=name)
    else:
        runs = [one for one in names if not one.startswith(".") and run in (None, one)]
        if len(runs) != 1:
            raise ConfigError(f"{backend.url}: {len(runs)} runs fit ({', '.join(sorted(runs)[:10])}). Name one: --run.")
        store = Store(path, run=runs[0])
    if step is not None:
        return store.open(step)
    info = store.newest()
    if info is None:
        raise StoreGone(f"{backend.url}: run {store.run} has no certified step. Name an uncertified one: --step.")
    return store.open(info.step, directory=info.directory)


def _same_step(directory: str, step: int | None) -> int:
    found = step_of_directory(directory)
    assert found is not None
    if step not in (None, found):
        raise ConfigError(f"the path names step {found}, not {step}. Give the path of the run, or no --step.")
    return found


def _without(source: Source, skip: Sequence[str], where: str) -> Source:
    known = {piece.spec.name for piece in source.pieces} | set(source.objects)
    unknown = sorted(set(skip) - known)
    if unknown:
        raise ConfigError(f"{where}: has nothing with the name {', '.join(unknown)[:300]} to skip. Correct --skip.")
    left: Mapping[str, tuple[str | int, ...]] | None = source.paths
    if left is not None:
        left = {name: path for name, path in left.items() if name not in skip}
    return dataclasses.replace(
        source,
        pieces=tuple(piece for piece in source.pieces if piece.spec.name not in skip),
        objects={name: read for name, read in source.objects.items() if name not in skip},
        paths=left,
    )


def _groups(pieces: Iterable[Piece], group_bytes: int) -> Iterable[list[Piece]]:
    """Pieces that are written together: about `group_bytes`, and no name twice (a shard has one part of a tensor)."""
    group: list[Piece] = []
    names: set[str] = set()
    nbytes = 0
    for piece in pieces:
        if 0 in piece.spec.global_shape:
            continue  # tensors without elements are known to every rank
        if group and (piece.spec.name in names or nbytes + piece.spec.nbytes > group_bytes):
            yield group
            group, names, nbytes = [], set[str](), 0
        group.append(piece)
        names.add(piece.spec.name)
        nbytes += piece.spec.nbytes
    yield group


def _discard(store: Store, step: int, world_size: int) -> None:
    try:
        store.discard(step, generation=0, world_size=world_size)
    except StoreError as error:  # it has no manifest, so it is no checkpoint; what led here is the error to raise
        _log.warning("step %d: files of the import that failed are left: %s", step, error)


def _step_of(path: str | os.PathLike[str]) -> int:
    name = Path(path).absolute().name
    match = _STEP_IN_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"{path}: its name has no step number at its end. Give --step.")
    return int(match.group(1))


__all__ = ["Imported", "export_dcp", "find_step", "import_checkpoint"]
