"""One slot of the ring: a file in shared memory, mapped, with a tensor view for everything in it."""

from __future__ import annotations

import dataclasses
import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from arc_dist.checkpoint_store.codec import decode, encode
from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.snapshot import layout
from arc_dist.snapshot.base import Bases
from arc_dist.snapshot.layout import SlotDamaged, SlotHeader, SlotInfo
from arc_dist.snapshot.plan import Plan
from arc_dist.snapshot.reserve import open_file, remove, reserve
from arc_dist.snapshot.tensors import bytes_of, tensor_of

_logger = logging.getLogger(__name__)

_SMALL_HEADROOM_BYTES = 256 << 10  # small objects grow a little with time; a slot need not grow with them
_BLOB_HEAD = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A snapshot as it lies in memory. Unpacks into ``specs, tensors, small``.

    Attributes:
        specs: of the tensors.
        tensors: views of the slot's memory, valid until the slot is written again; read only. One that is held
            rounded has a narrower dtype than its spec.
        small: the small objects, decoded; independent of the slot.
        info: step, generation and so on.
    """

    specs: list[TensorSpec]
    tensors: list[torch.Tensor]
    small: dict[str, Any]
    info: SlotInfo
    page: memoryview = dataclasses.field(repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.specs, self.tensors, self.small))

    def check(self) -> None:
        """Raises SlotDamaged when the slot has been written or given up since. Call it after copying from a peer's."""
        header = layout.read_header(self.page)
        if header is None or header.sequence != self.info.sequence:
            raise SlotDamaged(
                f"the snapshot of step {self.info.step} was overwritten while it was read. Restore another one.",
                step=self.info.step,
            )


class Slot:
    """A slot's file and its mapping. One process writes it; see layout.py for what a reader may see.

    Args:
        path: of the file; it need not exist.
        number: of the slot.
        bases: of the same directory.
        on_disk: the file is to lie in $TMPDIR.
        compact: the file becomes smaller when less is to be held.
    """

    def __init__(self, path: Path, number: int, bases: Bases, *, on_disk: bool = False, compact: bool = False) -> None:
        self.number = number
        self._path = path
        self._bases = bases
        self._on_disk = on_disk
        self._compact = compact
        self._base: torch.Tensor | None = None  # all bytes of the file
        self._buffer = memoryview(bytes(layout.PAGE_BYTES))  # the same as a memoryview
        self._plan: Plan | None = None
        self._views: list[torch.Tensor] = []
        self._table_on_file: Plan | None = None
        self._pinned_address: int | None = None
        if path.exists() and path.stat().st_size >= layout.PAGE_BYTES:
            self._map(open_file(path))

    # ------------------------------------------------------------------ reading

    def info(self) -> SlotInfo | None:
        """What the slot holds; None unless that is valid."""
        return layout.slot_info(self.number, self._buffer)

    def base_number(self) -> int:
        """The base that a valid slot needs; 0 for none."""
        header = layout.read_header(self._buffer)
        return header.base if header is not None else 0

    def plan(self) -> Plan:
        """How a valid slot is laid out."""
        self.tensors()
        assert self._plan is not None
        return self._plan

    def tensors(self) -> tuple[list[TensorSpec], list[torch.Tensor]]:
        """The specs and views of a valid slot."""
        header = layout.read_header(self._buffer)
        assert header is not None, f"slot {self.number} holds no snapshot"
        if self._plan is None or self._table_on_file is not self._plan:
            self._read_plan(header)
        assert self._plan is not None
        return self._plan.specs, self._views

    def snapshot(self) -> Snapshot:
        """The whole snapshot of a valid slot."""
        specs, tensors = self.tensors()
        header, info = layout.read_header(self._buffer), self.info()
        assert header is not None
        assert info is not None
        return Snapshot(specs, tensors, unpack_small(layout.read_small(self._buffer, header)), info, self._buffer)

    def _read_plan(self, header: SlotHeader) -> None:
        plan = Plan.read(self._buffer, header, self._bases.of(header), f"slot {self.number}")
        self._take_plan(plan)
        self._table_on_file = plan

    # ------------------------------------------------------------------ writing

    def write(
        self,
        plan: Plan,
        tensors: list[torch.Tensor],
        small: bytes,
        *,
        step: int,
        generation: int,
        parting: bool,
        sequence: int,
        replica_key: int = 0,
    ) -> bool:
        """Replaces what the slot holds. False when no memory is left for it; the slot is empty then."""
        if self._base is not None:
            layout.begin_write(self._buffer)
        if not self._reserve(plan.small_offset + len(small)):
            return False
        if self._plan is not plan:
            self._take_plan(plan)
        if plan.own is None:
            copy_in(self._views, tensors)
        else:
            copy_in([self._views[index] for index in plan.own], [tensors[index] for index in plan.own])
        buffer = self._buffer
        if self._table_on_file is not plan:
            buffer[plan.table_offset : plan.table_offset + len(plan.table)] = plan.table
            self._table_on_file = plan
        buffer[plan.small_offset : plan.small_offset + len(small)] = small
        layout.seal(
            buffer,
            SlotHeader(
                sequence=sequence,
                step=step,
                generation=generation,
                parting=parting,
                replicated=plan.replicated,
                tensor_bytes=plan.tensor_bytes,
                table_offset=plan.table_offset,
                table_bytes=len(plan.table),
                table_crc=plan.table_crc,
                small_offset=plan.small_offset,
                small_bytes=len(small),
                small_crc=zlib.crc32(small),
                file_bytes=plan.small_offset + len(small),
                base=plan.base.number if plan.base is not None else 0,
                base_bytes=plan.base.nbytes if plan.base is not None else 0,
                replica_key=replica_key,
            ),
        )
        return True

    def certify(self) -> None:
        """Marks a valid slot as trusted."""
        layout.set_certified(self._buffer, True)

    def drop(self) -> None:
        """Gives up what the slot holds; its bytes stay readable through views taken before."""
        if self._base is not None:
            layout.set_empty(self._buffer)

    def close(self) -> None:
        """Lets the mapping go, as far as no view of it is held; the file stays."""
        self._unmap()

    def release(self) -> None:
        """Gives the slot and its memory up; views taken before keep theirs."""
        self.drop()
        self._unmap()
        remove(self._path)

    def _reserve(self, nbytes: int) -> bool:
        """Makes the file and its mapping large enough, all pages in place."""
        if self._base is not None and self._is_misplaced(nbytes):
            self.release()
        if self._base is not None and self._base.numel() >= nbytes:
            return True
        self._unmap()
        size = layout.align(nbytes + _SMALL_HEADROOM_BYTES, layout.PAGE_BYTES)
        descriptor = reserve(self._path, size, on_disk=self._on_disk)
        if descriptor is None:
            return False
        self._map(descriptor)
        layout.begin_write(self._buffer)
        return True

    def _is_misplaced(self, nbytes: int) -> bool:
        """Whether the present file holds much more than is needed, or an earlier process had it in memory."""
        assert self._base is not None
        is_large = self._base.numel() > nbytes + nbytes // 8 + 2 * _SMALL_HEADROOM_BYTES
        return (self._compact and is_large) or (self._on_disk and not self._path.is_symlink())

    def _map(self, descriptor: int) -> None:
        """Maps all of an open file, and closes the descriptor."""
        try:
            # Populated now: the first copy must not pay for a page fault every 4096 bytes.
            mapping = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        finally:
            os.close(descriptor)
        self._buffer = memoryview(mapping)
        self._base = torch.frombuffer(mapping, dtype=torch.uint8)
        self._plan = self._table_on_file = None
        self._views = []
        if torch.cuda.is_initialized():
            self._pin_memory(self._base)

    def _unmap(self) -> None:
        if self._pinned_address is not None:
            _cuda_runtime().cudaHostUnregister(self._pinned_address)
            self._pinned_address = None
        self._base, self._buffer = None, memoryview(bytes(layout.PAGE_BYTES))
        self._plan = self._table_on_file = None
        self._views = []

    def _pin_memory(self, base: torch.Tensor) -> None:
        """Lets the GPU copy into the slot by itself. Slower but correct when the driver refuses."""
        error = _cuda_runtime().cudaHostRegister(base.data_ptr(), base.numel(), 0)
        if int(error) == 0:
            self._pinned_address = base.data_ptr()
        else:
            _logger.warning("the GPU driver cannot pin %s (error %d); snapshots are slower", self._path, int(error))

    def _take_plan(self, plan: Plan) -> None:
        assert self._base is not None
        self._views = plan.views(self._base)
        self._plan = plan
        self._table_on_file = None


def read_peer(path: Path, number: int) -> Snapshot | None:
    """A snapshot in another process's directory, without any means to change it; None when it is not valid.

    Raises:
        FileNotFoundError: there is no such slot.
        SlotDamaged: the slot contradicts itself.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < layout.PAGE_BYTES:
            return None
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    buffer = memoryview(mapping)
    header, info = layout.read_header(buffer), layout.slot_info(number, buffer)
    if header is None or info is None or header.file_bytes > len(buffer):
        return None
    plan = Plan.read(buffer, header, Bases(path.parent, private=True).of(header), str(path))
    views = plan.views(torch.frombuffer(mapping, dtype=torch.uint8))
    return Snapshot(plan.specs, views, unpack_small(layout.read_small(buffer, header)), info, buffer)


def read_small_objects(directory: Path, number: int) -> dict[str, Any]:
    """The small objects in a slot of which nothing else is needed: a note (peers/image.py) has no tensors.

    Raises:
        SlotDamaged: the slot is not valid.
    """
    buffer = memoryview(layout.slot_path(directory, number).read_bytes())
    header = layout.read_header(buffer)
    if header is None:
        raise SlotDamaged(f"slot {number} of {directory} holds no valid note; another snapshot must be used")
    return unpack_small(layout.read_small(buffer, header))


def copy_in(views: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """Copies live tensors into a slot. From GPUs on side streams, all at once, and waits for the end.

    The GPU branch has not been tested on a GPU yet.
    """
    if not tensors:
        return  # all that there is lies in a base
    with torch.no_grad():
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        if not devices:
            torch._foreach_copy_(views, tensors)  # type: ignore[reportPrivateImportUsage]
            return
        streams: list[torch.cuda.Stream] = []
        for device in devices:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            streams.append(stream)
            with torch.cuda.stream(stream):
                for view, tensor in zip(views, tensors, strict=True):
                    if tensor.device == device:
                        view.copy_(tensor, non_blocking=True)
        for view, tensor in zip(views, tensors, strict=True):
            if not tensor.is_cuda:
                view.copy_(tensor)
        for stream in streams:
            stream.synchronize()


def pack_small(small: dict[str, Any]) -> bytes:
    """Small objects as bytes: JSON, and the tensors in them.

    Raises:
        ConfigError: something in it that the codec does not know; the message has its path.
    """
    value, tensors = encode(small)
    rows: list[list[Any]] = []
    parts: list[bytes] = []
    offset = 0
    for path, tensor in tensors.items():
        data = bytes_of(tensor)
        rows.append([path, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset, len(data)])
        parts.append(data)
        offset += len(data)
    head = json.dumps({"value": value, "tensors": rows}, allow_nan=False).encode()
    return b"".join([_BLOB_HEAD.pack(len(head)), head, *parts])


def unpack_small(data: bytes) -> dict[str, Any]:
    """The inverse of `pack_small`. The tensors have memory of their own."""
    (head_bytes,) = _BLOB_HEAD.unpack_from(data)
    start = _BLOB_HEAD.size + head_bytes
    head = json.loads(data[_BLOB_HEAD.size : start])
    tensors: dict[str, torch.Tensor] = {}
    for path, dtype, shape, offset, nbytes in head["tensors"]:
        tensors[path] = tensor_of(data[start + offset : start + offset + nbytes], dtype, shape)
    return decode(head["value"], tensors)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()
