"""The port between the store and a place that keeps files, with what such a place may be unable to do."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Generator
from typing import Protocol

from arc_dist.errors import (
    ArcError,
    ConfigError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreGone,
    StoreTransient,
)


class Unsupported(ConfigError):
    """This kind of storage cannot do what a checkpoint needs, and no weaker substitute is used in its place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend promises.

    Attributes:
        exclusive_create: a file can be created so that exactly one of several racing writers wins.
        atomic_publish: a file appears under its name only when it is whole.
        durable: data and names are on stable storage when a call returns.
        reserve: space can be reserved before writing.
        private: files are readable by their owner alone.
        shared: other processes that open the same URL see the same files.
    """

    exclusive_create: bool
    atomic_publish: bool
    durable: bool
    reserve: bool
    private: bool
    shared: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory."""

    name: str
    is_directory: bool


class Sink(Protocol):
    """A file being written. It has its name only after `publish`; `discard` leaves nothing behind."""

    def write(self, data: memoryview) -> None: ...

    def publish(self) -> None: ...

    def discard(self) -> None: ...


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Source(Protocol):
    """A file opened for reading at any place, by several threads at once.

    Attributes:
        block_bytes: how much to ask for at once: little enough for the cache of a core that hashes it, and so much that
            a request is worth its way.
    """

    block_bytes: int

    @property
    def nbytes(self) -> int: ...

    def num_streams(self) -> int:
        """How many parts of it are best read at once, by as many threads."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer`; StoreCorrupt when the file ends before it is full."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """A place that keeps files. Paths are relative to its root, with '/' between names; '' is the root.

    Every method raises the errors of `arc_dist.errors`, never a bare OSError.
    """

    @property
    def url(self) -> str:
        """The place, without credentials, for messages."""
        ...

    @property
    def capabilities(self) -> Capabilities: ...

    def prepare(self) -> None:
        """Makes the root usable; StoreGone when what should hold it is not there."""
        ...

    def make_directory(self, path: str) -> None:
        """Creates a directory below the root where that means something; it may exist already."""
        ...

    def list(self, path: str) -> list[Entry]:
        """The names in a directory; StoreGone when it does not exist, ConfigError when it is a file."""
        ...

    def exists(self, path: str) -> bool:
        """Whether a file or directory is there. The root of an object store is there when its bucket is."""
        ...

    def read(self, path: str, max_bytes: int) -> bytes:
        """A whole small file; StoreCorrupt when it is larger than `max_bytes`, StoreGone when it is not there."""
        ...

    def open(self, path: str) -> Source: ...

    def claim(self, directory: str, name: str, data: bytes) -> bool:
        """Creates a directory that holds one file, both at once; False when the directory is taken already."""
        ...

    def create(self, path: str, nbytes: int, *, exclusive: bool) -> Sink:
        """Begins a file of exactly `nbytes`. With `exclusive`, `publish` raises Fenced when the name is taken."""
        ...

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Creates a small file, whole, durable and only if the name is free; False when it is not."""
        ...

    def remove(self, path: str) -> None:
        """Removes a file; nothing happens when it is not there."""
        ...

    def remove_directory(self, path: str) -> None:
        """Removes an empty directory; nothing happens when it is not there."""
        ...

    def sync_directory(self, path: str) -> None:
        """Makes the names in a directory durable, and the names of the directories that lead to it."""
        ...


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_GONE = {errno.ENOENT, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN}
_TRANSIENT = {
    errno.EIO,
    errno.EINTR,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EREMOTEIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}


def store_error(error: OSError, doing: str, where: str) -> ArcError:
    """The error of our tree that says the same as an OSError, with its remedy."""
    code = error.errno
    what = f"{doing} {where}: {error.strerror or type(error).__name__}"
    fields: dict[str, object] = {"file": where, "errno": code}
    if code in _FULL:
        return StoreFull(f"{what}. Free space or raise the quota there, or choose another store.", **fields)
    if code in _DENIED or isinstance(error, PermissionError):
        return StoreDenied(f"{what}. Give this user write permission there, or choose another store.", **fields)
    if code in _GONE or isinstance(error, FileNotFoundError):
        return StoreGone(f"{what}. Create it, or mount what should be there.", **fields)
    if code in _TRANSIENT or isinstance(error, (TimeoutError, ConnectionError)):
        return StoreTransient(f"{what}. It may succeed when tried again.", **fields)
    if code in (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG):
        return ConfigError(f"{what}. Correct the path.", **fields)
    return StoreError(f"{what}. Look at the storage's own log.", **fields)


def is_missing(error: StoreGone) -> bool:
    """Whether a name is not there, as opposed to storage that does not answer (a stale handle, a lost mount).

    The first may mean that nothing was saved yet or that a step is damaged; the second must never.
    """
    return error.fields.get("errno") in (None, errno.ENOENT)


@contextlib.contextmanager
def translated(doing: str, where: str) -> Generator[None]:
    """Turns OSErrors of its block into errors of our tree."""
    try:
        yield
    except OSError as error:
        raise store_error(error, doing, where) from error
