"""Base files: what several snapshots of a rank have in common, held once.

A base is bytes of tensors back to back, each at a multiple of `layout.ALIGN_BYTES`. It is filled before the first slot
that names it is sealed, and never written again: a tensor that changes later is held in the slots from then on, and
when that leaves too much that is stale a new base gets a new number. A base is removed when no valid slot names it;
who has it mapped can read on.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from arc_dist.snapshot import layout
from arc_dist.snapshot.layout import SlotDamaged, SlotHeader
from arc_dist.snapshot.reserve import remove, reserve


class BaseFile:
    """One base, mapped.

    Attributes:
        number: names the file.
        nbytes: of the file.
    """

    def __init__(self, number: int, mapping: mmap.mmap) -> None:
        self.number = number
        self.nbytes = len(mapping)
        self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)

    def view(self, byte_offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A tensor in it; only to be read once a slot names the base."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self._bytes.narrow(0, byte_offset, nbytes).view(dtype).view(tuple(shape))


class Bases:
    """The base files of one directory. One process makes and removes them; others read, with `private`."""

    def __init__(self, directory: Path, *, private: bool = False) -> None:
        self._directory = directory
        self._private = private
        self._open: dict[int, BaseFile] = {}
        self._last = 0

    def of(self, header: SlotHeader) -> BaseFile | None:
        """The base that a slot names; None when it names none.

        Raises:
            SlotDamaged: it is gone, or shorter than it was.
        """
        if not header.base:
            return None
        found = self._open.get(header.base)
        if found is None:
            found = self._open[header.base] = self._map(header.base)
        if found.nbytes < header.base_bytes:
            raise SlotDamaged(f"{layout.base_path(self._directory, header.base)} is cut short; use another snapshot")
        return found

    def make(self, nbytes: int) -> BaseFile | None:
        """A new base of `nbytes`, to be filled; None when there is no room for it."""
        taken = [number for number, _ in layout.base_files(self._directory)]
        number = self._last = max([self._last, *self._open, *taken]) + 1
        descriptor = reserve(layout.base_path(self._directory, number), layout.align(nbytes, layout.PAGE_BYTES))
        if descriptor is None:
            return None
        os.close(descriptor)
        made = self._open[number] = self._map(number)
        return made

    def remove_all_but(self, numbers: Collection[int]) -> None:
        """Removes what nobody needs, also what a process that died has left half made."""
        for number, path in layout.base_files(self._directory):
            if number not in numbers:
                self._open.pop(number, None)
                remove(path)

    def _map(self, number: int) -> BaseFile:
        path = layout.base_path(self._directory, number)
        try:
            with path.open("rb" if self._private else "r+b") as file:
                access = mmap.ACCESS_COPY if self._private else mmap.ACCESS_WRITE
                return BaseFile(number, mmap.mmap(file.fileno(), 0, access=access))
        except (FileNotFoundError, ValueError) as error:
            raise SlotDamaged(f"{path}, which a snapshot needs, is gone; another snapshot must be used") from error
