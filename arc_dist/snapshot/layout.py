"""Bytes of a rank's shared-memory directory: snapshot slots, the status page, the last exception, ownership.

Standard library only: a supervisor reads here what a training process wrote, also after that process was killed.

A directory (`directory.py` makes and collects them) holds::

    slot-<k>.bin     one snapshot each: header page | tensor bytes | table (JSON) | small objects
    base-<n>.bin     bytes of tensors that several snapshots have in common (base.py)
    progress         where in its step the training process is (progress.py)
    stacks.txt       where its threads are, when its supervisor asks (supervisor/stacks.py)
    status           one page that the training process updates without a system call
    record-<k>.bin   the newest step boundary (record.py)
    exception.json   the uncaught exception that ended the training process

**Torn writes.** The fault is: the writer dies (SIGKILL) between any two of its stores. Memory survives the process,
so what was stored stays stored, in program order. A slot's state word is therefore set to WRITING before anything
else of the slot is touched, and to VALID after everything else; `inspect` lists VALID slots only. A base is written
before the first slot that names it is sealed, never after, and removed only when no VALID slot names it. The status
page and the records are double-buffered behind a sequence number for the same reason. Loss of power is not in this
fault model: nothing here survives it, and the checkpoint store is for that.

All words are native: the memory is never seen by another machine.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import mmap
import os
import re
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arc_dist.errors import ArcError

PAGE_BYTES = 4096
ALIGN_BYTES = 64  # of every tensor: a cache line, and more than any dtype needs
VERSION = 2

_MAGIC = b"ARCSLOT\x00"
_HEADER = struct.Struct("@8s18Q")  # the words of `_Word`, after the magic
_SLOT_NAME = re.compile(r"slot-(\d+)\.bin")
_BASE_NAME = re.compile(r"base-(\d+)\.bin")


class SlotState(enum.IntEnum):
    """The state word of a slot. Only the lowest byte differs, so that no reader can see a mixture of two states."""

    EMPTY = 0
    WRITING = 1
    VALID = 2


class _Word(enum.IntEnum):
    """Index of each 8-byte word of a slot's header; 0 is the magic."""

    VERSION = 1
    STATE = 2  # changes after the header was sealed, as does CERTIFIED; the checksum covers the words behind them
    CERTIFIED = 3
    SEQUENCE = 4
    STEP = 5
    GENERATION = 6
    FLAGS = 7
    TENSOR_BYTES = 8
    TABLE_OFFSET = 9
    TABLE_BYTES = 10
    TABLE_CRC = 11
    SMALL_OFFSET = 12
    SMALL_BYTES = 13
    SMALL_CRC = 14
    FILE_BYTES = 15
    BASE = 16
    BASE_BYTES = 17
    HEADER_CRC = 18


_FLAG_PARTING = 1
_FLAG_REPLICATED = 2


class SlotDamaged(ArcError):
    """A slot's table or small objects are not what its header says, or the slot was overwritten while it was read."""


@dataclasses.dataclass(frozen=True)
class SlotInfo:
    """A valid snapshot, as `inspect` lists it.

    Attributes:
        slot: number of the slot in its directory.
        step: number of committed steps that the state contains (0: before the first).
        generation: the generation that wrote it.
        certified: enough healthy verdicts followed for it to be trusted.
        nbytes: bytes of the tensors that it gives back, wherever and however they are held.
        parting: written by a rank that had lost a peer, at the last committed step.
        replicated: every tensor is the same on all ranks (plain DDP), so that a peer's copy can be used.
        sequence: grows with every snapshot written to the directory; the higher of two was written later.
    """

    slot: int
    step: int
    generation: int
    certified: bool
    nbytes: int
    parting: bool
    replicated: bool = False
    sequence: int = 0


@dataclasses.dataclass(frozen=True)
class SlotHeader:
    """The sealed part of a slot's header, and where its table and small objects lie (bytes from the file's start).

    `base` is the number of the base file that holds some of its tensors, and `base_bytes` its size; 0 for none.
    """

    sequence: int
    step: int
    generation: int
    parting: bool
    replicated: bool
    tensor_bytes: int
    table_offset: int
    table_bytes: int
    table_crc: int
    small_offset: int
    small_bytes: int
    small_crc: int
    file_bytes: int
    base: int = 0
    base_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class TableEntry:
    """Where one tensor lies in a slot. The table is JSON of these: a slot can be read knowing nothing of the model.

    `held` is the dtype of the `nbytes` bytes at `byte_offset`; a tensor of another `dtype` was rounded to it. With
    `in_base` the offset is one in the base file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    replicated: bool
    byte_offset: int
    nbytes: int
    held: str
    in_base: bool = False


def slot_path(directory: Path, slot: int) -> Path:
    """The file of a slot."""
    return directory / f"slot-{slot}.bin"


def base_path(directory: Path, number: int) -> Path:
    """The file of a base; numbers begin with 1."""
    return directory / f"base-{number}.bin"


def align(nbytes: int, to: int = ALIGN_BYTES) -> int:
    """`nbytes` rounded up to a multiple of `to`."""
    return -(-nbytes // to) * to


# --- slots: writing ---------------------------------------------------------------------------------------------------


def begin_write(buffer: memoryview) -> None:
    """Marks a slot as being written. Call it before any other byte of the slot is touched."""
    words = buffer[:PAGE_BYTES].cast("Q")
    words[_Word.STATE] = SlotState.WRITING
    words[_Word.CERTIFIED] = 0


def seal(buffer: memoryview, header: SlotHeader) -> None:
    """Writes the header and then, last of all, the state word VALID."""
    flags = _FLAG_PARTING * header.parting | _FLAG_REPLICATED * header.replicated
    _HEADER.pack_into(
        buffer, 0, _MAGIC, VERSION, SlotState.WRITING, 0,
        header.sequence, header.step, header.generation, flags, header.tensor_bytes,
        header.table_offset, header.table_bytes, header.table_crc,
        header.small_offset, header.small_bytes, header.small_crc, header.file_bytes,
        header.base, header.base_bytes, 0,
    )  # fmt: skip
    words = buffer[:PAGE_BYTES].cast("Q")
    words[_Word.HEADER_CRC] = _header_crc(buffer)
    words[_Word.STATE] = SlotState.VALID


def set_certified(buffer: memoryview, certified: bool) -> None:
    """Changes the certified word of a valid slot."""
    buffer[:PAGE_BYTES].cast("Q")[_Word.CERTIFIED] = int(certified)


def set_empty(buffer: memoryview) -> None:
    """Gives a slot up: it is listed no more."""
    buffer[:PAGE_BYTES].cast("Q")[_Word.STATE] = SlotState.EMPTY


def encode_table(entries: list[TableEntry]) -> bytes:
    """The table as JSON bytes."""
    return json.dumps({"version": VERSION, "tensors": [vars(entry) for entry in entries]}).encode()


# --- slots: reading ---------------------------------------------------------------------------------------------------


def read_state(buffer: memoryview | bytes) -> SlotState | None:
    """The state word, or None when this is no slot of this version."""
    if len(buffer) < PAGE_BYTES:
        return None
    magic, version, state, *_ = _HEADER.unpack_from(buffer, 0)
    if magic != _MAGIC or version != VERSION or state not in iter(SlotState):
        return None
    return SlotState(state)


def read_header(buffer: memoryview | bytes) -> SlotHeader | None:
    """The header of a valid slot; None when the slot is empty, torn, of another version, or its header is damaged."""
    if read_state(buffer) is not SlotState.VALID:
        return None
    words = _HEADER.unpack_from(buffer, 0)
    if words[_Word.HEADER_CRC] != _header_crc(buffer):
        return None
    return SlotHeader(
        sequence=words[_Word.SEQUENCE],
        step=words[_Word.STEP],
        generation=words[_Word.GENERATION],
        parting=bool(words[_Word.FLAGS] & _FLAG_PARTING),
        replicated=bool(words[_Word.FLAGS] & _FLAG_REPLICATED),
        tensor_bytes=words[_Word.TENSOR_BYTES],
        table_offset=words[_Word.TABLE_OFFSET],
        table_bytes=words[_Word.TABLE_BYTES],
        table_crc=words[_Word.TABLE_CRC],
        small_offset=words[_Word.SMALL_OFFSET],
        small_bytes=words[_Word.SMALL_BYTES],
        small_crc=words[_Word.SMALL_CRC],
        file_bytes=words[_Word.FILE_BYTES],
        base=words[_Word.BASE],
        base_bytes=words[_Word.BASE_BYTES],
    )


def slot_info(slot: int, buffer: memoryview | bytes) -> SlotInfo | None:
    """What `inspect` says about one slot; None unless it is valid."""
    header = read_header(buffer)
    if header is None:
        return None
    return SlotInfo(
        slot=slot,
        step=header.step,
        generation=header.generation,
        certified=_HEADER.unpack_from(buffer, 0)[_Word.CERTIFIED] == 1,
        nbytes=header.tensor_bytes,
        parting=header.parting,
        replicated=header.replicated,
        sequence=header.sequence,
    )


def inspect(directory: Path | str) -> list[SlotInfo]:
    """Lists the valid snapshots of a directory, by slot. A torn or empty slot, or one that vanishes, is not listed."""
    found: list[SlotInfo] = []
    for slot, path in slot_files(Path(directory)):
        try:
            with path.open("rb", buffering=0) as file:
                page = file.read(PAGE_BYTES)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            continue
        header = read_header(page)
        info = slot_info(slot, page)
        if header is not None and info is not None and header.file_bytes <= size and has_base(Path(directory), header):
            found.append(info)
    return found


def slot_files(directory: Path) -> list[tuple[int, Path]]:
    """The slot files of a directory with their numbers, in order; none when there is no such directory."""
    return _numbered(directory, _SLOT_NAME)


def base_files(directory: Path) -> list[tuple[int, Path]]:
    """The base files of a directory with their numbers, in order; none when there is no such directory."""
    return _numbered(directory, _BASE_NAME)


def has_base(directory: Path, header: SlotHeader) -> bool:
    """Whether the base that a slot needs is there; True when it needs none."""
    if not header.base:
        return True
    try:
        return base_path(directory, header.base).stat().st_size >= header.base_bytes
    except FileNotFoundError:
        return False


def _numbered(directory: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted((int(match[1]), directory / name) for name in names if (match := pattern.fullmatch(name)))


def read_table(buffer: memoryview, header: SlotHeader) -> list[TableEntry]:
    """The table of a valid slot.

    Raises:
        SlotDamaged: the bytes are not those that were sealed.
    """
    table = json.loads(_section(buffer, header.table_offset, header.table_bytes, header.table_crc, "table"))
    return [_entry(entry) for entry in table["tensors"]]


def _entry(fields: dict[str, Any]) -> TableEntry:
    lists = {key: tuple(fields[key]) for key in ("shape", "global_shape", "offsets")}
    return TableEntry(**{**fields, **lists})


def read_small(buffer: memoryview, header: SlotHeader) -> bytes:
    """The bytes of the small objects of a valid slot.

    Raises:
        SlotDamaged: the bytes are not those that were sealed.
    """
    return _section(buffer, header.small_offset, header.small_bytes, header.small_crc, "small objects")


def _section(buffer: memoryview, offset: int, nbytes: int, crc: int, what: str) -> bytes:
    data = bytes(buffer[offset : offset + nbytes])
    if len(data) != nbytes or zlib.crc32(data) != crc:
        raise SlotDamaged(f"the {what} of a snapshot differ from what was written; another snapshot must be used")
    return data


def _header_crc(buffer: memoryview | bytes) -> int:
    return zlib.crc32(buffer[_Word.SEQUENCE * 8 : _Word.HEADER_CRC * 8])


# --- the status page --------------------------------------------------------------------------------------------------


class Phase(enum.IntEnum):
    """What the training process is doing, as far as its supervisor needs to know before ending it."""

    NONE = 0  # not guarded yet, or a script that never is: nothing to wait for
    STARTING = 1
    STEPPING = 2
    PARTING = 3  # a peer is lost; the last committed step is being written
    PARTED = 4  # it is written
    DONE = 5
    LEAVING = 6  # all ranks agreed to go; the last checkpoint is being written


@dataclasses.dataclass(frozen=True)
class Status:
    """One reading of the status page.

    Attributes:
        phase: see `Phase`.
        generation: of the process that wrote it.
        step: number of steps committed (0: none yet).
        progress_ns: `time.monotonic_ns()` of the last write; comparable between processes of a host.
        pid: of the process that wrote it, in its own pid namespace.
    """

    phase: Phase
    generation: int
    step: int
    progress_ns: int
    pid: int


class StatusPage:
    """The page in which a training process says where it is; written and read without system calls.

    Two copies behind a sequence number: word 0 is the number of writes, and copy `writes % 2` is the newest. A writer
    that dies in the middle leaves the older copy as the newest whole one. One writer, any number of readers.
    """

    _NAME = "status"
    _COPY_WORDS = 8
    _READ_ATTEMPTS = 1000

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._words = memoryview(mapping).cast("q")
        self._pid = os.getpid()

    @classmethod
    def create(cls, directory: Path | str) -> StatusPage:
        """Creates the page, or sets an existing one back to phase NONE, generation 0, step 0."""
        descriptor = os.open(Path(directory) / cls._NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, PAGE_BYTES)  # a page that cannot be had must not become a SIGBUS later
            page = cls(mmap.mmap(descriptor, PAGE_BYTES))
        finally:
            os.close(descriptor)
        page.write(phase=Phase.NONE, generation=0, step=0)
        return page

    @classmethod
    def open(cls, directory: Path | str) -> StatusPage:
        """Opens the page of a directory.

        Raises:
            FileNotFoundError: nobody has created it.
        """
        descriptor = os.open(Path(directory) / cls._NAME, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(descriptor, PAGE_BYTES))
        finally:
            os.close(descriptor)

    def write(
        self, *, phase: Phase | int | None = None, step: int | None = None, generation: int | None = None
    ) -> None:
        """Says what changed (what is not given stays) and that there was progress just now."""
        words = self._words
        writes = words[0]
        old = self._COPY_WORDS * (1 + writes % 2)
        new = self._COPY_WORDS * (1 + (writes + 1) % 2)
        words[new] = words[old] if phase is None else phase
        words[new + 1] = words[old + 1] if generation is None else generation
        words[new + 2] = words[old + 2] if step is None else step
        words[new + 3] = time.monotonic_ns()
        words[new + 4] = self._pid
        words[0] = writes + 1

    def read(self) -> Status:
        """The newest whole copy. A reader overtaken by two writes tries again, a bounded number of times."""
        words = self._words
        copy: list[int] = []
        for _ in range(self._READ_ATTEMPTS):
            writes = words[0]
            start = self._COPY_WORDS * (1 + writes % 2)
            copy = words[start : start + 5].tolist()
            if words[0] == writes:
                break
        return Status(phase=Phase(copy[0]), generation=copy[1], step=copy[2], progress_ns=copy[3], pid=copy[4])

    def close(self) -> None:
        """Unmaps the page; the file stays."""
        self._words.release()
        self._mapping.close()


# --- the last exception -----------------------------------------------------------------------------------------------

_EXCEPTION = "exception.json"


def write_exception(directory: Path | str, exception: Mapping[str, object]) -> None:
    """Leaves what ended the training process for its supervisor: whole or not at all.

    Args:
        directory: this rank's directory.
        exception: ``{"type", "message", "step", "traceback", "generation", "rank", "frame", "batch"}``; `frame` is the
            line that raised it, `batch` a `protocol.batches.BatchPlace` as a mapping, or None.
    """
    path = Path(directory) / _EXCEPTION
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(json.dumps(exception), encoding="utf-8")
    draft.rename(path)


def read_exception(directory: Path | str) -> dict[str, object] | None:
    """What `write_exception` left, or None."""
    try:
        return json.loads((Path(directory) / _EXCEPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def clear_exception(directory: Path | str) -> None:
    """Removes the exception of an earlier generation."""
    (Path(directory) / _EXCEPTION).unlink(missing_ok=True)
