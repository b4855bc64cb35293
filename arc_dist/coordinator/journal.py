"""Remembers decisions: append-only lines, each a whole state with its checksum; the last one is the truth.

A line is ``<crc32 in hex> <JSON>``. It is on disk when `append` returns. Because each line says everything, reading is
taking the last one, and compaction is keeping only it, which happens at every opening.

Opening raises the *epoch*, durably, before anything else: it tells this coordinator from an earlier one that may still
believe itself alive. The file is locked while it is open. Where the lock is lost (a host that was away too long, a file
system that forgets locks), the newer coordinator has put a file of its own in the older one's place: the older one then
finds, before it tells anybody, that what it has appended is not in the journal, and is fenced.

What a crash can leave behind is a torn last line, whose decision was told to nobody; it is dropped. Damage anywhere
else is no crash but an alteration, and nothing is decided on it.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import Any, Protocol

from arc_dist.errors import ConfigError, Deposed, StoreCorrupt, StoreError

_COMPACT_BYTES = 16 << 20


class JournalFile(Protocol):
    """The file of a journal, locked for one coordinator. Every method raises OSError when it did not do its work."""

    @property
    def nbytes(self) -> int: ...

    def read(self) -> bytes | None:
        """All of it; None when there is none yet."""
        ...

    def replace(self, data: bytes) -> None:
        """Puts a file with `data` in its place, at once and durably, and appends to that from now on."""
        ...

    def append(self, data: bytes) -> None:
        """Adds `data`, durably. After an error any part of it may be there."""
        ...

    def truncate(self, nbytes: int) -> None: ...

    def is_in_place(self) -> bool:
        """Whether it is still the file that the next coordinator will read."""
        ...

    def close(self) -> None: ...


class Journal:
    """An open journal. Use `Journal.open`; close it, or let the process end.

    Attributes:
        epoch: number of times this journal was opened, from 1.
        last: the last state that was appended before this opening, or None.
    """

    def __init__(self, path: Path, file: JournalFile, epoch: int, last: dict[str, Any] | None) -> None:
        self.path = path
        self.epoch = epoch
        self.last = last
        self._file: JournalFile | None = file
        self._size_bytes = file.nbytes

    @staticmethod
    def open(path: Path, file: JournalFile | None = None) -> Journal:
        """Locks and reads the journal, and begins a new epoch. Creates it (mode 0600) when it is not there.

        Args:
            path: where it is.
            file: its file, locked already, which is closed when this fails; None opens and locks the one at `path`.

        Raises:
            ConfigError: another coordinator has it open, or the place cannot be written.
            StoreCorrupt: a line other than the last was altered.
        """
        file = _lock(path) if file is None else file
        try:
            entry = _last_entry(path, file.read())
            epoch = 1 + (entry["epoch"] if entry else 0)
            last = entry["state"] if entry else None
            file.replace(_line({"epoch": epoch, "state": last}))
        except OSError as error:
            file.close()
            raise ConfigError(f"{path} cannot be written: {error}. Set ARC_RUN_DIR to another one.") from error
        except StoreCorrupt:
            file.close()
            raise
        return Journal(path, file, epoch, last)

    def append(self, state: dict[str, Any]) -> None:
        """Writes a whole state; it is durable when this returns.

        Raises:
            StoreError: it is not durable. What was written of it is taken back, so that the file stays readable.
            Deposed: another coordinator has taken the journal over.
        """
        assert self._file is not None  # the service appends to no journal that it has closed
        line = _line({"epoch": self.epoch, "state": state})
        try:
            if self._size_bytes > _COMPACT_BYTES:
                self._require_place()
                self._file.replace(line)
                self._size_bytes = self._file.nbytes
                return
            self._file.append(line)
            self._require_place()
        except OSError as error:
            try:
                self._file.truncate(self._size_bytes)
            except OSError:
                pass  # a torn last line is what `open` expects
            self._require_place()  # one that cannot write must not decide beside one that can
            raise StoreError(f"{self.path}: the decision is not on disk: {error}", path=str(self.path)) from error
        self._size_bytes += len(line)

    def _require_place(self) -> None:
        assert self._file is not None
        if not self._file.is_in_place():
            raise Deposed(f"{self.path} was taken over by another coordinator; this one may not decide any more")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(path: Path) -> _LockedFile:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be written: {error}. Set ARC_RUN_DIR to another one.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(
            f"{path} is in use by another job's coordinator. Give this job a name (torchrun --rdzv-id) or a "
            "directory (ARC_RUN_DIR) of its own."
        ) from None
    return _LockedFile(path, lock)


class _LockedFile:
    """A `JournalFile` on a disk of the operating system."""

    def __init__(self, path: Path, lock: int) -> None:
        self._path = path
        self._lock = lock
        self._file = -1

    @property
    def nbytes(self) -> int:
        return os.fstat(self._file).st_size

    def read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, data: bytes) -> None:
        file = _rewrite(self._path, data)
        if self._file >= 0:
            os.close(self._file)
        self._file = file

    def append(self, data: bytes) -> None:
        _write_all(self._file, data)
        os.fdatasync(self._file)

    def is_in_place(self) -> bool:
        mine = os.fstat(self._file)
        try:
            present = os.stat(self._path)
        except FileNotFoundError:
            return False  # it was moved away, and what is appended to it is lost
        except OSError:
            return True  # nobody can say; the disk is ill, and that is told
        return (present.st_ino, present.st_dev) == (mine.st_ino, mine.st_dev)

    def truncate(self, nbytes: int) -> None:
        os.ftruncate(self._file, nbytes)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        os.close(self._lock)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _last_entry(path: Path, content: bytes | None) -> dict[str, Any] | None:
    """The last whole entry; every line but the last must be whole."""
    if content is None:
        return None
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    last: dict[str, Any] | None = None
    for number, line in enumerate(lines, start=1):
        entry = _parse(line)
        if entry is None:
            if number == len(lines):
                break  # torn: nobody was told
            raise StoreCorrupt(
                f"{path}: line {number} was altered. Nothing is decided on it; move the file away to start afresh.",
                path=str(path),
                line=number,
            )
        last = entry
    return last


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def _rewrite(path: Path, data: bytes) -> int:
    """Replaces the file by one with these bytes alone, durably and at once. Returns it open for appending."""
    draft = path.with_suffix(".new")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        _write_all(file, data)
        os.fsync(file)
        os.replace(draft, path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError:
        os.close(file)
        raise
    return file


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
