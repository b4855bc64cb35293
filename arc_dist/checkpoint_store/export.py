"""Writes a checkpoint as one safetensors file that any program reads: whole tensors, whatever they were cut into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from arc_dist.checkpoint_store.backends import open_backend
from arc_dist.checkpoint_store.buffers import as_bytes
from arc_dist.checkpoint_store.reader import Checkpoint
from arc_dist.checkpoint_store.shard import build_header, file_order_key
from arc_dist.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written: `path`, its size, and how many tensors it holds."""

    path: str
    nbytes: int
    num_tensors: int


def export_safetensors(
    checkpoint: Checkpoint,
    out: str,
    *,
    prefix: str = "",
    replace: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Export:
    """Writes the tensors of a step into one file. Every byte is verified; at most one tensor is in memory at a time.

    Args:
        checkpoint: the step.
        out: the file's path or URL. It gets its name when it is whole.
        prefix: only tensors whose names begin with it, without it: ``"model."`` gives what ``load_state_dict`` wants.
        replace: whether a file that is there may be replaced.
        progress: called with the number of bytes done since the last call.

    Raises:
        ConfigError: the name is taken or is no file's; no tensor has the prefix.
        CheckpointMismatch, StoreCorrupt, StoreError: the step cannot be read, or the file not written; none is left.
    """
    parent, _, name = out.rpartition("/")
    if not name or name in (".", ".."):
        raise ConfigError(f"export to {out}: name a file, such as model.safetensors.")
    backend = open_backend(parent or ("/" if out.startswith("/") else "."))
    if backend.exists(name) and not replace:
        raise ConfigError(f"export to {out}: it is there already. Name another file, or replace it with --force.")
    sources = {name.removeprefix(prefix): spec for name, spec in checkpoint.specs().items() if name.startswith(prefix)}
    if not sources:
        found = sorted({name.partition(".")[0] + "." for name in checkpoint.specs()})
        raise ConfigError(
            f"step {checkpoint.step}: no tensor begins with {prefix!r}. Names begin with: {', '.join(found[:20])}"
        )
    specs = [dataclasses.replace(spec, name=name) for name, spec in sources.items()]
    for spec in specs:
        spec.check()
    specs.sort(key=file_order_key)
    header = build_header(specs)
    nbytes = len(header) + sum(spec.nbytes for spec in specs)
    sink = backend.create(name, nbytes, exclusive=not replace)
    try:
        sink.write(memoryview(header))
        for spec in specs:
            (tensor,) = checkpoint.read([sources[spec.name]])
            sink.write(as_bytes(tensor))
            if progress is not None:
                progress(spec.nbytes)
        sink.publish()
    except BaseException:
        sink.discard()
        raise
    return Export(path=out, nbytes=nbytes, num_tensors=len(specs))
