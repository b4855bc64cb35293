"""A snapshot as it travels: the bytes of its slot behind the header, those of its base, and what describes both.

The receiver writes the same slot file anew, under a number of its own and with a base number of its own, by the rules
of `snapshot/layout.py`: it is WRITING until every byte is there and has the right digest, and VALID last of all. So
what is left of a transfer that broke off is a torn slot, which nobody lists.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arc_dist.checkpoint_store.format import FAST_HASH, new_hash
from arc_dist.errors import StoreCorrupt
from arc_dist.snapshot import layout, reserve
from arc_dist.snapshot.layout import SlotDamaged, SlotHeader

_HASH_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """A valid slot, mapped for reading.

    Attributes:
        header: as it was when the slot was opened.
        body: the slot's bytes behind the header page.
        base: the bytes of its base; empty without one.
    """

    header: SlotHeader
    body: memoryview
    base: memoryview
    page: memoryview = dataclasses.field(repr=False)

    @staticmethod
    def open(directory: Path, slot: int) -> Image:
        """Opens a slot for reading.

        Raises:
            SlotDamaged: it holds no valid snapshot, or its base is gone.
            FileNotFoundError: there is no such slot.
        """
        view = _map(layout.slot_path(directory, slot))
        header = layout.read_header(view)
        if header is None or header.file_bytes > len(view) or not layout.has_base(directory, header):
            raise SlotDamaged(f"slot {slot} of {directory} holds no valid snapshot")
        base = memoryview(b"")
        if header.base:
            base = _map(layout.base_path(directory, header.base))[: header.base_bytes]
        body = view[layout.PAGE_BYTES : header.file_bytes]
        return Image(header=header, body=body, base=base, page=view[: layout.PAGE_BYTES])

    def is_unchanged(self) -> bool:
        """Whether the slot still holds what it held when it was opened; what was read before is whole then."""
        return layout.read_header(self.page) == self.header

    def parts(self, *, with_base: bool) -> list[memoryview]:
        """What is sent."""
        return [self.body, self.base] if with_base and self.header.base else [self.body]

    def note(self) -> Image:
        """What only the rank itself knows of the snapshot, as an image of a slot without tensors.

        Raises:
            SlotDamaged: the slot was overwritten while it was read.
        """
        start = self.header.small_offset - layout.PAGE_BYTES
        body = memoryview(bytes(self.body[start : start + self.header.small_bytes]))
        if not self.is_unchanged():
            raise SlotDamaged(f"the snapshot of step {self.header.step} was overwritten while it was read")
        header = dataclasses.replace(
            self.header,
            tensor_bytes=0,
            table_offset=layout.PAGE_BYTES,
            table_bytes=0,
            table_crc=0,
            small_offset=layout.PAGE_BYTES,
            file_bytes=layout.PAGE_BYTES + len(body),
            base=0,
            base_bytes=0,
        )
        page = memoryview(bytearray(layout.PAGE_BYTES))
        layout.seal(page, header)
        return Image(header=header, body=body, base=memoryview(b""), page=page)

    def facts(self) -> Facts:
        """The digests of what it holds; reads all of it."""
        return Facts(
            sequence=self.header.sequence,
            generation=self.header.generation,
            step=self.header.step,
            body_digest=digest(self.body),
            base_digest=digest(self.base),
        )


class Draft:
    """A slot that is being received. Fill `parts` and `seal` it; anything else leaves it torn, hence unlisted.

    Args:
        directory: where the slot is to be.
        slot: its number; what it held is gone from here on.
        header: of the original.
        base: number of a base in `directory` that has the right bytes already; 0 to receive one, if there is any.

    Raises:
        PermissionError, OSError: the file cannot be made.
        MemoryError: no room is left in memory or on disk.
    """

    def __init__(self, directory: Path, slot: int, header: SlotHeader, *, base: int = 0) -> None:
        self._directory = directory
        self._slot = slot
        self._path = layout.slot_path(directory, slot)
        self._view = _reserve(self._path, max(header.file_bytes, layout.PAGE_BYTES), is_slot=True)
        self.parts = [self._view[layout.PAGE_BYTES : header.file_bytes]]
        if header.base and not base:
            numbers = [number for number, _ in layout.base_files(directory)]
            base = max(numbers, default=0) + 1
            path = layout.base_path(directory, base)
            view = _reserve(path, layout.align(header.base_bytes, layout.PAGE_BYTES), is_slot=False)
            self.parts.append(view[: header.base_bytes])
        self._header = dataclasses.replace(header, base=base if header.base else 0)

    @property
    def base(self) -> int:
        """The base that the slot will name."""
        return self._header.base

    def seal(self, facts: Facts) -> None:
        """Makes the slot valid and trusted, as the original was.

        Raises:
            StoreCorrupt: the bytes that came are not those that were sent. The slot stays torn.
        """
        if digest(self.parts[0]) != facts.body_digest or (
            len(self.parts) > 1 and digest(self.parts[1]) != facts.base_digest
        ):
            raise StoreCorrupt(
                f"the copy of step {self._header.step} has other bytes than its original: it was altered on its way"
            )
        facts.write(self._directory, self._slot)
        layout.seal(self._view, self._header)
        layout.set_certified(self._view, True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Digests of what a slot holds, kept beside it so that a copy of a copy is compared with the original.

    Attributes:
        sequence: of the original; facts of another snapshot say nothing.
        generation, step: of the snapshot.
        body_digest: of the bytes behind the header page.
        base_digest: of the base's; that of no bytes without one.
    """

    sequence: int
    generation: int
    step: int
    body_digest: str
    base_digest: str

    def write(self, directory: Path, slot: int) -> None:
        path = _facts_path(directory, slot)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        draft.rename(path)

    @staticmethod
    def read(directory: Path, slot: int, header: SlotHeader) -> Facts | None:
        """The facts of the snapshot with this header, or None."""
        try:
            facts = Facts(**json.loads(_facts_path(directory, slot).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        same = (facts.sequence, facts.generation, facts.step) == (header.sequence, header.generation, header.step)
        return facts if same else None


def header_of(fields: Mapping[str, Any]) -> SlotHeader:
    """The header in a message.

    Raises:
        ValueError: it cannot be the header of a slot.
    """
    names = {field.name for field in dataclasses.fields(SlotHeader)}
    if set(fields) != names or not all(type(value) in (int, bool) and 0 <= value < 2**63 for value in fields.values()):
        raise ValueError("the header of a snapshot cannot be understood")
    header = SlotHeader(**fields)
    ends = (header.table_offset + header.table_bytes, header.small_offset + header.small_bytes)
    if (
        header.file_bytes < layout.PAGE_BYTES
        or max(ends) > header.file_bytes
        or bool(header.base) != bool(header.base_bytes)
    ):
        raise ValueError("the header of a snapshot contradicts itself")
    return header


def digest(data: memoryview) -> str:
    """XXH3 (128 bits) of some bytes: finds accidents, not forgery."""
    hasher = new_hash(FAST_HASH)
    for start in range(0, len(data), _HASH_BLOCK_BYTES):
        hasher.update(data[start : start + _HASH_BLOCK_BYTES])
    return hasher.hexdigest()


def _facts_path(directory: Path, slot: int) -> Path:
    return directory / f"facts-{slot}.json"


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < layout.PAGE_BYTES:
            raise SlotDamaged(f"{path} is shorter than a page")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _reserve(path: Path, nbytes: int, *, is_slot: bool) -> memoryview:
    if is_slot and path.exists() and path.stat().st_size >= layout.PAGE_BYTES:
        # Before the file can change: a reader must not find the old header over new bytes.
        with path.open("r+b") as file, mmap.mmap(file.fileno(), layout.PAGE_BYTES) as page:
            view = memoryview(page)
            layout.begin_write(view)
            view.release()
    descriptor = reserve.reserve(path, layout.align(nbytes, layout.PAGE_BYTES))
    if descriptor is None:
        raise MemoryError(f"no room for {nbytes / 1e6:.1f} MB at {path}")
    try:
        view = memoryview(mmap.mmap(descriptor, 0))
    finally:
        os.close(descriptor)
    if is_slot:
        layout.begin_write(view)
    return view
