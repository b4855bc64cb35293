"""Where each tensor of a state lies in a slot, and in which dtype."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.errors import ConfigError
from arc_dist.snapshot import layout
from arc_dist.snapshot.base import BaseFile
from arc_dist.snapshot.layout import SlotDamaged, SlotHeader, TableEntry

ROUNDED = "bfloat16"
_WIDE = ("float32", "float64")  # what 16 bit make smaller; float16 has the same size and more digits


class Plan:
    """Where each tensor of a state lies in a slot; made once per list of specs and kind of holding.

    Args:
        specs: of the tensors.
        rounds: says by name whether a tensor is held rounded to bfloat16, if it is wider; None: none is.
        base: holds some tensors instead of the slot.
        places: byte offset in `base` by index of each of them.
    """

    def __init__(
        self,
        specs: list[TensorSpec],
        *,
        rounds: Callable[[str], bool] | None = None,
        base: BaseFile | None = None,
        places: Mapping[int, int] | None = None,
    ) -> None:
        self.specs = specs
        self.base = base if places else None
        self.places = dict(places or {})
        self.replicated = all(spec.replicated for spec in specs)
        self.dtypes = [getattr(torch, spec.dtype) for spec in specs]
        self.numel = [torch.Size(spec.shape).numel() for spec in specs]
        entries: list[TableEntry] = []
        offset = layout.PAGE_BYTES
        for index, (spec, numel) in enumerate(zip(specs, self.numel, strict=True)):
            is_rounded = rounds is not None and spec.dtype in _WIDE and rounds(spec.name)
            held = ROUNDED if is_rounded else spec.dtype
            nbytes = numel * getattr(torch, held).itemsize
            in_base = index in self.places
            entries.append(
                TableEntry(
                    name=spec.name,
                    dtype=spec.dtype,
                    shape=spec.shape,
                    global_shape=spec.global_shape,
                    offsets=spec.offsets,
                    replicated=spec.replicated,
                    byte_offset=self.places[index] if in_base else offset,
                    nbytes=nbytes,
                    held=held,
                    in_base=in_base,
                )
            )
            offset += 0 if in_base else layout.align(nbytes)
        self.entries = entries
        self.held_dtypes = [getattr(torch, entry.held) for entry in entries]
        # The tensors that lie in the slot itself; None for all of them.
        self.own = [index for index in range(len(specs)) if index not in self.places] if self.places else None
        self.tensor_bytes = sum(numel * dtype.itemsize for numel, dtype in zip(self.numel, self.dtypes, strict=True))
        self.table = layout.encode_table(entries)
        self.table_crc = zlib.crc32(self.table)
        self.table_offset = offset
        self.small_offset = layout.align(offset + len(self.table))

    @classmethod
    def read(cls, buffer: memoryview, header: SlotHeader, base: BaseFile | None, where: str) -> Plan:
        """The plan that a valid slot was written with.

        Raises:
            SlotDamaged: the table is not what was written, or cannot have been written by this version.
        """
        entries = layout.read_table(buffer, header)
        specs = [TensorSpec(e.name, e.dtype, e.shape, e.global_shape, e.offsets, e.replicated) for e in entries]
        rounded = {entry.name for entry in entries if entry.held != entry.dtype}
        places = {index: entry.byte_offset for index, entry in enumerate(entries) if entry.in_base}
        plan = cls(specs, rounds=rounded.__contains__, base=base, places=places)
        ends = [entry.byte_offset + entry.nbytes for entry in entries if entry.in_base]
        if plan.entries != entries or max(ends, default=0) > (base.nbytes if base is not None else 0):
            raise SlotDamaged(f"{where} was written with another layout; another snapshot must be used")
        return plan

    def require_fit(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises ConfigError unless the tensors are what the specs say: a copy would cast or repeat them silently."""
        if [t.dtype for t in tensors] != self.dtypes or [t.numel() for t in tensors] != self.numel:
            raise ConfigError("the tensors given to a snapshot differ from their specs in number, dtype or size")

    def views(self, slot: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of a slot whose bytes are `slot`, each in the dtype that it is held in."""
        found: list[torch.Tensor] = []
        for entry, dtype in zip(self.entries, self.held_dtypes, strict=True):
            if entry.in_base:
                assert self.base is not None, f"{entry.name} lies in a base that was not given"
                found.append(self.base.view(entry.byte_offset, dtype, entry.shape))
            elif entry.nbytes:
                found.append(slot.narrow(0, entry.byte_offset, entry.nbytes).view(dtype).view(entry.shape))
            else:
                found.append(torch.empty(entry.shape, dtype=dtype))
        return found
